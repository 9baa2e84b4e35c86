"""`echolab export`: datasets that trainers read, and the check of one that was written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echolab.errors import WrongUsage
from pipelines.options import (
    ERROR,
    JsonOption,
    Progress,
    ScorerOption,
    SegmenterOption,
    StoreOption,
    VerifierOption,
    open_lab,
    option,
    print_json,
)

if TYPE_CHECKING:
    from echolab.export.run import ExportReport


def export(
    to: Annotated[str | None, option("The format.")] = None,
    out: Annotated[Path | None, option("The new folder.", "--out", "-o", metavar="DIR")] = None,
    clipset: Annotated[str | None, option("The clip set: NAME or NAME@VERSION.")] = None,
    what: Annotated[str | None, option("clips, rollouts or prompts; the usual for the format.")] = None,
    where: Annotated[str | None, option("Only rows for which this holds.", metavar="SQL")] = None,
    best: Annotated[int | None, option("Of each group, the N rollouts of highest reward.", metavar="N")] = None,
    form: Annotated[str | None, option("How prompts are written: text, chat or tokens.")] = None,
    tokenizer: Annotated[str | None, option("The ids must be of this tokenizer: a folder, or its fingerprint.")] = None,
    source: Annotated[str | None, option("Name of the dataset, for rows that have none.")] = None,
    ability: Annotated[str | None, option("verl's column of that name (math).")] = None,
    title: Annotated[str | None, option("Title of the card (hf).")] = None,
    license: Annotated[str | None, option("Licence of the card, such as apache-2.0; none without it.")] = None,
    language: Annotated[list[str] | None, option("Language of the card, such as en; or several.")] = None,
    verify: Annotated[Path | None, option("Check an export instead.", "--verify", metavar="DIR")] = None,
    store: StoreOption = None,
    verifier: VerifierOption = None,
    scorer: ScorerOption = None,
    segmenter: SegmenterOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Write clips, rollouts or prompts as a dataset. Its provenance.json is what --verify checks. Formats: hf, trl-sft,
    trl-grpo, verl, openrlhf, axolotl, llamafactory, jsonl, parquet, replay.

    echolab export --clipset hard --to hf --out hard-clips --store store
    """
    if verify is not None:
        given = {"--to": to, "--out": out, "--clipset": clipset, "--what": what, "--where": where, "--best": best}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise WrongUsage(f"--verify checks an export as it is: leave out {', '.join(wrong)}")
        return _verify(verify, store, json_)
    if to is None or out is None:
        raise WrongUsage("what is to be written, and where? Give --to FORMAT and --out DIR")
    options = {
        "clipset": clipset, "what": what, "where": where, "best": best, "form": form, "tokenizer": tokenizer, "source": source,
        "ability": ability, "title": title, "license": license, "language": tuple(language or ()), "verifier": verifier,
        "scorer": scorer, "segmenter": segmenter,
    }  # fmt: skip
    with open_lab(store) as lab, Progress("writing", enabled=not json_, unit="rows") as show:
        report = lab.export(out, to, progress=show, **options)
    if json_:
        print_json(asdict(report))
    else:
        _print(report)


def _print(report: ExportReport) -> None:
    for c in report.counts:
        dropped = "".join(f", {n:,} left out ({rule})" for rule, n in c["dropped"].items() if n)
        print(f"{c['stage']}: {c['in']:,} in{dropped}, {c['out']:,} out")
    for note in report.notes:
        print(note)
    splits = ", ".join(f"{split} {n:,}" for split, n in report.splits.items())
    form = f", form {report.form}," if report.form else ""
    print(f"{report.name}: {sum(report.splits.values()):,} {report.what} as {report.to}{form} in {report.out}: {splits}")


def _verify(folder: Path, store: Path | None, json_: bool) -> None:
    from echolab.export.verify import verify
    from echolab.store import Store

    problems = verify(folder, Store.open(store) if store is not None else None)
    if json_:
        print_json({"sound": not problems, "problems": problems})
    else:
        checked = "files, counts and clips" if store is not None else "files and counts (give --store to check the clips too)"
        print("\n".join(problems) or f"{folder} is sound: {checked}")
    if problems:
        raise typer.Exit(ERROR)
