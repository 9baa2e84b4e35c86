"""Which prompts and clips share text with a benchmark.

Three comparisons, each listed with what it found:

- prompts with problems by word n-grams (`--ngram`, 8 unless told), words as in `ngrams.words`;
- long texts by n-grams of at least 13 words, since all mathematics shares shorter phrases: clips with problems, clips and
  prompts with solutions and answers;
- prompts with problems by their whole text (`ngrams.exact`), for problems that are too short to have an n-gram: what the
  user said, each of its lines, and the problem's id (the template that `ingest --strip-template` cuts is cut there).

What a template brings is no hit. Of chat prompts, rendered or not, only what the user said is compared. Of each benchmark
file those n-grams are common that at least 4 of its texts share, and more than a fifth of them, or more than 10 of up to
1,000, or more than 1 in 100. Words that stand in a common n-gram are left out: n-grams are made of what is before and after,
and whole texts are compared with and without these words, in problems and prompts alike. N-grams without a letter, such as
1 2 3 4 5 6 7 8, count for nothing either. How many n-grams were left out is reported.

No hit is no proof: a paraphrase or a translation shares no n-gram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from echolab import ids
from echolab.clips.benchmarks import Benchmark, Text
from echolab.clips.ngrams import common, exact, hashes, ngrams, remaining, words

NGRAM, LONG_NGRAM = 8, 13
FEWEST = 3  # words without the common ones that are compared as a whole text


class Hit(NamedTuple):
    """What a prompt or clip shares with a text of a benchmark: the first n-gram they have in common, or all of a problem."""

    benchmark: int
    text: Text
    shared: str
    kind: str  # ngram or exact


class Contamination:
    """Some benchmarks. Prompts and clips have at most one hit for each text of a benchmark."""

    def __init__(self, benchmarks: Sequence[Benchmark], n: int = NGRAM):
        self._indexes = [_Index(number, benchmark, n) for number, benchmark in enumerate(benchmarks)]
        self.left_out = [index.problems.left_out + index.long.left_out for index in self._indexes]

    def of_prompts(self, prompts: Sequence[str], problem_ids: Sequence[str | None]) -> list[list[Hit]]:
        said = _Said([ids.problem_text(p) or "" for p in prompts])
        return [sum(hits, []) for hits in zip(*(i.of_prompts(said, problem_ids) for i in self._indexes), strict=True)]

    def of_clips(self, clips: Sequence[str]) -> list[list[Hit]]:
        said = _Said(clips)
        return [sum(hits, []) for hits in zip(*(i.of_clips(said) for i in self._indexes), strict=True)]


class _Said:
    """Texts, and what is made of them once for all benchmarks."""

    def __init__(self, texts: Sequence[str]):
        self.texts, self.words = texts, [words(t) for t in texts]
        self.values, self.counts = hashes(self.words)
        self.starts = np.cumsum(self.counts) - self.counts  # of each text its first word, among those of all
        self._grams: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def grams(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All n-grams, the text of each, and its place in that."""
        if n not in self._grams:
            grams, sizes = ngrams(self.values, self.counts, n)
            place = np.arange(len(grams)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            self._grams[n] = grams, np.repeat(np.arange(len(sizes)), sizes), place
        return self._grams[n]

    def covered(self, n: int, those: np.ndarray) -> np.ndarray:
        """Which words of all texts stand in one of these n-grams, whose hashes are sorted."""
        grams, text, place = self.grams(n)
        start = (self.starts[text] + place)[_among(grams, those)]
        size = len(self.values) + 1
        open_ = np.bincount(start, minlength=size) - np.bincount(start + n, minlength=size)
        return np.cumsum(open_)[:-1] > 0

    def keys(self, text: int, covered: np.ndarray) -> list[str]:
        """The whole text, and what is left of it without its common words, as they are compared."""
        mine = covered[self.starts[text] : self.starts[text] + self.counts[text]]
        left = len(mine) - np.count_nonzero(mine)
        whole = [self.texts[text]]
        if FEWEST <= left < len(mine):
            whole.append(remaining(self.texts[text], mine.tolist()))
        return [exact(t) for t in whole]


class _Index:
    """One benchmark."""

    def __init__(self, number: int, benchmark: Benchmark, n: int):
        self.number = number
        problems = [t for t in benchmark.texts if t.is_problem]
        self.problems, self.long = _Ngrams(problems, n), _Ngrams(benchmark.texts, max(n, LONG_NGRAM))
        self.whole: dict[str, list[Text]] = {}
        said = self.problems.said
        covered = said.covered(n, self.problems.common)
        for i, text in enumerate(problems):
            for key in {*said.keys(i, covered), ids.problem_id(text.text)} - {""}:
                self.whole.setdefault(key, []).append(text)

    def of_prompts(self, said: _Said, problem_ids: Sequence[str | None]) -> list[list[Hit]]:
        covered = said.covered(self.problems.n, self.problems.common)
        found = []
        for i, hits in enumerate(zip(self.problems.find(said), self.long.find(said), strict=True)):
            keys = [*said.keys(i, covered), *map(exact, said.texts[i].splitlines()), problem_ids[i] or ""]
            whole = ((t, " ".join(t.text.split()), "exact") for key in keys for t in self.whole.get(key, ()))
            found.append(self._hits([*hits[0], *hits[1], *whole]))
        return found

    def of_clips(self, said: _Said) -> list[list[Hit]]:
        return [self._hits(found) for found in self.long.find(said)]

    def _hits(self, found: Sequence[tuple[Text, str, str]]) -> list[Hit]:
        """The first of each text."""
        once = {text: (shared, kind) for text, shared, kind in reversed(found)}
        return [Hit(self.number, text, *what) for text, what in reversed(once.items())]


class _Ngrams:
    """The n-grams of texts that are evidence, each once a text, sorted by hash."""

    def __init__(self, texts: Sequence[Text], n: int):
        self.n, self.texts, self.said = n, texts, _Said([t.text for t in texts])
        grams, text, place = self.said.grams(n)
        order = np.lexsort((place, text, grams))
        first = np.ones(len(order), bool)
        first[1:] = (grams[order][1:] != grams[order][:-1]) | (text[order][1:] != text[order][:-1])
        order = order[first]
        different, shared_by = np.unique(grams[order], return_counts=True)
        self.common = different[common(shared_by, len(texts))]
        start = self.said.starts[text] + place
        letters = _before(np.array([not w.isnumeric() for said in self.said.words for w in said], bool))
        covered = _before(self.said.covered(n, self.common))
        evidence = (letters[start + n] > letters[start]) & (covered[start + n] == covered[start])
        order = order[evidence[order]]
        self.grams, self.text, self.place = grams[order], text[order], place[order]
        self.left_out = len(different) - len(np.unique(self.grams))

    def find(self, said: _Said) -> list[list[tuple[Text, str, str]]]:
        """For each text said, those that share an n-gram with it."""
        found: list[list[tuple[Text, str, str]]] = [[] for _ in said.texts]
        grams, rows, places = said.grams(self.n)
        first, last = (np.searchsorted(self.grams, grams, side) for side in ("left", "right"))
        known = np.flatnonzero(first < last)
        seen: set[tuple[int, int]] = set()
        for row, place, a, b in zip(rows[known], places[known], first[known], last[known], strict=True):
            for text, at in zip(self.text[a:b].tolist(), self.place[a:b].tolist(), strict=True):
                shared = said.words[row][place : place + self.n]
                if (row, text) not in seen and self.said.words[text][at : at + self.n] == shared:  # and not only its hash
                    seen.add((row, text))
                    found[row].append((self.texts[text], " ".join(shared), "ngram"))
        return found


def _among(values: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Which of the values are among those, which are sorted."""
    if not len(those):
        return np.zeros(len(values), bool)
    return those[np.minimum(np.searchsorted(those, values), len(those) - 1)] == values


def _before(marks: np.ndarray) -> np.ndarray:
    """How many marks stand before each place, and before the end."""
    return np.append(0, np.cumsum(marks))
