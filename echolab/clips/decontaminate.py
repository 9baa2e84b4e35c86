"""Which prompts and clips share text with a benchmark.

Three comparisons, each listed with what it found:

- prompts with problems by word n-grams (`--ngram`, 8 unless told), words as in `ngrams.words`;
- long texts by n-grams of at least 13 words, since all mathematics shares shorter phrases: clips with problems, clips and
  prompts with solutions and answers;
- prompts with problems by their whole text (`ngrams.exact`), where a problem is too short to have an n-gram: what the user
  said, and each of its lines; and by the id of the problem (the template that `ingest --strip-template` cuts is cut there).

What a template brings is no hit. Of chat prompts, rendered or not, only what the user said is compared. Of each benchmark
file those n-grams are common that at least 4 of its texts share, and more than a tenth of them, or more than 10 of up to
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
from echolab.clips.ngrams import Said, common, exact, remaining

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

    def of_prompts(self, asked: Said, problem_ids: Sequence[str | None]) -> list[list[Hit]]:
        """Of what users asked, and the ids of the problems behind it."""
        return [sum(hits, []) for hits in zip(*(i.of_prompts(asked, problem_ids) for i in self._indexes), strict=True)]

    def of_clips(self, said: Said) -> list[list[Hit]]:
        return [sum(hits, []) for hits in zip(*(i.of_clips(said) for i in self._indexes), strict=True)]


class _Index:
    """One benchmark."""

    def __init__(self, number: int, benchmark: Benchmark, n: int):
        self.number = number
        problems = [t for t in benchmark.texts if t.is_problem]
        self.problems, self.long = _Ngrams(problems, n), _Ngrams(benchmark.texts, max(n, LONG_NGRAM))
        self.ids: dict[str | None, list[Text]] = {}
        self.whole: dict[str, list[Text]] = {}  # of problems that no n-gram can find
        found = set(self.problems.text.tolist())
        covered = self.problems.covers(self.problems.said)
        for i, text in enumerate(problems):
            self.ids.setdefault(ids.problem_id(text.text), []).append(text)
            if i not in found:
                for key in {*_whole(self.problems.said, i, covered)} - {""}:
                    self.whole.setdefault(key, []).append(text)

    def of_prompts(self, asked: Said, problem_ids: Sequence[str | None]) -> list[list[Hit]]:
        by_words = zip(self.problems.find(asked), self.long.find(asked), strict=True)
        covered = self.problems.covers(asked)
        found = []
        for i, (short, long) in enumerate(by_words):
            same = self.ids.get(problem_ids[i], [])
            if self.whole:
                keys = dict.fromkeys([*_whole(asked, i, covered), *map(exact, asked.texts[i].splitlines())])
                same = [*same, *(text for key in keys for text in self.whole.get(key, ()))]
            found.append(self._hits([*short, *long, *((text, " ".join(text.text.split()), "exact") for text in same)]))
        return found

    def of_clips(self, said: Said) -> list[list[Hit]]:
        return [self._hits(found) for found in self.long.find(said)]

    def _hits(self, found: Sequence[tuple[Text, str, str]]) -> list[Hit]:
        """The first of each text."""
        once = {text: (shared, kind) for text, shared, kind in reversed(found)}
        return [Hit(self.number, text, *what) for text, what in reversed(once.items())]


def _whole(said: Said, text: int, covered: np.ndarray) -> list[str]:
    """A whole text, and what is left of it without its common words, as they are compared."""
    mine = covered[said.starts[text] : said.starts[text] + said.counts[text]]
    found = [said.texts[text]]
    if FEWEST <= len(mine) - np.count_nonzero(mine) < len(mine):
        found.append(remaining(said.texts[text], mine.tolist()))
    return [exact(t) for t in found]


class _Ngrams:
    """The n-grams of texts that are evidence, each once a text, sorted by hash."""

    def __init__(self, texts: Sequence[Text], n: int):
        self.n, self.texts, self.said = n, texts, Said([t.text for t in texts])
        grams, text, place = self.said.grams(n)
        order = np.lexsort((place, text, grams))
        grams, text, place = grams[order], text[order], place[order]
        different, shared_by = np.unique(grams[_first(grams, text)], return_counts=True)
        self.common = _Among(different[common(shared_by, len(texts))])
        start = self.said.starts[text] + place
        letters = _before(np.array([not w.isnumeric() for said in self.said.words for w in said], bool))
        covered = _before(self.covers(self.said))
        evidence = np.flatnonzero((letters[start + n] > letters[start]) & (covered[start + n] == covered[start]))
        evidence = evidence[_first(grams[evidence], text[evidence])]
        self.grams, self.text, self.place = _Among(grams[evidence]), text[evidence], place[evidence]
        self.left_out = len(different) - len(np.unique(grams[evidence]))

    def covers(self, said: Said) -> np.ndarray:
        """Which words of all these texts stand in an n-gram that is common here."""
        grams, text, place = said.grams(self.n)
        start = (said.starts[text] + place)[self.common.find(grams)]
        size = len(said.values) + 1
        return np.cumsum(np.bincount(start, minlength=size) - np.bincount(start + self.n, minlength=size))[:-1] > 0

    def find(self, said: Said) -> list[list[tuple[Text, str, str]]]:
        """For each text said, those that share an n-gram with it."""
        found: list[list[tuple[Text, str, str]]] = [[] for _ in said.texts]
        grams, rows, places = said.grams(self.n)
        known = self.grams.find(grams)
        first, last = (np.searchsorted(self.grams.values, grams[known], side) for side in ("left", "right"))
        seen: set[tuple[int, int]] = set()
        for row, place, a, b in zip(rows[known], places[known], first, last, strict=True):
            for text, at in zip(self.text[a:b].tolist(), self.place[a:b].tolist(), strict=True):
                shared = said.words[row][place : place + self.n]
                if (row, text) not in seen and self.said.words[text][at : at + self.n] == shared:  # and not only its hash
                    seen.add((row, text))
                    found[row].append((self.texts[text], " ".join(shared), "ngram"))
        return found


class _Among:
    """Sorted hashes, and a table of their first bits by which nearly all others are told apart at once."""

    def __init__(self, values: np.ndarray):
        self.values = values
        bits = min(26, 4 + max(6, len(values).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[values >> self._shift] = True

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Where those stand that are among them."""
        likely = np.flatnonzero(self._table[hashes >> self._shift])
        place = np.minimum(np.searchsorted(self.values, hashes[likely]), len(self.values) - 1)
        return likely[self.values[place] == hashes[likely]] if len(self.values) else likely


def _first(grams: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Where, in this order, an n-gram stands in a text for the first time."""
    first = np.ones(len(grams), bool)
    first[1:] = (grams[1:] != grams[:-1]) | (text[1:] != text[:-1])
    return first


def _before(marks: np.ndarray) -> np.ndarray:
    """How many marks stand before each place, and before the end."""
    return np.append(0, np.cumsum(marks))
