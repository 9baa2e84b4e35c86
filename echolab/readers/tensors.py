"""What the readers of pickled dumps share: names in a pickle without running it, torch files without trusting them,
and plain lists out of what trainers store as lists or as tensors."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from echolab.errors import Unreadable
from echolab.readers import plain
from echolab.readers.base import raw_json

ROUNDING = 0.5  # an entropy this far below zero is a certain token, computed in bfloat16

# What converting one row of a pickle may raise, tensors too: then this row is bad, and no other.
NO_ROW = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    OverflowError,
    RuntimeError,
)  # RecursionError is one, and torch's own
_FIRST = 2_000  # of a pickle's instructions; numbers, of which there are more, come later
_REFUSED = re.compile(r"GLOBAL (\S+)")


def import_torch(what: str) -> Any:
    try:
        import torch
    except ImportError:
        raise Unreadable(f"{what} need torch: pip install 'echolab[torch]'") from None
    return torch


def pickle_names(data: bytes, skip: int = 0) -> list[str]:
    """The texts, and names of classes and functions, with which a pickle begins, in their order; of the one after `skip`
    others where several follow each other. Nothing of it is run."""
    names: list[str] = []
    stream = io.BytesIO(data)
    try:
        for _ in range(skip):
            for _ in pickletools.genops(stream):
                pass
        for opcode, value, _ in islice(pickletools.genops(stream), _FIRST):
            if isinstance(value, str):
                names.append(value.rpartition(" ")[2] if opcode.name == "GLOBAL" else value)
    except Exception:  # cut off, or no pickle: what came before counts
        return names
    return names


def load_torch(path: Path, allow_pickle: bool, what: str) -> Any:
    """What `torch.save` wrote. Values and tensors only: anything else could run code, and takes `allow_pickle`."""
    torch = import_torch(what)
    try:
        with path.open("rb") as f:
            options = {"map_location": "cpu", "mmap": f.read(2) == b"PK"}  # the old format cannot be mapped
        return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError as e:
        if not allow_pickle:
            refused = _REFUSED.search(str(e))
            raise Unreadable(
                f"{path}: holds more than plain values and tensors{f' ({refused[1]})' if refused else ''}; reading it could"
                " run code: if you trust the file, give --allow-pickle"
            ) from None
    except Exception as e:  # whatever a damaged file does to torch
        raise Unreadable(f"{path}: not readable by torch, perhaps damaged ({said(e)})") from None
    try:
        return torch.load(path, weights_only=False, **options)
    except Exception as e:
        raise Unreadable(f"{path}: cannot be unpickled ({said(e)})") from None


def said(error: Exception) -> str:
    """An error in one short line; with its kind, where it is not one of ours."""
    line = next(iter(str(error).strip().splitlines()), "")[:160]
    if isinstance(error, ValueError) and line:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def jsonable(value: Any) -> Any:
    """What a pickle held as JSON can hold it: names are texts, and what is no plain value is shown as text."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def raw(value: Any) -> bytes:
    """What the quarantine keeps of something that was pickled, as JSON if it can be."""
    for shown in (raw_json, lambda v: ascii(v).encode()):
        try:
            return shown(value)
        except NO_ROW:  # names that are no texts, circles, too many levels
            continue
    return b""


def as_list(value: Any, what: str) -> list[Any]:
    """A list, a tuple or a one-dimensional tensor as a list."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} is not a list: {type(value).__name__}")
    return list(value)


def token_ids(value: Any, what: str) -> list[int]:
    return plain.token_ids(as_list(value, what), what)


def floats(value: Any, what: str) -> list[float]:
    return plain.numbers("d", as_list(value, what), what)


def mask(value: Any, what: str) -> list[bool]:
    return plain.CONVERT["loss_mask"](as_list(value, what), what)


def entropies(values: Sequence[float]) -> list[float]:
    """Entropies as they are kept: those that rounding made negative are zero. Raises ValueError for what is none."""
    if not all(map(math.isfinite, values)):
        raise ValueError("an entropy is not finite")
    if values and min(values) < -ROUNDING:
        raise ValueError(f"an entropy is negative: {min(values):g}")
    return [v if v > 0 else 0.0 for v in values]


def constant(values: Sequence[float], counted: Sequence[bool] | None) -> float | None:
    """The one value of all counted tokens (of all, where none counts), or None where they differ."""
    found = {v for v, c in zip(values, counted, strict=True) if c} if counted is not None and any(counted) else set(values)
    return found.pop() if len(found) == 1 else None
