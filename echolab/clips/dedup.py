"""Near duplicates: texts whose sets of word 5-grams have a Jaccard similarity of at least a threshold.

MinHash bands name the pairs that are worth a look, the exact sets decide. Of a text shorter than 5 words, the whole is its one
5-gram; a text without words is like no other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from echolab.clips.ngrams import Said, common, mix

N = 5
HASHES = 128
MISSED = 0.01  # of pairs at the threshold, at most
DIRECT = 64  # texts of a group that are compared one by one, whatever their bands say
PIECE = 1 << 20  # 5-grams that are hashed at once
SAMPLE = 100_000  # texts among which templates are looked for


def bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many hashes: the longest bands that miss fewer than 1 in 100 pairs at the threshold."""
    for size in range(HASHES, 1, -1):
        if (1 - threshold**size) ** (HASHES // size) < MISSED:
            return HASHES // size, size
    return HASHES, 1


class Shingles:
    """The 5-grams of texts, each text's sorted and once, on disk. Texts are numbered from 0 as they are added."""

    def __init__(self, path: Path):
        self._path, self._sizes = path, [np.empty(0, np.int64)]
        path.touch()

    def add(self, said: Said) -> None:
        grams, sizes = said.shingles(N)
        with self._path.open("ab") as f:
            grams.tofile(f)
        self._sizes.append(sizes)

    def read(self) -> None:
        """No more texts are added, now they can be asked for."""
        self.sizes = np.concatenate(self._sizes)
        self.starts = np.cumsum(self.sizes) - self.sizes
        filled = self._path.stat().st_size > 0
        self._grams = np.memmap(self._path, np.uint64, "r") if filled else np.empty(0, np.uint64)

    def __getitem__(self, text: int) -> np.ndarray:
        start = self.starts[text]
        return self._grams[start : start + self.sizes[text]]

    def templates(self, texts: np.ndarray) -> np.ndarray:
        """5-grams that so many of these texts share that they say nothing of any."""
        sample = texts[:SAMPLE]
        grams, counts = np.unique(np.concatenate([self[t] for t in sample] or [self._grams]), return_counts=True)
        return grams[common(counts, len(sample))]

    def without(self, grams: np.ndarray) -> Shingles:
        """The same texts without these 5-grams."""
        rest = Shingles(self._path.with_suffix(".rest"))
        with rest._path.open("wb") as f:
            for first, last in self._pieces():
                piece = self._grams[self.starts[first] : self.starts[last - 1] + self.sizes[last - 1]]
                stays = ~np.isin(piece, grams)
                piece[stays].tofile(f)
                text = np.repeat(np.arange(last - first), self.sizes[first:last])
                rest._sizes.append(np.bincount(text[stays], minlength=last - first))
        rest.read()
        return rest

    def keys(self, threshold: float) -> np.ndarray:
        """A row for each text, a column for each band: where two texts have the same number, they are worth a look."""
        n_bands, size = bands(threshold)
        keys = np.zeros((len(self.sizes), n_bands), np.uint64)
        factors = mix(np.arange(n_bands * size)) | np.uint64(1)
        for first, last in self._pieces():
            there = first + np.flatnonzero(self.sizes[first:last])
            if not len(there):
                continue
            start = self.starts[first]
            piece = self._grams[start : self.starts[last - 1] + self.sizes[last - 1]]
            for i, factor in enumerate(factors):
                least = np.minimum.reduceat(piece * factor, self.starts[there] - start)
                keys[there, i // size] = mix(keys[there, i // size] ^ least)
        return keys

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of texts that hold about `PIECE` 5-grams together."""
        first = 0
        while first < len(self.sizes):
            last = max(first + 1, int(np.searchsorted(self.starts, self.starts[first] + PIECE)))
            yield first, last
            first = last


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets, as sorted arrays."""
    if not len(a) or not len(b):
        return 0.0
    place = np.minimum(np.searchsorted(b, a), len(b) - 1)
    shared = int(np.count_nonzero(b[place] == a))
    return shared / (len(a) + len(b) - shared)


def leaders(
    shingles: Shingles, keys: np.ndarray, order: np.ndarray, threshold: float, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For each text of `order` its leader, and how like it is to that. In this order each text follows the first earlier
    leader that is like enough, and where there is none it leads itself. Texts of a small group are all compared."""
    leader, similarity = order.copy(), np.ones(len(order))
    worth, buckets = _worth_a_look(keys[order], shingles.sizes[order] > 0, None if groups is None else groups[order])
    found: dict[int, list[int]] = defaultdict(list)  # of each bucket, the places of leaders in it
    for place, mine in zip(worth, buckets, strict=True):
        text = shingles[order[place]]
        for other in sorted({o for bucket in mine for o in found[bucket]}):
            size, its = len(text), int(shingles.sizes[order[other]])
            if min(size, its) / max(size, its) < threshold:
                continue
            if (like := jaccard(text, shingles[order[other]])) >= threshold:
                leader[place], similarity[place] = order[other], like
                break
        else:
            for bucket in mine:
                found[bucket].append(place)
    return leader, similarity


def _worth_a_look(keys: np.ndarray, there: np.ndarray, groups: np.ndarray | None) -> tuple[list[int], list[list[int]]]:
    """Places of the texts that share a bucket with another one, and their buckets: bands, and small groups."""
    columns = [keys[:, i] for i in range(keys.shape[1])] + ([] if groups is None else [groups])
    buckets: dict[int, list[int]] = defaultdict(list)
    for number, column in enumerate(columns):
        places = np.flatnonzero(there)
        _, which, counts = np.unique(column[places], return_inverse=True, return_counts=True)
        most = DIRECT if number == keys.shape[1] else len(places)
        shared = (counts[which] > 1) & (counts[which] <= most)
        for place, bucket in zip(places[shared].tolist(), which[shared].tolist(), strict=True):
            buckets[place].append(bucket * len(columns) + number)
    return (worth := sorted(buckets)), [buckets[p] for p in worth]
