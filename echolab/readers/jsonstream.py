"""JSON documents of any size, split into the raw bytes of their elements without loading them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from echolab.readers.base import BOM, is_compressed, open_bytes, parse_json

ALL = "[]"  # in a path: every element of a list
CHUNK = 1 << 20
REST_BYTES = 16 << 20  # how much of a broken document's unreadable rest is kept

_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb'[^ \t\r\n,:"\[\]{}]*+')
_OPENING, _CLOSING = re.compile(rb"[\[{]++"), re.compile(rb"[\]}]++")
_TO_BRACKET = re.compile(rb'[^"\[\]{}]*+')

At = tuple[str | int, ...]
Name = str | frozenset[str]  # in a path; a set is any of its names


@dataclass(slots=True)
class Piece:
    """One element that the path names, or (`side`) another value of an object that encloses such elements."""

    at: At
    raw: bytes
    side: bool = False


@dataclass(slots=True)
class Broken:
    """What could not be walked: a value of the wrong kind, or the rest of a document that ends early or is no JSON."""

    reason: str
    raw: bytes


class _End(Exception):
    """The file ended inside a value."""


class _Syntax(Exception):
    pass


class _Cursor:
    """A window on the file. The bytes from `mark` on are kept: the piece that is being read."""

    def __init__(self, file: BinaryIO, size: int, chunk: int) -> None:
        self.file, self.left, self.chunk = file, size, chunk
        self.buf = bytearray()
        self.mark = self.pos = self.dropped = 0
        self.at: At = ()

    def more(self) -> None:
        data = self.file.read(min(self.chunk, self.left))
        if not data:
            raise _End
        self.left -= len(data)
        self.dropped += self.mark
        del self.buf[: self.mark]
        self.pos -= self.mark
        self.mark = 0
        self.buf += data

    def run(self, pattern: re.Pattern[bytes]) -> None:
        """Past all that the pattern takes, over the borders of chunks."""
        while True:
            match = pattern.match(self.buf, self.pos)
            self.pos = match.end() if match else self.pos
            del match  # it locks the buffer
            if self.pos < len(self.buf):
                return
            self.more()

    def peek(self) -> int:
        """The next byte that is not white space. A new piece begins there."""
        while True:
            self.mark = self.pos
            match = _SPACE.match(self.buf, self.pos)
            self.mark = self.pos = match.end() if match else self.pos
            del match
            if self.pos < len(self.buf):
                return self.buf[self.pos]
            self.more()

    def string(self) -> None:
        """Past the closing quote: the first one with an even number of backslashes before it."""
        self.pos += 1
        while True:
            quote = self.buf.find(b'"', self.pos)
            if quote < 0:
                self.pos = len(self.buf)
                self.more()
                continue
            self.pos = quote + 1
            before = quote - 1
            while self.buf[before] == ord("\\"):
                before -= 1
            if (quote - before) % 2:
                return

    def value(self) -> bytes:
        """The raw bytes of the value that comes next; each byte is looked at once, however long it is."""
        self.peek()
        depth = 0
        while True:
            byte = self.buf[self.pos]
            if byte == ord('"'):
                self.string()
            elif byte in b"{[":
                depth += self.brackets(_OPENING)
            elif byte in b"}]" and depth:
                depth -= self.brackets(_CLOSING, depth)
            else:
                self.run(_SCALAR)
                if self.pos == self.mark:
                    raise _Syntax(f"unexpected {chr(byte)!r}")
            if not depth:
                return bytes(self.buf[self.mark : self.pos])
            self.run(_TO_BRACKET)

    def brackets(self, pattern: re.Pattern[bytes], most: int = CHUNK) -> int:
        """Past those that stand here side by side; how many."""
        match = pattern.match(self.buf, self.pos, self.pos + most)
        found = match.end() - self.pos if match else 0
        self.pos += found
        return found

    def expect(self, wanted: bytes) -> int:
        byte = self.peek()
        if byte not in wanted:
            names = " or ".join(repr(chr(w)) for w in wanted)
            raise _Syntax(f"expected {names}, found {chr(byte)!r}")
        self.pos += 1
        return byte

    def rest(self) -> bytes:
        self.buf += self.file.read(min(self.left, max(0, REST_BYTES - (len(self.buf) - self.mark))))
        return bytes(self.buf[self.mark :])


def place(at: At) -> str:
    """`categories[0].name`"""
    return "".join(f"[{a}]" if isinstance(a, int) else f".{a}" for a in at).lstrip(".") or "the document"


def walk(path: Path, names: Sequence[Name], size: int | None = None, chunk: int = CHUNK) -> Iterator[Piece | Broken]:
    """The pieces of the document in `path`, in the order of the file: `names` leads from its root to the elements,
    with ALL for each list on the way. Memory holds one piece and one chunk. Elements that are complete come out
    whatever follows them."""
    early: list[str] = []  # why a compressed file ends before its time
    with open_bytes(path, early.append) as file:
        size = sys.maxsize if is_compressed(path) else path.stat().st_size if size is None else size
        cursor = _Cursor(file, size, chunk)
        try:
            begin = file.read(min(len(BOM), cursor.left))
            cursor.left -= len(begin)
            cursor.buf += begin.removeprefix(BOM)
            cursor.dropped = len(begin) - len(cursor.buf)
            cursor.peek()
        except _End:
            return  # an empty file
        try:
            yield from _walk(cursor, names, ())
        except _End:
            why = f": {early[0]}" if early else ""
            yield Broken(f"the file ends in the middle of {place(cursor.at)}{why}", cursor.rest())
            return
        except _Syntax as e:
            yield _broken(cursor, str(e))
            return
        try:
            cursor.peek()
        except _End:
            return
        cursor.at = ()
        yield _broken(cursor, "something follows the end of the document")


def _broken(cursor: _Cursor, problem: str) -> Broken:
    reason = f"not JSON in {place(cursor.at)}, at byte {cursor.dropped + cursor.pos}: {problem}"
    rest = cursor.rest()
    cut = f"; only the next {len(rest)} bytes are kept" if cursor.file.read(1) else ""
    return Broken(reason + cut, rest)


def _walk(cursor: _Cursor, names: Sequence[Name], at: At) -> Iterator[Piece | Broken]:
    cursor.at = at
    if not names:
        yield Piece(at, cursor.value())
        return
    is_list = names[0] == ALL
    if cursor.peek() != ord("[" if is_list else "{"):
        raw = cursor.value()
        if raw != b"null":
            yield Broken(f"expected {'a list' if is_list else 'an object'} at {place(at)}", raw)
        return
    cursor.pos += 1
    close = ord("]" if is_list else "}")
    for i in count():
        cursor.at = at
        if cursor.peek() == close:
            cursor.pos += 1
            return
        if i:
            cursor.expect(b",")
        if is_list:
            yield from _walk(cursor, names[1:], (*at, i))
        else:
            yield from _member(cursor, names, at)


def _member(cursor: _Cursor, names: Sequence[Name], at: At) -> Iterator[Piece | Broken]:
    if cursor.peek() != ord('"'):
        raise _Syntax("expected a name in quotes")
    try:
        name = parse_json(cursor.value())
    except ValueError as e:
        raise _Syntax(str(e)) from None
    cursor.expect(b":")
    if name == names[0] or (isinstance(names[0], frozenset) and name in names[0]):
        yield from _walk(cursor, names[1:], (*at, name))
    else:
        cursor.at = (*at, name)
        yield Piece((*at, name), cursor.value(), side=True)
