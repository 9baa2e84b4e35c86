"""Readers of foreign dumps, one file a format. A reader knows its format by `sniff` and yields rows by `read`."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from echolab.errors import EcholabError
from echolab.readers import plain, qwen_math, reasoning_gym, trl, verl
from echolab.readers.base import Bad, Head, Reader, ReadOptions, Row, Source, look, step_of_path

# In the order in which they are asked; `plain` takes what no trainer claims.
READERS: tuple[Reader, ...] = tuple(cast(Reader, m) for m in (trl, verl, reasoning_gym, qwen_math, plain))

__all__ = ["READERS", "Bad", "Head", "ReadOptions", "Reader", "Row", "Source", "choose", "look", "step_of_path"]


def choose(path: Path, format: str = "auto", mapped: bool = False) -> tuple[Reader, str] | None:
    """The reader of a file and how it was known, or None where no reader knows the file."""
    if format != "auto":
        reader = next((r for r in READERS if format == r.NAME), None)
        if reader is None:
            raise EcholabError(f"unknown format {format!r}: use auto, {', '.join(r.NAME for r in READERS)}")
        return reader, "as told by --format"
    if mapped:
        return cast(Reader, plain), "as told by --map"
    head = look(path)
    for reader in READERS:
        if reason := reader.sniff(head):
            return reader, reason
    return None
