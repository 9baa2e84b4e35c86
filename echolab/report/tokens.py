"""Token numbers as the page carries them: one character for a token's length, two for a number.

A token is shown where its first character begins: one that holds only the rest of a character has length 0. Lengths are
those of JavaScript (UTF-16). reader.js reads what is written here.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)
STEP = 0.004  # nats: what is shown with two digits is right
NOTHING, MOST = 4095, 4094  # no number; the largest, 16.376, stands for all above


def spell(ids: Sequence[int], pieces: Mapping[int, bytes]) -> tuple[str, list[int]]:
    """The text of tokens, and how much of it each one begins. Bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts: list[str] = []
    lengths = [0] * len(ids)
    owner = None  # the token in which a character began that is not complete yet
    for i, id in enumerate(ids):
        piece = pieces.get(id, b"")
        if owner is None and (whole := _decoded(piece)) is not None:
            texts.append(whole[0])
            lengths[i] = whole[1]
            continue
        text = decoder.decode(piece)
        texts.append(text)
        if text and owner is not None:
            lengths[owner] += _length(text[0])
            text, owner = text[1:], None
        lengths[i] += _length(text)
        if owner is None and decoder.getstate()[0]:
            owner = i
    if owner is not None:
        texts.append(rest := decoder.decode(b"", final=True))
        lengths[owner] += _length(rest)
    return "".join(texts), lengths


@lru_cache(1 << 18)
def _decoded(piece: bytes) -> tuple[str, int] | None:
    """A piece that is text on its own, and its length."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    return text, _length(text)


def _length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2


def pack_lengths(lengths: Iterable[int]) -> str:
    """One character each, more for those of 63 and above."""
    return "".join("_" * (n // 63) + _LETTERS[n % 63] for n in lengths)


_LETTERS = ALPHABET.tobytes().decode()


def pack(numbers: np.ndarray) -> str:
    """Two characters each, in units of 0.004; of NaN, none is shown."""
    known = np.isfinite(numbers)
    codes = np.where(known, np.clip(np.rint(np.where(known, numbers, 0) / STEP), 0, MOST), NOTHING).astype(np.int64)
    return ALPHABET[np.stack([codes >> 6, codes & 63], 1)].tobytes().decode()


def unpack(packed: str) -> np.ndarray:
    """The numbers again, NaN where there is none."""
    codes = _CODES[np.frombuffer(packed.encode(), np.uint8)].reshape(-1, 2)
    numbers = codes[:, 0] * 64 + codes[:, 1]
    return np.where(numbers == NOTHING, np.nan, numbers * STEP)


_CODES = np.zeros(128, np.int64)
_CODES[ALPHABET] = np.arange(64)
