"""Local benchmark files, read for decontamination: JSON lines, a JSON list, or Parquet.

`FILE` takes every column that is known by its name: problems from `problem`, `question`, `prompt` and `messages`, long texts
from `solution`, `answer` and their like. `FILE:COLUMN` takes that one alone (`reward_model.ground_truth` looks inside).

A problem is a text, of which only what stands between a template's role markers counts; or chat messages, also as a JSON
string, of which the user's count as the problem, the assistant's as a long text, and the system's not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echolab import ids
from echolab.errors import EcholabError

PROBLEMS = ("problem", "question", "prompt", "messages")
LONG = (
    "solution", "solutions", "answer", "answers", "final_answer", "ground_truth", "reward_model.ground_truth",
    "extra_info.answer",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A problem, or a long text beside one, and where it stands first. Rows count from 0."""

    row: int
    column: str
    text: str
    is_problem: bool


@dataclass(frozen=True)
class Benchmark:
    """One benchmark file; equal texts stand here once."""

    file: str
    column: str | None  # None: all that are known
    sha256: str
    texts: tuple[Text, ...]


def load(word: str) -> Benchmark:
    """`FILE` or `FILE:COLUMN`."""
    path, column = _split(word)
    try:
        with path.open("rb") as f:
            sha256 = file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise EcholabError(f"{path}: {e.strerror or e}") from None
    found: dict[tuple[str, bool], Text] = {}
    seen: dict[str, None] = {}
    for number, row in enumerate(rows(path)):
        seen |= dict.fromkeys(row)
        for name in (column,) if column else (*PROBLEMS, *LONG):
            for text, is_problem in _texts(value(row, name), name not in LONG):
                found.setdefault((text, is_problem), Text(number, name, text, is_problem))
    if not found:
        raise EcholabError(_nothing(path, column, list(seen)))
    return Benchmark(path.name, column, sha256, tuple(found.values()))


def _split(word: str) -> tuple[Path, str | None]:
    path = Path(word).expanduser()
    file, colon, column = word.rpartition(":")
    if path.exists() or not colon or not file or "/" in column:
        return path, None
    return Path(file).expanduser(), column or None


def _nothing(path: Path, column: str | None, columns: list[str]) -> str:
    there = f"its columns are {', '.join(columns)}" if columns else "it has no rows"
    if column is None:
        return f"{path}: no column with problems is known by its name; {there}: name one with {path.name}:COLUMN"
    if column.partition(".")[0] not in columns:
        return f"{path}: no column {column}; {there}"
    return f"{path}: column {column} holds neither texts nor chat messages; {there}"


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of JSON lines, a JSON list or Parquet."""
    with path.open("rb") as f:
        if f.read(4) == b"PAR1":
            yield from _parquet(path)
            return
    with path.open(encoding="utf-8-sig") as f:
        try:
            start = f.read(1000).lstrip()[:1]
            f.seek(0)
            yield from _objects(path, enumerate(json.load(f), 1) if start == "[" else _lines(path, f))
        except (UnicodeDecodeError, json.JSONDecodeError) as e:
            raise EcholabError(f"{path}: neither JSON nor Parquet ({e})") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as e:
        raise EcholabError(f"{path}: cannot be read as Parquet ({str(e).splitlines()[0]})") from None


def _lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as e:
                raise EcholabError(f"{path}: line {number} is not JSON ({e.msg})") from None


def _objects(path: Path, rows: Iterable[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
    for number, row in rows:
        if not isinstance(row, dict):
            raise EcholabError(f"{path}: row {number} is no JSON object with columns")
        yield row


def value(row: dict[str, Any], name: str) -> Any:
    """A column of a row; `a.b` looks inside."""
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    inside = row.get(first)
    return value(inside, rest) if dot and isinstance(inside, dict) else None


def _texts(value: Any, is_problem: bool) -> Iterator[tuple[str, bool]]:
    """The texts of one value, and which of them are problems."""
    if isinstance(value, str):
        if messages := _messages_in(value):
            yield from _texts(messages, is_problem)
        elif text := (ids.problem_text(value) or "").strip() if is_problem else value.strip():
            yield text, is_problem
    elif isinstance(value, list):
        if not _are_messages(value):
            for item in value:
                yield from _texts(item, is_problem)
            return
        for role, kind in (("user", is_problem), ("assistant", False)):
            said = (_content(m.get("content")) for m in value if m.get("role") == role)
            if text := "\n".join(s for s in said if s).strip():
                yield text, kind


def _messages_in(text: str) -> list[Any] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and value and _are_messages(value) else None


def _are_messages(value: list[Any]) -> bool:
    return all(isinstance(m, dict) and "role" in m for m in value)


def _content(content: Any) -> str:
    """A message's text; of one in parts, the texts."""
    if isinstance(content, list):
        return "\n".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return content if isinstance(content, str) else ""
