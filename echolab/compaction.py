"""Merging small files into sorted ones, in bounded memory, without the rows of readings that are not live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from echolab import ids, scan
from echolab.errors import Busy, EcholabError
from echolab.files import ROW_GROUP_BYTES, ROW_GROUP_ROWS, conform, finish_file, merge_statistics, pc, statistics
from echolab.schema import TABLES, Table
from echolab.store import DataFile, Snapshot, Staged, Store

TARGET_BYTES = 256 << 20  # on disk; a file ends with the row group that reaches it
SMALL_BYTES = TARGET_BYTES // 2
TINY_BYTES = 8 << 20  # what is worth a compaction that nobody asked for: far below a file that ingest fills
MERGE_FILES, MERGE_BYTES = 256, 320 << 20  # what one merge reads at once: files, and memory for their open pages
PAGES_BYTES = 20 << 20  # of one open file, at most (measured, for rollouts)
MANY_SMALL_FILES, MANY_SMALL_ROOT_FILES = 32, 64
BLOCK_BYTES = 16 << 20
KEY_MEMORY = "256MB"


@dataclass
class _Done:
    files_before: int = 0
    files_after: int = 0
    rows_dropped: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    tables: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Merge:
    spec: Table
    partition: str | None
    files: list[DataFile]


def compact(store: Store, table: str | None = None, full: bool = False) -> dict[str, Any]:
    """Merge small files, and rewrite those with rows that no ledger will show; `full` rewrites all.

    Takes the store lock itself, for planning and for each commit; rows are rewritten outside of it."""
    if table is not None and table not in TABLES:
        raise EcholabError(f"no table {table}: there are {', '.join(TABLES)}")
    with store.lock(name="compact"):
        return _compact(store, list(TABLES) if table is None else [table], full)


def auto(store: Store, table: str) -> dict[str, Any] | None:
    """Compact a table where small files have piled up; None where they have not, or somebody is at it already."""
    spec = TABLES[table]
    many = MANY_SMALL_FILES if spec.partition else MANY_SMALL_ROOT_FILES
    tiny = (f for f in store.snapshot().files(table) if f.size < TINY_BYTES)
    small = [len(group) for group in _by_partition(spec, tiny).values()]
    if max(small, default=0) <= many:
        return None
    try:
        with store.lock(seconds=0, name="compact"):
            return _compact(store, [table], full=False)
    except Busy:
        return None


def _compact(store: Store, tables: Sequence[str], full: bool) -> dict[str, Any]:
    done = _Done()
    with store.lock():  # no reading is half committed now: what the ledger lacks, it lacks for good
        snapshot = store.snapshot()
        live = [(r.ingest_id,) for r in snapshot.ledger.live]
    with store.job("compact") as folder, scan.scratch(folder, KEY_MEMORY) as con:
        con.execute("CREATE TABLE live (ingest_id VARCHAR)")
        if live:
            con.executemany("INSERT INTO live VALUES (?)", live)
        for name in tables:
            for merge in _plan(snapshot, con, TABLES[name], full):
                _run(store, con, merge, folder, done)
    return asdict(done)


def _plan(snapshot: Snapshot, con: duckdb.DuckDBPyConnection, spec: Table, full: bool) -> list[_Merge]:
    """Which files to merge."""
    merges = []
    for partition, files in _by_partition(spec, snapshot.files(spec.name)).items():
        dead = _files_with_dead_rows(con, spec, files)
        chosen = [f for f in files if full or _is_small(f) or f.name in dead]
        for batch in _batches(chosen):
            if full or len(batch) > 1 or batch[0].name in dead:
                merges.append(_Merge(spec, partition, batch))
    return merges


def _run(store: Store, con: duckdb.DuckDBPyConnection, merge: _Merge, folder: Path, done: _Done) -> None:
    spec, files = merge.spec, merge.files
    dropped = _count_dead(con, spec, files)
    staged = list(_stage(merge, _merged(con, spec, files), folder))
    before, after = sum(f.rows for f in files), sum(pq.read_metadata(s.path).num_rows for s in staged)
    if before != after + dropped:
        raise EcholabError(
            f"compaction of {spec.name} read {before} rows and wrote {after} of {before - dropped}: nothing was changed;"
            " run `echolab store validate`"
        )
    size = sum(s.path.stat().st_size for s in staged)
    with store.lock():
        store.commit(spec.name, staged, replaces=files)
    done.files_before += len(files)
    done.files_after += len(staged)
    done.rows_dropped += dropped
    done.bytes_before += sum(f.size for f in files)
    done.bytes_after += size
    if spec.name not in done.tables:
        done.tables.append(spec.name)


def _by_partition(spec: Table, files: Iterable[DataFile]) -> dict[str | None, list[DataFile]]:
    groups: dict[str | None, list[DataFile]] = {}
    for f in files:
        groups.setdefault(f.partition[spec.partition] if spec.partition else None, []).append(f)
    return groups


def _is_small(file: DataFile) -> bool:
    return file.size < SMALL_BYTES


def _batches(files: Sequence[DataFile]) -> Iterator[list[DataFile]]:
    """Files of neighbouring steps together, as many as one merge may read."""
    batch: list[DataFile] = []
    memory = 0
    for f in sorted(files, key=lambda f: (f.low.get("step") is None, f.low.get("step") or 0, f.name)):
        pages = min(4 * f.size, PAGES_BYTES)
        if batch and (len(batch) == MERGE_FILES or memory + pages > MERGE_BYTES):
            yield batch
            batch, memory = [], 0
        batch.append(f)
        memory += pages
    if batch:
        yield batch


def _has_readings(spec: Table) -> bool:
    return spec.name == "rollouts"


def _files_with_dead_rows(con: duckdb.DuckDBPyConnection, spec: Table, files: Sequence[DataFile]) -> set[str]:
    if not _has_readings(spec):
        return set()
    source = scan.parquet([f.path for f in files], ", filename = true")
    dead = con.sql(f"SELECT DISTINCT filename FROM {source} WHERE ingest_id NOT IN (FROM live)").fetchall()
    paths = {path for (path,) in dead}
    return {f.name for f in files if str(f.path) in paths}


def _count_dead(con: duckdb.DuckDBPyConnection, spec: Table, files: Sequence[DataFile]) -> int:
    if not _has_readings(spec):
        return 0
    source = scan.parquet([f.path for f in files])
    return con.sql(f"SELECT count(*) FROM {source} WHERE ingest_id NOT IN (FROM live)").fetchall()[0][0]


# The merge. Every file is sorted, so the next rows of the merged order are the next rows of some of the files: only
# the keys are sorted as a whole (by DuckDB, which spills), and each file is read once from its beginning to its end.


def _merged(con: duckdb.DuckDBPyConnection, spec: Table, files: Sequence[DataFile]) -> Iterator[pa.Table]:
    """The rows that stay, in order, in blocks of about BLOCK_BYTES."""
    cursors = [_Cursor(f.path, spec) for f in files]
    row_bytes = sum(c.bytes for c in cursors) / max(sum(f.rows for f in files), 1)
    rows = max(1, int(BLOCK_BYTES / max(row_bytes, 1)))
    order = _order(con, spec, files)
    for batch in order:
        for start in range(0, batch.num_rows, rows):
            yield _block(cursors, batch.slice(start, rows))


def _order(con: duckdb.DuckDBPyConnection, spec: Table, files: Sequence[DataFile]) -> pa.RecordBatchReader:
    """(file, row) of all rows that stay, in the order of the table."""
    con.execute("CREATE OR REPLACE TABLE files (filename VARCHAR, file INTEGER)")
    con.executemany("INSERT INTO files VALUES (?, ?)", [(str(f.path), i) for i, f in enumerate(files)])
    source = scan.parquet([f.path for f in files], ", filename = true, file_row_number = true")
    where = "WHERE ingest_id IN (FROM live)" if _has_readings(spec) else ""
    keys = ", ".join(f'"{c}" NULLS LAST' for c in spec.sort)
    query = f"SELECT file, file_row_number AS row FROM {source} JOIN files USING (filename) {where} ORDER BY {keys}, file, row"
    return con.sql(query).to_arrow_reader(1 << 14)


def _block(cursors: Sequence[_Cursor], order: pa.RecordBatch) -> pa.Table:
    parts, places = [], []
    for file in pc.unique(order["file"]).to_pylist():
        place = pc.indices_nonzero(pc.equal(order["file"], file))
        parts.append(cursors[file].take(order["row"].take(place)))
        places.append(place)
    return pa.concat_tables(parts).take(pc.sort_indices(pa.concat_arrays(places)))


class _Cursor:
    """Reads a file once, from its beginning to its end, and keeps no more of it than has been asked for."""

    def __init__(self, path: Path, spec: Table):
        self.path, self.schema = path, spec.arrow
        meta = pq.read_metadata(path)
        self.bytes = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        self.batch = max(1, min(4096, int((1 << 20) * meta.num_rows / max(self.bytes, 1))))
        self._rewind()

    def _rewind(self) -> None:
        file = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 16)
        self.batches = file.iter_batches(batch_size=self.batch, use_threads=False)
        self.start = 0  # the file's row that `buffer` starts with
        self.buffer = self.schema.empty_table()

    def take(self, rows: pa.Array) -> pa.Table:
        ends = pc.min_max(rows).as_py()
        if ends["min"] < self.start:  # not sorted: other software wrote it, or an echolab with another order
            self._rewind()
        parts, end = [self.buffer], self.start + self.buffer.num_rows
        while end <= ends["max"]:
            part = conform(pa.Table.from_batches([next(self.batches)]), self.schema)
            parts.append(part)
            end += part.num_rows
        held = pa.concat_tables(parts)
        taken = held.take(pc.subtract(rows, self.start))
        self.buffer = held.slice(ends["max"] + 1 - self.start)
        self.start = ends["max"] + 1
        return taken


def _stage(merge: _Merge, blocks: Iterator[pa.Table], folder: Path) -> Iterator[Staged]:
    """Files of about TARGET_BYTES."""
    groups = _row_groups(blocks)
    while True:
        path = folder / f"{ids.random_id()}.parquet"
        stats: list[dict[str, Any]] = []

        def until_full(path: Path = path, stats: list[dict[str, Any]] = stats) -> Iterator[pa.Table]:
            for group in groups:
                stats.append(statistics(merge.spec, group))
                yield group
                del group  # written: make room before the next one is read
                if path.with_suffix(".tmp").stat().st_size >= TARGET_BYTES:
                    return

        finish_file(path, merge.spec, until_full())
        if not stats:
            path.unlink()
            return
        total = merge_statistics(stats)
        yield Staged(merge.spec.name, path, total["numRecords"], merge.partition, total)


def _row_groups(blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    size = rows = 0
    for block in blocks:
        held.append(block)
        size, rows = size + block.nbytes, rows + block.num_rows
        full = size >= ROW_GROUP_BYTES and (rows >= ROW_GROUP_ROWS[0] or size >= 4 * ROW_GROUP_BYTES)
        if full or rows >= ROW_GROUP_ROWS[1]:
            group, held, size, rows = pa.concat_tables(held), [], 0, 0
            yield group
            del group
    if held:
        yield pa.concat_tables(held)
