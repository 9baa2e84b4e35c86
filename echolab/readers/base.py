"""What every reader shares: the rows that it yields, the file that it reads, the head by which it knows its format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import orjson
import pyarrow as pa

from echolab.errors import EcholabError

HEAD_BYTES = 1 << 16
FIRST_LINE_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Row:
    """One rollout. `fields` are columns of `rollouts` (ids, run and ingest are added later); `key` is the group's
    own key where the dump has one; `raw` is what the quarantine keeps if the row turns out to be unusable."""

    row: int
    fields: dict[str, Any]
    key: tuple | None = None
    raw: bytes = b""


@dataclass(slots=True)
class Bad:
    """One row that could not be read. `tail`: the unterminated last line of a file that may still be growing."""

    row: int
    reason: str
    raw: bytes
    tail: bool = False


@dataclass
class ReadOptions:
    """The options that a reader itself needs."""

    map: dict[str, str] = field(default_factory=dict)
    group_size: int | None = None
    reward_weights: dict[str, float] = field(default_factory=dict)


@dataclass
class Source:
    """One file on its way into the store. `rel` is its name there, `typed` the path as the user gave it (a hint for
    step and split). A line format continues at byte `start`, whose row is `start_row`."""

    path: Path
    rel: str
    typed: str
    options: ReadOptions = field(default_factory=ReadOptions)
    start: int = 0
    start_row: int = 0
    size: int = -1
    found: dict[str, Any] = field(default_factory=dict)  # what the reader inferred, kept in the ledger
    notes: list[str] = field(default_factory=list)  # what the user should know of it
    sha: Any = field(default_factory=hashlib.sha256)  # of bytes 0..consumed
    consumed: int = 0
    rows: int = 0  # rows of the file seen so far, quarantined ones counted, an unfinished last line not

    def __post_init__(self) -> None:
        self.consumed, self.rows = self.start, self.start_row
        if self.size < 0:
            self.size = self.path.stat().st_size

    def take(self, data: bytes) -> None:
        self.sha.update(data)
        self.consumed += len(data)


@dataclass
class Head:
    """The beginning of a file. `first` is its first line as JSON, `schema` its Parquet schema, where it has one."""

    path: Path
    start: bytes
    first: Any = None
    schema: pa.Schema | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Names of the first row's fields, whatever the file's kind."""
        if self.schema is not None:
            return frozenset(self.schema.names)
        return frozenset(self.first) if isinstance(self.first, dict) else frozenset()


class Reader(Protocol):
    """A module of this package. `sniff` says how it knew the format, or None; `read` yields every row of the file."""

    NAME: str
    VERSION: int
    CONTINUES: bool  # a longer file with the same beginning is read on from where it ended

    @staticmethod
    def sniff(head: Head) -> str | None: ...

    @staticmethod
    def read(source: Source) -> Iterator[Row | Bad]: ...


def look(path: Path) -> Head:
    """The head of a file, for sniffing."""
    with path.open("rb") as f:
        start = f.read(HEAD_BYTES)
        if start[:4] == b"PAR1":
            import pyarrow.parquet as pq

            try:
                return Head(path, start, schema=pq.read_schema(path))
            except (pa.ArrowException, OSError) as e:
                raise EcholabError(f"{path}: not a readable Parquet file ({_first_line(e)})") from None
        f.seek(0)
        line = f.readline(FIRST_LINE_BYTES).removeprefix(BOM).strip()
        while not line and f.tell() < HEAD_BYTES:
            more = f.readline(FIRST_LINE_BYTES)
            if not more:
                break
            line = more.strip()
    try:
        return Head(path, start, first=parse_json(line))
    except ValueError:
        return Head(path, start)


def parse_json(data: bytes) -> Any:
    """JSON, also with NaN and Infinity. Raises ValueError with a short reason."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as first:
        try:
            return json.loads(data)
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
        except UnicodeDecodeError:
            raise ValueError("invalid UTF-8") from None
        except ValueError:
            raise ValueError(f"not JSON: {_first_line(first)}") from None


def json_lines(source: Source) -> Iterator[tuple[int, bytes, dict[str, Any]] | Bad]:
    """The objects of a JSONL file from where `source` starts, one at a time, in bounded memory. Reads no further
    than the file's size at the start. An unterminated last line that does not parse is left for the next reading."""
    left = source.size - source.start
    with source.path.open("rb") as f:
        f.seek(source.start)
        for line in f:
            line = line[:left]
            left -= len(line)
            if not line:
                return
            text = (line.removeprefix(BOM) if source.consumed == 0 else line).strip()
            if not text:
                source.take(line)
                continue
            row = source.rows
            try:
                value = parse_json(text)
                bad = None if isinstance(value, dict) else Bad(row, f"expected a JSON object, got {type(value).__name__}", line)
            except ValueError as e:
                value, bad = None, Bad(row, str(e), line, tail=not line.endswith(b"\n"))
            if bad and bad.tail:
                yield bad
                return
            source.take(line)
            source.rows += 1
            yield bad or (row, line, value)


def hash_whole(source: Source) -> None:
    """For formats that are read as a whole: take the file's bytes as consumed."""
    with source.path.open("rb") as f:
        while chunk := f.read(1 << 20):
            source.take(chunk)


def number(value: Any, what: str) -> float | None:
    """A reward or the like: numbers, booleans, and the strings that some trainers write for them."""
    if value is None or isinstance(value, float):
        result = value
    elif isinstance(value, bool | int):
        result = float(value)
    elif isinstance(value, str):
        known = {"true": 1.0, "false": 0.0, "none": None, "null": None, "": None}
        word = value.strip().lower()
        try:
            result = known[word] if word in known else float(word)
        except ValueError:
            raise ValueError(f"{what} is not a number: {value[:80]!r}") from None
    else:
        raise ValueError(f"{what} is not a number: {type(value).__name__}")
    if result is not None and result in (float("inf"), float("-inf")):
        raise ValueError(f"{what} is infinite")
    return result


def dumps(value: Any) -> str | None:
    """JSON text for a column, keys sorted so that equal content is equal text; None for nothing."""
    if not value and value is not False and value != 0:
        return None
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def text(value: Any) -> str | None:
    """A gold answer or the like as text: strings as they are, all else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


_STEP = re.compile(r"(?:^|[^a-zA-Z])(?:global_)?step_?(\d+)", re.IGNORECASE)


def step_of_path(path: str) -> int | None:
    """The training step that a path names (step400, step_400, global_step_400), the last one if several."""
    steps = _STEP.findall(path)
    return int(steps[-1]) if steps else None


def rows_of_lines(source: Source, convert: Callable[[int, dict[str, Any]], list[Row | Bad]]) -> Iterator[Row | Bad]:
    """Rows of a JSONL dump: `convert(row, object)` makes the rollouts of one line, or raises ValueError with the
    reason why it cannot."""
    for item in json_lines(source):
        if isinstance(item, Bad):
            yield item
            continue
        row, line, value = item
        try:
            rows = convert(row, value)
        except ValueError as e:
            yield Bad(row, str(e), line)
            continue
        for r in rows:
            r.raw = r.raw or line
            yield r


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
