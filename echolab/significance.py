"""How sure a mean is, and whether two differ: bootstrap, permutations, sign flips. Rows are what is drawn (trajectories,
problems), columns are bins; NaN is unknown. Everything is seeded, and the order of rows is the caller's to fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

CELLS = 1 << 22  # of a matrix of draws x rows that is in memory at once
BAND = (0.025, 0.975)

Distances = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]


def means(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each column the mean of what is known, and of how many."""
    known = ~np.isnan(rows)
    n = known.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(known, rows, 0).sum(axis=0, dtype=np.float64) / n, n


def bootstrap(rows: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """[draws, columns]: means over rows drawn with replacement, as many as there are."""
    middle, n = means(rows)
    known = ~np.isnan(rows)
    # Around the mean single precision does: what is rounded are deviations.
    deviations = np.nan_to_num(rows - middle).astype(np.float32)
    weights = None if (n == len(rows)).all() else known.astype(np.float32)
    rng, out = np.random.default_rng(seed), []
    for some in _chunks(draws, len(rows)):
        times = np.empty((some, len(rows)), np.float32)
        for i in range(some):
            times[i] = np.bincount(rng.integers(len(rows), size=len(rows)), minlength=len(rows))
        drawn = len(rows) if weights is None else times @ weights
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold nothing that a column knows
            out.append(middle + np.where(drawn > 0, times @ deviations / drawn, np.nan))
    return np.concatenate(out)


def band(rows: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """[2, columns]: between these lie 95 % of the means of a bootstrap."""
    found = bootstrap(rows, draws, seed)
    empty = np.isnan(found).all(axis=0)
    found[:, empty] = 0
    return np.where(empty, np.nan, np.nanquantile(found, BAND, axis=0))


def permutation_test(
    a: np.ndarray, b: np.ndarray, distances: Distances, draws: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Of each distance between the mean rows of `a` and `b`: its value, and how often it is as large when rows change
    sides by chance, (1 + that often) / (1 + draws). NaN where a distance is not defined."""
    rows = np.concatenate([a, b]).astype(np.float64)
    middle, n = means(rows)
    known = (~np.isnan(rows)).astype(np.float64)
    rows = np.nan_to_num(rows - middle)
    total = rows.sum(axis=0)

    def of(side: np.ndarray) -> Mapping[str, np.ndarray]:
        n_a, sums = side @ known, side @ rows
        with np.errstate(invalid="ignore"):
            return distances(middle + sums / n_a, middle + (total - sums) / (n - n_a))

    found = {name: values[0] for name, values in of((np.arange(len(rows))[None] < len(a)) * 1.0).items()}
    larger = dict.fromkeys(found, 0)
    rng = np.random.default_rng(seed)
    for some in _chunks(draws, len(rows)):
        side = np.zeros((some, len(rows)))
        for i in range(some):
            side[i, rng.permutation(len(rows))[: len(a)]] = 1
        for name, values in of(side).items():
            larger[name] += int((values >= _barely(found[name])).sum())
    return {name: (float(v), (1 + larger[name]) / (1 + draws) if np.isfinite(v) else np.nan) for name, v in found.items()}


def sign_flip_test(differences: np.ndarray, draws: int, seed: int) -> float:
    """How often a mean is as far from 0 when each difference may as well have the other sign, both ways, with the 1 of
    `permutation_test`."""
    least = _barely(abs(differences.mean()))
    rng, larger = np.random.default_rng(seed), 0
    for some in _chunks(draws, len(differences)):
        signs = rng.integers(2, size=(some, len(differences))) * 2 - 1
        larger += int((abs(signs @ differences / len(differences)) >= least).sum())
    return (1 + larger) / (1 + draws)


def _barely(value: float) -> float:
    """The same split found again counts, however its sum was rounded."""
    return value - 1e-9 * abs(value) - 1e-12


def _chunks(draws: int, rows: int) -> Iterator[int]:
    size = max(1, CELLS // max(rows, 1))
    while draws > 0:
        yield min(size, draws)
        draws -= size
