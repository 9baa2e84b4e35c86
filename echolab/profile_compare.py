"""Two profiles side by side: how far apart their mean curves are, and whether chance could have put them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from echolab.coverage import Chosen, label
from echolab.curves import flat, resample
from echolab.errors import EcholabError, WrongUsage
from echolab.named import Named, find
from echolab.profiles import MEMORY
from echolab.significance import band, means, permutation_test, sign_flip_test
from echolab.sql import Session
from echolab.store import Snapshot
from echolab.views import text


@dataclass(frozen=True)
class Side:
    """One of the two profiles, read again from its members."""

    profile: str
    scorer: str
    segmenter: str
    trajectories: int
    problems: int
    mean: float
    curve: list[float | None]


@dataclass(frozen=True)
class Paired:
    """Problems that both have: the mean over problems of the difference a - b, its 95 % interval, and the p-value of a
    sign-flip test."""

    problems: int
    difference: float
    lo: float | None
    hi: float | None
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """`distances` has the value and the p-value of each: `mse`, `one_minus_pearson`, `max_abs` of the mean curves."""

    a: Side
    b: Side
    bins: int
    difference: list[float | None]
    distances: dict[str, dict[str, float | None]]
    paired: Paired | None
    notes: list[str]


def compare(
    snapshot: Snapshot, a: str, b: str, *, bins: int | None = None, permutations: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two profiles over relative position, in the bins of the first unless `bins` says otherwise. Their
    trajectories are read again: the members of each, under the scorer and the segmenter that it was made with."""
    if permutations < 1 or seed < 0 or (bins is not None and not 1 <= bins <= 1000):
        raise WrongUsage("at least 1 permutation, a seed from 0 on, and 1 to 1000 bins")
    named = find(snapshot, "cohort", a), find(snapshot, "cohort", b)
    bins = bins or int(named[0].config["bins"])
    with Session(snapshot, memory_limit=MEMORY) as session:
        (ids_a, problems_a, rows_a), (ids_b, problems_b, rows_b) = (_curves(session, n, bins) for n in named)
    sides = _side(snapshot, named[0], problems_a, rows_a), _side(snapshot, named[1], problems_b, rows_b)
    found = permutation_test(rows_a, rows_b, distances, permutations, seed)
    difference = means(rows_a)[0] - means(rows_b)[0]
    return Comparison(
        *sides,
        bins,
        _numbers(difference),
        {name: {"value": _number(value), "p": _number(p)} for name, (value, p) in found.items()},
        _paired(problems_a, rows_a, problems_b, rows_b, permutations, seed),
        _notes(snapshot, named, len(set(ids_a) & set(ids_b))),
    )


def distances(a: np.ndarray, b: np.ndarray) -> Mapping[str, np.ndarray]:
    """Between curves, a row each: over the bins that both know. Pearson's is not defined where a curve is level."""
    known = ~(np.isnan(a) | np.isnan(b))
    n = known.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.where(known, a - b, 0)
        x, y = (np.where(known, c - (np.where(known, c, 0).sum(axis=1) / n)[:, None], 0) for c in (a, b))
        level = np.where(known, abs(a) + abs(b), 0).max(axis=1) * 1e-9  # less than this is what rounding leaves
        norms = [np.sqrt((c**2).sum(axis=1)) for c in (x, y)]
        pearson = np.where(np.minimum(*norms) > level, (x * y).sum(axis=1) / (norms[0] * norms[1]), np.nan)
        return {
            "mse": (apart**2).sum(axis=1) / n,
            "one_minus_pearson": 1 - pearson,
            "max_abs": np.where(n > 0, abs(apart).max(axis=1), np.nan),
        }


def _curves(session: Session, named: Named, bins: int) -> tuple[list[str], list[str | None], np.ndarray]:
    """Ids and problems of a profile's trajectories, and [trajectories, bins] of their entropies, in the order of the ids."""
    chosen = Chosen(named.config["scorer"], named.config["segmenter"])
    rows: list[tuple[str, str | None]] = []
    curves: list[np.ndarray] = []
    for batch in session.batches(
        f"""SELECT rollout_id, problem_id, segment_entropies FROM profile_members JOIN segmentations USING (rollout_id)
        WHERE profile = {text(named.label)} AND {chosen.cut}"""
    ):
        rows += zip(batch["rollout_id"].to_pylist(), batch["problem_id"].to_pylist(), strict=True)
        curves.append(resample(*flat(batch["segment_entropies"]), bins).astype(np.float32))
    if len(rows) != (expected := named.parents["facts"]["trajectories"]):
        raise EcholabError(
            f"{expected - len(rows):,} of {expected:,} trajectories of {named.label} have no segments in this store any more"
        )
    order = sorted(range(len(rows)), key=lambda i: rows[i][0])
    rollouts, problems = zip(*(rows[i] for i in order), strict=True)
    return list(rollouts), list(problems), np.concatenate(curves)[order]


def _side(snapshot: Snapshot, named: Named, problems: list[str | None], rows: np.ndarray) -> Side:
    mean, _ = means(rows)
    scorer, segmenter = (label(snapshot, kind, named.config[kind]) for kind in ("scorer", "segmenter"))
    n_problems = len({p for p in problems if p})
    return Side(named.label, scorer, segmenter, len(rows), n_problems, float(np.nanmean(mean)), _numbers(mean))


def _paired(
    problems_a: list[str | None], rows_a: np.ndarray, problems_b: list[str | None], rows_b: np.ndarray, draws: int, seed: int
) -> Paired | None:
    """Each problem counts once, whatever its number of trajectories: the difference of its mean curves, over position."""
    shared = sorted(p for p in {*problems_a} & {*problems_b} if p is not None)
    if not shared:
        return None
    apart = _by_problem(problems_a, rows_a, shared) - _by_problem(problems_b, rows_b, shared)
    apart = means(apart.T)[0]
    apart = apart[~np.isnan(apart)]
    if len(apart) < 2:
        return Paired(len(apart), float(apart.mean()), None, None, None) if len(apart) else None
    low, high = band(apart[:, None], draws, seed)[:, 0]
    return Paired(len(apart), float(apart.mean()), float(low), float(high), sign_flip_test(apart, draws, seed))


def _by_problem(problems: list[str | None], rows: np.ndarray, shared: list[str]) -> np.ndarray:
    """[problems, bins]: the mean curve of each of these problems."""
    place = {p: i for i, p in enumerate(shared)}
    at = np.array([place.get(p or "", -1) for p in problems])
    rows, at = rows[at >= 0], at[at >= 0]
    known = ~np.isnan(rows)
    sums, n = np.zeros((len(shared), rows.shape[1])), np.zeros((len(shared), rows.shape[1]))
    np.add.at(sums, at, np.where(known, rows, 0))
    np.add.at(n, at, known)
    with np.errstate(invalid="ignore"):
        return sums / n


def _notes(snapshot: Snapshot, named: tuple[Named, Named], both: int) -> list[str]:
    a, b = named
    notes = []
    for kind in ("scorer", "segmenter"):
        if a.config[kind] != b.config[kind]:
            names = [label(snapshot, kind, n.config[kind]) for n in named]
            notes.append(f"{a.label} has {kind} {names[0]}, {b.label} {names[1]}: what differs may be the {kind}")
    if both:
        notes.append(f"{both:,} trajectories are members of both: the permutation test takes them for different ones")
    return notes


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(v) for v in values]
