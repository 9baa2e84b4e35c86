"""`echolab curate`: which clips of a set are worth training on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.options import JsonOption, Progress, StoreOption, count, open_lab, option, pairs, print_json

if TYPE_CHECKING:
    from echolab.clips.curate import CurateReport

SHOWN = 10  # hits of a benchmark on the screen
CHARS = 60


def curate(
    clipset: Annotated[str, option("The clip set to curate: name or name@version.")],
    name: Annotated[str, option("Name of the new one.", "--name", "-n")],
    min_tokens: Annotated[int | None, option("Drop shorter clips.")] = None,
    max_tokens: Annotated[int | None, option("Drop longer clips.")] = None,
    max_repetition: Annotated[
        float | None, option("Drop loops: a larger share of 16-token n-grams repeats an earlier one, such as 0.5.")
    ] = None,
    drop_cut_off: Annotated[
        bool, typer.Option("--drop-cut-off", help="Drop whole completions that did not end by themselves.")
    ] = False,
    against: Annotated[
        list[str] | None, option("Drop what shares text with this benchmark.", metavar="FILE[:COLUMN]")
    ] = None,
    ngram: Annotated[int | None, option("Words in a row that a prompt and a problem share (8); of long texts, 13.")] = None,
    dedup: Annotated[bool, typer.Option("--dedup", help="Keep one of clips with equal prompt and tokens.")] = False,
    near_dedup: Annotated[
        float | None, option("Keep one of clips at least so similar, such as 0.8 (Jaccard, word 5-grams).", metavar="THRESHOLD")
    ] = None,
    difficulty_temperature: Annotated[
        float | None, option("Even out the success rates of problems: 1 keeps all, a large number evens fully.", metavar="T")
    ] = None,
    cap: Annotated[
        list[str] | None, option("Keep so many of each problem, source or step.", metavar="WHAT=N")
    ] = None,
    seed: Annotated[int | None, option("Of what --difficulty-temperature draws (0).")] = None,
    validation: Annotated[float | None, option("Share of problems in the validation split.")] = None,
    weights: Annotated[str | None, option("uniform, entropy or staleness; their mean is 1.")] = None,
    half_life: Annotated[float | None, option("Steps in which --weights staleness halves.")] = None,
    list_: Annotated[Path | None, option("Write a line of JSON for each dropped clip.", "--list", metavar="FILE")] = None,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Make a clip set from a clip set. Rules act in the order of these options, each says what it dropped.

    echolab curate --clipset hard --name curated --dedup --against aime24.jsonl:problem --cap problem=4 --store store
    """
    rules = {
        "min_tokens": min_tokens, "max_tokens": max_tokens, "max_repetition": max_repetition, "drop_cut_off": drop_cut_off,
        "against": tuple(against or ()), "ngram": ngram, "dedup": dedup, "near_dedup": near_dedup,
        "difficulty_temperature": difficulty_temperature, "cap": pairs(cap or [], "--cap"), "seed": seed,
        "validation": validation, "weights": weights, "half_life": half_life,
    }  # fmt: skip
    with open_lab(store) as lab, Progress("reading", enabled=not json_, unit="clips") as show:
        progress = (lambda n, total: show("", n, total)) if show else None
        report = lab.curate(clipset, name, listing=list_, progress=progress, **rules)
    if json_:
        facts = {"clipset": report.clipset, "parent": report.parent, "made": report.made}
        print_json(facts | {"in": report.n_in, "out": report.n_out} | report.facts)
    else:
        _print(report)


def _print(report: CurateReport) -> None:
    facts = report.facts
    was = "" if report.made else " (nothing new: as it stands)"
    print(f"{report.clipset}: {report.n_out:,} of {count(report.n_in, 'clip')} of {report.parent}{was}")
    for stage in facts["counts"]:
        for rule, n in stage["dropped"].items():
            print(f"    {rule}: {n:,} dropped, {stage['out']:,} left")
    for benchmark in facts["decontamination"]:
        _print_benchmark(benchmark)
    if facts["splits"]:
        print(", ".join(f"{n:,} {split}" for split, n in facts["splits"].items()))
    for note in facts["notes"]:
        print(note)


def _print_benchmark(found: dict[str, Any]) -> None:
    texts = f"{count(found['texts'], 'text')}, n-grams of {found['ngram']} and {found['long_ngram']} words"
    left_out = f", {count(found['left_out'], 'common one')} left out" if found["left_out"] else ""
    shares = f"{count(found['clips'], 'clip')} with text of {count(found['rows'], 'row')}"
    print(f"against {found['file']} ({texts}{left_out}): {shares}")
    for hit in found["hits"][:SHOWN]:
        shared = hit["shared"] if len(hit["shared"]) <= CHARS else hit["shared"][:CHARS] + "…"
        shared = shared if shared.isprintable() else ascii(shared)
        print(f"    row {hit['row']} {hit['column']}: {hit['in']} of {count(hit['clips'], 'clip')}, {hit['kind']}: {shared}")
    if found["n_hits"] > SHOWN:
        print(f"    and {found['n_hits'] - SHOWN:,} more: --list FILE writes all")
