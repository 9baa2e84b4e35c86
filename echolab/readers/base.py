"""What every reader shares: the rows that it yields, the file that it reads, the head by which it knows its format."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import orjson
import pyarrow as pa

from echolab.errors import Unreadable

HEAD_BYTES = 1 << 16
FIRST_LINES, FIRST_LINE_BYTES = 20, 64 << 20
LINE_BYTES = 256 << 20  # a longer line is no row: it would take gigabytes as Python objects
KEPT_BYTES = 1 << 20  # of a line that is too long, in quarantine
BOM = b"\xef\xbb\xbf"
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by their first bytes
PACKED, UNPACKED = 1 << 16, 1 << 12  # bytes of a compressed file and of what is in it, at once
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")


@dataclass(slots=True)
class Scores:
    """Numbers that a dump recorded for each token of `completion_ids`: the entropy of the distribution that it was
    sampled from, in nats, and its log-probability under that distribution."""

    entropies: list[float]
    logprobs: list[float] | None = None


@dataclass(slots=True)
class Row:
    """One rollout. `fields` are columns of `rollouts` (ids, run and ingest are added later); `key` is the group's
    own key where the dump has one; `raw` is what the quarantine keeps if the row turns out to be unusable."""

    row: int
    fields: dict[str, Any]
    key: tuple | None = None
    raw: bytes = b""
    scores: Scores | None = None


@dataclass(slots=True)
class ScoresOf:
    """Token numbers for a rollout that another dump brings: it is the one with these tokens, prompt and completion
    together. The numbers are aligned with all of them; those of the prompt do not count."""

    row: int
    token_ids: list[int]
    entropies: list[float]
    logprobs: list[float] | None = None
    step: int | None = None
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
    allow_pickle: bool = False


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
    broken: str | None = None  # why the bytes of a compressed file end before their time

    def __post_init__(self) -> None:
        self.consumed, self.rows = self.start, self.start_row
        if self.size < 0:
            self.size = self.path.stat().st_size

    def take(self, data: bytes) -> None:
        """These bytes of the file are read. Those of a compressed file are taken as it is opened."""
        self.sha.update(data)
        self.consumed += len(data)

    def open(self) -> BinaryIO:
        """The file's bytes, unpacked if they are compressed: then it is read as a whole, whatever its format."""
        file = open_bytes(self.path, self._ends_early)
        if is_compressed(self.path):
            self.found["whole"] = True
            if self.consumed == 0:
                hash_whole(self)
        return file

    def _ends_early(self, reason: str) -> None:
        self.broken = reason


@dataclass
class Head:
    """The beginning of a file. `first` is its first line as JSON, `schema` its Parquet schema, where it has one; `broken`
    why a compressed file ends in it."""

    path: Path
    start: bytes
    first: Any = None
    schema: pa.Schema | None = None
    broken: str = ""

    @property
    def keys(self) -> frozenset[str]:
        """Names of the first row's fields, whatever the file's kind."""
        if self.schema is not None:
            return frozenset(self.schema.names)
        return frozenset(self.first) if isinstance(self.first, dict) else frozenset()


class Reader(Protocol):
    """A module of this package. `sniff` says how it knew the format, or None; `read` yields every row of the file: one
    Row (or ScoresOf) or one Bad for each."""

    NAME: str
    VERSION: int
    CONTINUES: bool  # a longer file with the same beginning is read on from where it ended

    @staticmethod
    def sniff(head: Head) -> str | None: ...

    @staticmethod
    def read(source: Source) -> Iterator[Row | ScoresOf | Bad]: ...


def is_compressed(path: Path) -> str | None:
    """gzip or zstd, by the file's first bytes."""
    with path.open("rb") as f:
        start = f.read(4)
    return next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)


def unpacked_name(name: str) -> str:
    """The name without what compression added to it."""
    for suffix in COMPRESSED_SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


class _Unpacked(io.RawIOBase):
    """A compressed file as the bytes in it. Where it is damaged or cut it ends, after all that could be unpacked."""

    def __init__(self, path: Path, kind: str, ends_early: Callable[[str], None]):
        self.path, self.kind, self.ends_early = path, kind, ends_early
        self.given, self.most, self.ended = 0, UNPACKED, False
        self.attempts = [1, UNPACKED]  # bytes at once, from the end of the list
        self._open(sys.maxsize)

    def _open(self, slow_from: int) -> None:
        self.packed = _Packed(self.path, slow_from)
        self.stream = pa.CompressedInputStream(pa.PythonFile(self.packed, "r"), self.kind)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """What a read cannot unpack to its end is lost to it: near the damage packed bytes come one by one, and then
        those in them too."""
        while not self.ended:
            try:
                data = self.stream.read(min(len(buffer), self.most))
            except OSError as e:  # from now on the stream gives anything
                if not self.attempts:
                    self.ended = True
                    self.ends_early(f"the {self.kind} data end early or are damaged ({_first_line(e)})")
                    break
                self.most = self.attempts.pop()
                near = max(0, self.packed.tell() - PACKED)
                self.packed.close()
                self._open(near)
                skip = self.given
                while skip and (data := self.stream.read(min(skip, UNPACKED))):
                    skip -= len(data)
            else:
                buffer[: len(data)] = data
                self.given += len(data)
                return len(data)
        return 0

    def close(self) -> None:
        self.packed.close()
        super().close()


class _Packed(io.FileIO):
    """A compressed file, read byte by byte from a place on."""

    def __init__(self, path: Path, slow_from: int):
        super().__init__(path)
        self.slow_from = slow_from

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(1 if self.tell() >= self.slow_from else PACKED)


def open_bytes(path: Path, ends_early: Callable[[str], None] = lambda reason: None) -> BinaryIO:
    """The bytes of a file, unpacked if they are compressed. Then they can be read once, from the beginning."""
    if kind := is_compressed(path):
        return cast(BinaryIO, io.BufferedReader(_Unpacked(path, kind, ends_early), UNPACKED))
    return path.open("rb", buffering=1 << 20)


def look(path: Path) -> Head:
    """The head of a file, for sniffing."""
    broken: list[str] = []
    with open_bytes(path, broken.append) as f:
        start = f.read(HEAD_BYTES)
        if start[:4] == b"PAR1":
            if is_compressed(path):
                raise Unreadable(f"{path}: Parquet inside a compressed file cannot be read: unpack it first")
            with open_parquet(path) as file:
                return Head(path, start, schema=file.schema_arrow)
        first = _first(start.removeprefix(BOM).lstrip(), f)
    return Head(path, start, first, broken="".join(broken))


def _first(text: bytes, rest: BinaryIO) -> Any:
    """The first line as JSON. Where that is an object which cannot be read, the next one tells as well."""
    if text[:1] == b"[":  # a document, which may be huge, or no row
        return None
    for line in islice(_lines(text, rest), FIRST_LINES):
        line = line.strip()
        try:
            return parse_json(line)
        except ValueError:
            if line and not (line.startswith(b"{") and line.endswith(b"}")):
                return None
    return None


def _lines(text: bytes, rest: BinaryIO) -> Iterator[bytes]:
    *whole, last = text.split(b"\n")
    yield from whole
    yield last + rest.readline(FIRST_LINE_BYTES)
    yield from iter(lambda: rest.readline(FIRST_LINE_BYTES), b"")


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
    told = False
    with source.open() as f:
        packed = is_compressed(source.path) is not None
        left = sys.maxsize if packed else source.size - source.start
        if not packed:
            f.seek(source.start)
        first = source.start == 0
        while line := f.readline(min(left, LINE_BYTES)):
            left -= len(line)
            ended = line.endswith(b"\n")
            text, first = (line.removeprefix(BOM) if first else line), False
            if len(line) == LINE_BYTES and not ended:
                yield _too_long(source, f, line, left, packed)
                left = sys.maxsize if packed else source.size - source.consumed
                continue
            row = source.rows
            reason, value = _object(text)
            if reason and not (ended or packed):
                yield Bad(row, reason, line, tail=True)
                return
            if reason and not ended and source.broken:
                reason, told = source.broken, True
            if not packed:
                source.take(line)
            if value is None and not reason:
                continue
            source.rows += 1
            yield (row, line, value) if value is not None else Bad(row, str(reason), line)
        if source.broken and not told:
            yield Bad(source.rows, source.broken, b"")


def _object(line: bytes) -> tuple[str | None, dict[str, Any] | None]:
    """Why a line is no JSON object, and the object. Neither for an empty line."""
    if not line or line.isspace():
        return None, None
    try:
        value = parse_json(line)
    except ValueError as e:
        return str(e), None
    return (None, value) if isinstance(value, dict) else (f"expected a JSON object, got {type(value).__name__}", None)


def _too_long(source: Source, f: BinaryIO, line: bytes, left: int, packed: bool) -> Bad:
    """Pass over the rest of a line that is too long to be a row."""
    kept, length, row = line[:KEPT_BYTES], 0, source.rows
    while line:
        length += len(line)
        if not packed:
            source.take(line)
        if line.endswith(b"\n"):
            break
        line = f.readline(min(left, LINE_BYTES))
        left -= len(line)
    source.rows += 1
    return Bad(row, f"a line of {length:,} bytes: too long to be a row, its beginning is kept", kept)


def hash_whole(source: Source) -> None:
    """For formats that are read as a whole: take the file's bytes as consumed, no further than its size at the start."""
    with source.path.open("rb") as f:
        while chunk := f.read(min(1 << 20, source.size - source.consumed)):
            source.take(chunk)


def open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:  # the last in a column's name
        raise Unreadable(f"{path}: not a readable Parquet file ({_first_line(e)})") from None
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise Unreadable(f"{path}: several columns are named {', '.join(twice)}: rename them")
    return file


def parquet_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]] | Bad]:
    """The rows of a Parquet file as dicts, a few at a time. Arrow does not check the UTF-8 of what it reads."""
    if source.size == 0:
        return
    try:
        file = open_parquet(source.path)
        for batch in file.iter_batches(batch_size=_few_rows(file.metadata)):
            try:
                values = batch.to_pylist()
            except (ValueError, OverflowError):
                values = [None] * batch.num_rows
            for i, value in enumerate(values):
                row = source.rows
                source.rows += 1
                try:
                    value = value or batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield Bad(row, "invalid UTF-8", _raw_parquet(batch.slice(i, 1)))
                except (ValueError, OverflowError) as e:  # a time after the year 9999
                    yield Bad(row, _first_line(e), _raw_parquet(batch.slice(i, 1)))
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
    """A row of which a value cannot be had, its strings as bytes."""
    strings = (pa.types.is_string, pa.types.is_large_string)
    columns = [c.cast(pa.large_binary()) if any(t(c.type) for t in strings) else c for c in row.columns]
    return repr({name: _known(c) for name, c in zip(row.schema.names, columns, strict=True)}).encode()


def _known(column: pa.Array) -> Any:
    try:
        return column[0].as_py()
    except (ValueError, OverflowError):  # in a list or struct, or out of range
        return f"({column.type})"


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
