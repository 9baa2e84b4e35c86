"""Long work over rollouts that can stop at any moment and go on: a fixed plan of items, a staged file for each finished
one, a commit now and then.

A job lives in STORE/_jobs/NAME: `job.json` says what it does, `plan.parquet` which rollouts belong to which item, and an
item that is finished but not committed yet is a folder of Parquet files. What is committed is known by the transaction
that each item carries in every table it writes to."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake.exceptions import TableNotFoundError

from echolab import ids
from echolab.errors import Busy, EcholabError
from echolab.files import pc
from echolab.keys import without_known
from echolab.scan import parquet, scratch
from echolab.store import DataFile, Store, write_synced

ITEM_TOKENS = 64 * 1024
WINDOW_TOKENS = 1 << 20  # items whose rollouts are read at once
COMMIT_ITEMS, COMMIT_SECONDS = 64, 30.0
TRIES = 3
LOST = "no longer in the store"

PLAN = pa.schema(
    [
        pa.field("item", pa.int32(), nullable=False),
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("run", pa.string()),
        pa.field("step", pa.int64()),
        pa.field("tokens", pa.int64(), nullable=False),  # about
    ]
)


@dataclass
class Done:
    """What came of one item: rows of tables, and the rollouts that it could do nothing with, with the reason."""

    tables: dict[str, pa.Table]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0

    @property
    def rows(self) -> int:
        return next(iter(self.tables.values())).num_rows if self.tables else 0


Payload = tuple[int, pa.Table]
Result = tuple[int, "Done | Exception"]
Work = Callable[[pa.Table], Done]
Backend = Callable[[Iterable[Payload]], Iterable[Result]]


def serial(work: Work) -> Backend:
    """The items one after the other, in this process."""

    def backend(payloads: Iterable[Payload]) -> Iterator[Result]:
        for number, rows in payloads:
            try:
                yield number, work(rows)
            except Exception as e:  # whatever it is, the item failed, and the job is told
                yield number, e

    return backend


def items(groups: Sequence[Any], tokens: Sequence[int], bound: int = ITEM_TOKENS) -> list[int]:
    """The item of each rollout, given in order: contiguous whole groups, until an item holds `bound` tokens."""
    number, held, found = 0, 0, []
    start = 0
    for i in range(1, len(groups) + 1):
        if i < len(groups) and groups[i] == groups[start]:
            continue
        size = sum(tokens[start:i])
        if held and held + size > bound:
            number, held = number + 1, 0
        held += size
        found += [number] * (i - start)
        start = i
    return found


@dataclass(frozen=True)
class Job:
    """One job on disk. `Job.create` plans it, `Job.open` finds it again, `run` works it off."""

    store: Store
    name: str

    @property
    def folder(self) -> Path:
        return self.store.job_folder(self.name)

    @classmethod
    def create(cls, store: Store, name: str, config: Mapping[str, Any], plan: pa.Table, tables: Sequence[str]) -> Job:
        """A new job with its plan. It writes to `tables`, in this order."""
        job = cls(store, name)
        if (job.folder / "job.json").exists():
            raise EcholabError(f"job {name} is there already")
        if job.folder.exists():  # of a process that died before it had made its job
            job.remove()
        with job._writing():
            job.folder.mkdir(parents=True)
            _write(job.folder / "plan.parquet", plan.select(PLAN.names).cast(PLAN))
            facts = {"id": ids.random_id()[:12], "config": dict(config), "tables": list(tables)}
            write_synced(job.folder / "job.tmp", json.dumps(facts).encode())
            (job.folder / "job.tmp").rename(job.folder / "job.json")  # last: without it there is no job
        job._say({"state": "planned"})
        return job

    @classmethod
    def open(cls, store: Store, name: str) -> Job | None:
        job = cls(store, name)
        return job if (job.folder / "job.json").exists() else None

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "job.json").read_bytes())

    @cached_property
    def plan(self) -> pa.Table:
        return pq.read_table(self.folder / "plan.parquet")

    @cached_property
    def n_items(self) -> int:
        return 0 if not self.plan.num_rows else pc.max(self.plan["item"]).as_py() + 1

    @cached_property
    def sizes(self) -> dict[int, int]:
        """The tokens of each item, about."""
        per_item = self.plan.group_by("item").aggregate([("tokens", "sum")]).to_pylist()
        return {row["item"]: row["tokens_sum"] for row in per_item}

    @property
    def status(self) -> dict[str, Any]:
        """As of the last commit: state (planned, running, stopped, failed, done), items, tokens, skipped, failed."""
        try:
            return json.loads((self.folder / "status.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {"state": "planned"}

    def _say(self, status: Mapping[str, Any]) -> None:
        unfinished = self.folder / "status.tmp"
        with self._writing():
            unfinished.write_text(json.dumps(status))
            unfinished.rename(self.folder / "status.json")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            said = (
                f"cannot write to {self.folder}: {e.strerror or e}; what is stored stays, the same command goes on from there"
            )
            raise EcholabError(said) from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        with ExitStack() as held:
            try:
                held.enter_context(self.store.lock(0, self.name))
            except Busy:
                said = f"another process works on job {self.name}: `echolab score status` shows how far it is"
                raise Busy(said) from None
            yield

    @property
    def is_locked(self) -> bool:
        """Does a process work on it?"""
        try:
            with self.lock():
                return False
        except Busy:
            return True

    def remove(self) -> None:
        """At once, however long the deleting takes: what a kill leaves of it is no job, and `vacuum` removes it."""
        gone = self.store.job_folder(f"gone-{ids.random_id()[:12]}")
        self.folder.rename(gone)
        shutil.rmtree(gone)

    # Items.

    def _staged(self, item: int) -> Path:
        return self.folder / f"item-{item:06d}"

    @property
    def staged(self) -> list[int]:
        """Items that are finished and not committed yet, or not in every table."""
        return sorted(int(f.name[5:]) for f in self.folder.glob("item-*") if f.suffix != ".tmp")

    def _transaction(self, item: int) -> str:
        return f"{self.facts['id']}/{item}"

    def committed(self, table: str, numbers: Iterable[int]) -> set[int]:
        """Which of these items the table holds. Delta takes milliseconds for each."""
        try:
            delta = self.store.delta(table)
        except TableNotFoundError:
            return set()
        return {i for i in numbers if delta.transaction_version(self._transaction(i)) is not None}

    def pending(self) -> list[int]:
        """Items that nobody has finished. It asks for all of them: a run does so once."""
        staged = set(self.staged)
        open_ = [i for i in range(self.n_items) if i not in staged]
        done = self.committed(self.facts["tables"][-1], open_)
        return [i for i in open_ if i not in done]

    def stage(self, item: int, done: Done) -> None:
        """Keep what came of an item: all of it or nothing."""
        unfinished = self._staged(item).with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        with self._writing():
            unfinished.mkdir()
            for table, rows in done.tables.items():
                _write(unfinished / f"{table}.parquet", rows)
            facts = {"skipped": done.skipped, "tokens": done.tokens}
            write_synced(unfinished / "facts.json", json.dumps(facts).encode())
            unfinished.rename(self._staged(item))

    def _forget(self, item: int) -> None:
        """Its files at once, however long the deleting takes."""
        gone = self._staged(item).with_suffix(".tmp")
        shutil.rmtree(gone, ignore_errors=True)
        self._staged(item).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def commit(self) -> dict[int, dict[str, Any]]:
        """Bring staged items into their tables, each once, and forget their files. Returns what is known of each."""
        staged = self.staged
        if not staged:
            return {}
        found = {i: json.loads((self._staged(i) / "facts.json").read_bytes()) for i in staged}
        with self.store.job("items") as folder, self.store.lock():
            for table in self.facts["tables"]:
                done = self.committed(table, staged)
                new = [i for i in staged if i not in done]
                files = [f for i in new if (f := self._staged(i) / f"{table}.parquet").exists()]
                if not new:
                    continue
                rows = pa.concat_tables([pq.read_table(f) for f in files]) if files else None
                rows = without_known(self.store.snapshot(), table, rows, folder) if rows is not None else None
                files = self.store.stage(table, rows, folder) if rows is not None and rows.num_rows else []
                self.store.commit(table, files, transactions={self._transaction(i): 1 for i in new})
        self._note_skipped([{"item": i, "rollout_id": r, "reason": why} for i in staged for r, why in found[i]["skipped"]])
        for i in staged:
            self._forget(i)
        return found

    def _note_skipped(self, skipped: Sequence[Mapping[str, Any]]) -> None:
        if not skipped:
            return
        with self._writing(), (self.folder / "skipped.jsonl").open("a+b") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read() != b"\n":  # a process died in the middle of a line
                    f.write(b"\n")
            f.writelines(json.dumps(s).encode() + b"\n" for s in skipped)
            f.flush()
            os.fsync(f.fileno())

    def skipped(self) -> list[dict[str, Any]]:
        """Rollouts that nothing could be done with, each once."""
        try:
            lines = (self.folder / "skipped.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        found = {}
        for line in lines:
            with suppress(ValueError):  # the end of a process that was killed: the item is noted again
                row = json.loads(line)
                found[row["item"], row["rollout_id"]] = row
        return list(found.values())

    def rollouts_of(self, numbers: Iterable[int]) -> pa.Table:
        """These items' part of the plan."""
        return self.plan.filter(pc.is_in(self.plan["item"], pa.array(list(numbers), pa.int32())))

    def payloads(self, numbers: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[int, pa.Table, list[str]]]:
        """The rollouts of these items, in the order of the plan, and the ids of those that the store has lost."""
        for window in self._windows(numbers):
            plan = self.rollouts_of(window)
            rows = self._rollouts(plan, columns)
            for number in window:
                mine = rows.filter(pc.equal(rows["item"], number))
                there = set(mine["rollout_id"].to_pylist())
                asked = plan.filter(pc.equal(plan["item"], number))["rollout_id"].to_pylist()
                yield number, mine, [r for r in asked if r not in there]

    def _windows(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        window: list[int] = []
        for number in numbers:
            window.append(number)
            if sum(self.sizes[n] for n in window) >= WINDOW_TOKENS:
                yield window
                window = []
        if window:
            yield window

    def _rollouts(self, plan: pa.Table, columns: Sequence[str]) -> pa.Table:
        """The rows of live readings, each id once: the oldest reading's, as the views have it."""
        snapshot = self.store.snapshot()
        files = [f.path for f in snapshot.files("rollouts") if _may_hold(f, plan)]
        if not files:
            return plan.select(["item", "rollout_id"]).slice(0, 0)
        live = [r.ingest_id for r in snapshot.ledger.live]
        with scratch(self.folder) as db:
            db.register("plan", plan.append_column("place", _places(plan.num_rows)))
            db.register("live", pa.table({"ingest_id": pa.array(live, pa.string()), "age": _places(len(live))}))
            wanted = ", ".join(f"r.{c}" for c in columns)
            return db.sql(
                f"""SELECT plan.item, {wanted} FROM {parquet(files)} r JOIN plan USING (rollout_id) JOIN live USING (ingest_id)
                WHERE {_bounds(plan)}
                QUALIFY row_number() OVER (PARTITION BY rollout_id ORDER BY age) = 1 ORDER BY place"""
            ).to_arrow_table()


def _write(path: Path, rows: pa.Table) -> None:
    with path.open("wb") as f:
        pq.write_table(rows, f, compression="zstd")
        f.flush()
        os.fsync(f.fileno())


def _places(n: int) -> pa.Array:
    return pa.array(range(n), pa.int64())


def _bounds(plan: pa.Table) -> str:
    """A condition by which row groups can be left unread."""
    steps = plan["step"]
    if steps.null_count or not len(steps):
        return "true"
    ends = pc.min_max(steps).as_py()
    return f"r.step BETWEEN {ends['min']} AND {ends['max']}"


def _may_hold(file: DataFile, plan: pa.Table) -> bool:
    steps = plan.filter(pc.equal(plan["run"], file.partition["run"]))["step"]
    if not len(steps):
        return False
    low, high = file.low.get("step"), file.high.get("step")
    if low is None or high is None or steps.null_count:
        return True
    ends = pc.min_max(steps).as_py()
    return ends["min"] <= high and ends["max"] >= low


@dataclass
class Report:
    """How a run of a job ended."""

    items: int
    done: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: Counter[str] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)

    def plus(self, later: Report) -> Report:
        numbers = {n: getattr(self, n) + getattr(later, n) for n in ("items", "done", "rows", "tokens", "seconds", "skipped")}
        return Report(**numbers, failed=later.failed)


Progress = Callable[[int, int, float], None]  # tokens of the plan: those of finished items, all, and finished in a second


def run(job: Job, backend: Backend, columns: Sequence[str], progress: Progress | None = None) -> Report:
    """Work off what is pending. An item that fails is tried again, and in the end listed; the others are committed.
    Call it under the job's lock."""
    return _Run(job, backend, columns, progress).run()


class _Run:
    def __init__(self, job: Job, backend: Backend, columns: Sequence[str], progress: Progress | None):
        self.job, self.backend, self.columns, self.progress = job, backend, columns, progress
        self.report = Report(job.n_items)
        self.began = self.committed_at = time.monotonic()
        self.total, self.passed, self.before = sum(job.sizes.values()), 0, 0  # tokens of the plan
        self.pending: set[int] = set()
        self.lost: dict[int, list[str]] = {}

    def run(self) -> Report:
        job, report = self.job, self.report
        new = job.status["state"] == "planned"  # nothing of it is committed
        job.commit()
        self.pending = set(range(job.n_items) if new else job.pending())
        report.skipped = Counter(s["reason"] for s in job.skipped())
        self.passed = self.before = self.total - sum(job.sizes[i] for i in self.pending)
        self._say("running")
        self._show()
        try:
            for _ in range(TRIES):
                if not self.pending:
                    break
                for number, result in self.backend(self._payloads(sorted(self.pending))):
                    self._took(number, result)
            self._commit()
        except BaseException:
            self._commit()
            self._say("stopped")
            raise
        for number in sorted(self.pending):
            report.failed.setdefault(number, "nothing came back")
        self._say("failed" if report.failed else "done")
        return report

    def _payloads(self, numbers: Sequence[int]) -> Iterator[Payload]:
        """Items with something left to work on."""
        for number, rows, lost in self.job.payloads(numbers, self.columns):
            self.lost[number] = lost
            if rows.num_rows:
                yield number, rows
            else:
                self._took(number, Done({}))

    def _took(self, number: int, result: Done | Exception) -> None:
        if isinstance(result, Exception):
            self.report.failed[number] = _reason(result)
            return
        self.report.failed.pop(number, None)
        self.pending.discard(number)
        lost = [(rollout, LOST) for rollout in self.lost.pop(number, ())]
        self.job.stage(number, replace(result, skipped=[*result.skipped, *lost]))
        self.report.tokens += result.tokens
        self.report.rows += result.rows
        self.passed += self.job.sizes[number]
        self._show()
        if len(self.job.staged) >= COMMIT_ITEMS or time.monotonic() - self.committed_at > COMMIT_SECONDS:
            self._commit()
            self._say("running")

    def _show(self) -> None:
        if self.progress:
            rate = (self.passed - self.before) / max(time.monotonic() - self.began, 1e-9)
            self.progress(self.passed, self.total, rate)

    def _commit(self) -> None:
        for facts in self.job.commit().values():
            self.report.skipped.update(why for _, why in facts["skipped"])
        self.committed_at = time.monotonic()

    def _say(self, state: str) -> None:
        report = self.report
        report.done = report.items - len(self.pending)
        report.seconds = time.monotonic() - self.began
        facts = {**report.__dict__, "state": state, "skipped": dict(report.skipped)}
        self.job._say({**facts, "tokens_per_second": report.tokens / max(report.seconds, 1e-9)})


def _reason(error: Exception) -> str:
    first = str(error).splitlines()[0][:300] if str(error) else ""
    return first if isinstance(error, EcholabError) and first else f"{type(error).__name__}: {first}"


def jobs(store: Store, kind: str) -> list[Job]:
    """The jobs of a kind that are on disk."""
    folder = store.job_folder("")
    names = sorted(f.name for f in folder.iterdir() if f.name.startswith(f"{kind}-")) if folder.exists() else []
    return [job for name in names if (job := Job.open(store, name))]
