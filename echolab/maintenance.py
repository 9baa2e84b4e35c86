"""What keeps a store in shape: what is in it, what happened to it, what may go, and the way from an older format."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from deltalake.schema import Schema
from filelock import FileLock, Timeout

from echolab import scan
from echolab.compaction import auto, compact
from echolab.errors import EcholabError
from echolab.ledger import Ledger
from echolab.schema import FORMAT_VERSION, TABLES, Table
from echolab.store import Snapshot, Store, now
from echolab.validate import SHOWN, leftovers, type_name, validate

__all__ = ["auto", "compact", "history", "info", "leftovers", "migrate", "pins", "release", "vacuum", "validate"]

PINNING = ("clipsets", "cohorts", "exports")
FLOOR_HOURS = 1.0  # no file goes that is younger than the longest writer may need
# Folders of these nobody resumes; others are plans that wait.
OWN_JOBS = ("ingest-", "verify-", "add-", "compact-", "items-", "resegment-", "gone-", "clipset-", "cohort-", "export-")


# What is in it.


def info(snapshot: Snapshot) -> dict[str, Any]:
    """The store in numbers, from the logs and the ledger."""
    ledger = snapshot.ledger
    tables = {}
    for name in snapshot.versions:
        files = snapshot.files(name)
        tables[name] = {
            "rows": sum(f.rows for f in files),
            "files": len(files),
            "bytes": sum(f.size for f in files),
            "version": snapshot.versions[name],
        }
    runs = _runs(snapshot)
    return {
        "path": str(snapshot.store.root),
        "format": snapshot.store.format,
        "version": snapshot.versions.get("ingests", 0),
        "rollouts": sum(run["rollouts"] for run in runs.values()),
        "runs": runs,
        "readings": {"live": len(ledger.live), "superseded": len(ledger.readings) - len(ledger.live)},
        "quarantined": ledger.n_quarantined(),
        "tables": tables,
        "pins": pins(snapshot),
    }


def _runs(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """Attempts, readings and rollouts shown of each run. Only where readings share or hide rows are rows looked at."""
    runs: dict[str, dict[str, Any]] = {}
    for r in snapshot.ledger.live:
        run = runs.setdefault(r.run, {"attempts": [], "readings": 0, "rollouts": 0, "shared": 0})
        run["attempts"] = sorted({*run["attempts"], r.attempt})
        run["readings"] += 1
        run["rollouts"] += r.n_rows
        run["shared"] += r.n_shared
    unsure = [name for name, run in runs.items() if run.pop("shared") or len(run["attempts"]) > 1]
    if unsure:
        for name, shown in _count_shown(snapshot, unsure):
            runs[name]["rollouts"] = shown
    return dict(sorted(runs.items()))


def _count_shown(snapshot: Snapshot, runs: Sequence[str]) -> list[tuple[str, int]]:
    with scan.scratch() as con:
        for name in ("ingests", "rollouts"):
            files = [f.path for f in snapshot.files(name) if name == "ingests" or f.partition["run"] in runs]
            con.execute(f"CREATE VIEW {name} AS {scan.relation(con, TABLES[name], files)}")
        shown = SHOWN.format(columns="run, rollout_id")
        counted = dict(con.sql(f"SELECT run, count(DISTINCT rollout_id) FROM ({shown}) GROUP BY run").fetchall())
        return [(run, counted.get(run, 0)) for run in runs]


def history(store: Store, table: str | None = None) -> list[dict[str, Any]]:
    """Commits of all tables, oldest first. `version` stands where the ledger moved: those are the versions that
    a store can be opened at. Rows and files are NULL where the log does not say."""
    if table is not None and table not in TABLES:
        raise EcholabError(f"no table {table}: there are {', '.join(TABLES)}")
    commits = []
    for name in [table] if table else TABLES:
        for h in store.history(name):
            if h["operation"] == "VACUUM START":
                continue
            counts = {k: h.get(f"echolab.{k}") for k in ("files_added", "files_removed", "rows_added", "rows_removed")}
            commits.append(
                {
                    "time": datetime.fromtimestamp(h["timestamp"] / 1000, UTC),
                    "table": name,
                    "table_version": h["version"],
                    "version": h["version"] if name == "ingests" else None,
                    "operation": h.get("echolab.kind") or _OPERATIONS.get(h["operation"], h["operation"].lower()),
                    **{k: None if v is None else int(v) for k, v in counts.items()},
                }
            )
    return sorted(commits, key=lambda c: (c["time"], c["table"] == "ingests", c["table"], c["table_version"]))


_OPERATIONS = {"CREATE TABLE": "create", "VACUUM END": "vacuum", "ADD COLUMN": "migrate", "ADD COLUMNS": "migrate"}


# What may go.


@dataclass
class _Removed:
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    released: list[str] = field(default_factory=list)


def pins(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Clip sets, cohorts and exports that hold table versions against vacuum."""
    held = []
    for kind in PINNING:
        for entry in snapshot.registry(kind).values():
            parents = entry["parents"]
            if parents.get("versions") and not parents.get("unpinned"):
                held.append({"kind": kind, **{k: entry[k] for k in ("id", "name", "version")}, "tables": parents["versions"]})
    return sorted(held, key=lambda p: (p["kind"], p["name"], p["version"]))


def release(store: Store, names: Iterable[str]) -> list[str]:
    """Release the table versions that these names hold, all versions of a name (or one: `name@2`). Call it under the lock."""
    snapshot = store.snapshot()
    chosen = _chosen(pins(snapshot), names)
    for pin in chosen:
        entry = snapshot.registry(pin["kind"])[pin["id"]]
        parents = {**entry["parents"], "unpinned": True}
        store.register(pin["kind"], entry["id"], entry["name"], entry["config"], parents, entry["version"])
    return [_label(pin) for pin in chosen]


def _chosen(held: Sequence[dict[str, Any]], names: Iterable[str]) -> list[dict[str, Any]]:
    chosen = []
    for name in names:
        found = [pin for pin in held if name in (pin["name"], _label(pin))]
        if not found:
            there = ", ".join(sorted({_label(p) for p in held})) or "nothing is pinned"
            raise EcholabError(f"nothing named {name} is pinned (pinned: {there})")
        chosen += [pin for pin in found if pin not in chosen]
    return chosen


def _label(pin: dict[str, Any]) -> str:
    return f"{pin['name']}@{pin['version']}"


def vacuum(
    store: Store,
    keep_days: float = 7.0,
    dry_run: bool = False,
    unpin: Sequence[str] = (),
    floor_hours: float = FLOOR_HOURS,
) -> dict[str, Any]:
    """Delete files that neither the current version nor a pinned one needs, and that nobody has needed for `keep_days`;
    with them what dead processes left behind. Somebody may still read an older snapshot: `keep_days` is for them.

    Returns the files that went (or would go), below the store's folder, their bytes, and what was released."""
    hours = keep_days * 24
    if not hours >= floor_hours:  # also NaN
        raise EcholabError(
            f"keep_days is too short: a writer may need {floor_hours:g} hours, so keep {floor_hours / 24:.3f} days or more"
        )
    with store.lock():
        released = _chosen(pins(store.snapshot()), unpin)
        if released and not dry_run:
            release(store, unpin)
        snapshot = store.snapshot()
        removed = _Removed(released=[_label(pin) for pin in released])
        held = [pin for pin in pins(snapshot) if pin not in released]
        for name in snapshot.versions:
            _vacuum_table(store, name, hours, [pin["tables"].get(name) for pin in held], dry_run, removed)
        for job in _dead_jobs(store, floor_hours):
            _remove(store, job, dry_run, removed)
        for path in _old_quarantine(store, snapshot.ledger, hours):
            _remove(store, path, dry_run, removed)
    return asdict(removed)


def _vacuum_table(
    store: Store, name: str, hours: float, pinned: Sequence[int | None], dry_run: bool, removed: _Removed
) -> None:
    delta = store.delta(name)
    keep = sorted({v for v in pinned if v is not None and v <= delta.version()})

    def run(dry: bool) -> list[str]:
        return delta.vacuum(int(hours), dry_run=dry, enforce_retention_duration=False, full=True, keep_versions=keep)

    files = [f for f in (store.folder(name) / f for f in run(True)) if f.exists()]  # it also names those long gone
    removed.bytes += sum(f.stat().st_size for f in files)
    removed.files += sorted(str(f.relative_to(store.root)) for f in files)
    if files and not dry_run:  # it writes two commits, also where there is nothing to delete
        run(False)


def _dead_jobs(store: Store, floor_hours: float) -> list[Path]:
    """Job folders of processes that died. A folder that was made this moment is not locked yet: hence the age."""
    folder = store.job_folder("")
    if not folder.exists():
        return []
    youngest = time.time() - floor_hours * 3600
    return [
        f
        for f in sorted(folder.iterdir())
        if f.name.startswith(OWN_JOBS) and f.is_dir() and f.stat().st_mtime <= youngest and not _is_alive(f)
    ]


def _is_alive(job: Path) -> bool:
    try:
        with FileLock(job / "alive.lock", timeout=0):
            return False
    except Timeout:
        return True


def _old_quarantine(store: Store, ledger: Ledger, hours: float) -> list[Path]:
    """Of readings that never came into the ledger, or were replaced long enough ago."""
    if not store.quarantine.exists():
        return []
    oldest = now() - timedelta(hours=hours)
    keep = {r.ingest_id for r in ledger.live}
    keep |= {i for r in ledger.readings if r.created_at and r.created_at > oldest for i in r.supersedes}
    return [f for f in sorted(store.quarantine.glob("*.jsonl")) if f.stem not in keep]


def _remove(store: Store, path: Path, dry_run: bool, removed: _Removed) -> None:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    removed.files += sorted(str(f.relative_to(store.root)) for f in files)
    removed.bytes += sum(f.stat().st_size for f in files)
    if dry_run:
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


# From an older format.

# What it takes to bring a store from format N to N + 1, beyond the columns that its tables lack.
STEPS: dict[int, Callable[[Store], str]] = {}


def migrate(store: Store) -> list[str]:
    """Bring a store of an older echolab up to this one. Says what it did; nothing where there is nothing to do.

    Each step leaves a store that reads as before, and the format is written last: a killed migration is run again."""
    with store.lock():
        lacking = {name: _lacking(store, spec) for name, spec in TABLES.items()}  # raises before anything changes
        done = []
        for name, columns in lacking.items():
            if columns:
                names = [f.name for f in columns]
                store.delta(name).alter.add_columns(list(Schema.from_arrow(pa.schema(columns)).fields))
                done.append(f"{name}: added {', '.join(names)}")
        for format in range(store.format, FORMAT_VERSION):
            if format in STEPS:
                done.append(STEPS[format](store))
            store.mark(format + 1)
            done.append(f"store format {format + 1}")
        return done


def _lacking(store: Store, spec: Table) -> list[pa.Field]:
    """Columns that a table of an older echolab does not have."""
    try:
        delta: DeltaTable = store.delta(spec.name)
    except TableNotFoundError:
        return []
    there = pa.schema(delta.schema().to_arrow())
    if unknown := [n for n in there.names if n not in spec.arrow.names]:
        raise EcholabError(f"table {spec.name} has columns of a newer echolab ({', '.join(unknown)}): update echolab")
    for f in spec.arrow:
        if f.name not in there.names and not f.nullable:
            raise EcholabError(f"table {spec.name} lacks {f.name}, which may not be NULL: was it written by other software?")
        if f.name in there.names and type_name(there.field(f.name).type) != type_name(f.type):
            raise EcholabError(f"column {f.name} of {spec.name} has another type: was it written by other software?")
    return [f for f in spec.arrow if f.name not in there.names]
