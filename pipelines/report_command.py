"""`echolab report`: a store as one HTML file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from echolab.errors import WrongUsage
from pipelines.options import (
    JsonOption,
    ScorerOption,
    SegmenterOption,
    StoreOption,
    VerifierOption,
    count,
    open_lab,
    option,
    print_json,
)


def report(
    out: Annotated[Path, option("The page to write.", "--out", "-o", metavar="FILE.html")],
    run: Annotated[list[str] | None, option("Only this run; may be given again.", "--run")] = None,
    clipset: Annotated[str | None, option("Mark the EchoClips of this clip set (the newest).")] = None,
    static: Annotated[Path | None, option("Also write each chart as SVG and PNG into this folder.", metavar="DIR")] = None,
    store: StoreOption = None,
    verifier: VerifierOption = None,
    scorer: ScorerOption = None,
    segmenter: SegmenterOption = None,
    json_: JsonOption = False,
) -> None:
    """What a store says, as one HTML file. It has charts, tables and a reader of rollouts, and needs no network.

    echolab report --out report.html --run my-run --store store
    """
    if out.is_dir():
        raise WrongUsage(f"{out} is a folder: give --out FILE.html")
    with open_lab(store) as lab:
        done = lab.report(out, runs=run, clipset=clipset, static=static, verifier=verifier, scorer=scorer, segmenter=segmenter)
    if json_:
        print_json(asdict(done))
        return
    readable = f"{done.groups:,} of {count(done.n_groups, 'group')} to read"
    print(f"{done.path}: {done.size / 1e6:.1f} MB, {count(len(done.charts), 'chart')}, {readable}")
    for line in (*done.notes, *(f"no {what}" for what in done.missing)):
        print(line.replace("`", "'"))
    if static is not None:
        print(f"{count(len(done.static), 'image')} in {static}")
