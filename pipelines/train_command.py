"""`echolab train` and `echolab evaluate`: the trainer from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from echolab.errors import EcholabError, WrongUsage
from pipelines.options import JsonOption, argument, count, option, print_json, say

if TYPE_CHECKING:
    from trainer.config import TrainConfig

Changes = Annotated[list[str] | None, option("Change a key: optimizer.lr=1e-5. May be repeated.", "--set", metavar="KEY=VALUE")]


def _torch() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise EcholabError("training needs torch and transformers: pip install 'echolab[torch]'") from None


def train(
    config: Annotated[str, argument("A TOML file, or the name of a preset.", "CONFIG")],
    set_: Changes = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the resolved configuration, and stop.")] = False,
    json_: JsonOption = False,
) -> None:
    """Train a policy as a configuration says. Every step's rollouts go to the store; a run that was stopped goes on.

    echolab train run.toml --set optimizer.lr=1e-6
    """
    _torch()
    from trainer.config import load, show

    resolved = load(config, set_ or ())
    if show_config:
        print_json(resolved.model_dump(mode="json")) if json_ else print(show(resolved), end="")
        return
    from trainer.loop import train as train_

    facts = train_(resolved)
    if json_:
        print_json(facts)
    else:
        print(f"run {facts['run']}: {facts['steps']} steps done; {facts['checkpoint']}")
        print(f"ask on: echolab query degenerate_by_step --param run={facts['run']} --store {resolved.store}")


def evaluate(
    config: Annotated[str, argument("The configuration of the run: its task, verifier and evaluation.", "CONFIG")],
    model: Annotated[str, option("The model: a checkpoint, a folder, or a name on the Hub.", "--model", "-m")],
    against: Annotated[str | None, option("Another model, on the same questions.")] = None,
    n: Annotated[int | None, option("Completions of a question (those of the configuration).", "--n", "-n")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    profile: Annotated[str | None, option("Warn if a question is a problem of this profile of the run's store.")] = None,
    set_: Changes = None,
    json_: JsonOption = False,
) -> None:
    """mean@n, pass@k and maj@n of a model, or of two, compared. Intervals are over questions; two are compared in pairs.

    echolab evaluate run.toml --model runs/a/checkpoints/step_000100 --against runs/b/checkpoints/step_000100 -n 32
    """
    _torch()
    from trainer.config import load
    from trainer.evaluate import compare

    resolved = load(config, set_ or ())
    if n is not None and n < 1:
        raise WrongUsage("-n is at least 1")
    if profile is not None:
        _warn(resolved, profile)
    found = compare(resolved, [against, model] if against else [model], n or resolved.evaluation.n, seed)
    if json_:
        print_json(found)
        return
    print(f"{found['questions']} questions, {found['n']} completions each, temperature {found['temperature']:g}")
    for name, values in found["models"].items():
        _print(name, values, found["n"])
    if d := found.get("difference"):
        print(f"\n--model minus --against: {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}], p {d['p']:.3f}")


def _warn(config: TrainConfig, profile: str) -> None:
    import echolab
    from echolab.profiles import overlap
    from trainer.tasks import questions

    with echolab.open(config.store) as lab:
        o = overlap(lab.snapshot, profile, (str(q.get("prompt") or q.get("messages")) for q in questions(config)))
    if o.shared:
        say(f"warning: {len(o.shared):,} of {count(o.problems, 'problem')} of {o.profile} are among the {o.texts:,} questions")


def _print(name: str, values: dict[str, Any], n: int) -> None:
    print(f"\n{name}")
    print(f"  mean@{n}  {values['mean']:.4f} [{values['mean/low']:.4f}, {values['mean/high']:.4f}] over questions")
    for key, value in values.items():
        if "@" in key:
            print(f"  {key:<8} {value:.4f}")
    print(f"  ended by themselves {values['ended']:.1%}, without a verdict {values['unrewarded']:.1%}")
    print(f"  mean length {values['length']:.1f} tokens")
