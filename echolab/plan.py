"""Before anything is read: the options of an ingest, the files, and what the ledger says is to be done with each."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import field_validator, model_validator

from echolab.config import Config
from echolab.errors import EcholabError, Unreadable
from echolab.ledger import Ledger, Reading
from echolab.readers import COMPANIONS, READERS, Reader, aside, choose, look
from echolab.readers.base import is_compressed
from echolab.rows import Overrides
from echolab.store import MARKER, Snapshot, partition_folder

NOBODYS = "_."  # first letters of files in a folder that are nobody's data


class IngestConfig(Config):
    """What `echolab ingest` can be told. Every field but `replace` and `attempt` counts as an option of the reading."""

    run: str
    format: str = "auto"
    role: Literal["policy", "expert"] = "policy"
    step: int | None = None
    split: str | None = None
    model: str | None = None
    source: str | None = None
    map: dict[str, str] = {}
    group_size: int | None = None
    reward_weights: dict[str, float] = {}
    strip_template: str | None = None
    tokenizer: str | None = None
    temperature: float | None = None
    dtype: str | None = None
    problems: dict[str, str] = {}
    success_threshold: float | None = None
    failure_reward: float | None = None
    attempt: int | None = None
    replace: bool = False
    rename: str | None = None  # --as
    allow_pickle: bool = False

    @field_validator("run")
    @classmethod
    def _run(cls, run: str) -> str:
        if not run.strip() or not run.isprintable():
            raise ValueError("a run's name is one printable line")
        if len(partition_folder("run", run)) > 255:
            raise ValueError("a run's name is a folder's name too, and this one is too long")
        return run

    @field_validator("format")
    @classmethod
    def _format(cls, format: str) -> str:
        known = ["auto", *(r.NAME for r in READERS)]
        if format not in known:
            raise ValueError(f"unknown format {format!r}: use {', '.join(known)}")
        return format

    @field_validator("step")
    @classmethod
    def _step(cls, step: int | None) -> int | None:
        if step is not None and step < 0:
            raise ValueError("must not be negative")
        return step

    @field_validator("group_size", "attempt")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("success_threshold", "failure_reward", "temperature")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"must be a finite number, not {value}")
        return value

    @field_validator("reward_weights")
    @classmethod
    def _finite_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        if not all(map(math.isfinite, weights.values())):
            raise ValueError("weights must be finite numbers")
        return weights

    @field_validator("rename")
    @classmethod
    def _relative(cls, name: str | None) -> str | None:
        if name is None:
            return None
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is no name in the store: give a relative path without ..")
        return str(path)

    @model_validator(mode="after")
    def _map_is_for_plain(self) -> IngestConfig:
        if self.map and self.format not in ("auto", "plain"):
            raise ValueError(f"--map describes plain dumps: {self.format} knows its own fields")
        return self

    @field_validator("strip_template")
    @classmethod
    def _pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as e:
            raise ValueError(f"not a regular expression: {e}") from None
        return pattern

    def given(self, format: str) -> dict[str, Any]:
        """The options that count when the same file comes again, defaults left out."""
        counts = {
            "role", "step", "split", "model", "source", "map", "group_size", "reward_weights", "strip_template", "tokenizer",
            "temperature", "dtype",
        }  # fmt: skip
        values = self.model_dump(include=counts, exclude_defaults=True)
        if self.problems:  # a long list: its hash says whether it is the same
            values["problems"] = hashlib.sha256(json.dumps(self.problems, sort_keys=True).encode()).hexdigest()
        return {**values, "format": format}

    def overrides(self) -> Overrides:
        strip = re.compile(self.strip_template) if self.strip_template else None
        return Overrides(
            self.run,
            self.role,
            self.step,
            self.split,
            self.model,
            self.source,
            self.tokenizer,
            self.temperature,
            self.group_size,
            strip,
            self.problems,
        )


@dataclass
class FileReport:
    """What became of one file."""

    file: str
    status: str  # ingested, continued, replaced, unchanged, skipped (no reader knows it), failed
    format: str | None = None
    known_by: str | None = None  # how the format was known
    rows: int = 0
    scores: int = 0  # rollouts whose token entropies the dump holds
    quarantined: int = 0
    shared: int = 0
    conflicts: int = 0
    groups_by: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class IngestReport:
    run: str
    files: list[FileReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quarantine: list[str] = field(default_factory=list)
    asides: dict[str, int] = field(default_factory=dict)  # why files of a known dump are not read on their own: how many

    @property
    def rows(self) -> int:
        return sum(f.rows for f in self.files)

    @property
    def scores(self) -> int:
        return sum(f.scores for f in self.files)

    @property
    def quarantined(self) -> int:
        return sum(f.quarantined for f in self.files)


@dataclass
class Plan:
    """What to do with one file, decided from the ledger before it is read."""

    path: Path
    rel: str
    typed: str
    reader: Reader
    known_by: str
    chain: tuple[Reading, ...]  # live readings of this source when the plan was made
    status: str
    stat: os.stat_result
    continues: Reading | None = None
    supersedes: tuple[str, ...] = ()
    sha: Any = None  # of the bytes that are read already
    companions: str | None = None  # hash of the files that are read along
    attempt: int | None = None  # None: that of the run which the reading's steps belong to

    @property
    def beginning(self) -> tuple[Reading, ...]:
        """The readings that this one goes on from, newest first."""
        by_id = {r.ingest_id: r for r in self.chain}
        found, reading = [], self.continues
        while reading is not None:
            found.append(reading)
            reading = by_id.get(reading.options.get("continues", ""))
        return tuple(found)

    def changed(self, whole: bool) -> bool:
        """The file is no longer the one that was planned. To one that is read by lines, lines may be added meanwhile."""
        stat = self.path.stat()
        same = (stat.st_size, stat.st_mtime_ns) == (self.stat.st_size, self.stat.st_mtime_ns)
        grown = stat.st_size > self.stat.st_size and not whole
        return (stat.st_dev, stat.st_ino) != (self.stat.st_dev, self.stat.st_ino) or not (same or grown)


def find_files(paths: Sequence[str | Path], rename: str | None, report: IngestReport) -> Iterator[tuple[Path, str, str]]:
    """Every file with its name in the store and as it was typed, folders in natural order."""
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            stores = {marker.parent for marker in path.rglob(MARKER)}  # the dumps may lie beside their store
            for file in sorted(path.rglob("*"), key=_natural):
                below = file.relative_to(path)
                rel = Path(rename or "", below).as_posix()
                if any(part[0] in NOBODYS for part in below.parts) or not stores.isdisjoint(file.parents):
                    continue
                if not _is_text(rel):
                    report.files.append(FileReport(ascii(rel), "failed", notes=["its name is not Unicode: rename it"]))
                elif file.is_file() and (reason := aside(file)):
                    report.asides[reason] = report.asides.get(reason, 0) + 1
                elif file.is_file():
                    yield file, rel, str(Path(given, below))
                elif file.is_symlink():
                    report.files.append(
                        FileReport(rel, "skipped", notes=["a link to a folder or to nothing: links are not followed"])
                    )
                elif not file.is_dir():
                    report.files.append(FileReport(rel, "skipped", notes=["no file, but a pipe, a socket or a device"]))
        elif path.is_file():
            yield path, rename or path.name, str(given)
        else:
            raise EcholabError(f"{given}: {'neither a file nor a folder' if path.exists() else 'no such file or folder'}")


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(p)) if p.isdecimal() else (1, p) for p in re.split(r"(\d+)", str(path)) if p]


def make_plan(ledger: Ledger, path: Path, rel: str, typed: str, config: IngestConfig, report: IngestReport) -> Plan | None:
    """Compare a file with the ledger: new, to be continued, to be replaced, unchanged, or nobody's (None, and reported)."""
    chosen = choose(path, config.format, mapped=bool(config.map))
    if chosen is None:
        report.files.append(FileReport(rel, "skipped", notes=[_why_unknown(path)]))
        return None
    reader, known_by = chosen
    chain = ledger.chain(config.run, rel)
    stat = path.stat()
    beside = _hash_of(COMPANIONS[reader.NAME](path)) if reader.NAME in COMPANIONS else None
    plan = Plan(path, rel, typed, reader, known_by, chain, "ingested", stat, companions=beside, attempt=config.attempt)
    if not chain:
        return plan
    same_options = all(r.options["given"] == config.given(reader.NAME) for r in chain)
    last, sha = _known_beginning(path, chain)
    if last and same_options:
        plan = replace(plan, continues=last, sha=sha, attempt=config.attempt or last.attempt)
        outdated = config.replace and last.reader_version < reader.VERSION
        found = last.options["found"]
        if found.get("unmatched") or (beside and beside != found.get("companions")):  # only more can come of it
            return replace(plan, continues=None, sha=None, status="replaced", supersedes=tuple(r.ingest_id for r in chain))
        if not outdated and (stat.st_size == last.bytes_read or _same_tail(path, last)):
            return replace(plan, status="unchanged")
        if stat.st_size > last.bytes_read and reader.CONTINUES and not found.get("whole"):
            return replace(plan, status="continued")
        plan = replace(plan, continues=None, sha=None)
    if config.replace or not any(r.n_rows for r in chain):  # nothing is lost where nothing could be read
        return replace(plan, status="replaced", supersedes=tuple(r.ingest_id for r in chain))
    if config.attempt and config.attempt > max(r.attempt for r in chain) and same_options:
        return plan
    raise EcholabError(_changed(path, rel, chain, same_options, bool(last), config, reader.NAME))


def _hash_of(files: Sequence[Path]) -> str | None:
    """Of the names and bytes of files that are read along with another."""
    if not files:
        return None
    sha = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as f:
            sha.update(f"{file.name}\n{hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return sha.hexdigest()


def _why_unknown(path: Path) -> str:
    if path.stat().st_size == 0:
        return "the file is empty"
    if path.suffix in (".zip", ".bz2", ".xz", ".7z", ".lz4", ".tar", ".tgz"):
        return "of compressed files only gzip and zstd are read: unpack it first"
    head = look(path)
    if head.broken and not head.keys:
        raise Unreadable(f"{path}: {head.broken}")
    if not head.start.strip():
        return "the file is empty"
    if head.start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "its text is UTF-16 or UTF-32: convert it to UTF-8"
    if is_compressed(path):
        return "no reader knows what is in this compressed file: unpack it first"
    fields = sorted(head.keys)
    return f"no reader knows this file{', whose rows have ' + ', '.join(fields[:20]) if fields else ''}"


def read_again(plan: Plan, chain: tuple[Reading, ...], attempt: int, first_step: int | None) -> Plan | None:
    """The same file as part of this attempt, if the attempt would hide what is stored of it: a file of the attempt that
    begins with the same bytes as before. `chain` are the live readings of the source by now."""
    old = {r.ingest_id: r.options["found"].get("end_step") for r in plan.beginning if r.attempt < attempt}
    if first_step is None or not any(step is not None and step >= first_step for step in old.values()):
        return None
    while more := [r.ingest_id for r in chain if r.options.get("continues") in old and r.ingest_id not in old]:
        old |= dict.fromkeys(more)
    return replace(plan, status="replaced", chain=chain, continues=None, sha=None, supersedes=tuple(old), attempt=attempt)


def _known_beginning(path: Path, chain: Sequence[Reading]) -> tuple[Reading | None, Any]:
    """The longest finished sequence of readings whose bytes the file begins with: its last reading, and the hash of
    these bytes, ready to go on. (Attempts may have read different contents under one name.)"""
    size = path.stat().st_size
    sha, done = hashlib.sha256(), 0
    best: tuple[Reading | None, Any] = (None, None)
    read_on = {r.options.get("continues") for r in chain}
    with path.open("rb") as f:
        for reading in sorted((r for r in chain if r.ingest_id not in read_on), key=lambda r: r.bytes_read):
            if reading.bytes_read > size:
                break
            while done < reading.bytes_read and (chunk := f.read(min(1 << 20, reading.bytes_read - done))):
                sha.update(chunk)
                done += len(chunk)
            if sha.hexdigest() == reading.sha256:
                best = (reading, sha.copy())
    return best


def _same_tail(path: Path, last: Reading) -> bool:
    """The file still ends in the unfinished line that was quarantined."""
    tail = last.options.get("tail")
    if not tail or path.stat().st_size != last.bytes_read + tail["bytes"]:
        return False
    with path.open("rb") as f:
        f.seek(last.bytes_read)
        return hashlib.sha256(f.read()).hexdigest() == tail["sha256"]


def _changed(
    path: Path, rel: str, chain: Sequence[Reading], same_options: bool, same_bytes: bool, config: IngestConfig, format: str
) -> str:
    last = chain[-1]
    if same_bytes and not same_options:
        old, new = last.options["given"], config.given(format)
        names = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        what = ", ".join(f"{n} was {old.get(n, 'not given')}, is {new.get(n, 'not given')}" for n in names)
        return f"{rel} is in run {config.run!r} with other options ({what}): give --replace to read it anew"
    if path.resolve() != Path(last.options["path"]):
        return (
            f"{rel} is in run {config.run!r} with other content, from {Path(last.options['path']).parent}:"
            " give --replace to put this one in its place, or --as NAME to keep both"
        )
    return f"{rel} changed since it was read into run {config.run!r}: give --replace to read it anew"


def nothing_known(paths: Sequence[str | Path], report: IngestReport) -> str:
    what = ", ".join(str(p) for p in paths)
    if any((Path(p) / MARKER).exists() for p in paths):
        return f"{what}: this is a store, not dumps; ask it with --store {what}"
    if not report.files:
        return f"{what}: no files"
    first = min(report.files, key=lambda f: f.status != "failed")  # what failed says more than what nobody knows
    note = first.notes[0]
    if len(report.files) > 1 and len({n for f in report.files for n in f.notes}) > 1:
        named = "" if first.file in note else f"{first.file}: "
        return f"{what}: none of the {len(report.files)} files can be read; the first: {named}{note}"
    if first.status == "failed":
        return note
    if not note.startswith("no reader"):
        return f"{what}: {note}"
    return f"{what}: {note}; name its fields with --map, e.g. --map completion=response --map prompt=question"


def check_run(snapshot: Snapshot, config: IngestConfig) -> None:
    """A run keeps its success threshold: changing it would change answers that were given."""
    entry = snapshot.registry("runs").get(config.run)
    for name in ("success_threshold", "failure_reward"):
        given, now = getattr(config, name), entry["config"].get(name) if entry else None
        if None not in (given, now) and given != now and not config.replace:
            option = "--" + name.replace("_", "-")
            raise EcholabError(f"run {config.run!r} has {option} {now}, not {given}: --replace changes it for all its rollouts")
