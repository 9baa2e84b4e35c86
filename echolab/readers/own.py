"""Rollouts of a store, read again: what `echolab sql "SELECT * FROM rollouts" --out FILE` writes as Parquet or JSON, or the
same rows as JSONL. Beside the columns of `rollouts` a row may have the `entropies` of its completion_ids, as our own sampler
writes them.

The exported group_id is the group's key, so that groups stay what they were under any run and split. Ids are made anew. What a
view adds to its table is not taken."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echolab.readers.base import BOM, Bad, Head, Row, Scores, Source, hash_whole, look, parse_json, raw_json
from echolab.readers.jsonstream import ALL
from echolab.readers.plain import COLUMNS, CONVERT, as_word, elements, first_row, items_of, numbers
from echolab.schema import FLOATS, ROLLOUTS

NAME = "echolab"
VERSION = 2  # entropies
CONTINUES = True  # lines do; Parquet and documents say found["whole"]

_DOCUMENT = re.compile(rb'\s*\{\s*"columns"\s*:\s*(\[.*?\])\s*,\s*"rows"\s*:\s*\[', re.DOTALL)
_ID = re.compile(r"[0-9a-f]{32}")
_TAKEN = (*(c for c in COLUMNS if c != "group"), "group_source")
_VIEW = {"success", "kind", "success_threshold", "failure_reward", "completeness"}  # what the view adds
_LEFT = {c.name for c in ROLLOUTS.columns} | _VIEW | {"entropies"}
_WORST = ("all", "effective", "filtered")  # the later the less a dump can show


def sniff(head: Head) -> str | None:
    document = _document(head)
    row = dict.fromkeys(document) if document is not None else first_row(head)
    if not {"rollout_id", "group_id"} <= row.keys() or not ({"completion", "completion_ids"} & row.keys()):
        return None
    ids = [id for id in (row["rollout_id"], row["group_id"]) if id is not None]
    if not all(isinstance(id, str) and _ID.fullmatch(id) for id in ids):
        return None
    return "rollouts of a store: its rows have rollout_id and group_id"


def _document(head: Head) -> list[str] | None:
    """Names of the columns of a result that was written as one JSON document."""
    match = _DOCUMENT.match(head.start.removeprefix(BOM)) if head.schema is None else None
    try:
        columns = parse_json(match[1]) if match else None
    except ValueError:
        return None
    if not isinstance(columns, list) or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in columns):
        return None
    return [c["name"] for c in columns]


def read(source: Source) -> Iterator[Row | Bad]:
    for item in _items(source):
        if isinstance(item, Bad):
            yield item
            continue
        row, raw, value = item
        try:
            fields = _fields(value)
            made = Row(row, fields, (_group(value),), raw, scores=_scores(value, fields))
        except ValueError as e:
            yield Bad(row, str(e), raw or raw_json(value))
            continue
        if value.get("completeness") in _WORST:
            known = (source.found.get("completeness", "all"), value["completeness"])
            source.found["completeness"] = max(known, key=_WORST.index)
        yield made


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as `read` takes them, all with the same columns."""
    columns = (*ROLLOUTS.arrow, pa.field("entropies", FLOATS))
    schema = pa.schema([c for c in columns if c.name in rows[0]])
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")


def _items(source: Source) -> Iterator[tuple[int, bytes, dict[str, Any]] | Bad]:
    if _document(look(source.path)) is None:
        yield from items_of(source)
        return
    source.found["whole"] = True  # a longer file is another file
    hash_whole(source)
    yield from elements(source, ("rows", ALL))


def _scores(value: dict[str, Any], fields: dict[str, Any]) -> Scores | None:
    if value.get("entropies") is None:
        return None
    logprobs = fields.get("logprobs")
    known = logprobs is not None and None not in logprobs
    return Scores(numbers("d", value["entropies"], "entropies"), logprobs if known else None)


def _group(value: dict[str, Any]) -> str:
    group = value.get("group_id")
    if not group or not isinstance(group, str):
        raise ValueError("group_id is missing" if not group else f"group_id is not a text: {type(group).__name__}")
    return group


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    fields = {c: _convert(c, value[c]) for c in _TAKEN if value.get(c) is not None}
    if value.get("role") not in (None, "policy", "expert"):
        raise ValueError(f"role is neither policy nor expert: {str(value['role'])[:80]!r}")
    fields["role"] = value.get("role")
    if rest := {name: v for name, v in value.items() if name not in _LEFT and v is not None}:
        extra = parse_json(fields["extra"].encode()) if isinstance(fields.get("extra"), str) else fields.get("extra")
        fields["extra"] = {**(extra if isinstance(extra, dict) else {} if extra is None else {"extra": extra}), **rest}
    return fields


def _is_pair(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"key", "value"} and isinstance(value["key"], str)


def _convert(column: str, value: Any) -> Any:
    if column in ("messages", "sampling", "extra"):
        # Columns of JSON text: checked, and kept as they are, as ids are made from them.
        parsed = parse_json(value.encode()) if isinstance(value, str) else value
        checked = CONVERT[column](parsed, column) if column in CONVERT else parsed
        return value if isinstance(value, str) else checked
    if column == "rewards" and isinstance(value, list) and all(map(_is_pair, value)):  # DuckDB gives a map as a list of pairs
        value = {v["key"]: v["value"] for v in value}
    if column == "logprobs" and isinstance(value, list):  # JSON knows no NaN: null stands for it
        numbers("d", [0.0 if v is None else v for v in value], column)
        return value
    if column == "group_source" and value not in ("explicit", "contiguous", "prompt_text", "prompt_ids"):
        raise ValueError(f"group_source is no rule by which groups are found: {str(value)[:80]!r}")
    return CONVERT.get(column, as_word)(value, column)
