"""The data files of a store: how rows are sorted, cut into row groups, encoded, and described in the log."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from echolab.errors import EcholabError
from echolab.schema import Table

pc: Any = pyarrow.compute  # makes its functions when it is imported, where pyright does not see them

ROW_GROUP_BYTES = 192 << 20  # uncompressed, as Arrow holds it
ROW_GROUP_ROWS = (2_048, 1 << 20)
DICTIONARY_BYTES = 32 << 20  # prompts and group ids repeat: keep their dictionary for a whole row group


def write_parquet(path: Path, spec: Table, rows: Iterable[pa.Table]) -> None:
    """The one Parquet writer. Lists of numbers are byte-stream-split, what repeats keeps its dictionary."""
    split = [_leaf(c.name) for c in spec.columns if pa.types.is_list(c.type) and c.type.value_type in _SPLIT]
    split += [c.name for c in spec.columns if pa.types.is_floating(c.type)]
    dictionary = [c.name for c in spec.columns if c.name in _REPEATS]
    if spec.name == "rollouts":
        dictionary.append("origin.file")
    writer = pq.ParquetWriter(
        path,
        spec.arrow,
        compression="zstd",
        compression_level=1,
        use_dictionary=dictionary,  # pyright: ignore[reportArgumentType]
        use_byte_stream_split=split,  # pyright: ignore[reportArgumentType]
        dictionary_pagesize_limit=DICTIONARY_BYTES,
        store_schema=False,
    )
    with writer:
        for table in rows:
            writer.write_table(table, row_group_size=max(table.num_rows, 1))
            del table  # before the next one is made: one row group at a time


_SPLIT = (pa.int32(), pa.float32())
_REPEATS = frozenset((
    "ingest_id", "run", "split", "role", "model", "source", "group_id", "group_source", "prompt_id",
    "problem_id", "prompt", "messages", "prompt_format", "tokenizer", "finish_reason", "ground_truth",
    "policy_version", "sampling", "step", "verifier", "status", "scorer", "segmenter", "clipset",
    "group_kind", "selector", "profile", "axis", "slice", "statistic",
))  # fmt: skip


def _leaf(column: str) -> str:
    return f"{column}.list.element"


def sort_rows(spec: Table, rows: pa.Table) -> pa.Table:
    if not spec.sort:
        return rows
    order = pc.sort_indices(rows, sort_keys=[(c, "ascending", "at_end") for c in spec.sort])
    return rows.take(order)


def row_groups(rows: pa.Table) -> Iterator[pa.Table]:
    """Slices that keep a row group within its bytes, and above its fewest rows where that fits."""
    if not rows.num_rows:
        return
    fewest, most = ROW_GROUP_ROWS
    step = max(1, int(rows.num_rows * ROW_GROUP_BYTES / max(rows.nbytes, 1)))
    step = min(max(step, fewest if rows.nbytes / rows.num_rows * fewest < 4 * ROW_GROUP_BYTES else 1), most)
    for start in range(0, rows.num_rows, step):
        piece = rows.slice(start, step)
        if piece.num_rows > 1 and piece.nbytes > 4 * ROW_GROUP_BYTES:  # long rows that stand together
            half = piece.num_rows // 2
            yield from row_groups(piece.slice(0, half))
            yield from row_groups(piece.slice(half))
        else:
            yield piece


def finish_file(path: Path, spec: Table, rows: Iterable[pa.Table]) -> None:
    """Write a file so that it is either whole under its name or not there."""
    unfinished = path.with_suffix(".tmp")
    try:
        write_parquet(unfinished, spec, rows)
        with unfinished.open("rb") as f:
            os.fsync(f.fileno())
        unfinished.rename(path)
    except OSError as e:
        unfinished.unlink(missing_ok=True)
        raise EcholabError(f"cannot write to the store: {e.strerror or e}") from None


def statistics(spec: Table, rows: pa.Table) -> dict[str, Any]:
    """Delta statistics of the scalar columns. NaN is left out of minimum and maximum; infinity is kept here, as
    files are merged, but JSON has no word for it: the log then holds no bound."""
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    for c in spec.columns:
        if pa.types.is_nested(c.type) or c.name == spec.partition or c.name in _LONG_TEXTS:
            continue
        values = rows[c.name]
        nulls[c.name] = values.null_count
        if pa.types.is_floating(c.type):
            values = values.filter(pc.invert(pc.is_nan(values)))
        if pa.types.is_boolean(c.type) or len(values) == values.null_count:
            continue
        ends = pc.min_max(values).as_py()
        low[c.name], high[c.name] = (_stat(ends[k]) for k in ("min", "max"))
    return {"numRecords": rows.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls}


def merge_statistics(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of several tables together."""
    merged: dict[str, Any] = {"numRecords": sum(p["numRecords"] for p in parts)}
    for name, best in (("minValues", min), ("maxValues", max)):
        columns = {c: None for p in parts for c in p[name]}
        merged[name] = {c: best(p[name][c] for p in parts if c in p[name]) for c in columns}
    merged["nullCount"] = {c: sum(p["nullCount"][c] for p in parts) for c in (parts[0]["nullCount"] if parts else ())}
    return merged


# Columns whose smallest value is a page of prose, or no text that JSON could hold.
_LONG_TEXTS = frozenset((
    "prompt", "messages", "completion", "ground_truth", "extra", "sampling", "options", "config", "parents",
    "extracted", "clip", "text", "bytes",
))  # fmt: skip


def _stat(value: Any) -> Any:
    return value.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if isinstance(value, datetime) else value


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of the schema in its order, absent ones as NULL."""
    columns = [rows[f.name].cast(f.type) if f.name in rows.column_names else pa.nulls(rows.num_rows, f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """As `to_pylist`, which imports pandas to make a time, where there is pandas: a tenth of a second."""
    times = [f.name for f in table.schema if pa.types.is_timestamp(f.type)]
    for name in times:
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.int64()))
    rows = table.to_pylist()
    for row in rows:
        row |= {name: _EPOCH + timedelta(microseconds=row[name]) for name in times if row[name] is not None}
    return rows


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
