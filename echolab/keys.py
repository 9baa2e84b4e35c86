"""Rows of the tables that have no ledger: the same key is stored once."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from echolab.files import pc
from echolab.scan import parquet, scratch
from echolab.schema import TABLES
from echolab.store import DataFile, Snapshot


def without_known(snapshot: Snapshot, table: str, rows: pa.Table, folder: Path) -> pa.Table:
    """The rows whose keys the table does not hold, each key once. Call it under the lock."""
    spec = TABLES[table]
    partitions = set(pc.unique(rows[spec.partition]).to_pylist()) if spec.partition else set()
    files = [f for f in snapshot.files(table) if not spec.partition or f.partition[spec.partition] in partitions]
    files = [f.path for f in files if "step" not in rows.column_names or _may_share(f, rows["step"])]
    keys = rows.select(list(spec.key)).append_column("place", pa.array(range(rows.num_rows), pa.int64()))
    columns = ", ".join(spec.key)
    with scratch(folder) as db:
        db.register("new", keys)
        known = f"ANTI JOIN {parquet(files)} USING ({columns})" if files else ""
        new = db.sql(f"SELECT min(place) AS place FROM new {known} GROUP BY {columns} ORDER BY place")
        places = new.to_arrow_table().column("place")
    return rows if len(places) == rows.num_rows else rows.take(places)


def _may_share(file: DataFile, steps: pa.ChunkedArray) -> bool:
    """A rollout has one step: rows whose steps are apart have no key in common."""
    low, high = file.low.get("step"), file.high.get("step")
    if low is None or high is None or steps.null_count:
        return True
    first, last = pc.min(steps).as_py(), pc.max(steps).as_py()
    return first <= high and last >= low
