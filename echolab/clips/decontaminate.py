"""Which prompts and clips share text with a benchmark.

Three comparisons, each listed with what it found:

- prompts with problems by word n-grams (`--ngram`, 8 unless told), words as in `ngrams.words`;
- long texts by n-grams of at least 13 words, since all mathematics shares shorter phrases: clips with problems, clips and
  prompts with solutions and answers;
- prompts with problems by their whole text (`ngrams.exact`), for problems that are too short to have an n-gram: what the
  user said, each of its lines, and the problem's id (the template that `ingest --strip-template` cuts is cut there).

What a template brings is no hit. Of chat prompts, rendered or not, only what the user said is compared. Of each benchmark
file, n-grams are left out that more than 10 of its texts share, if these are more than 1 in 100, or that more than half of
at least 4 texts share; also those without a letter, such as 1 2 3 4 5 6 7 8. How many were left out is reported, and a text
that has no other n-gram is still found by its whole text.

No hit is no proof: a paraphrase or a translation shares no n-gram."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from echolab import ids
from echolab.clips.benchmarks import Benchmark, Text
from echolab.clips.ngrams import common, exact, hashes, ngrams, words

NGRAM, LONG_NGRAM = 8, 13


class Hit(NamedTuple):
    """What a prompt or clip shares with a text of a benchmark: the first n-gram they have in common, or all of a problem."""

    benchmark: int
    text: Text
    shared: str
    kind: str  # ngram or exact


class Contamination:
    """The index of some benchmarks. Prompts and clips have at most one hit for each text of a benchmark."""

    def __init__(self, benchmarks: Sequence[Benchmark], n: int = NGRAM):
        texts = [(b, t) for b, benchmark in enumerate(benchmarks) for t in benchmark.texts]
        problems = [(b, t) for b, t in texts if t.is_problem]
        self._problems, self._long = _Ngrams(problems, n), _Ngrams(texts, max(n, LONG_NGRAM))
        self.left_out = [self._problems.left_out[b] + self._long.left_out[b] for b in range(len(benchmarks))]
        self._exact: dict[str, list[tuple[int, Text]]] = {}
        for b, t in problems:
            for key in {exact(t.text), ids.problem_id(t.text)} - {""}:
                self._exact.setdefault(key, []).append((b, t))

    def of_prompts(self, prompts: Sequence[str], problem_ids: Sequence[str | None]) -> list[list[Hit]]:
        asked = [ids.problem_text(p) or "" for p in prompts]
        said = [words(a) for a in asked]
        by_words = zip(self._problems.find(said), self._long.find(said), strict=True)
        found = []
        for text, problem_id, hits in zip(asked, problem_ids, by_words, strict=True):
            keys = dict.fromkeys([*map(exact, (text, *text.splitlines())), problem_id or ""])
            whole = [Hit(b, t, " ".join(t.text.split()), "exact") for key in keys for b, t in self._exact.get(key, ())]
            found.append(_once([*chain(*hits), *whole]))
        return found

    def of_clips(self, clips: Sequence[str]) -> list[list[Hit]]:
        return [_once(hits) for hits in self._long.find([words(c) for c in clips])]


def _once(hits: Sequence[Hit]) -> list[Hit]:
    """The first hit of each text."""
    return list({(h.benchmark, h.text): h for h in reversed(hits)}.values())[::-1]


class _Ngrams:
    """The n-grams of texts, each once a text, without those that are no evidence, sorted by hash."""

    def __init__(self, texts: Sequence[tuple[int, Text]], n: int):
        self.n, self.texts, self.words = n, texts, [words(t.text) for _, t in texts]
        values, counts = hashes(self.words)
        grams, sizes = ngrams(values, counts, n)
        text = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(grams)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        letters = np.cumsum([0, *(not w.isnumeric() for said in self.words for w in said)])
        start = (np.cumsum(counts) - counts)[text] + place
        evidence = letters[start + n] > letters[start]
        order = np.lexsort((place, text, grams))
        first = np.ones(len(order), bool)
        first[1:] = (np.diff(grams[order]) != 0) | (np.diff(text[order]) != 0)
        order = order[first]
        self.left_out: Counter[int] = Counter()
        benchmark = np.array([b for b, _ in texts], np.int64)
        for b, n_texts in zip(*np.unique(benchmark, return_counts=True), strict=True):
            mine = order[benchmark[text[order]] == b]
            _, which, shared_by = np.unique(grams[mine], return_inverse=True, return_counts=True)
            evidence[mine] &= ~common(shared_by, n_texts)[which]
            self.left_out[int(b)] = len(np.unique(grams[mine[~evidence[mine]]]))
        order = order[evidence[order]]
        self.grams, self.text, self.place = grams[order], text[order], place[order]

    def find(self, said: Sequence[list[str]]) -> list[list[Hit]]:
        """For each text, given as its words, those that share an n-gram with it."""
        found: list[list[Hit]] = [[] for _ in said]
        grams, sizes = ngrams(*hashes(said), self.n)
        first, last = (np.searchsorted(self.grams, grams, side) for side in ("left", "right"))
        known = np.flatnonzero(first < last)
        ends = np.cumsum(sizes)
        rows = np.searchsorted(ends, known, "right")
        seen: set[tuple[int, int]] = set()
        for row, place, a, b in zip(rows, known - (ends - sizes)[rows], first[known], last[known], strict=True):
            for text, at in zip(self.text[a:b].tolist(), self.place[a:b].tolist(), strict=True):
                shared = said[row][place : place + self.n]
                if (row, text) not in seen and self.words[text][at : at + self.n] == shared:  # and not only its hash
                    seen.add((row, text))
                    benchmark, matched = self.texts[text]
                    found[row].append(Hit(benchmark, matched, " ".join(shared), "ngram"))
        return found
