"""Curves and distances against plain loops in float64, and the clips that `match` chooses by them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.clips.match import DISTANCES, Experts, Sums, dtw, mse, nearest, pearson, zscore
from echolab.clips.selectors import Selector, select
from echolab.curves import resample

RNG = np.random.default_rng(5)
NUMBERS = st.floats(0, 12, width=32)
SEQUENCES = st.lists(NUMBERS, min_size=1, max_size=30)


# The definitions, as loops.


def curve_of(values, bins):
    """The mean over each bin of a step function on 0..1."""
    n, out = len(values), []
    for k in range(bins):
        low, high = Fraction(k, bins), Fraction(k + 1, bins)
        parts = [max(0, min(high, Fraction(i + 1, n)) - max(low, Fraction(i, n))) for i in range(n)]
        out.append(float(sum(p * Fraction(v) for p, v in zip(parts, values, strict=True)) * bins))
    return out


def warped(a, b):
    best = {(-1, -1): 0.0}
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            before = min(best.get(p, math.inf) for p in ((i - 1, j), (i, j - 1), (i - 1, j - 1)))
            best[i, j] = before + (x - y) ** 2
    return best[len(a) - 1, len(b) - 1] / max(len(a), len(b))


def uncorrelated(a, b):
    if max(a) == min(a) or max(b) == min(b):
        return 1.0
    return 1 - float(np.corrcoef(a, b)[0, 1])


def standardised(a):
    a = np.array(a, np.float64)
    return np.zeros(len(a)) if a.max() == a.min() else (a - a.mean()) / a.std()


LOOPS = {"mse": lambda a, b: float(np.mean((np.array(a) - np.array(b)) ** 2)), "dtw": warped, "pearson": uncorrelated}


def columns(sequences):
    return np.array(sequences, np.float32).T


# Curves.


@given(st.lists(SEQUENCES, min_size=1, max_size=5), st.integers(2, 20), st.randoms())
@settings(max_examples=100, deadline=None)
def test_curves_of_prefixes_are_means_of_step_functions(sequences, bins, rng):
    counts = [len(s) for s in sequences]
    start = np.cumsum(counts) - counts
    length = np.array([rng.randint(1, n) for n in counts])
    found = Sums(np.concatenate(sequences)).curves(start, length, bins)
    assert found.dtype == np.float32 and found.shape == (bins, len(sequences))
    for i, s in enumerate(sequences):
        assert found[:, i] == pytest.approx(curve_of(s[: length[i]], bins), abs=2e-6)


def test_curves_are_those_of_profiles():
    counts = RNG.integers(1, 50, 40)
    values = RNG.gamma(0.3, 1.5, counts.sum())
    found = Sums(values).curves(np.cumsum(counts) - counts, counts, 16)
    assert np.abs(found.T - resample(values, counts, 16)).max() < 1e-6


def test_a_curve_is_the_same_to_the_last_bit_wherever_its_sequence_lies():
    values = RNG.gamma(0.3, 1.5, 30).astype(np.float32)
    alone = Sums(values).curves(np.array([0]), np.array([30]), 16)
    among = Sums(np.concatenate([RNG.random(100_000), values])).curves(np.array([100_000]), np.array([30]), 16)
    assert (alone == among).all()


def test_a_level_sequence_has_a_level_curve():
    for value in (0.3, 0.1, 1e-7, 11.7):
        curve = Sums(np.full(7, value)).curves(np.array([0]), np.array([7]), 16)
        assert curve.min() == curve.max() and not zscore(curve).any()


# Distances.


@pytest.mark.parametrize(("name", "tolerance"), [("mse", 1e-5), ("dtw", 1e-5), ("pearson", 1e-3)])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_distances_are_what_loops_find(name, tolerance, data):
    bins, n = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 4))
    grid = st.lists(st.integers(0, 12).map(lambda i: i / 4), min_size=bins, max_size=bins)
    a, b = (data.draw(st.lists(grid, min_size=n, max_size=n)) for _ in "ab")
    found = DISTANCES[name](*((zscore(columns(x)) for x in (a, b)) if name == "pearson" else (columns(a), columns(b))))
    assert found == pytest.approx([LOOPS[name](x, y) for x, y in zip(a, b, strict=True)], abs=tolerance)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_warping_knows_sequences_of_unequal_length(n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((n, 5)).astype(np.float32), rng.random((m, 1)).astype(np.float32)
    assert dtw(a, b) == pytest.approx([warped(a[:, i], b[:, 0]) for i in range(5)], abs=1e-5)
    assert dtw(b, a) == pytest.approx(dtw(a, b), abs=1e-6)


def test_warping_never_exceeds_the_mean_square_and_forgives_a_shift():
    a, b = RNG.random((16, 200)).astype(np.float32), RNG.random((16, 200)).astype(np.float32)
    assert (dtw(a, b) <= mse(a, b) + 1e-6).all() and (dtw(a, a) == 0).all()
    peak = np.zeros((16, 1), np.float32)
    peak[5] = 1
    assert dtw(peak, np.roll(peak, 3, axis=0))[0] == 0 < mse(peak, np.roll(peak, 3, axis=0))[0]


def test_correlation_ignores_scale_and_level_curves_correlate_with_nothing():
    a = RNG.random((16, 50)).astype(np.float32)
    assert pearson(zscore(a), zscore(3 * a + 2)) == pytest.approx(np.zeros(50), abs=1e-4)
    assert pearson(zscore(a), zscore(-a)) == pytest.approx(np.full(50, 2), abs=1e-4)
    assert (pearson(zscore(np.ones_like(a)), zscore(a)) == 1).all()
    assert zscore(a).mean(axis=0) == pytest.approx(np.zeros(50), abs=1e-6)
    assert zscore(a).std(axis=0) == pytest.approx(np.ones(50), abs=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_distance_is_the_same_to_the_last_bit_in_every_batch(distance):
    values = RNG.gamma(0.3, 1.5, 30_000).astype(np.float32)
    start, length = np.arange(0, 29_900, 3), RNG.integers(1, 60, 9_967)
    experts = Experts(RNG.random((16, 3)).astype(np.float32), {})
    column, number = np.zeros(len(start), np.int64), np.full(len(start), 3)

    def find(some):
        return nearest(values, start[some], length[some], experts, column[some], number[some], distance, True)

    together = find(np.arange(len(start)))
    assert np.isfinite(together).all()
    for some in (np.arange(7), np.arange(9_000, 9_967), RNG.permutation(len(start))[:3000]):
        assert (find(some) == together[some]).all()


# Experts.


def experts_of(trajectories, bins):
    problems, entropies = zip(*trajectories, strict=True)
    return Experts.of([pa.table({"problem_id": pa.array(problems, pa.string()), "segment_entropies": list(entropies)})], bins)


def test_experts_are_found_by_problem_and_unknown_entropies_left_out():
    found = experts_of([("q", [1.0, 3.0]), (None, [5.0]), ("p", [2.0, None, 2.0]), ("q", [4.0]), ("r", [None]), ("s", [])], 2)
    assert found.columns == {"p": (0, 1), "q": (1, 2)}
    assert found.curves.T.tolist() == [[2, 2], [1, 3], [4, 4]]
    assert found.of_problem("q") == (1, 2) and found.of_problem("r") == found.of_problem(None) == (0, 0)


def test_a_profile_is_there_for_every_problem_and_48_bins_become_16():
    means = RNG.random(48)
    found = Experts.profile(means.tolist(), 16)
    assert found.curves[:, 0] == pytest.approx(means.reshape(16, 3).mean(axis=1), abs=1e-6)
    assert found.of_problem("anything") == found.of_problem(None) == (0, 1)
    assert Experts.profile([1.0, None, 3.0], 2).curves[:, 0].tolist() == [1.0, 3.0]


# The selector.


def rollout(number, entropies, ends=None, **fields):
    return {
        "group_id": "g", "rollout_id": f"r{number}", "sample": number, "success": True, "truncated": False, "problem_id": "p",
        "n_thinking": 99, "segment_ends": ends or list(range(1, len(entropies) + 1)), "segment_entropies": entropies,
    } | fields  # fmt: skip


def choose(rows, experts, **options):
    kinds = {"segment_ends": pa.list_(pa.int32()), "segment_entropies": pa.list_(pa.float32())}
    rows = pa.table({k: pa.array([r[k] for r in rows], kinds.get(k)) for k in rows[0]})
    found = select(rows, Selector(selector="match", bins=len(experts.curves), **options), experts)
    return found, [(int(i), int(n)) for i, n in zip(found.row, found.segment, strict=True)]


def brute(rows, trajectories, config):
    """Distances of all prefixes that may be chosen, in the order of ties."""
    curves = [curve_of([v for v in t if v is not None], config.bins) for p, t in trajectories if p == "p"]
    found = []
    for i, r in enumerate(rows):
        begin = 0
        for n, (end, entropy) in enumerate(zip(r["segment_ends"], r["segment_entropies"], strict=True)):
            known = [e for e in r["segment_entropies"][: n + 1] if e is not None]
            long = end - begin >= config.min_segment_tokens and (config.region == "all" or begin < r["n_thinking"])
            fits = entropy is not None and long if config.unit == "prefix" else n == len(r["segment_ends"]) - 1
            begin = end
            if fits and len(known) >= config.min_segments:
                own = curve_of(known, config.bins)
                pairs = [(own, c) if config.normalise == "none" else (standardised(own), standardised(c)) for c in curves]
                found.append((min(LOOPS[config.distance](a, b) for a, b in pairs), i, n))
    return found


EIGHTHS = st.integers(0, 80).map(lambda i: i / 8)  # differences of rounding alone correlate with anything
ENTROPIES = st.lists(st.one_of(EIGHTHS, st.none()), min_size=1, max_size=12)


@st.composite
def rollouts(draw):
    rows = []
    for i in range(draw(st.integers(1, 4))):
        entropies = draw(ENTROPIES)
        ends = np.cumsum(draw(st.lists(st.integers(1, 3), min_size=len(entropies), max_size=len(entropies)))).tolist()
        rows.append(rollout(i, entropies, ends, n_thinking=draw(st.integers(0, ends[-1]))))
    return rows


CONFIGS = st.one_of(
    [st.builds(
        Selector, selector=st.just("match"), bins=st.integers(2, 8), min_segments=st.integers(1, 4),
        distance=st.sampled_from(["mse", "dtw", "pearson"]), normalise=st.sampled_from(["none", "zscore"]),
        **({"region": st.sampled_from(["all", "think"]), "min_segment_tokens": st.integers(1, 2)} if unit == "prefix" else {}),
        unit=st.just(unit),
    )
    for unit in ("prefix", "rollout")]
)  # fmt: skip


@given(
    rollouts(),
    st.lists(st.tuples(st.sampled_from("ppq"), st.lists(EIGHTHS, min_size=1, max_size=30)), min_size=1, max_size=3),
    CONFIGS,
)
@settings(max_examples=200, deadline=None)
def test_match_chooses_a_nearest_prefix(rows, trajectories, config):
    options = config.model_dump(exclude={"selector", "bins"})
    found, picks = choose(rows, experts_of(trajectories, config.bins), **options)
    if not any(p == "p" for p, _ in trajectories):
        assert picks == [] and found.groups == {"no_expert": 1}
        return
    distances = brute(rows, trajectories, config)
    if not distances:
        assert picks == [] and found.groups == {"no_segment": 1}
        return
    [(row, segment)] = picks
    least, near = min(distances), {(i, n): d for d, i, n in distances}
    tolerance = 1e-3 if "pearson" in config.distance or config.normalise == "zscore" else 1e-5 * (1 + least[0])
    assert near[row, segment] <= least[0] + tolerance
    assert found.distance[0] == pytest.approx(near[row, segment], abs=tolerance)


def test_equal_distances_go_to_the_lowest_sample_then_to_the_shortest_prefix():
    level = experts_of([("p", [0.5, 0.5, 0.5])], 4)
    rows = [rollout(2, [0.5] * 5), rollout(1, [0.5] * 6), rollout(0, [0.5, 0.5])]
    assert choose(rows, level)[1] == [(1, 2)]
    assert choose(rows, level, min_segments=2)[1] == [(2, 1)]
    assert choose(rows, level, scope="rollout")[1] == [(1, 2), (0, 2)]


def test_of_several_experts_the_nearest_counts():
    rows = [rollout(0, [3.0, 0.0, 1.0, 2.0]), rollout(1, [0.0, 1.0, 2.0, 9.0])]
    far, near = ("p", [0.0, 9.0, 0.0]), ("p", [0.0, 1.0, 2.0])
    found, picks = choose(rows, experts_of([far, near, ("q", [3.0, 0.0, 1.0, 2.0])], 3))
    assert picks == [(1, 2)] and found.distance[0] == pytest.approx(0, abs=1e-6)
    assert choose(rows, experts_of([far], 3))[0].distance[0] > 1


def test_the_unit_rollout_takes_the_nearest_whole_completion():
    rows = [rollout(0, [0.0, 1.0, 2.0, 9.0]), rollout(1, [0.0, 1.0, 2.5])]
    expert = experts_of([("p", [0.0, 1.0, 2.0])], 3)
    assert choose(rows, expert)[1] == [(0, 2)]
    found, picks = choose(rows, expert, unit="rollout")
    assert picks == [(1, 2)] and found.whole.all()


def test_short_prefixes_do_not_win_by_their_length():
    """A distance is a mean over bins: the prefix whose shape is the expert's wins, however long it is."""
    shape = [0.2, 2.0, 0.4, 1.6, 0.1, 1.0]
    rows = [rollout(0, [e + 0.01 for e in shape for _ in range(4)] + [5.0] * 3)]
    for distance in ("mse", "dtw", "pearson"):
        assert choose(rows, experts_of([("p", shape)], 6), distance=distance)[1] == [(0, 23)]
