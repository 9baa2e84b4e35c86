"""What samples say of a policy: mean@k, unbiased pass@k, maj@k with ties, and intervals over questions.

Every function takes one row a question; intervals come from drawing questions, never samples, as these are no independent
witnesses."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

Numbers = Sequence[float] | np.ndarray
DRAWS, LEVEL = 10_000, 0.95
MOST_SUBSETS, SUBSETS = 2_000, 1_000  # below the first, maj@k looks at all subsets, else at so many drawn ones


class Interval(NamedTuple):
    """A mean over questions with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """The mean difference of two policies on the same questions; p: twice the share of draws on the other side of zero."""

    mean: float
    low: float
    high: float
    p: float


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k samples is right, from n >= k samples of which `correct` are: 1 - C(n - c, k) / C(n, k)."""
    if not 0 < k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a question, there are {n} ({correct} right)")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def maj_at_k(answers: Sequence[Hashable | None], right: Sequence[bool], k: int, seed: int = 0) -> float:
    """The chance that the most frequent answer of k samples is right. Several equally frequent ones share it; a sample without
    an answer (None) votes for nothing. `answers` name classes of equal answers."""
    n = len(answers)
    if not 0 < k <= n or len(right) != n:
        raise ValueError(f"maj@{k} needs at least {k} samples a question, there are {n}")
    if math.comb(n, k) <= MOST_SUBSETS:
        subsets = itertools.combinations(range(n), k)
    else:
        rng = np.random.default_rng(seed)
        subsets = (rng.choice(n, k, replace=False).tolist() for _ in range(SUBSETS))
    credits = [_credit([answers[i] for i in s], [right[i] for i in s]) for s in subsets]
    return math.fsum(credits) / len(credits)


def _credit(answers: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {a for a, n in votes.items() if n == most}
    return len({a for a, r in zip(answers, right, strict=True) if r and a in winners}) / len(winners)


def interval(values: Numbers, seed: int = 0, level: float = LEVEL) -> Interval:
    """The mean of one number a question, with a percentile interval over drawn questions."""
    x = np.asarray(values, dtype=np.float64)
    means = _drawn_means(x, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high))


def paired(a: Numbers, b: Numbers, seed: int = 0, level: float = LEVEL) -> Difference:
    """b - a on the same questions, in the same order."""
    if len(a) != len(b):
        raise ValueError(f"a paired comparison needs the same questions: {len(a)} and {len(b)}")
    x = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    means = _drawn_means(x, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    return Difference(float(x.mean()), float(low), float(high), float(min(1.0, 2 * (beyond + 1) / (len(means) + 1))))


def _drawn_means(x: np.ndarray, seed: int) -> np.ndarray:
    if not len(x):
        raise ValueError("no questions")
    rng = np.random.default_rng(seed)
    pieces = max(1, DRAWS * len(x) // 4_000_000)  # of memory
    drawn = [x[rng.integers(len(x), size=(len(part), len(x)))].mean(1) for part in np.array_split(np.empty(DRAWS), pieces)]
    return np.concatenate(drawn)


def sampling_error(correct: Numbers, n: int) -> float:
    """The part of the standard error that more samples a question would remove: of mean@n, over the questions."""
    rates = np.asarray(correct, dtype=np.float64) / n
    return float(np.sqrt((rates * (1 - rates) / max(n - 1, 1)).sum()) / len(rates))
