"""One-dimensional arrays of floats out of .npy files, without numpy."""

from __future__ import annotations

import ast
import struct
from pathlib import Path

_MAGIC = b"\x93NUMPY"
_FORMATS = {"<f2": "e", "<f4": "f", "<f8": "d"}
_HEADER_BYTES = 4096  # that of an array of one dimension takes about a hundred


def floats(path: Path) -> list[float]:
    """The numbers of the file. Raises ValueError where it holds anything else, OSError where it cannot be read."""
    data = path.read_bytes()
    if data[:6] != _MAGIC or len(data) < 12:
        raise ValueError("no .npy file")
    width = 2 if data[6] == 1 else 4
    begin = 8 + width
    end = begin + int.from_bytes(data[8:begin], "little")
    if end > min(len(data), begin + _HEADER_BYTES):
        raise ValueError("a .npy file cut off in its header")
    try:
        header = ast.literal_eval(data[begin:end].decode("latin-1").strip())
        kind, shape = header["descr"], header["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        raise ValueError("a .npy file whose header cannot be read") from None
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise ValueError(f"a .npy file of {str(kind)[:40]}, not of little-endian floats")
    if not isinstance(shape, tuple) or len(shape) != 1 or not isinstance(shape[0], int):
        raise ValueError(f"a .npy file of shape {str(shape)[:40]}, not of one dimension")
    layout = struct.Struct(f"<{_FORMATS[kind]}")
    if len(data) - end != shape[0] * layout.size:
        raise ValueError(f"a .npy file with {len(data) - end} bytes for {shape[0]} numbers")
    return list(struct.unpack(f"<{shape[0]}{_FORMATS[kind]}", data[end:]))
