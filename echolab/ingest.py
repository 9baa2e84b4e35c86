"""Dumps into the store: which files are new, read them, stage them, commit them with their ledger rows."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from echolab import ids
from echolab.compaction import auto
from echolab.errors import EcholabError, Unreadable
from echolab.ledger import Ledger, Reading
from echolab.plan import FileReport, IngestConfig, IngestReport, Plan, check_run, find_files, make_plan, nothing_known
from echolab.readers import Bad, ReadOptions, Row, Source, step_of_path
from echolab.rows import Identify, Stored, bad_of, to_table
from echolab.scan import parquet, scratch
from echolab.schema import TABLES
from echolab.store import DataFile, Snapshot, Staged, Store, now

CHUNK_ROWS, CHUNK_BYTES = 2_048, 16 << 20  # rows become Arrow in chunks, so that Python holds few of them
STAGE_BYTES = 128 << 20  # a staged file; with its sorted copy and the next one being read, about half a gigabyte
COMMIT_SECONDS = 30.0  # between commits, so that an interrupted reading of many files keeps what it has
_TICK = timedelta(microseconds=1)  # between ledger rows, whose order decides whose rollouts show
Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all


@dataclass
class Open:
    """One reading under way."""

    plan: Plan
    ingest_id: str
    source: Source
    identify: Identify
    report: FileReport
    attempt: int
    group_sources: set[str] = field(default_factory=set)
    start_step: int | None = None
    end_step: int | None = None
    tail: dict[str, Any] | None = None
    bad: list[Bad] = field(default_factory=list)

    def stored(self, fields: dict[str, Any]) -> None:
        """One of its rows is on its way into the store."""
        self.report.rows += 1
        self.group_sources.add(fields["group_source"])
        if (step := fields["step"]) is not None:
            self.start_step = step if self.start_step is None else min(step, self.start_step)
            self.end_step = step if self.end_step is None else max(step, self.end_step)


def ingest(store: Store, paths: Sequence[str | Path], config: IngestConfig, progress: Progress | None = None) -> IngestReport:
    """Read dumps into the store. The same bytes again change nothing; a longer file is read on from where it ended."""
    report = IngestReport(config.run)
    snapshot = store.snapshot()
    check_run(snapshot, config)
    ledger = snapshot.ledger
    plans: list[Plan] = []
    names: set[str] = set()
    for path, rel, typed in find_files(paths, config.rename):
        if rel in names:
            raise EcholabError(
                f"two files would both be {rel!r} in run {config.run!r}: give the folder that holds both, or --as"
            )
        names.add(rel)
        try:
            plan = make_plan(ledger, path, rel, typed, config, report)
        except Unreadable as e:
            report.files.append(FileReport(rel, "failed", notes=[str(e)]))
            continue
        if plan:
            plans.append(plan)
    if not plans and not any(f.status == "unchanged" for f in report.files):
        raise EcholabError(nothing_known(paths, report))
    _register_run(store, config)
    with store.job("ingest") as folder:
        _Ingest(store, snapshot, config, folder, report).read(plans, progress)
    if plans:
        for table in ("rollouts", "ingests"):
            auto(store, table)
    return report


class _Ingest:
    """Reads planned files one after the other; stages and commits as enough has come together."""

    def __init__(self, store: Store, snapshot: Snapshot, config: IngestConfig, folder: Path, report: IngestReport):
        self.store, self.snapshot, self.config, self.folder, self.report = store, snapshot, config, folder, report
        self.rows: list[tuple[Open, Row, dict[str, Any]]] = []
        self.row_bytes = 0
        self.tables: list[pa.Table] = []
        self.staged: list[Future[list[Staged]]] = []
        self.done: list[Open] = []
        self.batch: tuple[list[Open], list[Future[list[Staged]]]] = [], []  # read, and being written while we read on
        self.committed_at = time.monotonic()

    def read(self, plans: Sequence[Plan], progress: Progress | None) -> None:
        total = sum(p.path.stat().st_size for p in plans)
        before = 0
        with ThreadPoolExecutor(1, "echolab-stage") as self.pool:
            for plan in plans:
                reading = self._open(plan)
                stat = plan.path.stat()
                try:
                    self._read(reading, progress and (lambda done, b=before, r=plan.rel: progress(r, b + done, total)))
                    whole = not plan.reader.CONTINUES or reading.source.found.get("whole")
                    if whole and _stamp(plan.path.stat()) != _stamp(stat):
                        raise Unreadable(f"{plan.rel} changed while it was read: run the command again")
                except Unreadable as e:  # its rows stay invisible: they get no ledger row
                    report = reading.report
                    report.status, report.rows, report.quarantined, report.notes = "failed", 0, 0, [str(e)]
                else:
                    self.done.append(reading)
                before += stat.st_size
                held = sum(t.nbytes for t in self.tables)
                if self.staged or held >= 0.75 * STAGE_BYTES or time.monotonic() - self.committed_at > COMMIT_SECONDS:
                    self._end_batch()
            self._end_batch()
            self._commit()

    def _read(self, reading: Open, progress: Callable[[int], None] | None) -> None:
        source = reading.source
        for n, item in enumerate(reading.plan.reader.read(source), 1):
            if isinstance(item, Row):
                self._row(reading, item)
            else:
                self._bad(reading, item)
            if progress and n % 512 == 0:
                progress(source.consumed)
        self._chunk()
        self._close(reading)
        if progress:
            progress(source.size)

    def _open(self, plan: Plan) -> Open:
        config, ledger, last = self.config, self.snapshot.ledger, plan.continues
        found = dict(last.options["found"]) if last else {}
        source = Source(
            plan.path,
            plan.rel,
            plan.typed,
            ReadOptions(dict(config.map), config.group_size, dict(config.reward_weights)),
            start=last.bytes_read if last else 0,
            start_row=found.get("rows", 0),
            found=found or _inherited(ledger, config.run, plan.reader.NAME),
            sha=plan.sha or hashlib.sha256(),
        )
        ingest_id = ids.random_id()
        stored = _stored(self.snapshot, plan.chain, config, self.folder) if last else Stored()
        identify = Identify(ingest_id, plan.rel, config.overrides(), step_of_path(plan.typed), stored)
        report = FileReport(plan.rel, plan.status, plan.reader.NAME, plan.known_by)
        self.report.files.append(report)
        return Open(plan, ingest_id, source, identify, report, config.attempt or ledger.newest_attempt(config.run) or 1)

    def _row(self, reading: Open, row: Row) -> None:
        try:
            fields = reading.identify(row)
        except (ValueError, TypeError, AttributeError, OverflowError) as e:
            self._bad(reading, bad_of(row, _reason(e)))
            return
        self.rows.append((reading, row, fields))
        self.row_bytes += len(row.raw) or 4 * len(fields.get("completion") or ()) + 1024
        if len(self.rows) >= CHUNK_ROWS or self.row_bytes >= CHUNK_BYTES:
            self._chunk()

    def _bad(self, reading: Open, bad: Bad) -> None:
        reading.bad.append(bad)
        reading.report.quarantined += 1
        if bad.tail:
            reading.tail = {"bytes": len(bad.raw), "sha256": hashlib.sha256(bad.raw).hexdigest()}
        if len(reading.bad) >= 1_000:
            self._quarantine(reading)

    def _quarantine(self, reading: Open) -> None:
        with (self.folder / f"{reading.ingest_id}.jsonl").open("ab") as f:
            f.writelines(_quarantined(reading.plan.rel, b) for b in reading.bad)
        reading.bad = []

    def _chunk(self) -> None:
        """Turn the rows at hand into Arrow, and stage what has come together."""
        rows, self.rows, self.row_bytes = self.rows, [], 0
        if not rows:
            return
        rejected: set[int] = set()

        def reject(i: int, reason: str) -> None:
            rejected.add(i)
            self._bad(rows[i][0], bad_of(rows[i][1], reason))

        self.tables.append(to_table([fields for _, _, fields in rows], reject))
        for i, (reading, _, fields) in enumerate(rows):
            if i not in rejected:
                reading.stored(fields)
        if sum(t.nbytes for t in self.tables) >= STAGE_BYTES:
            self._stage()

    def _stage(self) -> None:
        """Sort and write in the background: reading goes on meanwhile, one file ahead at most."""
        if self.staged:
            self.staged[-1].result()
        tables, self.tables = self.tables, []
        if tables:
            self.staged.append(self.pool.submit(lambda: self.store.stage("rollouts", pa.concat_tables(tables), self.folder)))

    def _close(self, reading: Open) -> None:
        """The whole file is read; what it found is known."""
        if reading.bad:
            self._quarantine(reading)
        source, identify, report = reading.source, reading.identify, reading.report
        report.groups_by = "+".join(sorted(reading.group_sources)) or None
        report.notes += source.notes
        if identify.step_of_path_used:
            report.notes.append(f"step {identify.path_step} is from the path, where the rows have none")
        if self.config.group_size and "prompt_text" in reading.group_sources:
            n = self.config.group_size
            report.notes.append(f"groups are each {n} rollouts of a prompt in the order of the file (--group-size {n})")

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
            shared = _shared(snapshot, staged, winners, self.folder)
            if staged:
                self.store.commit("rollouts", staged)
            self.store.quarantine.mkdir(exist_ok=True)
            for reading in winners:
                bad = self.folder / f"{reading.ingest_id}.jsonl"
                if bad.exists():
                    bad.rename(self.store.quarantine / bad.name)
                    self.report.quarantine.append(str(self.store.quarantine / bad.name))
                reading.report.shared, reading.report.conflicts = shared.get(reading.ingest_id, (0, 0))
            first = max([now(), *(r.created_at + _TICK for r in snapshot.ledger.readings[-1:] if r.created_at)])
            rows = [_ledger_row(r, self.config, first + i * _TICK) for i, r in enumerate(winners)]
            _note_attempts(snapshot.ledger, winners)
            self.store.add("ingests", pa.Table.from_pylist(rows, schema=TABLES["ingests"].arrow))
        self.snapshot = self.store.snapshot()

    def _lost(self, reading: Open, ledger: Ledger) -> bool:
        """Another process read the same source meanwhile: the same bytes are nothing to do, others are an error."""
        plan = reading.plan
        chain = ledger.chain(self.config.run, plan.rel)
        if {r.ingest_id for r in chain} == {r.ingest_id for r in plan.chain}:
            return False
        source = reading.source
        if any(r.bytes_read == source.consumed and r.sha256 == source.sha.hexdigest() for r in chain):
            reading.report.status, reading.report.rows, reading.report.quarantined = "unchanged", 0, 0
            reading.report.notes.append("another process ingested it meanwhile")
            return True
        raise EcholabError(f"{plan.rel}: another process ingested it meanwhile, with other content: run the command again")


def _inherited(ledger: Ledger, run: str, format: str) -> dict[str, Any]:
    """The group size that the run's first dump of this format had: a hint where a file leaves it open."""
    size = ledger.options_of_run(run, format).get("group_size")
    return {"group_size": size} if size else {}


def _stored(snapshot: Snapshot, chain: Sequence[Reading], config: IngestConfig, folder: Path) -> Stored:
    """What the source stored so far, so that counting of equal content and of group members goes on."""
    readings = [r.ingest_id for r in chain]
    files = [f for f in snapshot.files("rollouts") if f.partition["run"] == config.run]
    if not files:
        return Stored()
    with scratch(folder) as db:
        rows = f"(SELECT * FROM {parquet([f.path for f in files])} WHERE list_contains($readings, ingest_id))"
        found = db.execute(f"SELECT rollout_id FROM {rows} WHERE sample IS NULL", {"readings": readings})
        known: set[bytes] = set()
        while some := found.fetchmany(100_000):
            known.update(bytes.fromhex(r) for (r,) in some)
        members = f"SELECT split, step, prompt_id, ground_truth, count(*) FROM {rows} GROUP BY ALL"
        counts = db.execute(members, {"readings": readings}).fetchall() if config.group_size else []
    return Stored(frozenset(known), {(s, t, p, g): n for s, t, p, g, n in counts})


def _shared(snapshot: Snapshot, staged: Sequence[Staged], readings: Sequence[Open], folder: Path) -> dict[str, tuple[int, int]]:
    """For each new reading: its rollouts that an older live reading holds too, and those of them with another reward.

    Equal ids have equal run, split and step, so that only files whose steps overlap are looked at."""
    steps = [s for s in staged if s.rows]
    if not steps:
        return {}
    low, high = (_extreme(steps, end) for end in ("minValues", "maxValues"))
    unknown = any(s.stats["nullCount"].get("step") for s in steps)
    old = [
        f for f in snapshot.files("rollouts") if f.partition["run"] == steps[0].partition and _overlaps(f, low, high, unknown)
    ]
    if not old and (len(readings) == 1 or not unknown and _disjoint(readings)):
        return {}
    winners = [r.ingest_id for r in readings]
    order = [*(r.ingest_id for r in snapshot.ledger.live), *winners]
    files = parquet([*(f.path for f in old), *(s.path for s in steps)])
    with scratch(folder) as db:
        db.execute("CREATE TABLE ledger AS SELECT unnest($ids) AS ingest_id, unnest(range(len($ids))) AS age", {"ids": order})
        db.execute(
            f"""CREATE VIEW held AS SELECT rollout_id, reward, age, ledger.ingest_id FROM ledger JOIN
            {files} USING (ingest_id)"""
        )
        rows = db.execute(
            """
            WITH oldest AS (
              SELECT rollout_id, min(age) AS age, arg_min(reward, age) AS reward
              FROM held GROUP BY rollout_id HAVING count(*) > 1
            )
            SELECT held.ingest_id, count(*), count(*) FILTER (WHERE held.reward IS DISTINCT FROM oldest.reward)
            FROM held JOIN oldest USING (rollout_id) WHERE held.age > oldest.age GROUP BY ALL
            """
        ).fetchall()
    return {i: (n, conflicts) for i, n, conflicts in rows if i in set(winners)}


def _disjoint(readings: Sequence[Open]) -> bool:
    """No two readings have a step in common, so none can hold a rollout of another."""
    found = [r for r in readings if r.report.rows]
    ranges = sorted((r.start_step, r.end_step) for r in found if r.start_step is not None and r.end_step is not None)
    return len(ranges) == len(found) and all(a[1] < b[0] for a, b in pairwise(ranges))


def _extreme(staged: Sequence[Staged], end: str) -> int | None:
    values = [s.stats[end]["step"] for s in staged if "step" in s.stats[end]]
    return (min if end == "minValues" else max)(values, default=None)


def _overlaps(file: DataFile, low: int | None, high: int | None, unknown: bool) -> bool:
    if unknown and file.nulls.get("step"):
        return True
    first, last = file.low.get("step"), file.high.get("step")
    if low is None or high is None or first is None or last is None:
        return False
    return first <= high and last >= low


def _register_run(store: Store, config: IngestConfig) -> None:
    with store.lock():
        snapshot = store.snapshot()
        check_run(snapshot, config)
        entry = snapshot.registry("runs").get(config.run)
        settings = dict(entry["config"]) if entry else {"success_threshold": 1.0}
        for name in ("success_threshold", "failure_reward"):
            if getattr(config, name) is not None:
                settings[name] = getattr(config, name)
        if not entry or settings != entry["config"]:
            store.register("runs", config.run, config.run, settings)


def _ledger_row(reading: Open, config: IngestConfig, created_at: datetime) -> dict[str, Any]:
    source, plan = reading.source, reading.plan
    found = {**source.found, "rows": source.rows}
    options: dict[str, Any] = {"given": config.given(plan.reader.NAME), "found": found, "path": str(plan.path.resolve())}
    if reading.tail:
        options["tail"] = reading.tail
    if plan.continues:
        options["continues"] = plan.continues.ingest_id
    return Reading(
        reading.ingest_id,
        config.run,
        plan.rel,
        reading.attempt,
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


def _note_attempts(ledger: Ledger, winners: Iterable[Open]) -> None:
    """Say it where rows of this reading, or of an earlier attempt, do not show."""
    for reading in winners:
        start, run = reading.start_step, reading.identify.overrides.run
        later = [r for r in ledger.live if r.run == run and r.attempt > reading.attempt and r.start_step is not None]
        if later:
            cut = min(r.start_step for r in later if r.start_step is not None)
            reading.report.notes.append(
                f"attempt {reading.attempt} is superseded from step {cut} on: its rows from there are hidden"
            )
        if start is not None and any(r.run == run and r.attempt < reading.attempt for r in ledger.live):
            reading.report.notes.append(f"attempt {reading.attempt} hides the rows of earlier attempts from step {start} on")


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _quarantined(rel: str, bad: Bad) -> bytes:
    """One line of a quarantine file; bytes that are no text as hex."""
    entry: dict[str, Any] = {"file": rel, "row": bad.row, "reason": bad.reason}
    try:
        entry["raw"] = bad.raw.decode()
    except UnicodeDecodeError:
        entry["raw_hex"] = bad.raw.hex()
    return json.dumps(entry).encode() + b"\n"


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "text that is not Unicode (a lone surrogate)"
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
