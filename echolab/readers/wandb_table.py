"""Tables that were logged to Weights & Biases, as downloaded: `*.table.json`, {"columns": [...], "data": [[...], ...]}.

Of TRL (`completions`): its Parquet dump in another container. Of OpenRLHF (`train/generated_samples`): one sample a step, in
one text with its prompt; each later table repeats the rows of the earlier ones."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from echolab.errors import Unreadable
from echolab.readers.base import Bad, Head, Row, Source, hash_whole, integer, number, parse_json
from echolab.readers.jsonstream import ALL, Broken, Piece, walk
from echolab.readers.trl import Facts, group_size, rollout, weights_of

NAME = "wandb_table"
VERSION = 1
CONTINUES = False

_TRL, _OPENRLHF = frozenset({"step", "prompt", "completion"}), frozenset({"global_step", "text", "reward"})
_PATH = ("data", ALL)
_COLUMNS = re.compile(rb'"columns"\s*:\s*(\[(?:\s*"(?:[^"\\]|\\.)*"\s*,?)*\s*\])\s*,\s*"data"\s*:\s*\[')


def sniff(head: Head) -> str | None:
    if head.schema is not None or not head.start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return None
    match = _COLUMNS.search(head.start)
    try:
        columns = set(parse_json(match[1])) if match else set()
    except ValueError:
        return None
    if columns >= _TRL:
        return "a table of columns and data, as TRL logs its completions"
    return "a table of columns and data, as OpenRLHF logs a sample" if columns == _OPENRLHF else None


def read(source: Source) -> Iterator[Row | Bad]:
    hash_whole(source)
    if source.size == 0:
        return
    columns = _columns(source)
    of_trl = set(columns) >= _TRL
    weights, size = _prepare(source, columns) if of_trl else ({}, None)
    if not of_trl:
        source.notes.append("OpenRLHF logs one sample a step: its text is prompt and response together, and it has no group")
    for piece in _pieces(source):
        row = source.rows
        source.rows += 1
        try:
            values = _values(piece, columns)
            item = rollout(source, row, values, weights, size) if of_trl else _sample(row, values)
        except ValueError as e:
            item = Bad(row, str(e), b"")
        item.raw = piece.raw
        yield item


def _pieces(source: Source) -> Iterator[Piece | Broken]:
    return (p for p in walk(source.path, _PATH, source.size) if isinstance(p, Broken) or not p.side)


def _columns(source: Source) -> list[str]:
    for piece in walk(source.path, _PATH, source.size):
        if isinstance(piece, Piece) and piece.at == ("columns",):
            try:
                names = parse_json(piece.raw)
            except ValueError:
                break
            columns = [str(name) for name in names] if isinstance(names, list) else []
            if set(columns) >= _TRL or set(columns) >= _OPENRLHF:
                return columns
            raise Unreadable(
                f"{source.path}: a table of neither TRL nor OpenRLHF, its columns are {', '.join(columns) or 'none'}"
            )
    raise Unreadable(f"{source.path}: not a W&B table, it has no columns")


def _values(piece: Piece | Broken, columns: list[str]) -> dict[str, Any]:
    if isinstance(piece, Broken):
        raise ValueError(piece.reason)
    values = parse_json(piece.raw)
    if not isinstance(values, list):
        raise ValueError(f"expected a list of values, got {type(values).__name__}")
    if len(values) != len(columns):
        raise ValueError(f"{len(values)} values for {len(columns)} columns")
    return dict(zip(columns, values, strict=True))


@dataclass
class _Column:
    """A column as numbers. It is one of numbers if its first value is a number."""

    numbers: array = field(default_factory=lambda: array("d"))  # NaN: none
    first: Any = None
    floats: bool = False

    def add(self, value: Any) -> None:
        value = math.nan if value == "NaN" else value
        self.first = value if self.first is None else self.first
        self.floats = self.floats or isinstance(value, float)
        try:
            found = number(value, "")
        except ValueError:
            found = None
        self.numbers.append(math.nan if found is None else found)


def _prepare(source: Source, names: list[str]) -> tuple[dict[str, float], int | None]:
    """The reward columns with their weights, and the group size."""
    columns, facts, last = {name: _Column() for name in names}, Facts(), None
    for piece in _pieces(source):
        try:
            values = _values(piece, names)
            visit = values["step"], values["prompt"]
        except ValueError:
            values, visit = {}, last  # it counts in its block
        if facts.runs and visit == last:
            facts.runs[-1] += 1
        else:
            facts.runs.append(1)
        last = visit
        for name, column in columns.items():
            column.add(values.get(name))
    floats = any(c.floats for name, c in columns.items() if name != "advantage")  # else whole numbers are rewards too
    numeric = {name: c.floats or not floats for name, c in columns.items() if isinstance(c.first, int | float)}
    weights = weights_of(source, numeric)
    n = sum(facts.runs)
    facts.rewards = array("d", [0.0]) * n
    for name, weight in weights.items():
        for i, value in enumerate(columns[name].numbers):
            facts.rewards[i] += 0.0 if math.isnan(value) else weight * value
    facts.advantages = columns["advantage"].numbers if "advantage" in columns else array("d", [math.nan]) * n
    return weights, group_size(source, facts)


def _sample(row: int, values: dict[str, Any]) -> Row:
    text = values["text"]
    if not isinstance(text, str):
        raise ValueError("text is missing" if text is None else f"text is not a text: {type(text).__name__}")
    fields = {
        "step": integer(values["global_step"], "global_step"),
        "completion": text,
        "reward": number(values["reward"], "reward"),
        "extra": {k: v for k, v in values.items() if k not in _OPENRLHF and v is not None},
    }
    return Row(row, fields, (text,))  # the same sample in a later table is the same rollout
