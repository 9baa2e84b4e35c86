"""Dumps into the store: which files are new, read them, stage them, commit them with their ledger rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from echolab import ids
from echolab.compaction import auto
from echolab.errors import EcholabError, Unreadable
from echolab.known import shared, stored_before
from echolab.ledger import Ledger, Reading
from echolab.plan import (
    FileReport,
    IngestConfig,
    IngestReport,
    Plan,
    check_run,
    find_files,
    make_plan,
    nothing_known,
    read_again,
)
from echolab.readers import ONLY_SCORES, Bad, ReadOptions, Row, ScoresOf, Source, step_of_path
from echolab.readers.base import unpacked_name
from echolab.recorded import Matcher, Scorer, fresh, score_row
from echolab.recorded import to_table as score_table
from echolab.rows import Identify, Stored, bad_of, to_table, with_ids
from echolab.schema import TABLES
from echolab.store import Snapshot, Staged, Store, now

CHUNK_ROWS, CHUNK_BYTES = 2_048, 16 << 20  # rows become Arrow in chunks, so that Python holds few of them
STAGE_BYTES = 128 << 20  # a staged file; with its sorted copy and the next one being read, about half a gigabyte
COMMIT_FILES, COMMIT_SECONDS = 8, 20.0  # between commits, so that an interrupted reading of many files keeps what it has
_TICK = timedelta(microseconds=1)  # between ledger rows, whose order decides whose rollouts show
Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all

# What converting or identifying one row may raise: then this row is bad, and no other.
_NO_ROW = (ValueError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass
class Open:
    """One reading under way."""

    plan: Plan
    ingest_id: str
    source: Source
    identify: Identify
    report: FileReport
    group_sources: set[str] = field(default_factory=set)
    start_step: int | None = None
    end_step: int | None = None
    unknown_steps: int = 0
    rewarded: bool = False
    tail: dict[str, Any] | None = None
    bad: list[Bad] = field(default_factory=list)
    scored: list[str] = field(default_factory=list)  # rollouts that it brings token numbers of
    matcher: Matcher | None = None
    first_reason: str = ""

    def stored(self, fields: dict[str, Any], made: Mapping[str, str | None]) -> None:
        """One of its rows is on its way into the store."""
        self.report.rows += 1
        self.group_sources.add(str(made["group_source"]))
        self.unknown_steps += fields["step"] is None
        self.rewarded = self.rewarded or fields.get("reward") is not None
        if (step := fields["step"]) is not None:
            self.start_step = step if self.start_step is None else min(step, self.start_step)
            self.end_step = step if self.end_step is None else max(step, self.end_step)


def ingest(
    store: Store,
    paths: Sequence[str | Path],
    config: IngestConfig,
    progress: Progress | None = None,
    only: Callable[[Path], bool] | None = None,
) -> IngestReport:
    """Read dumps into the store. The same bytes again change nothing; a longer file is read on from where it ended.

    With `only`, those of the files that it says: then none of them is no error, and what is wrong with one is in the report."""
    report = IngestReport(config.run)
    snapshot = store.snapshot()
    check_run(snapshot, config)
    plans = _plans(snapshot.ledger, paths, config, report, only)
    if not plans and not only:
        raise EcholabError(nothing_known(paths, report))
    todo = [p for p in plans if p.status != "unchanged"]
    report.files += [_unchanged(p, snapshot.ledger, config) for p in plans if p.status == "unchanged"]
    with store.job("ingest") as folder:
        job = _Ingest(store, snapshot, config, folder, report)
        job.read(todo, progress)
        if config.attempt and (again := _again(store.snapshot().ledger, plans, config)):
            report.files = [f for f in report.files if f.status != "unchanged" or f.file not in {p.rel for p in again}]
            job.read(again, progress)
    if not only and all(f.status in ("failed", "skipped") for f in report.files):
        raise EcholabError(nothing_known(paths, report))
    if not todo:
        with store.lock():
            _register_run(store, store.snapshot(), config)
    for table in ("rollouts", "ingests") if todo else ():
        try:
            auto(store, table)
        except EcholabError as e:  # the rollouts are in the store all the same
            report.notes.append(f"small files were not merged: {e}")
    return report


def _unchanged(plan: Plan, ledger: Ledger, config: IngestConfig) -> FileReport:
    report = FileReport(plan.rel, "unchanged", plan.reader.NAME)
    if bad := ledger.n_quarantined(plan.beginning):
        report.notes.append("1 of its rows is in quarantine" if bad == 1 else f"{bad:,} of its rows are in quarantine")
    if config.attempt and plan.continues and plan.continues.attempt != config.attempt:
        report.notes.append(f"--attempt {config.attempt} is not used: it was read as attempt {plan.continues.attempt}")
    return report


def _plans(
    ledger: Ledger,
    paths: Sequence[str | Path],
    config: IngestConfig,
    report: IngestReport,
    only: Callable[[Path], bool] | None,
) -> list[Plan]:
    plans: list[Plan] = []
    names: set[str] = set()
    for path, rel, typed in find_files(paths, config.rename, report):
        if rel in names:
            raise EcholabError(
                f"two files would both be {rel!r} in run {config.run!r}: give the folder that holds both, or --as"
            )
        names.add(rel)
        if only and not only(path):
            continue
        try:
            plan = make_plan(ledger, path, rel, typed, config, report)
        except (EcholabError, OSError) as e:
            if not only and not isinstance(e, Unreadable | OSError):
                raise
            report.files.append(FileReport(rel, "failed", notes=[_reason(e, path)]))
            continue
        if plan:
            plans.append(plan)
    return plans


def _again(ledger: Ledger, plans: Sequence[Plan], config: IngestConfig) -> list[Plan]:
    """Files of this attempt that came out as before: of their older readings the attempt would hide rows."""
    attempt = config.attempt or 1
    first = ledger.first_step(config.run, attempt)
    found = (read_again(p, ledger.chain(config.run, p.rel), attempt, first) for p in plans)
    return [p for p in found if p]


class _Ingest:
    """Reads planned files one after the other; stages and commits as enough has come together."""

    def __init__(self, store: Store, snapshot: Snapshot, config: IngestConfig, folder: Path, report: IngestReport):
        self.store, self.snapshot, self.config, self.folder, self.report = store, snapshot, config, folder, report
        self.scorer = Scorer(config.run, config.tokenizer, config.temperature, config.dtype)
        self.eos = self.scorer.eos(snapshot)
        self.rows: list[tuple[Open, Row]] = []
        self.late: list[ScoresOf] = []  # of the file at hand
        self.scores: list[dict[str, Any]] = []
        self.failed: set[str] = set()  # rollouts whose scores are staged though their file could not be read
        self.row_bytes = 0
        self.tables: list[pa.Table] = []
        self.score_tables: list[pa.Table] = []
        self.held = 0  # bytes of both
        self.staged: list[Future[list[Staged]]] = []
        self.done: list[Open] = []
        self.batch: tuple[list[Open], list[Future[list[Staged]]]] = [], []  # read, and being written while we read on
        self.hints: dict[str, int] = {}  # group sizes by format, as this command's files have them
        self.committed_at = time.monotonic()

    def read(self, plans: Sequence[Plan], progress: Progress | None) -> None:
        total = sum(p.stat.st_size for p in plans)
        before = 0
        with ThreadPoolExecutor(1, "echolab-stage") as self.pool:
            ordered = sorted(plans, key=lambda p: p.reader.NAME in ONLY_SCORES)
            scores_begin = next((p for p in ordered if p.reader.NAME in ONLY_SCORES), None)
            for plan in ordered:
                if plan is scores_begin:  # the rollouts that they speak of are in the store by then
                    self._end_batch()
                    self._commit()
                self._file(plan, progress and (lambda done, b=before, r=plan.rel: progress(r, b + done, total)))
                before += plan.stat.st_size
                if self.held >= 0.75 * STAGE_BYTES:
                    self._stage()
                if len(self.staged) >= COMMIT_FILES or time.monotonic() - self.committed_at > COMMIT_SECONDS:
                    self._end_batch()
            self._end_batch()
            self._commit()

    def _file(self, plan: Plan, progress: Callable[[int], None] | None) -> None:
        """Read one file. If that fails its rows stay invisible, as they get no ledger row; the others are read on."""
        reading = self._open(plan)
        report, source = reading.report, reading.source
        try:
            self._read(reading, progress)
            if plan.changed(whole=not plan.reader.CONTINUES or bool(source.found.get("whole"))):
                raise Unreadable(f"{plan.rel} changed while it was read: run the command again")
        except (Unreadable, OSError) as e:
            self.rows = [r for r in self.rows if r[0] is not reading]
            self.late = []
            self.failed.update(reading.scored)
            report.status, report.rows, report.quarantined, report.notes = "failed", 0, 0, [_reason(e, plan.path)]
            return
        if plan.continues and reading.tail and not report.rows and source.consumed == source.start:
            report.status, report.quarantined, report.notes = "unchanged", 0, ["its last line is still unfinished"]
            return
        if size := source.found.get("group_size"):
            self.hints.setdefault(plan.reader.NAME, size)
        self.done.append(reading)

    def _read(self, reading: Open, progress: Callable[[int], None] | None) -> None:
        source = reading.source
        for n, item in enumerate(reading.plan.reader.read(source), 1):
            if isinstance(item, Row):
                self._row(reading, item)
            elif isinstance(item, ScoresOf):
                self._scores_of(reading, item)
            else:
                self._bad(reading, item)
            if progress and n % 512 == 0:
                progress(source.consumed)
        self._match(reading)
        self._chunk()
        self._close(reading)
        if progress:
            progress(source.size)

    def _open(self, plan: Plan) -> Open:
        config, last = self.config, plan.continues
        name = plan.reader.NAME
        hint = self.snapshot.ledger.options_of_run(config.run, name).get("group_size") or self.hints.get(name)
        found = dict(last.options["found"]) if last else {"group_size": hint} if hint else {}
        source = Source(
            plan.path,
            unpacked_name(plan.rel),
            plan.typed,
            ReadOptions(dict(config.map), config.group_size, dict(config.reward_weights), config.allow_pickle),
            start=last.bytes_read if last else 0,
            start_row=found.get("rows", 0),
            size=plan.stat.st_size,
            found=found,
            sha=plan.sha or hashlib.sha256(),
        )
        found.setdefault("path_step", step_of_path(plan.typed))
        if plan.companions:
            found["companions"] = plan.companions
        ingest_id = ids.random_id()
        stored = stored_before(self.snapshot, plan.beginning, config, self.folder) if last else Stored()
        identify = Identify(ingest_id, source.rel, config.overrides(), found["path_step"], stored)
        report = FileReport(plan.rel, plan.status, name, plan.known_by)
        self.report.files.append(report)
        return Open(plan, ingest_id, source, identify, report)

    def _row(self, reading: Open, row: Row) -> None:
        try:
            reading.identify.prepare(row)
        except _NO_ROW as e:
            self._bad(reading, bad_of(row, _reason(e)))
            return
        self.rows.append((reading, row))
        self.row_bytes += len(row.raw) or _bytes_of(row.fields)
        if len(self.rows) >= CHUNK_ROWS or self.row_bytes >= CHUNK_BYTES:
            self._chunk()

    def _scores_of(self, reading: Open, item: ScoresOf) -> None:
        item.step = self.config.step if self.config.step is not None else item.step
        if item.step is None:
            item.step = reading.identify.path_step
        self.late.append(item)
        self.row_bytes += len(item.raw) or 40 * len(item.token_ids)
        if len(self.late) >= CHUNK_ROWS or self.row_bytes >= CHUNK_BYTES:
            self._match(reading)

    def _match(self, reading: Open) -> None:
        """Numbers for rollouts that are stored already."""
        late, self.late = self.late, []
        if not late:
            return
        reading.matcher = reading.matcher or Matcher(self.snapshot, self.config.run, self.scorer.id, self.eos, self.folder)
        for item, row in reading.matcher.rows(late):
            if isinstance(row, dict):
                self._score(reading, row)
            else:
                self._bad(reading, Bad(item.row, row, item.raw))
        if reading.matcher.missing:
            reading.source.found["unmatched"] = reading.matcher.missing

    def _score(self, reading: Open, row: dict[str, Any]) -> None:
        reading.report.scores += 1
        reading.scored.append(row["rollout_id"])
        self.scores.append(row)

    def _bad(self, reading: Open, bad: Bad) -> None:
        reading.bad.append(bad)
        reading.report.quarantined += 1
        if not bad.tail:
            reading.first_reason = reading.first_reason or bad.reason
        else:
            reading.tail = {"bytes": len(bad.raw), "sha256": hashlib.sha256(bad.raw).hexdigest()}
        if len(reading.bad) >= 1_000 or len(bad.raw) >= CHUNK_BYTES // 16:
            self._quarantine(reading)

    def _quarantine(self, reading: Open) -> None:
        try:
            with (self.folder / f"{reading.ingest_id}.jsonl").open("ab") as f:
                f.writelines(_quarantined(reading.plan.rel, b) for b in reading.bad)
        except OSError as e:
            raise EcholabError(f"cannot write to the quarantine: {e.strerror or e}") from None
        reading.bad = []

    def _chunk(self) -> None:
        """Turn the rows at hand into Arrow, and stage what has come together. A row counts, in its group and else, only
        when all of it fits: then a file read in parts gives what it gives at once."""
        rows, self.rows, self.row_bytes = self.rows, [], 0
        unfit: dict[int, str] = {}
        table = to_table([row.fields for _, row in rows], unfit.__setitem__)
        made: list[dict[str, str | None] | None] = []
        for i, (reading, row) in enumerate(rows):
            if i not in unfit:
                try:
                    own = reading.identify(row)
                    reading.stored(row.fields, own)
                    made.append(own)
                    if row.scores:
                        scores = score_row(self.scorer.id, str(own["rollout_id"]), row.fields, row.scores, self.eos)
                        self._score(reading, scores)
                    continue
                except _NO_ROW as e:
                    made.append(None)
                    unfit[i] = _reason(e)
            self._bad(reading, bad_of(row, unfit[i]))
        self.tables.append(with_ids(table, made))
        self.held += self.tables[-1].nbytes
        if self.scores:
            self.score_tables.append(score_table(self.scores))
            self.held += self.score_tables[-1].nbytes
            self.scores = []
        if self.held >= STAGE_BYTES:
            self._stage()

    def _stage(self) -> None:
        """Sort and write in the background: reading goes on meanwhile, one file ahead at most."""
        if self.staged:
            self.staged[-1].result()
        tables, self.tables = self.tables, []
        scores, self.score_tables, self.held = self.score_tables, [], 0
        if tables:
            self.staged.append(self.pool.submit(lambda: self.store.stage("rollouts", _together(tables), self.folder)))
        if scores:
            self.staged.append(self.pool.submit(lambda: self.store.stage("scores", _together(scores), self.folder)))

    def _close(self, reading: Open) -> None:
        """The whole file is read; what it found is known."""
        if reading.bad:
            self._quarantine(reading)
        plan, report, config = reading.plan, reading.report, self.config
        if reading.unknown_steps and plan.chain and plan.status == "ingested":
            raise Unreadable(f"{plan.rel}: an attempt begins at a step, and the steps of its rows are unknown: give --replace")
        report.groups_by = "+".join(sorted(reading.group_sources)) or None
        report.notes += reading.source.notes
        if reading.identify.step_of_path_used:
            report.notes.append(f"step {reading.identify.path_step} is from the path, where the rows have none")
        if report.scores and (unsaid := [n for n in ("tokenizer", "temperature", "dtype") if getattr(config, n) is None]):
            report.notes.append(f"of its entropies it does not say the {', '.join(unsaid)}: --{', --'.join(unsaid)} do")
        if report.rows and not reading.rewarded and config.role == "policy":
            report.notes.append("no rollout has a reward: its groups are unrewarded")
        if reading.tail:
            report.notes.append("its last line is not finished: in quarantine until it is")
        if unreadable := report.quarantined - bool(reading.tail):
            rows = "1 row" if unreadable == 1 else f"{unreadable:,} rows"
            report.notes.append(f"{rows} could not be read, the first because: {reading.first_reason}")
        by_prompt = not reading.group_sources.isdisjoint(("prompt_text", "prompt_ids"))
        if config.group_size and by_prompt:
            report.notes.append(
                f"groups are each {config.group_size} rollouts of a prompt in file order (--group-size {config.group_size})"
            )
        elif config.group_size and "contiguous" not in reading.group_sources:
            report.notes.append("--group-size is not used: the dump says which rollouts belong together")
        if config.reward_weights and plan.reader.NAME not in ("trl", "wandb_table"):
            report.notes.append(f"--reward-weights are not used: a {plan.reader.NAME} dump has its total reward")

    def _end_batch(self) -> None:
        """Begin to write what has come together, and commit what was begun before."""
        self._stage()
        self._commit()
        self.batch, self.done, self.staged = (self.done, self.staged), [], []

    def _commit(self) -> None:
        """Under the lock: check the ledger again, commit the rollouts, then the ledger rows."""
        readings, written = self.batch
        staged = [s for future in written for s in future.result()]
        self.batch = [], []
        self.committed_at = time.monotonic()
        if not readings:
            return
        with self.store.lock():
            snapshot = self.store.snapshot()
            winners = [r for r in readings if not self._lost(r, snapshot.ledger)]
            if not winners:
                return
            _register_run(self.store, snapshot, self.config)
            rollouts = [s for s in staged if s.table == "rollouts"]
            known = shared(snapshot, rollouts, winners, self.folder)
            if rollouts:
                self.store.commit("rollouts", rollouts)
            lost = self.failed.union(*(r.scored for r in readings if r not in winners))
            scores = [s for s in staged if s.table == "scores"]
            if scores := fresh(self.store, snapshot, scores, lost, self.folder):
                self.scorer.register(self.store)
                self.store.commit("scores", scores)
            self.store.quarantine.mkdir(exist_ok=True)
            for reading in winners:
                bad = self.folder / f"{reading.ingest_id}.jsonl"
                if bad.exists():
                    bad.rename(self.store.quarantine / bad.name)
                    self.report.quarantine.append(str(self.store.quarantine / bad.name))
                reading.report.shared, reading.report.conflicts = known.get(reading.ingest_id, (0, 0))
            first = max([now(), *(r.created_at + _TICK for r in snapshot.ledger.readings[-1:] if r.created_at)])
            rows = [_ledger_row(r, self.config, snapshot.ledger, first + i * _TICK) for i, r in enumerate(winners)]
            self.store.add("ingests", pa.Table.from_pylist(rows, schema=TABLES["ingests"].arrow))
        self.snapshot = self.store.snapshot()

    def _lost(self, reading: Open, ledger: Ledger) -> bool:
        """Another process read the same source meanwhile: the same bytes and options are nothing to do."""
        plan, source, report = reading.plan, reading.source, reading.report
        chain = ledger.chain(self.config.run, plan.rel)
        if {r.ingest_id for r in chain} == {r.ingest_id for r in plan.chain}:
            return False
        read = (source.consumed, source.sha.hexdigest(), self.config.given(plan.reader.NAME))
        same = any((r.bytes_read, r.sha256, r.options["given"]) == read for r in chain)
        report.status, report.rows, report.quarantined = "unchanged" if same else "failed", 0, 0
        report.notes.append("another process ingested it meanwhile" + ("" if same else ", otherwise: run the command again"))
        return True


def _together(tables: list[pa.Table]) -> pa.Table:
    """One table, held by nobody else: it is let go as soon as its sorted copy stands."""
    whole = pa.concat_tables(tables)
    tables.clear()
    return whole


def _register_run(store: Store, snapshot: Snapshot, config: IngestConfig) -> None:
    """Keep the run's settings. Under the lock."""
    check_run(snapshot, config)
    entry = snapshot.registry("runs").get(config.run)
    settings = dict(entry["config"]) if entry else {"success_threshold": 1.0}
    for name in ("success_threshold", "failure_reward"):
        if getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    if not entry or settings != entry["config"]:
        store.register("runs", config.run, config.run, settings)


def _ledger_row(reading: Open, config: IngestConfig, ledger: Ledger, created_at: datetime) -> dict[str, Any]:
    source, plan = reading.source, reading.plan
    attempt = plan.attempt or ledger.attempt_at(config.run, reading.start_step)
    _note_attempt(reading, ledger, attempt)
    found = {**source.found, "rows": source.rows, "end_step": reading.end_step}
    if reading.report.scores:
        found["scores"] = reading.report.scores
    options: dict[str, Any] = {"given": config.given(plan.reader.NAME), "found": found, "path": str(plan.path.resolve())}
    if reading.tail:
        options["tail"] = reading.tail
    if plan.continues:
        options["continues"] = plan.continues.ingest_id
    return Reading(
        reading.ingest_id,
        config.run,
        plan.rel,
        attempt,
        reading.start_step,
        source.consumed,
        source.sha.hexdigest(),
        plan.reader.NAME,
        plan.reader.VERSION,
        options,
        reading.report.rows,
        reading.report.shared,
        reading.report.quarantined,
        reading.report.groups_by,
        source.found.get("completeness", "all"),
        plan.supersedes,
        created_at,
    ).row()


def _note_attempt(reading: Open, ledger: Ledger, attempt: int) -> None:
    """Say it where rows of this reading, or of an earlier attempt, do not show."""
    run, start, end = reading.identify.overrides.run, reading.start_step, reading.end_step
    others = {r.attempt: ledger.first_step(run, r.attempt) for r in ledger.live if r.run == run}
    later = [first for a, first in others.items() if a > attempt and first is not None]
    if later and end is not None and end >= min(later):
        reading.report.notes.append(
            f"belongs to attempt {attempt}, which a later one supersedes from step {min(later)} on: rows hidden"
        )
    if start is not None and any(a < attempt for a in others):
        reading.report.notes.append(f"belongs to attempt {attempt}, which hides earlier attempts from step {start} on")


def _bytes_of(fields: dict[str, Any]) -> int:
    """About what a row weighs in Python, where its bytes are not at hand."""
    return 1024 + sum(len(v) * (1 if isinstance(v, str) else 40) for v in fields.values() if isinstance(v, str | list))


def _quarantined(rel: str, bad: Bad) -> bytes:
    """One line of a quarantine file; bytes that are no text as hex."""
    entry: dict[str, Any] = {"file": rel, "row": bad.row, "reason": bad.reason}
    try:
        entry["raw"] = bad.raw.decode()
    except UnicodeDecodeError:
        entry["raw_hex"] = bad.raw.hex()
    return json.dumps(entry).encode() + b"\n"


def _reason(error: Exception, path: Path | None = None) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or path or 'file'}: {error.strerror or error}"
    if isinstance(error, UnicodeEncodeError):
        return "text that is not Unicode (a lone surrogate)"
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
