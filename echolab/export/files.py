"""The files of an export: written piece by piece into a folder beside their place, which takes its name when all is done."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from echolab.errors import EcholabError

SUFFIX = ".echolab-export"  # of the unfinished folder; what a killed export left is replaced by the next one
SHARD_BYTES = 500 << 20  # of a Hub dataset's files, uncompressed


@dataclass(frozen=True)
class File:
    """One finished file, below the export's folder. `memory`: bytes of its rows in Arrow."""

    path: str
    split: str | None
    rows: int | None
    bytes: int
    sha256: str
    memory: int = 0


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which becomes `out` at the end unless something failed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EcholabError(f"{out} exists and is not empty: an export makes a new folder, choose another or remove it")
    folder = out.with_name(f".{out.name}{SUFFIX}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        folder.rename(out)
    except OSError as e:
        reason = "no space is left on its disk" if e.errno == errno.ENOSPC or "No space" in str(e) else e.strerror or str(e)
        raise EcholabError(f"cannot write {out}: {reason}; nothing was left behind") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_split(folder: Path, split: str, names: str, schema: pa.Schema, rows: Iterable[pa.Table]) -> list[File]:
    """The rows of a split in one file, or, where the pattern `names` has `{shard}`, in several of like size."""
    stem = re.sub(r"\W", "_", split)
    limit = SHARD_BYTES if "{shard}" in names else None
    written: list[tuple[Path, int, int]] = []
    for number, tables in enumerate(_shards(rows, limit)):
        path = folder / names.format(split=stem, shard=f"{number:05}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise EcholabError(
                f"split {split!r} and another one would both be written to {path.name}: leave one out by --where"
            )
        written.append((path, *_WRITERS[path.suffix](path, schema, tables)))
    files = []
    for path, n, memory in written:
        if limit:
            path = path.rename(path.with_stem(f"{path.stem}-of-{len(written):05}"))
        files.append(_file(folder, path, stem, n, memory))
    return files


def write_text(folder: Path, name: str, text: str) -> File:
    path = folder / name
    path.write_bytes(text.encode())
    return _file(folder, path, None, None, 0)


def digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _file(folder: Path, path: Path, split: str | None, rows: int | None, memory: int) -> File:
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return File(path.relative_to(folder).as_posix(), split, rows, path.stat().st_size, digest(path), memory)


def _shards(tables: Iterable[pa.Table], limit: int | None) -> Iterator[Iterator[pa.Table]]:
    """The stream cut where a shard has its bytes. Each is to be read to its end before the next."""
    stream = iter(tables)

    def one(table: pa.Table | None) -> Iterator[pa.Table]:
        size = 0
        while table is not None:
            yield table
            size += table.nbytes
            table = next(stream, None) if limit is None or size < limit else None

    while (first := next(stream, None)) is not None:
        yield one(first)


def _parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> tuple[int, int]:
    rows = memory = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=table.num_rows)
            rows, memory = rows + table.num_rows, memory + table.nbytes
    return rows, memory


def _jsonl(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> tuple[int, int]:
    return _json_rows(path, tables, b"", b"\n", b"\n")


def _json(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> tuple[int, int]:
    return _json_rows(path, tables, b"[\n", b",\n", b"\n]\n")


def _json_rows(path: Path, tables: Iterable[pa.Table], start: bytes, between: bytes, end: bytes) -> tuple[int, int]:
    rows = memory = 0
    with path.open("wb") as f:
        f.write(start)
        for table in tables:
            for row in table.to_pylist():
                f.write((between if rows else b"") + orjson.dumps(row))
                rows += 1
            memory += table.nbytes
        f.write(end)
    return rows, memory


_WRITERS = {".parquet": _parquet, ".jsonl": _jsonl, ".json": _json}
