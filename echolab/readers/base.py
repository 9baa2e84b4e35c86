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

from echolab.errors import Unreadable

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
                raise Unreadable(f"{path}: not a readable Parquet file ({_first_line(e)})") from None
        f.seek(0)
        line = f.readline(FIRST_LINE_BYTES).removeprefix(BOM).strip()
        while not line and f.tell() < HEAD_BYTES:
            more = f.readline(FIRST_LINE_BYTES)
            if not more:
                break
            line = more.strip()
    if line[:1] == b"[":  # a document, which may be huge, or no row
        return Head(path, start)
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
            value = json.loads(data.decode())
            if _SURROGATE.search(data):
                json.dumps(value, ensure_ascii=False).encode()
            return value
        except RecursionError:
            raise ValueError(NESTED) from None
        except UnicodeDecodeError:
            raise ValueError("invalid UTF-8") from None
        except UnicodeEncodeError:
            raise ValueError("a string holds a lone surrogate (half of a \\ud800 pair)") from None
        except ValueError:
            raise ValueError(f"not JSON: {_first_line(first)}") from None


NESTED = "JSON nested too deeply"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def json_lines(source: Source) -> Iterator[tuple[int, bytes, dict[str, Any]] | Bad]:
    """The objects of a JSONL file from where `source` starts, one at a time, in bounded memory. Reads no further
    than the file's size at the start. An unterminated last line that does not parse is left for the next reading."""
    left = source.size - source.start
    with source.path.open("rb", buffering=1 << 20) as f:
        f.seek(source.start)
        for line in f:
            line = line[:left]
            left -= len(line)
            if not line:
                return
            text = line.removeprefix(BOM) if source.consumed == 0 else line
            if not text or text.isspace():
                source.take(line)
                continue
            row = source.rows
            try:
                value: Any = parse_json(text)
                reason = None if isinstance(value, dict) else f"expected a JSON object, got {type(value).__name__}"
            except ValueError as e:
                value, reason = None, str(e)
            if reason and not line.endswith(b"\n"):
                yield Bad(row, reason, line, tail=True)
                return
            source.take(line)
            source.rows += 1
            yield Bad(row, reason, line) if reason else (row, line, value)


def hash_whole(source: Source) -> None:
    """For formats that are read as a whole: take the file's bytes as consumed, no further than its size at the start."""
    with source.path.open("rb") as f:
        while chunk := f.read(min(1 << 20, source.size - source.consumed)):
            source.take(chunk)


def open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise Unreadable(f"{path}: not a readable Parquet file ({_first_line(e)})") from None


def parquet_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]] | Bad]:
    """The rows of a Parquet file as dicts, a few at a time. Arrow does not check the UTF-8 of what it reads."""
    if source.size == 0:
        return
    try:
        file = open_parquet(source.path)
        for batch in file.iter_batches(batch_size=_few_rows(file.metadata)):
            try:
                values = batch.to_pylist()
            except UnicodeDecodeError:
                values = [None] * batch.num_rows
            for i, value in enumerate(values):
                row = source.rows
                source.rows += 1
                try:
                    value = value or batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield Bad(row, "invalid UTF-8", _raw_parquet(batch.slice(i, 1)))
                else:
                    yield row, value
    except (pa.ArrowException, OSError) as e:
        raise Unreadable(f"{source.path}: damaged Parquet file ({_first_line(e)})") from None


def _few_rows(footer: Any) -> int:
    """Rows of a batch, so that they do not weigh much as Python objects, which numbers in lists do."""
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    heaviest = max((g.total_byte_size / max(g.num_rows, 1) for g in groups), default=0)
    return max(1, min(256, int((4 << 20) / max(heaviest, 1))))


def _raw_parquet(row: pa.RecordBatch) -> bytes:
    """A row that holds invalid UTF-8, its strings as bytes."""
    strings = (pa.types.is_string, pa.types.is_large_string)
    columns = [c.cast(pa.large_binary()) if any(t(c.type) for t in strings) else c for c in row.columns]
    try:
        return repr({name: c[0].as_py() for name, c in zip(row.schema.names, columns, strict=True)}).encode()
    except UnicodeDecodeError:  # in a list or struct
        return b""


def raw_json(value: Any) -> bytes:
    """What the quarantine keeps of a row that is not a line of its own."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
    except RecursionError:
        return f"({NESTED})".encode()


def number(value: Any, what: str) -> float | None:
    """A reward or the like: numbers, booleans, and the strings that some trainers write for them."""
    if value is None or isinstance(value, float):
        result = value
    elif isinstance(value, bool | int):
        try:
            result = float(value)
        except OverflowError:
            raise ValueError(f"{what} is too large") from None
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


def integer(value: Any, what: str) -> int | None:
    """A step, a sample number or the like: whole numbers, also as text or as a float."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        result = value
    else:
        try:
            result = int(value) if isinstance(value, str) else None
        except ValueError:
            result = None
        if result is None and isinstance(value, float) and value.is_integer():
            result = int(value)
        if result is None:
            raise ValueError(f"{what} is not a whole number: {str(value)[:80]!r}")
    if result is not None and abs(result) >= 1 << 63:
        raise ValueError(f"{what} is too large")
    return result


def flag(value: Any, what: str) -> bool | None:
    """A verdict: true or false, also as 0, 1 or text."""
    result = number(value, what)
    if result is None or result != result:
        return None
    if result not in (0.0, 1.0):
        raise ValueError(f"{what} is neither true nor false: {str(value)[:80]!r}")
    return bool(result)


def scalars(value: dict[str, Any], without: frozenset[str] = frozenset(), limit: int = 200) -> dict[str, Any]:
    """The small facts of an object that stand for each of its samples: no lists, no objects, no long texts."""
    return {
        k: v
        for k, v in value.items()
        if k not in without and (isinstance(v, int | float) or (isinstance(v, str) and len(v) <= limit))
    }


def dumps(value: Any) -> str | None:
    """JSON text for a column, keys sorted so that equal content is equal text, NaN as null; None for nothing."""
    if value is None or value == {} or value == []:
        return None
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # integers above 64 bits, lone surrogates, foreign objects, or nested too deeply for orjson
        try:
            return json.dumps(value, sort_keys=True, default=str)
        except RecursionError:
            raise ValueError(NESTED) from None


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
