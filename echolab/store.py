"""A store on disk: one Delta table per table of the schema. Files are staged outside the tables and committed under
one lock; a snapshot is the exact list of files of one version of every table."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, Transaction
from filelock import FileLock, Timeout

from echolab import ids
from echolab.errors import Busy, EcholabError
from echolab.files import conform, finish_file, pc, row_groups, sort_rows, statistics, to_rows
from echolab.ledger import Ledger
from echolab.schema import FORMAT_VERSION, TABLES, Table

MARKER = "echolab.json"  # names the folder a store, and its format
LOCK_SECONDS = 600
SNAPSHOT_TRIES = 20

# Expired log entries are kept: a version that something pins must stay readable for as long as its files do.
_CONFIGURATION = {"delta.enableExpiredLogCleanup": "false"}


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a table, with the statistics of its scalar columns."""

    path: Path
    name: str  # below the table's folder
    rows: int
    size: int
    partition: dict[str, str | None]
    low: dict[str, Any] = field(default_factory=dict)
    high: dict[str, Any] = field(default_factory=dict)
    nulls: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Staged:
    """A finished file outside its table, ready to be committed."""

    table: str
    path: Path
    rows: int
    partition: str | None
    stats: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """One version of every table. Whatever is committed later does not show; a missing table is empty."""

    store: Store
    versions: Mapping[str, int]

    def files(self, table: str) -> list[DataFile]:
        if table not in self.versions:
            return []
        return _data_files(self.store.folder(table), self.store.delta(table, self.versions[table]))

    def table(self, name: str) -> pa.Table:
        """A whole table in memory: for the ledger and the registries, which are small."""
        schema = TABLES[name].arrow
        tables = [conform(pq.ParquetFile(f.path).read(), schema) for f in self.files(name)]
        return pa.concat_tables(tables) if tables else pa.Table.from_batches([], schema)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger.of(to_rows(self.table("ingests")))

    def registry(self, kind: str) -> dict[str, dict[str, Any]]:
        """The newest entry of each id, `config` and `parents` parsed."""
        entries: dict[str, dict[str, Any]] = {}
        for row in sorted(to_rows(self.table(kind)), key=lambda r: r["created_at"]):
            entries[row["id"]] = {**row, "config": json.loads(row["config"]), "parents": json.loads(row["parents"])}
        return entries


class Store:
    """`Store.open(path)` or `Store.create(path)`. Everything that knows where files lie is in here."""

    def __init__(self, root: Path):
        self.root = root

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    @classmethod
    def create(cls, path: str | Path) -> Store:
        """A new empty store, or the one that is there already."""
        root = _root(path)
        if (root / MARKER).exists():
            return cls.open(root)
        if root.exists() and (not root.is_dir() or any(not p.name.startswith(MARKER) for p in root.iterdir())):
            raise EcholabError(f"{root} is not empty and not an echolab store: give an empty or new folder")
        root.mkdir(parents=True, exist_ok=True)
        store = cls(root)
        store.mark(FORMAT_VERSION)
        return store

    @classmethod
    def open(cls, path: str | Path) -> Store:
        root = _root(path)
        store = cls(root)
        if not root.exists():
            raise EcholabError(f"{path}: no such folder; `echolab ingest` and `echolab store init` make a store")
        if not (root / MARKER).exists():
            raise EcholabError(f"{root} is not an echolab store: {_instead(Path(path))}")
        if store.format > FORMAT_VERSION:
            raise EcholabError(f"{root} has store format {store.format}, this echolab knows {FORMAT_VERSION}: update echolab")
        return store

    @property
    def format(self) -> int:
        try:
            return int(json.loads((self.root / MARKER).read_bytes())["format"])
        except (ValueError, KeyError, TypeError):
            raise EcholabError(f"{self.root / MARKER} is damaged: it should hold the store's format") from None

    def mark(self, format: int) -> None:
        """Write the store's format: the old marker or the new one is there, never half of one."""
        marker = self.root / f"{MARKER}.{ids.random_id()}"
        write_synced(marker, json.dumps({"format": format, "created_at": now().isoformat()}).encode())
        marker.rename(self.root / MARKER)
        _sync_folder(self.root)

    # Where things lie.

    def folder(self, table: str) -> Path:
        return self.root / table

    @property
    def quarantine(self) -> Path:
        return self.root / "_quarantine"

    def job_folder(self, job: str) -> Path:
        return self.root / "_jobs" / job

    # Reading.

    def delta(self, table: str, version: int | None = None) -> DeltaTable:
        """A Delta table, refused where reading its files alone would be wrong."""
        try:
            dt = DeltaTable(self.folder(table), version=version)
        except TableNotFoundError:
            raise
        except (DeltaError, OSError, ValueError) as e:
            which = f" at version {version}" if version is not None else ""
            raise EcholabError(f"{self.folder(table)}{which} cannot be opened: {_first_line(e)}") from None
        protocol = dt.protocol()
        features = [*(protocol.reader_features or []), *(protocol.writer_features or [])]
        unknown = sorted(set(features) - {"appendOnly", "invariants"})
        if protocol.min_reader_version > 1 or unknown:
            what = ", ".join(unknown) or f"reader version {protocol.min_reader_version}"
            raise EcholabError(f"{self.folder(table)} uses Delta features that echolab does not read: {what}")
        return dt

    def _version(self, table: str, at: datetime | None = None) -> int | None:
        try:
            dt = self.delta(table)
        except TableNotFoundError:
            return None
        if at is None:
            return dt.version()
        stamp = at.timestamp() * 1000
        return max((h["version"] for h in dt.history() if h["timestamp"] <= stamp), default=None)

    def snapshot(self, version: int | None = None, at: datetime | None = None) -> Snapshot:
        """The store now; or as it stood at a time; or as it stood when its ledger came to `version`.

        The ledger is fixed first: its rows are committed last, so what it names is there. A compaction may drop what
        a newer ledger has superseded, so a ledger that moved while the other tables were opened is read again."""
        if version is None and at is None:
            for _ in range(SNAPSHOT_TRIES):
                snapshot = Snapshot(self, self._versions())
                if self._version("ingests") == snapshot.versions.get("ingests"):
                    return snapshot
            with self.lock():
                return Snapshot(self, self._versions())
        if version is not None:
            times = {h["version"]: h["timestamp"] for h in self.history("ingests")}
            if version not in times:
                raise EcholabError(f"no version {version} of this store: `echolab store history` lists them")
            at = datetime.fromtimestamp(times[version] / 1000, UTC)
        snapshot = Snapshot(self, self._versions(at) | ({"ingests": version} if version is not None else {}))
        if any(not f.path.exists() for table in snapshot.versions for f in snapshot.files(table)):
            raise EcholabError(f"{self.root} as it stood then is gone: `echolab store vacuum` removed its files")
        return snapshot

    def _versions(self, at: datetime | None = None) -> dict[str, int]:
        """Of every table that is there, the ledger's first: it is the first table of the schema."""
        versions = {table: self._version(table, at) for table in TABLES}
        return {table: v for table, v in versions.items() if v is not None}

    def history(self, table: str = "ingests") -> list[dict[str, Any]]:
        """Commits of one table, oldest first."""
        try:
            return sorted(self.delta(table).history(), key=lambda h: h["version"])
        except TableNotFoundError:
            return []

    # Writing.

    @contextmanager
    def lock(self, seconds: float = LOCK_SECONDS, name: str = "store") -> Iterator[None]:
        """The one lock under which anything is committed. A process that dies releases it. It is not reentrant.

        Another `name` is another lock (`compact`: one process at a time rewrites files, before it commits them)."""
        folder = self.root / "_locks"
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            raise Busy(f"{self.root} is being written by another process: waited {seconds:.0f} s") from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def job(self, kind: str) -> Iterator[Path]:
        """A folder for staged files, gone afterwards. Its lock tells the living from the dead."""
        folder = self.job_folder(f"{kind}-{ids.random_id()[:12]}")
        folder.mkdir(parents=True)
        try:
            with FileLock(folder / "alive.lock"):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def stage(self, table: str, rows: pa.Table, folder: Path) -> list[Staged]:
        """Write rows as one finished Parquet file for each partition value: sorted, encoded, synced, renamed."""
        spec = TABLES[table]
        self._require_current(table)
        rows = sort_rows(spec, conform(rows, spec.arrow))  # the unsorted ones are free now, if the caller let them go
        if spec.partition is None:
            return [_stage(spec, rows, None, folder)] if rows.num_rows else []
        values = pc.unique(rows[spec.partition]).to_pylist()
        if len(values) == 1:
            return [_stage(spec, rows, values[0], folder)]
        return [_stage(spec, rows.filter(pc.equal(rows[spec.partition], v)), v, folder) for v in values]

    def commit(
        self,
        table: str,
        staged: Sequence[Staged],
        replaces: Sequence[DataFile] = (),
        transactions: Mapping[str, int] | None = None,
    ) -> int:
        """Move staged files into their table and make them its next version. Call it under the lock.

        `replaces` are files that the staged ones hold the rows of (compaction). `transactions` names work items, so
        that a rerun can see them committed."""
        spec = TABLES[table]
        folder = self.folder(table)
        dt = self._create(spec)
        if {f.name for f in replaces} - ({f.name for f in _data_files(folder, dt)} if replaces else set()):
            raise EcholabError(f"{folder}: another process replaced the same files meanwhile, nothing was committed")
        stamp = int(time.time() * 1000)
        removes = [RemoveAction(f.name, False, stamp, f.size, dict(f.partition)) for f in replaces]
        facts = {
            "kind": "compact" if replaces else "append",
            "files_added": len(staged),
            "files_removed": len(replaces),
            "rows_added": sum(s.rows for s in staged),
            "rows_removed": sum(f.rows for f in replaces),
        }
        properties = CommitProperties(
            custom_metadata={f"echolab.{k}": str(v) for k, v in facts.items()},  # for `echolab store history`
            app_transactions=[Transaction(k, v) for k, v in (transactions or {}).items()],
        )
        partition = [spec.partition] if spec.partition else None
        adds: list[AddAction] = []
        try:
            for file in staged:
                adds.append(_add(folder, spec, file, data_change=not replaces))
            dt.create_write_transaction([*adds, *removes], "append", dt.schema(), partition, commit_properties=properties)
        except (DeltaError, OSError) as e:
            for add in adds:  # in no version: nobody has seen them
                (folder / add.path).unlink(missing_ok=True)
            raise EcholabError(f"cannot write to {folder}: {_first_line(e)}") from None
        dt.update_incremental()
        return dt.version()

    def add(self, table: str, rows: pa.Table) -> int:
        """Stage and commit a few rows of a small table. Call it under the lock."""
        with self.job("add") as folder:
            return self.commit(table, self.stage(table, rows, folder))

    def register(
        self,
        kind: str,
        id: str,
        name: str,
        config: Mapping[str, Any],
        parents: Mapping[str, Any] | None = None,
        version: int = 1,
    ) -> None:
        """Add a registry entry; the newest of an id counts. Call it under the lock."""
        entry = {
            "id": id,
            "name": name,
            "version": version,
            "config": json.dumps(config, sort_keys=True),
            "parents": json.dumps(parents or {}, sort_keys=True),
            "created_at": now(),
        }
        self.add(kind, pa.Table.from_pylist([entry], schema=TABLES[kind].arrow))

    def _create(self, spec: Table) -> DeltaTable:
        try:
            return self.delta(spec.name)
        except TableNotFoundError:
            configuration = {**_CONFIGURATION, **({"delta.appendOnly": "true"} if spec.name == "rollouts" else {})}
            partition = [spec.partition] if spec.partition else None
            folder = self.folder(spec.name)
            try:
                return DeltaTable.create(folder, spec.arrow, partition_by=partition, configuration=configuration)
            except (DeltaError, OSError) as e:
                raise EcholabError(f"cannot write to {folder}: {_first_line(e)}") from None

    def _require_current(self, table: str) -> None:
        """Writing needs the table as this version knows it; reading does not."""
        try:
            names = pa.schema(self.delta(table).schema().to_arrow()).names
        except TableNotFoundError:
            return
        ours = TABLES[table].arrow.names
        if missing := [n for n in ours if n not in names]:
            raise EcholabError(f"table {table} lacks {', '.join(missing)}: run `echolab store migrate`")
        if unknown := [n for n in names if n not in ours]:
            raise EcholabError(f"table {table} has columns of a newer echolab ({', '.join(unknown)}): update echolab")


def _instead(path: Path) -> str:
    """What to do where a path is no store: it may be the folder above one."""
    folder = path.expanduser()
    if not folder.is_dir():
        return "it is a file, a store is a folder"
    if stores := sorted(marker.parent.name for marker in folder.glob(f"*/{MARKER}")):
        return f"did you mean {path / stores[0]}?"
    if any(folder.iterdir()):
        return "give another folder; `echolab ingest` and `echolab store init` make a store"
    return f"make one with `echolab store init --store {path}`"


def _root(path: str | Path) -> Path:
    root = Path(path).expanduser().absolute()
    if re.search("%[0-9A-Fa-f]{2}", str(root)):  # deltalake 1.6 decodes such a path twice, and looks elsewhere
        raise EcholabError(f"{root}: a store's path cannot hold % and two hex digits, choose another folder")
    return root


def now() -> datetime:
    return datetime.now(UTC)


def partition_folder(column: str, value: str | None) -> str:
    """The folder of a partition, in the way that all readers of such folders decode."""
    return f"{column}={quote(value or '', safe='')}"


def _stage(spec: Table, rows: pa.Table, partition: str | None, folder: Path) -> Staged:
    path = folder / f"{ids.random_id()}.parquet"
    finish_file(path, spec, row_groups(rows))
    return Staged(spec.name, path, rows.num_rows, partition, statistics(spec, rows))


def _log_statistics(stats: dict[str, Any]) -> str:
    def finite(values: dict[str, Any]) -> dict[str, Any]:
        return {c: v for c, v in values.items() if not (isinstance(v, float) and math.isinf(v))}

    return json.dumps({**stats, "minValues": finite(stats["minValues"]), "maxValues": finite(stats["maxValues"])})


def _add(folder: Path, spec: Table, staged: Staged, data_change: bool) -> AddAction:
    """Check a staged file by its footer and move it to its place."""
    footer = pq.read_metadata(staged.path)
    if footer.num_rows != staged.rows or footer.schema.to_arrow_schema().names != spec.arrow.names:
        raise EcholabError(f"staged file {staged.path} is not what was written: nothing was committed")
    place = Path(partition_folder(spec.partition, staged.partition)) if spec.partition else Path()
    name = place / staged.path.name
    try:
        (folder / place).mkdir(parents=True, exist_ok=True)
        staged.path.rename(folder / name)
    except OSError as e:
        raise EcholabError(f"cannot write to {folder / place}: {e.strerror or e}") from None
    _sync_folder(folder / place)
    partition = {spec.partition: staged.partition} if spec.partition else {}
    size = (folder / name).stat().st_size
    return AddAction(str(name), size, partition, int(time.time() * 1000), data_change, _log_statistics(staged.stats))


def _data_files(folder: Path, dt: DeltaTable) -> list[DataFile]:
    actions = pa.RecordBatchReader.from_stream(dt.get_add_actions(flatten=True)).read_all()
    actions = actions.select([f.name for f in actions.schema if not pa.types.is_timestamp(f.type)])  # nobody asks for these
    files = []
    for row in actions.to_pylist():
        facts: dict[str, dict[str, Any]] = {"min": {}, "max": {}, "null_count": {}, "partition": {}}
        for name, value in row.items():
            kind, dot, column = name.partition(".")
            if dot:
                facts[kind][column] = value
        name = unquote(row["path"])  # the log holds it URL-encoded
        low, high, nulls, partition = facts.values()
        files.append(DataFile(folder / name, name, row["num_records"], row["size_bytes"], partition, low, high, nulls))
    return sorted(files, key=lambda f: f.name)


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _first_line(error: Exception) -> str:
    """With what deltalake says of its causes: coloured, one below the other, each behind an arrow."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    text = re.sub(r"\s*\n\s*↳\s*", ": ", text)
    return text.splitlines()[0][:200] if text else type(error).__name__
