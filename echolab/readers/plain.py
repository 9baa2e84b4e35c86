"""Any other table of rollouts: JSONL, a JSON array or Parquet, by its own column names or by `--map column=path`."""

from __future__ import annotations

import difflib
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from echolab.errors import EcholabError, Unreadable
from echolab.readers.base import (
    BOM,
    HEAD_BYTES,
    Bad,
    Head,
    Row,
    Source,
    flag,
    hash_whole,
    integer,
    json_lines,
    number,
    open_bytes,
    parquet_rows,
    parse_json,
    raw_json,
    text,
    unpacked_name,
)
from echolab.readers.jsonstream import ALL, Broken, Piece, walk
from echolab.schema import ROLLOUTS

NAME = "plain"
VERSION = 1
CONTINUES = True  # lines do; arrays and Parquet say found["whole"]

# Columns that ingest makes: a dump's fields of these names go to `extra`.
_MADE = {"rollout_id", "ingest_id", "run", "role", "group_id", "group_source", "prompt_id", "problem_id", "n_chars", "origin"}
COLUMNS = (*(c.name for c in ROLLOUTS.columns if c.name not in _MADE), "group")
_COMPLETION = ("completion", "completion_ids")
_LIKELY = (
    "response",
    "output",
    "generation",
    "answer",
    "text",
    "responses",
    "outputs",
    "completions",
    "generations",
    "samples",
)

Names = tuple[str, ...]


def sniff(head: Head) -> str | None:
    keys = first_row(head)
    name = next((n for n in _COMPLETION if n in keys), None)
    return f"its rows have the field {name}" if name else None


def first_row(head: Head) -> dict[str, Any]:
    """The first object of a file in any container; of Parquet its columns, without values."""
    if head.schema is None and _is_array(head.path, head.start):
        first = next(walk(head.path, (ALL,)), None)
        try:
            value = None if first is None or isinstance(first, Broken) else parse_json(first.raw)
        except ValueError:
            value = None
    else:
        value = dict.fromkeys(head.keys) if head.schema is not None else head.first
    return value if isinstance(value, dict) else {}


def _is_array(path: File, start: bytes) -> bool:
    lines = unpacked_name(path.name).lower().endswith((".jsonl", ".ndjson"))
    return not lines and start.removeprefix(BOM).lstrip().startswith(b"[")


@dataclass
class _Map:
    """Where columns come from: a path of names, or (`lists`) the path to a list and on within each of its elements."""

    single: dict[str, Names] = field(default_factory=dict)
    lists: dict[str, tuple[Names, Names]] = field(default_factory=dict)

    @property
    def used(self) -> list[Names]:
        """The paths that the map takes from an object as a whole."""
        return [*self.single.values(), *(before for before, _ in self.lists.values())]

    @property
    def columns(self) -> set[str]:
        return {*self.single, *self.lists}


def read(source: Source) -> Iterator[Row | Bad]:
    plan = _plan(source.options.map)
    checked = source.start > 0
    absent = plan.columns - {"group"} if not checked else set()
    for item in items_of(source):
        if isinstance(item, Bad):
            yield item
            continue
        row, raw, value = item
        if not checked:
            _check(source, plan, value)
            checked = True
        try:
            rows = _rollouts(source.rel, plan, row, value)
        except ValueError as e:
            yield Bad(row, str(e), raw or raw_json(value))
            continue
        for r in rows:
            if isinstance(r, Row):
                absent -= {c for c in absent if _has(r.fields, c)}
            r.raw = r.raw or raw
            yield r
    for column in sorted(absent) if checked else ():
        source.notes.append(f"--map {column}={source.options.map[column]}: no row has it")


def _has(fields: dict[str, Any], column: str) -> bool:
    if column.startswith("rewards."):
        return column.removeprefix("rewards.") in (fields.get("rewards") or {})
    return fields.get("messages" if column == "prompt" and fields.get("prompt") is None else column) is not None


def items_of(source: Source) -> Iterator[tuple[int, bytes, dict[str, Any]] | Bad]:
    """The objects of a file in any container, each with its row, and its bytes where it is text."""
    with open_bytes(source.path) as f:
        start = f.read(HEAD_BYTES)
    if start[:4] != b"PAR1" and not _is_array(source.path, start):
        yield from json_lines(source)
        return
    source.found["whole"] = True  # a longer file is another file
    hash_whole(source)
    if start[:4] == b"PAR1":
        for item in parquet_rows(source):
            yield item if isinstance(item, Bad) else (item[0], b"", item[1])
    else:
        yield from elements(source, (ALL,))


def elements(source: Source, names: Sequence[str]) -> Iterator[tuple[int, bytes, dict[str, Any]] | Bad]:
    """The objects of a list in a JSON document, to which `names` lead."""
    for piece in walk(source.path, names, source.size):
        if isinstance(piece, Piece) and piece.side:
            continue
        row = source.rows
        source.rows += 1
        if isinstance(piece, Broken):
            yield Bad(row, piece.reason, piece.raw)
            continue
        try:
            value = parse_json(piece.raw)
        except ValueError as e:
            yield Bad(row, str(e), piece.raw)
            continue
        if isinstance(value, dict):
            yield row, piece.raw, value
        else:
            yield Bad(row, f"expected a JSON object, got {type(value).__name__}", piece.raw)


def _plan(given: dict[str, str]) -> _Map:
    plan = _Map()
    for column, path in given.items():
        if column not in COLUMNS and not (column.startswith("rewards.") and column != "rewards."):
            near = difflib.get_close_matches(column, COLUMNS, n=1, cutoff=0.0)[0]
            raise EcholabError(f"--map {column}={path}: there is no column {column!r}; the nearest is {near!r}")
        names = path.split(".")
        listed = [i for i, name in enumerate(names) if name.endswith(ALL)]
        if len(listed) > 1:
            raise EcholabError(f"--map {column}={path}: a path may hold one [] at most")
        if any(not name.removesuffix(ALL) for name in names):
            raise EcholabError(f"--map {column}={path}: the path has an empty name")
        if listed:
            at = listed[0]
            plan.lists[column] = ((*names[:at], names[at].removesuffix(ALL)), tuple(names[at + 1 :]))
        else:
            plan.single[column] = tuple(names)
    return plan


def _check(source: Source, plan: _Map, first: dict[str, Any]) -> None:
    """A file without any completions is the user's error, not a quarantine full of rows."""
    fields = ", ".join(list(first)[:40]) or "none"
    for column in _COMPLETION:
        single, (before, _) = plan.single.get(column), plan.lists.get(column, (None, None))
        path = single or before
        if path and _dig(first, path[:1]) is None:
            raise Unreadable(f"{source.path}: --map {column}={'.'.join(path)}: no such field; there are {fields}")
    if plan.columns.union(first).isdisjoint(_COMPLETION):
        likely = next((n for n in _LIKELY if n in first), next(reversed(first), "response"))
        example = likely + (ALL if isinstance(first.get(likely), list) else "")
        raise Unreadable(
            f"{source.path}: no completion; its rows have the fields {fields}; use --map, as in completion={example}"
        )


def _rollouts(rel: str, plan: _Map, row: int, value: dict[str, Any]) -> list[Row | Bad]:
    rest = _rest(value, plan.used)
    shared = {c: rest.pop(c) for c in COLUMNS if c in rest and c not in plan.columns}
    shared |= {column: _dig(value, names) for column, names in plan.single.items()}
    if not plan.lists:
        return [_row(row, shared, rest)]
    samples = _samples(plan, value)
    rows: list[Row | Bad] = []
    for i, (columns, left) in enumerate(samples):
        try:
            r = _row(row, {"sample": i, **shared, **columns}, {**rest, **left})
        except ValueError as e:
            rows.append(Bad(row, f"sample {i}: {e}", raw_json({**rest, **shared, **columns, **left})))
            continue
        r.key = r.key or (rel, None, row)
        rows.append(r)
    return rows


def _samples(plan: _Map, value: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Of each position in the mapped lists: the columns there, and what the map leaves of its elements."""
    lists: dict[Names, list] = {}
    for before, _ in plan.lists.values():
        items = _dig(value, before)
        if items is not None and not isinstance(items, list):
            raise ValueError(f"{'.'.join(before)} is not a list: {type(items).__name__}")
        if items is not None:
            lists[before] = items
    lengths = {".".join(before): len(items) for before, items in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError("lists of different length: " + ", ".join(f"{name} {n}" for name, n in lengths.items()))
    n = next(iter(lengths.values()), 0)
    if not n:
        raise ValueError("the mapped lists hold nothing: no completions")
    samples = []
    for i in range(n):
        columns = {c: _dig(lists[b][i], after) if b in lists else None for c, (b, after) in plan.lists.items()}
        left = {}
        for before, items in lists.items():
            used = [after for b, after in plan.lists.values() if b == before]
            if () not in used and (unused := _rest(items[i], used)):
                left[".".join(before)] = unused
        samples.append((columns, left))
    return samples


def _dig(value: Any, names: Names) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _rest(value: Any, used: list[Names]) -> Any:
    """What remains of a value without the paths in `used`, which are in columns already."""
    if not isinstance(value, dict):
        return value
    rest = {}
    for name, v in value.items():
        deeper = [u[1:] for u in used if u[0] == name]
        if () not in deeper and v is not None:
            left = _rest(v, deeper) if deeper else v
            if left or not deeper:
                rest[name] = left
    return rest


def _row(row: int, columns: dict[str, Any], rest: dict[str, Any]) -> Row:
    fields: dict[str, Any] = {}
    rewards: dict[str, float | None] = {}
    prompt = columns.pop("prompt", None)
    if isinstance(prompt, list) and columns.get("messages") is None:
        columns["messages"], prompt = prompt, None
    group = columns.pop("group", None)
    if isinstance(group, bool) or not isinstance(group, str | int | float | None):
        raise ValueError(f"group is not a single value: {type(group).__name__}")
    if isinstance(group, float):  # 1.0 is group 1, NaN is none
        group = None if math.isnan(group) else int(group) if group.is_integer() else group
    given = columns.pop("extra", None)
    for column, value in {"prompt": prompt, **columns}.items():
        if value is None:
            continue
        if column.startswith("rewards."):
            rewards[column.removeprefix("rewards.")] = number(value, column)
        else:
            fields[column] = CONVERT.get(column, as_word)(value, column)
    rewards = {**fields.get("rewards", {}), **rewards}
    fields["rewards"] = {name: r for name, r in rewards.items() if r is not None and r == r} or None
    fields["extra"] = {**rest, **(given if isinstance(given, dict) else {} if given is None else {"extra": given})}
    fields.setdefault("prompt_format", "chat" if fields.get("messages") else "unknown")
    _check_lengths(fields)
    return Row(row, fields, None if group is None else (group,))


def _check_lengths(fields: dict[str, Any]) -> None:
    if all(fields.get(name) is None for name in _COMPLETION):
        raise ValueError("completion is missing")
    lengths = {n: len(fields[n]) for n in ("completion_ids", "logprobs", "loss_mask") if fields.get(n) is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError("lists of different length: " + ", ".join(f"{name} {n}" for name, n in lengths.items()))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not a text: {type(value).__name__}")
    return value


def as_word(value: Any, what: str) -> str | None:
    """A name or version: empty means unknown."""
    if isinstance(value, dict | list):
        raise ValueError(f"{what} is not a single value: {type(value).__name__}")
    return str(value) or None


def _format(value: Any, what: str) -> str:
    if value not in ("raw", "chat", "rendered", "unknown"):
        raise ValueError(f"{what} is none of raw, chat, rendered, unknown: {str(value)[:80]!r}")
    return value


def _messages(value: Any, what: str) -> list[dict[str, Any]]:
    value = parse_json(value.encode()) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        raise ValueError(f"{what} is not a list of {{role, content}}")
    return value


def numbers(kind: str, value: Any, what: str) -> list:
    """A list of numbers, checked at the speed of C."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list: {type(value).__name__}")
    try:
        array(kind, value)
    except (TypeError, OverflowError):
        raise ValueError(f"{what} is not a list of {'token ids' if kind == 'i' else 'numbers'}") from None
    return value


def token_ids(value: Any, what: str) -> list[int]:
    ids = numbers("i", value, what)
    if ids and min(ids) < 0:
        raise ValueError(f"{what} holds a negative token id")
    return ids


def _mask(value: Any, what: str) -> list[bool]:
    if not isinstance(value, list) or not all(isinstance(v, int | float) and v in (0, 1) for v in value):
        raise ValueError(f"{what} is not a list of 0 and 1")
    return [bool(v) for v in value]


def _rewards(value: Any, what: str) -> dict[str, float | None]:
    if isinstance(value, list) and all(isinstance(v, tuple) for v in value):  # a Parquet map
        value = dict(value)
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object: {type(value).__name__}")
    return {str(name): number(v, f"{what}.{name}") for name, v in value.items()}


def _sampling(value: Any, what: str) -> dict[str, Any]:
    value = parse_json(value.encode()) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object: {type(value).__name__}")
    return value


CONVERT: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("prompt", "completion"), _text),
    **dict.fromkeys(("step", "sample", "part", "n_prompt_tokens", "n_completion_tokens"), integer),
    **dict.fromkeys(("reward", "advantage"), number),
    **dict.fromkeys(("prompt_ids", "completion_ids"), token_ids),
    "ground_truth": lambda value, what: text(value) or None,
    "logprobs": lambda value, what: numbers("d", value, what),
    "loss_mask": _mask,
    "messages": _messages,
    "prompt_format": _format,
    "rewards": _rewards,
    "sampling": _sampling,
    "success_recorded": flag,
}
