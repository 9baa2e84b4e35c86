"""`echolab score ...`: entropies of stored rollouts under a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from echolab.errors import EcholabError, WrongUsage
from pipelines.options import PARTLY, JsonOption, Progress, StoreOption, argument, count, option, print_json, store_path

if TYPE_CHECKING:
    from echolab.store import Store

score_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@score_app.callback()
def score(
    context: typer.Context,
    model: Annotated[str | None, option("Model folder, or its name on the Hub.", "--model", "-m")] = None,
    where: Annotated[str | None, option("Only these rollouts: a condition on the view `rollouts`.", metavar="SQL")] = None,
    tokenizer: Annotated[str | None, option("Tokenizer folder, where it is not the model's own.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: float32 on a CPU.")] = "auto",
    temperature: Annotated[float, typer.Option(help="Logits are divided by it.")] = 1.0,
    template: Annotated[str, typer.Option(help="raw, chat, or auto: as the rollout's prompt_format says.")] = "auto",
    segmenter: Annotated[list[str] | None, option("How completions are cut (newline); or several.", metavar="MODE")] = None,
    too_long: Annotated[str, typer.Option(help="skip or truncate what is longer than the model's context.")] = "skip",
    max_tokens: Annotated[int | None, option("A shorter context than the model's.")] = None,
    batch_tokens: Annotated[int | None, option("Tokens that go through the model at once.")] = None,
    backend: Annotated[str, typer.Option(help="serial, process or ray.")] = "serial",
    workers: Annotated[int | None, option("Workers of process and ray: one for each GPU, else each two cores.")] = None,
    ray_address: Annotated[str | None, option("A running Ray cluster; without it a local one.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the head on a CPU, for long jobs.")] = False,
    device: Annotated[str | None, option("cpu, cuda, cuda:1, ...")] = None,
    threads: Annotated[int | None, option("Threads of a worker.")] = None,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Token and segment entropies of stored rollouts under a model. What has them already is not scored again, and a job
    that was stopped goes on.

    echolab score --model Qwen/Qwen2.5-0.5B --where "run = 'my-run'" --store store
    """
    if (command := context.invoked_subcommand) is not None:
        given = [n for n in context.params if (source := context.get_parameter_source(n)) and source.name == "COMMANDLINE"]
        if given:  # they would act on nothing, and another store would be asked
            raise WrongUsage(f"options go behind the command: echolab score {command} ...")
        return
    if model is None:
        raise WrongUsage("which model? Give --model, a folder or a name on the Hub")
    options = {
        "model": model, "tokenizer": tokenizer, "dtype": dtype, "temperature": temperature, "template": template,
        "segmenters": [{"mode": mode} for mode in segmenter or ["newline"]], "too_long": too_long, "max_tokens": max_tokens,
        "batch_tokens": batch_tokens, "compiled": compiled, "device": device, "threads": threads,
    }  # fmt: skip
    _score(store_path(store), options, where, backend, workers, ray_address, json_)


def _score(
    root: Any, options: dict[str, Any], where: str | None, backend: str, workers: int | None, address: str | None, json_: bool
) -> None:
    from echolab.store import Store

    target = Store.open(root)
    try:
        from echolab.entropy.scorer import ScorerConfig
        from echolab.scoring import score as score_
    except ImportError:
        raise EcholabError("scoring needs torch and transformers: pip install 'echolab[torch]'") from None
    from echolab.coverage import label
    from pipelines.backends import choose_backend

    config = ScorerConfig.make(**options)
    elsewhere = choose_backend(backend, workers, address)
    with Progress("scoring", enabled=not json_, unit="tokens") as progress:
        show = progress and (lambda done, total, rate: progress(f"({rate:,.0f} tokens/s)" if rate else "", done, total))
        report, scorer = score_(target, config, where, show, elsewhere)
    if json_:
        print_json({"scorer": scorer, **report.__dict__})
    else:
        name = label(target.snapshot(), "scorer", scorer)  # what --scorer takes
        print(f"scorer {name}: {count(report.rows, 'rollout')} scored, {report.tokens:,} tokens in {report.seconds:,.1f} s")
        if not (report.rows or report.skipped or report.failed):
            print(_why_none(target, where))
        for reason, n in report.skipped.most_common():
            print(f"{count(n, 'rollout')} not scored: {reason}")
        for item, reason in report.failed.items():
            print(f"item {item} failed: {reason}")
        if report.failed:
            print("`echolab score resume` tries the failed items again")
    if report.failed:
        raise typer.Exit(PARTLY)


def _why_none(store: Store, where: str | None) -> str:
    """Why nothing was scored, where nothing went wrong."""
    from echolab.sql import Session

    with Session(store.snapshot()) as session:
        chosen = session.sql(f"SELECT count(*) FROM rollouts WHERE ({where or 'true'}\n)").item()  # it may end in a comment
    if chosen:
        return f"{count(chosen, 'rollout')} had scores already"
    return "no rollout fits --where" if where else "the store holds no rollouts"


@score_app.command("resume")
def score_resume(
    job: Annotated[str | None, argument("The job, where several are unfinished.")] = None,
    backend: Annotated[str, typer.Option(help="serial, process or ray.")] = "serial",
    workers: Annotated[int | None, option("Workers of process and ray.")] = None,
    ray_address: Annotated[str | None, option("A running Ray cluster; without it a local one.")] = None,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """Go on with a job that was stopped, with its own options.

    echolab score resume --store store
    """
    from echolab.scoring import unfinished
    from echolab.store import Store

    settings = unfinished(Store.open(store_path(store)), job)
    _score(store_path(store), settings["scorer"], settings["where"], backend, workers, ray_address, json_)


@score_app.command("status")
def score_status(store: StoreOption = None, json_: JsonOption = False) -> None:
    """How far the jobs are, as of their last commit.

    echolab score status --store store
    """
    from echolab.scoring import statuses
    from echolab.store import Store

    found = statuses(Store.open(store_path(store)))
    if json_:
        print_json([{"job": s.job, "model": s.scorer, **s.facts} for s in found])
        return
    if not found:
        print("no jobs")
    for s in found:
        facts = s.facts
        rate = f", {facts['tokens_per_second']:,.0f} tokens/s" if facts.get("tokens_per_second") else ""
        done = f"{facts.get('done', 0):,} of {facts.get('items', 0):,} items"
        print(f"{s.job}: {facts['state']}, {done}{rate} ({Path(s.scorer).name})")
        for reason, n in facts.get("skipped", {}).items():
            print(f"    {count(n, 'rollout')} not scored: {reason}")
        for item, reason in facts.get("failed", {}).items():
            print(f"    item {item} failed: {reason}")


@score_app.command("resegment")
def score_resegment(
    mode: Annotated[str, option("newline, paragraph, sentence, regex:PATTERN, exact_ids:1,2 or fixed:N.")],
    scorer: Annotated[str, option("The scorer: its id, name or name@version.")],
    min_segment_tokens: Annotated[int, typer.Option(help="Shorter segments join the next one.")] = 1,
    tokenizer: Annotated[str | None, option("The scorer's tokenizer, where the store lacks its vocabulary.")] = None,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:
    """Cut what is scored by another rule, without the model.

    echolab score resegment --scorer Qwen2.5-0.5B --mode paragraph --store store
    """
    from echolab.scoring import resegment
    from echolab.segment import Segmenter
    from echolab.store import Store

    segmenter = Segmenter.make(mode=mode, min_segment_tokens=min_segment_tokens)
    n = resegment(Store.open(store_path(store)), scorer, segmenter, tokenizer)
    said = f"{count(n, 'rollout')} cut by {segmenter.mode}"
    print_json({"segmenter": segmenter.mode, "rollouts": n}) if json_ else print(said)
