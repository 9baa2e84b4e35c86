"""`echolab verify`: verdicts on the rollouts of a store, judged in worker processes that can be killed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echolab import ids
from echolab.compaction import auto
from echolab.errors import EcholabError, WrongUsage
from echolab.files import conform
from echolab.schema import VERDICTS
from echolab.sql import Session
from echolab.store import DataFile, Snapshot, Store, now
from echolab.verifiers import STATUSES, Judged, Verifier
from echolab.views import text
from echolab.workers import MEMORY_GB, Outcome
from echolab.workers import run as run_tasks

COMMIT_ROWS, COMMIT_SECONDS = 50_000, 20.0  # between commits, so that an interrupted run keeps what it has
REMEMBERED = 200_000  # verdicts of a run that equal inputs share
Progress = Callable[[int, int], None]
Key = tuple[str, str]  # of a verdict, beside its verifier: rollout_id and input_hash


@dataclass
class VerifyReport:
    """What a run has done. `stood` had a verdict already, `elsewhere` got theirs from another process meanwhile."""

    verifier: str
    id: str
    statuses: dict[str, int]
    right: int = 0
    wrong: int = 0
    stood: int = 0
    elsewhere: int = 0
    without_gold: int = 0
    without_text: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # of errors
    seconds: float = 0.0

    @property
    def made(self) -> int:
        return sum(self.statuses.values())

    def count(self, judged: Judged) -> None:
        self.statuses[judged.status] += 1
        self.right += judged.success is True
        self.wrong += judged.success is False


def verify(
    store: Store,
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    run: str | None = None,
    where: str | None = None,
    again: Collection[str] = (),
    timeout: float = 5.0,
    workers: int | None = None,
    memory_gb: float = MEMORY_GB,
    progress: Progress | None = None,
) -> VerifyReport:
    """A verdict on every rollout with a ground truth that has none yet, or whose answer or ground truth has changed since.
    `again` names states (timeout, error) whose verdicts are made anew; `where` is SQL over the view `rollouts`."""
    if unknown := [s for s in again if s not in STATUSES]:
        raise WrongUsage(f"no state {unknown[0]!r} of verdicts: there are {', '.join(STATUSES)}")
    if timeout <= 0 or (workers is not None and workers < 1) or memory_gb < 0:
        raise WrongUsage("the timeout is more than 0 seconds, and the workers are at least 1")
    verifier = Verifier.make(name, options)
    started, snapshot = time.monotonic(), store.snapshot()
    if run is not None and run not in (runs := sorted({r.run for r in snapshot.ledger.live})):
        raise EcholabError(f"no run {run!r} in this store; there are: {', '.join(runs) or 'none'}")
    with store.job("verify") as folder, Session(snapshot) as session:
        chosen = _chosen(run, where)
        total = session.sql(f"SELECT count(*) {chosen}").item() if progress else 0
        verification = _Verification(snapshot, verifier, again, folder)
        with closing(_rows(session, chosen, verifier)) as rows:
            verification.go(_counted(rows, total, progress), workers=workers, timeout=timeout, memory_gb=memory_gb)
    auto(store, "verdicts")
    report = verification.report
    report.verifier = _label(store.snapshot(), verifier)
    report.seconds = time.monotonic() - started
    return report


def _chosen(run: str | None, where: str | None) -> str:
    conditions = [f"run = {text(run)}"] if run is not None else []
    conditions += [f"({where}\n)"] if where else []  # the line ends where a comment in it would
    return f"FROM rollouts{' WHERE ' if conditions else ''}{' AND '.join(conditions)}"


def _rows(session: Session, chosen: str, verifier: Verifier) -> Generator[dict[str, Any], None, None]:
    """Rollouts with the verifier's newest word on each, as the files have them: those of a group stand together."""
    prompt = "prompt" if verifier.reads_all else "right(prompt, 100) AS prompt"
    query = f"""
        SELECT r.*, w.word.input_hash AS known_hash, w.word.status AS known_status
        FROM (SELECT rollout_id, ground_truth, completion, {prompt} {chosen}) r
        LEFT JOIN (
            SELECT rollout_id, arg_max({{'input_hash': input_hash, 'status': status}}, created_at) AS word
            FROM base.verdicts WHERE verifier = {text(verifier.id)} GROUP BY rollout_id
        ) w ON w.rollout_id = r.rollout_id"""
    for batch in session.batches(query):
        names = batch.schema.names
        for values in zip(*batch.columns, strict=True):
            yield {n: v.as_py() for n, v in zip(names, values, strict=True)}


def _counted(rows: Iterable[dict[str, Any]], total: int, progress: Progress | None) -> Iterator[dict[str, Any]]:
    for done, row in enumerate(rows):
        if progress and done % 64 == 0:
            progress(done, total)
        yield row
    if progress:
        progress(total, total)


class _Verification:
    """From rollouts to committed verdicts. Equal inputs are judged once."""

    def __init__(self, snapshot: Snapshot, verifier: Verifier, again: Collection[str], folder: Path):
        self.store, self.verifier, self.again, self.folder = snapshot.store, verifier, again, folder
        self.report = VerifyReport(verifier.name, verifier.id, dict.fromkeys(STATUSES, 0))
        self.reasons: Counter[str] = Counter()
        self.began = now().timestamp() * 1e6
        self.committed_at = time.monotonic()
        self.waiting: dict[str, list[str]] = {}  # input_hash -> rollouts
        self.known: dict[str, Judged] = {}
        self.fresh: dict[Key, Judged] = {}  # not yet committed
        self.replacing: set[Key] = set()  # may take the place of a verdict that stood when we began
        self.clean = {f.name for f in _files(snapshot, verifier)}  # files that hold no other key of what is to be made

    def go(self, rows: Iterable[dict[str, Any]], **limits: Any) -> None:
        try:
            for (key, _), outcome in run_tasks(self.verifier.task, self._inputs(rows), **limits):
                self._take(key, outcome)
        finally:  # an interrupted run keeps what it has
            self._commit()
            self.report.reasons = dict(self.reasons.most_common())

    def _inputs(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, tuple[str | None, ...]]]:
        """What has to be judged; whatever needs no judge is settled here."""
        report = self.report
        for row in rows:
            gold, completion = (row["ground_truth"] or "").strip() or None, row["completion"]
            if gold is None and self.verifier.needs_gold:
                report.without_gold += 1
                continue
            if completion is None:
                report.without_text += 1
                continue
            given = self.verifier.input(completion, gold, row["prompt"])
            key = ids.input_hash((gold, None) if given is None else given)
            if row["known_hash"] == key and row["known_status"] not in self.again:
                report.stood += 1
                continue
            if row["known_hash"] is not None:
                self.replacing.add((row["rollout_id"], key))
            if given is None:
                self._keep(row["rollout_id"], key, Judged("no_answer"))
            elif key in self.known:
                self._keep(row["rollout_id"], key, self.known[key])
            elif key in self.waiting:
                self.waiting[key].append(row["rollout_id"])
            else:
                self.waiting[key] = [row["rollout_id"]]
                yield key, given

    def _take(self, key: str, outcome: Outcome) -> None:
        judged = Judged(*outcome.value) if outcome.status == "ok" else Judged(outcome.status)
        rollouts = self.waiting.pop(key)
        if outcome.status == "error":
            self.reasons[outcome.reason] += len(rollouts)
        if len(self.known) >= REMEMBERED:
            del self.known[next(iter(self.known))]
        self.known[key] = judged
        for rollout in rollouts:
            self._keep(rollout, key, judged)

    def _keep(self, rollout: str, key: str, judged: Judged) -> None:
        self.fresh[rollout, key] = judged
        if len(self.fresh) >= COMMIT_ROWS or time.monotonic() - self.committed_at > COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        """Under the lock: keys that another process has brought meanwhile are dropped, older ones are replaced."""
        if not self.fresh:
            return
        with ExitStack() as held:
            replaces = bool(self.replacing & self.fresh.keys())
            if replaces:  # files may have to be rewritten, as compaction does
                held.enter_context(self.store.lock(name="compact"))
            held.enter_context(self.store.lock())
            snapshot = self.store.snapshot()
            before = _files(snapshot, self.verifier)
            outdated = self._settle([f for f in before if replaces or f.name not in self.clean])
            if self.fresh:
                _register(snapshot, self.verifier)
                rows = pa.concat_tables([self._table(), *(self._without_fresh(f) for f in outdated)])
                self.store.commit("verdicts", self.store.stage("verdicts", rows, self.folder), outdated)
                if not outdated:  # ours alone: a file of another process may hold what we judge next
                    self.clean |= {f.name for f in _files(self.store.snapshot(), self.verifier)} - {f.name for f in before}
        for judged in self.fresh.values():
            self.report.count(judged)
        self.fresh, self.committed_at = {}, time.monotonic()

    def _settle(self, files: Iterable[DataFile]) -> list[DataFile]:
        """Drops what was made elsewhere since we began; gives the files that hold older verdicts on the same input."""
        older: dict[str, tuple[DataFile, set[Key]]] = {}
        for file in files:
            for key, made in zip(_keys(file), _column(file, "created_at"), strict=True):
                if key not in self.fresh:
                    continue
                if key in self.replacing and made < self.began:
                    older.setdefault(file.name, (file, set()))[1].add(key)
                else:
                    del self.fresh[key]
                    self.report.elsewhere += 1
        return [file for file, keys in older.values() if keys & self.fresh.keys()]

    def _without_fresh(self, file: DataFile) -> pa.Table:
        rows = conform(pq.ParquetFile(file.path).read(), VERDICTS.arrow)
        return rows.filter(pa.array([key not in self.fresh for key in _keys(file)]))

    def _table(self) -> pa.Table:
        made = now()
        rows = (
            {"rollout_id": rollout, "verifier": self.verifier.id, "input_hash": key, "created_at": made, **judged._asdict()}
            for (rollout, key), judged in self.fresh.items()
        )
        return pa.Table.from_pylist(list(rows), schema=VERDICTS.arrow)


def _files(snapshot: Snapshot, verifier: Verifier) -> list[DataFile]:
    return [f for f in snapshot.files("verdicts") if f.partition["verifier"] == verifier.id]


def _keys(file: DataFile) -> Iterator[Key]:
    return zip(_column(file, "rollout_id"), _column(file, "input_hash"), strict=True)


def _column(file: DataFile, name: str) -> list[Any]:
    """Times as microseconds."""
    column = pq.ParquetFile(file.path).read([name])[name]
    return (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()


def _register(snapshot: Snapshot, verifier: Verifier) -> None:
    """A configuration that is new to the store is the next version of its name. Under the lock."""
    entries = snapshot.registry("verifiers")
    if verifier.id not in entries:
        version = 1 + max((e["version"] for e in entries.values() if e["name"] == verifier.name), default=0)
        snapshot.store.register("verifiers", verifier.id, verifier.name, verifier.config, version=version)


def _label(snapshot: Snapshot, verifier: Verifier) -> str:
    entry = snapshot.registry("verifiers").get(verifier.id)
    return f"{verifier.name}@{entry['version']}" if entry else verifier.name
