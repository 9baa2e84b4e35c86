"""YAML as a dataset card's front matter needs it: mappings, lists and scalars, every doubtful text in quotes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}  # which YAML takes for other things


def dump(value: dict[str, Any]) -> str:
    return "".join(f"{line}\n" for line in _mapping(value))


def _mapping(value: dict[str, Any]) -> Iterator[str]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield f"{_scalar(key)}:"
            yield from (f"  {line}" for line in _mapping(item))
        elif isinstance(item, list) and item:
            yield f"{_scalar(key)}:"
            yield from _list(item)
        else:
            yield f"{_scalar(key)}: {_scalar(item)}"


def _list(items: list[Any]) -> Iterator[str]:
    for item in items:
        lines = iter(_mapping(item) if isinstance(item, dict) else [_scalar(item)])
        yield f"- {next(lines)}"
        yield from (f"  {line}" for line in lines)


def _scalar(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return '"' + "".join(_escaped(c) for c in value) + '"'


def _escaped(c: str) -> str:
    if c in '"\\':
        return "\\" + c
    if c.isprintable():
        return c
    code = ord(c)
    if 0xD800 <= code < 0xE000:  # half of a character
        code = 0xFFFD
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
