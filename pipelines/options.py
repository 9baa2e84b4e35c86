"""What the commands share: options, the store they work on, progress."""

from __future__ import annotations

import json
import re
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from echolab.errors import EcholabError, WrongUsage

if TYPE_CHECKING:
    import polars as pl

    from echolab.lab import Lab
    from echolab.sql import Options

DONE, ERROR, USAGE, PARTLY, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes


def option(help: str, *names: str, metavar: str | None = None, envvar: str | None = None) -> Any:
    """An option whose default need not be shown."""
    return typer.Option(*names, help=help, metavar=metavar, envvar=envvar, show_default=False)


def argument(help: str, metavar: str | None = None) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=False)


StoreOption = Annotated[Path | None, option("The store's folder.", "--store", "-s", envvar="ECHOLAB_STORE")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, all else on stderr.")]
VerifierOption = Annotated[str | None, option("Take rewards and success from this verifier.")]
ScorerOption = Annotated[str | None, option("Show token numbers of this scorer.")]
SegmenterOption = Annotated[str | None, option("Show segments of this segmenter.")]
FormatOption = Annotated[str | None, option("table, csv, json, md or parquet.", "--format", "-f")]
OutOption = Annotated[Path | None, option("Write to this file.", "--out", "-o")]
RowsOption = Annotated[int, typer.Option("--rows", min=0, help="Rows of a table to show; 0 shows all.")]
AtOption = Annotated[datetime | None, option("The store as it stood at this time (UTC).")]
VersionOption = Annotated[int | None, option("The store as it stood at this version.", "--version")]


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def say(text: str) -> None:
    print(text, file=sys.stderr)


def print_json(document: Any) -> None:
    from pipelines.render import plain

    print(json.dumps(plain(document), ensure_ascii=False))


def store_path(path: Path | None) -> Path:
    if path is None:
        raise EcholabError("which store? Give --store DIR, or set ECHOLAB_STORE")
    return path


def open_lab(path: Path | None, version: int | None = None, at: datetime | None = None) -> Lab:
    import echolab

    if at is not None and version is not None:
        raise WrongUsage("give --version or --at, not both")
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return echolab.open(store_path(path), version=version, at=at)


def view_options(verifier: str | None, scorer: str | None, segmenter: str | None) -> Options:
    from echolab.sql import Options

    return Options(verifier=verifier, scorer=scorer, segmenter=segmenter)


def pairs(items: list[str], option: str) -> dict[str, str]:
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise typer.BadParameter(f"expected NAME=VALUE, got {item!r}", param_hint=option)
        found[key.strip()] = value
    return found


def number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"not a number: {text!r}", param_hint=option) from None


def read_json(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as e:
        raise EcholabError(f"{path}: not JSON ({e})") from None


def answer_format(format: str | None, json_: bool) -> str | None:
    if json_ and format not in (None, "json"):
        raise WrongUsage(f"give --json or --format {format}, not both")
    return "json" if json_ else format


MADE_BY = (  # what a view or table of these names shows is there after this command
    ("rollouts", r"\w+", "holds no rollouts: `echolab ingest PATH --run NAME` reads dumps into it"),
    ("verdicts", r"verdicts", "holds no verdicts: `echolab verify --verifier math` makes them"),
    ("scores", r"scores|tokens|segments|segmentations", "holds no scores: `echolab score --model MODEL` makes them"),
    ("clips", r"clips|clipsets", "holds no clips: `echolab mine --name NAME` makes a clip set"),
    ("profiles", r"profiles", "holds no profiles: `echolab profile --name NAME --where SQL` makes one"),
)


def say_why_empty(frame: pl.DataFrame, lab: Lab, query: str) -> None:
    """No rows, since what the query reads was never made: say how it is made."""
    if frame.height:
        return
    snapshot = lab.store.snapshot()  # the newest: an earlier state may well be empty
    for table, names, how in MADE_BY:
        if re.search(rf"\b(FROM|JOIN)\s+({names})\b", query, re.IGNORECASE) and not snapshot.files(table):
            say(f"the store {how}")
            return


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere, nothing for --json. Bytes count as `MB`, all else by ones."""

    def __init__(self, what: str, enabled: bool, unit: str = "MB"):
        self.what, self.enabled, self.unit, self.bar = what, enabled, unit, None
        self.said, self.began, self.last = 0.0, (0.0, 0), 0  # the last line; when this began, and how far; how far now

    def __enter__(self) -> Any:
        return self.show if self.enabled else None

    def show(self, file: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            now = time.monotonic()
            if not self.said or done < self.last:  # the first line comes only when it takes long
                self.said, self.began = self.said or now, (now, done)
            self.last = done
            if now - self.said > 5:
                self.said = now
                shift = 20 if self.unit == "MB" else 0
                left = self.left(now, done, total)
                say(f"{f'{self.what} {file}'.rstrip()}: {done >> shift:,} of {total >> shift:,} {self.unit}{left}")
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            counts = (DownloadColumn(), TransferSpeedColumn()) if self.unit == "MB" else (MofNCompleteColumn(),)
            columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
            # what the time that remains is told by: a long piece of work is a step of minutes
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=1800)
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=total)
        self.bar.update(self.task, completed=done, total=total, description=f"{self.what} {file[-30:]}")

    def left(self, now: float, done: int, total: int) -> str:
        then, before = self.began
        if done == before:
            return ""
        return f", {timedelta(seconds=round((total - done) * (now - then) / (done - before)))} left"

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
