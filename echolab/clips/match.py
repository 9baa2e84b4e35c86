"""How close the segment entropies of a prefix come to those of an expert: sequences of any length on common bins of relative
position, and distances between them.

Sequences are columns: bins lie along the first axis, and every number of a column depends on that column alone. So a
distance is the same to the last bit whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

PIECE = 1 << 10  # sequences that are worked on at once: they stay in the processor's cache
SCALE = float(1 << 30)
LEVEL = np.float32(1e-6)


class Sums:
    """Running sums of sequences that lie in a row, from which the curve of any part of them is read.

    The numbers are whole ones, of 2^-30 nats: so sums are exact, and equal parts have equal curves wherever they lie."""

    def __init__(self, values: np.ndarray):
        self.values, self.up_to = np.zeros((2, len(values) + 1), np.int64)
        self.values[:-1] = np.rint(np.multiply(values, SCALE, dtype=np.float64))
        np.cumsum(self.values[:-1], out=self.up_to[1:])

    def curves(self, start: np.ndarray, length: np.ndarray, bins: int) -> np.ndarray:
        """[bins, parts] of the parts of so many values from `start` on. A part is a step function over 0..1, the value of a
        bin its mean there, as in echolab/curves.py."""
        edge = np.arange(bins + 1)[:, None] * length  # in parts of a value, of which `bins` make one
        at = edge // bins
        rest = edge - at * bins
        at += start
        reached = self.up_to[at] * bins + rest * self.values[at]
        return (np.diff(reached, axis=0) / (length * SCALE)).astype(np.float32)


def zscore(curves: np.ndarray) -> np.ndarray:
    """Each column less its mean, by its standard deviation; a level column becomes 0."""
    centred = curves - _total(curves) / np.float32(len(curves))
    deviation = np.sqrt(_total(centred * centred) / np.float32(len(curves)))
    high, low = curves.max(axis=0), curves.min(axis=0)
    level = high - low <= LEVEL * np.maximum(abs(high), abs(low))  # no more than what rounding leaves
    return np.where(level, np.float32(0), centred / np.where(level, np.float32(1), deviation))


def mse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared difference of columns."""
    return _total((a - b) ** 2) / np.float32(len(a))


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - the correlation of columns that `zscore` has made; with a level one it is 0."""
    return 1 - _total(a * b) / np.float32(len(a))


def dtw(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dynamic time warping of columns: the least sum of squared differences along a path from the first values of both to
    the last, over the length of the longer one. Not above `mse`, where lengths are equal.

    The cells of an anti-diagonal need only those of the two before it, in all columns at once."""
    n, m, columns = len(a), len(b), max(a.shape[1], b.shape[1])
    backwards = b[::-1]
    one, two, now = (np.full((n + 1, columns), np.inf, np.float32) for _ in range(3))  # one and two diagonals ago
    two[0] = 0
    for d in range(n + m - 1):
        low, high = max(0, d - m + 1), min(n, d + 1)  # rows of a that the diagonal meets
        cost = a[low:high] - backwards[m - 1 - d + low : m - 1 - d + high]
        cost *= cost
        cells = now[low + 1 : high + 1]
        np.minimum(one[low:high], one[low + 1 : high + 1], out=cells)
        np.minimum(cells, two[low:high], out=cells)
        cells += cost
        two[0] = np.inf  # the corner is a beginning only once
        now[high + 1 : high + 2] = np.inf
        two, one, now = one, now, two
    return one[n] / np.float32(max(n, m))


def _total(curves: np.ndarray) -> np.ndarray:
    """The sum of each column, bin by bin: in one order, however many columns there are."""
    total = curves[0].copy()
    for row in curves[1:]:
        total += row
    return total


DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"mse": mse, "dtw": dtw, "pearson": pearson}


@dataclass(frozen=True)
class Experts:
    """What clips are matched against: the curves of each problem's experts, or one profile for all problems."""

    curves: np.ndarray  # one column each
    columns: Mapping[str, tuple[int, int]] | None = None  # problem -> its first column and their number

    @classmethod
    def of(cls, trajectories: Iterable[pa.Table | pa.RecordBatch], bins: int) -> Experts:
        """Of expert trajectories: columns `problem_id` and `segment_entropies`. Unknown entropies are left out."""
        problems: list[str] = []
        curves = [np.empty((bins, 0), np.float32)]
        for some in trajectories:
            for problem, values in zip(*(some[c].to_pylist() for c in ("problem_id", "segment_entropies")), strict=True):
                known = _known(values or ())
                if problem is not None and len(known):
                    problems.append(problem)
                    curves.append(_curve(known, bins))
        order = sorted(range(len(problems)), key=problems.__getitem__)
        columns: dict[str, tuple[int, int]] = {}
        for place, i in enumerate(order):
            first, n = columns.get(problems[i], (place, 0))
            columns[problems[i]] = first, n + 1
        return cls(np.concatenate(curves, axis=1)[:, order], columns)

    @classmethod
    def profile(cls, means: Sequence[float | None], bins: int) -> Experts:
        """Of a profile: its mean entropy in equal bins of relative position."""
        return cls(_curve(_known(means), bins))

    def of_problem(self, problem: str | None) -> tuple[int, int]:
        """First column and number of columns."""
        if self.columns is None:
            return 0, self.curves.shape[1]
        return self.columns.get(problem or "", (0, 0))


def _known(values: Sequence[float | None]) -> np.ndarray:
    numbers = np.array(values, np.float64)
    return numbers[np.isfinite(numbers)]


def _curve(values: np.ndarray, bins: int) -> np.ndarray:
    return Sums(values).curves(np.zeros(1, np.int64), np.array([len(values)]), bins)


def nearest(
    values: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    experts: Experts,
    column: np.ndarray,
    number: np.ndarray,
    distance: str,
    normalise: bool,
) -> np.ndarray:
    """Of each sequence, so many `values` from its start on, the smallest distance to the `number` curves from `column` on."""
    bins, normalise = len(experts.curves), normalise or distance == "pearson"
    curves = zscore(experts.curves) if normalise else experts.curves
    found = np.full(len(start), np.inf, np.float32)
    for at in range(0, len(start), PIECE):
        here = slice(at, at + PIECE)
        first = start[here].min()
        own = Sums(values[first : (start[here] + length[here]).max()]).curves(start[here] - first, length[here], bins)
        own = zscore(own) if normalise else own
        for i in range(int(number[here].max(initial=0))):
            some = np.flatnonzero(number[here] > i)
            distances = DISTANCES[distance](own[:, some], curves[:, column[here][some] + i])
            found[at + some] = np.minimum(found[at + some], distances)
    return found
