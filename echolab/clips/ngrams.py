"""Words of texts, and n-grams as 64-bit hashes: what decontamination, near dedup and the search for loops compare.

A text is folded first: NFKD without combining marks, lower case, `−` is `-`. A word is what stands between white space,
without whatever is neither a letter nor a digit: `$x^{2}$` and `x^2` are both `x2`, and `+` between spaces is no word. Of a
language without white space between words, a word is all that stands together."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain

import numpy as np

_MARKS = re.compile(r"[^\w\s]|_")
_EXACT = re.compile(r"[^\w+\-*/^=<>|!%.,]|_|[.,](?!\d)|(?<!\d)[.,]")
_ASCII_MARKS = {i: None for i in range(128) if _MARKS.match(chr(i))}
_STEP = np.uint64(0x9E3779B97F4A7C15)


def fold(text: str) -> str:
    """What is left of a text when its case, its accents and its typographic forms do not count."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).replace("−", "-")
    return text.lower()


def words(text: str) -> list[str]:
    folded = fold(text)
    return (folded.translate(_ASCII_MARKS) if folded.isascii() else _MARKS.sub("", folded)).split()


def exact(text: str) -> str:
    """Texts are equal if these are: letters and digits, with the operators that tell one formula from another (of a point
    or comma, those between digits). White space, brackets, dollars and the marks of a sentence do not count."""
    return _EXACT.sub("", fold(text))


def remaining(text: str, without: Sequence[bool]) -> str:
    """A text without some of its words; marks that stand alone go with the word before them."""
    rest, place, gone = [], 0, False
    for token in fold(text).split():
        if _MARKS.sub("", token):
            gone, place = without[place], place + 1
        if not gone:
            rest.append(token)
    return " ".join(rest)


@lru_cache(maxsize=1 << 20)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def mix(values: np.ndarray) -> np.ndarray:
    """Spread numbers over 64 bits (splitmix64)."""
    values = values.astype(np.uint64) + _STEP
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngrams(values: np.ndarray, counts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of each text, in order, and how many it has: none where it is shorter than n."""
    size = len(values) - n + 1
    found = np.maximum(counts - n + 1, 0)
    if size <= 0:
        return np.empty(0, np.uint64), found
    rolled = np.zeros(size, np.uint64)
    for k in range(n):
        rolled = rolled * _STEP + values[k : size + k]
    ends = np.repeat(np.cumsum(counts), counts)[:size]
    return mix(rolled[np.arange(n, size + n) <= ends]), found


def distinct(grams: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of each text sorted and once, and how many they are."""
    text = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((grams, text))
    grams, text = grams[order], text[order]
    new = np.ones(len(grams), bool)
    new[1:] = (grams[1:] != grams[:-1]) | (text[1:] != text[:-1])
    return grams[new], np.bincount(text[new], minlength=len(sizes))


def common(counts: np.ndarray, texts: int) -> np.ndarray:
    """Which n-grams are no evidence, by the number of texts that each stands in: those of a template, or a phrase of the
    trade. More than a tenth of the texts have it, or more than 10 of up to 1,000, or more than 1 in 100; never fewer than 4."""
    return counts > max(3, min(10, texts / 10), texts / 100)


class Said:
    """Texts, their words, and the n-grams of these: made once, whoever asks."""

    def __init__(self, texts: Sequence[str]):
        self.texts, self.words = texts, [words(t) for t in texts]
        self.counts = np.fromiter(map(len, self.words), np.int64, len(self.words))
        self.values = np.fromiter(map(_hash, chain.from_iterable(self.words)), np.uint64, int(self.counts.sum()))
        self.starts = np.cumsum(self.counts) - self.counts  # of each text its first word, among those of all
        self._grams: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def grams(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The n-grams of all texts, the text of each, and its place in that."""
        if n not in self._grams:
            grams, sizes = ngrams(self.values, self.counts, n)
            place = np.arange(len(grams)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            self._grams[n] = grams, np.repeat(np.arange(len(sizes)), sizes), place
        return self._grams[n]

    def shingles(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The different n-grams of each text, sorted, and how many they are. Words that are fewer than n are one n-gram."""
        lacking = np.where((self.counts > 0) & (self.counts < n), n - self.counts, 0)
        padded = np.insert(self.values, np.repeat(self.starts + self.counts, lacking), 0)
        return distinct(*ngrams(padded, self.counts + lacking, n))
