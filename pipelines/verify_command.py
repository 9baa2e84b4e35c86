"""`echolab verify`: verdicts, and how they agree with the recorded rewards."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from echolab.errors import EcholabError
from pipelines.options import (
    PARTLY,
    JsonOption,
    Progress,
    RowsOption,
    StoreOption,
    count,
    open_lab,
    option,
    pairs,
    print_json,
)

if TYPE_CHECKING:
    import polars as pl

    from echolab.lab import Lab
    from echolab.verify import VerifyReport

# Of a disagreement: what fits on a screen. The query has all of it.
SIDE_BY_SIDE = ("run", "step", "prompt", "ground_truth", "extracted", "reward", "status", "success", "rollout_id")


def verify(
    verifier: Annotated[str, option("math, exact, numeric, choice, or python:module:function.")],
    store: StoreOption = None,
    run: Annotated[str | None, option("Only this run.")] = None,
    where: Annotated[str | None, option("Only rollouts for which this holds.", metavar="SQL")] = None,
    options: Annotated[
        list[str] | None, option("An option of the verifier.", "--option", "-o", metavar="NAME=VALUE")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 5.0,
    workers: Annotated[int | None, option("Processes at work (the cores of this machine).")] = None,
    memory: Annotated[float, typer.Option(help="GB of address space for each of them; 0 sets no limit.")] = 4.0,
    again: Annotated[str | None, option("Make these anew: timeout,error.", metavar="STATES")] = None,
    report: Annotated[bool, typer.Option("--report", help="Compare all it judged (of --run) with recorded rewards.")] = False,
    rows: RowsOption = 50,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Judge the answers of rollouts that have a ground truth. What has a verdict already is not judged again.

    echolab verify --verifier math --report --store store
    """
    lab = open_lab(store)
    with lab, Progress("verifying", enabled=not json_, unit="rollouts") as show:
        done = lab.verify(
            verifier, run=run, where=where, options=pairs(options or [], "--option"), timeout=timeout, workers=workers,
            memory_gb=memory, again=[s.strip() for s in again.split(",")] if again else (),
            progress=(lambda n, total: show("", n, total)) if show else None,
        )  # fmt: skip
    frames = _compare(lab, done, run) if report else None
    if json_:
        document = asdict(done) | {"made": done.made}
        print_json(document | {k: f.to_dicts() for k, f in (frames or {}).items()})
    else:
        _print(done)
        if frames:
            _print_report(frames, rows)
    if done.statuses["timeout"] or done.statuses["error"]:
        raise typer.Exit(PARTLY)


def _compare(lab: Lab, done: VerifyReport, run: str | None) -> dict[str, pl.DataFrame]:
    if "@" not in done.verifier:  # it has no version in this store
        raise EcholabError(f"nothing to compare: {done.verifier} has given no verdict in this store")
    return {name: lab.query(f"verifier_{name}", verifier=done.id, run=run) for name in ("agreement", "disagreements")}


def _print(done: VerifyReport) -> None:
    found = done.statuses
    parts = [f"{done.right:,} right", f"{found['ok'] - done.right:,} wrong", f"{found['no_answer']:,} without an answer"]
    parts += [count(found[s], s) for s in ("timeout", "error") if found[s]]
    print(f"{done.verifier}: {count(done.made, 'verdict')}" + (f": {', '.join(parts)}" if done.made else ""))
    for n, why in (
        (done.stood, "had a verdict already"),
        (done.elsewhere, "got theirs from another process meanwhile"),
        (done.without_gold, "without ground truth: no verdict"),
        (done.without_text, "without text: no verdict"),
    ):
        if n:
            print(f"{count(n, 'rollout')} {why}")
    if not (done.made or done.stood or done.elsewhere or done.without_gold or done.without_text):
        print("no rollout was there to judge")
    for reason, n in list(done.reasons.items())[:5]:
        print(f"{count(n, 'error')}: {reason}")
    if found["timeout"] or found["error"]:
        states = ",".join(s for s in ("timeout", "error") if found[s])
        print(f"--again {states} makes these anew, with another --timeout or --memory if you like")


def _print_report(frames: dict[str, pl.DataFrame], rows: int) -> None:
    from pipelines.render import table

    print("\nAgreement with the recorded rewards:\n")
    print(table(frames["agreement"].drop("verifier"), rows))
    print("Where they differ:\n")
    print(table(frames["disagreements"].select(SIDE_BY_SIDE), rows), end="")
