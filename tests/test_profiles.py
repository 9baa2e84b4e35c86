"""Profiles against brute force in exact or double precision over `lab.sql`, and tests and bands against plain loops."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab import EcholabError, ids
from echolab.curves import Axes, resample, top_shares
from echolab.errors import WrongUsage
from echolab.lab import Lab
from echolab.profile_compare import compare, distances
from echolab.profiles import overlap, profile, stored
from echolab.schema import TABLES
from echolab.scoring import resegment
from echolab.segment import Segmenter
from echolab.significance import band, bootstrap, permutation_test, sign_flip_test
from echolab.store import now
from echolab.vocab import Vocab

VOCAB = Vocab("tok", {0: b"a ", 1: b"b ", 2: b"c\n", 3: b"<end>"}, frozenset([3]))
CONFIG = {"kind": "model", "model": "base", "dtype": "float32", "temperature": 1.0, "rendering": "auto", "tokenizer": "tok"}


def register(store, id="one", name="base"):
    VOCAB.keep(store)
    with store.lock():
        store.register("scorers", id, name, {**CONFIG, "eos": [3]})


def score_rows(trajectories, scorer="one"):
    return [
        {
            "rollout_id": t["rollout_id"], "scorer": scorer, "run": "r", "step": 1, "token_ids": t["tokens"],
            "loss_mask": t["mask"], "entropies": t["entropies"], "logprobs": None, "mean_entropy": None,
            "n_tokens": len(t["tokens"]),
        }
        for t in trajectories
    ]  # fmt: skip


FIELDS = ("rollout_id", "problem", "source", "role", "reward")


def fill(store, add_reading, add_rows, trajectories):
    """Rollouts, their scores, and the segments that the real segmenter cuts."""
    add_reading(store, [{"group": t["problem"], **{k: t[k] for k in FIELDS}} for t in trajectories])
    add_rows(store, "scores", score_rows(trajectories))
    resegment(store, "one", Segmenter())


def draw(rng: random.Random, name: str, **fields):
    """A trajectory: of no tokens, one segment or many; some without entropies, some masked, some that end with EOS."""
    n = rng.choice([0, 1, 2, 5, 20, 20, 60])
    tokens = [rng.choice([0, 1, 1, 2]) for _ in range(n)] + [3] * (n > 3 and rng.random() < 0.5)
    entropies = [rng.choice([0.0, 0.5, rng.gammavariate(0.5, 1)]) for _ in tokens]
    if rng.random() < 0.2:
        entropies = [None if rng.random() < 0.2 else e for e in entropies]
    mask = [rng.random() < 0.6 for _ in tokens] if rng.random() < 0.4 else None
    return {
        "rollout_id": name, "problem": f"p{rng.randrange(6)}", "source": rng.choice(["x", "y", None]), "tokens": tokens,
        "entropies": entropies, "mask": mask, "role": "expert", "reward": rng.choice([0.0, 1.0, None]), **fields,
    }  # fmt: skip


def many(n, seed=0, **fields):
    rng = random.Random(seed)
    return [draw(rng, f"{fields.get('role', 't')}{i:03}", **fields) for i in range(n)]


@pytest.fixture
def filled(make_store, add_reading, add_rows):
    def make(trajectories):
        store = make_store()
        register(store)
        fill(store, add_reading, add_rows, trajectories)
        return store

    return make


# What the specification says, slowly.


def slow_resample(segments: list[float | None], bins: int) -> list[float]:
    n, out = len(segments), []
    for k in range(bins):
        low, high, area, width = Fraction(k, bins), Fraction(k + 1, bins), Fraction(0), Fraction(0)
        for i, value in enumerate(segments):
            part = min(high, Fraction(i + 1, n)) - max(low, Fraction(i, n))
            if part > 0 and value is not None and math.isfinite(value):
                area, width = area + part * Fraction(value), width + part
        out.append(float(area / width) if width else math.nan)
    return out


def slow_top(tokens: list[tuple[float, int]], share: float, segments: int) -> tuple[float, list[float]]:
    """Of (entropy, segment): the part held by the top tokens, in all and in each segment."""
    ranked = sorted(tokens, reverse=True)
    k = math.ceil(Fraction(str(share)) * len(ranked))
    edge = ranked[k - 1][0] if ranked else 0.0
    above, equal = sum(e > edge for e, _ in ranked), sum(e == edge for e, _ in ranked)
    parts = [(e * (1 if e > edge else (k - above) / equal if e == edge else 0), e, s) for e, s in ranked]

    def ratio(some: list[tuple[float, float, int]]) -> float:
        mass = sum(e for _, e, _ in some)
        return sum(p for p, _, _ in some) / mass if mass else math.nan

    return ratio(parts), [ratio([p for p in parts if p[2] == s]) for s in range(segments)]


def curves_of(store, bins: int, absolute: int) -> dict[str, dict]:
    """Of each trajectory with an entropy: its curves, from the views."""
    with Lab(store) as lab:
        segments = lab.sql("SELECT * FROM segments ORDER BY rollout_id, segment").to_dicts()
        tokens = lab.sql("SELECT rollout_id, position, entropy, counted FROM tokens").to_dicts()
    out = {}
    for rollout, some in itertools.groupby(segments, lambda s: s["rollout_id"]):
        some = list(some)
        values = [s["entropy"] for s in some]
        if all(v is None for v in values):
            continue
        where = {p: s["segment"] for s in some for p in range(s["start_token"], s["end_token"])}
        counted = [
            (t["entropy"], where[t["position"]])
            for t in tokens
            if t["rollout_id"] == rollout and t["position"] in where and t["counted"] and t["entropy"] is not None
        ]
        whole, shares = slow_top(counted, 0.2, len(some))
        top = [math.nan if v is None else s for v, s in zip(values, shares, strict=True)]
        peak = next(s["segment"] for s in some if s["is_peak"])
        one_hot: list[float | None] = [float(s["segment"] == peak) for s in some]

        def columns(v, last=None):
            first = [math.nan if x is None else x for x in v[:absolute]]
            first += [math.nan] * (absolute - len(first))
            return slow_resample(v, bins) + first + (slow_resample(v, 1) if last is None else [last])

        spread = [p * len(some) / bins for p in slow_resample(one_hot, bins)]
        hot = (one_hot + [0.0] * absolute)[:absolute]
        out[rollout] = {
            "entropy": columns(values),
            "tokens": columns([s["n_tokens"] for s in some]),
            "top20": columns(top, whole),
            "peaks": [*spread, *hot, (peak + 0.5) / len(some)],
            "segments": len(some),
            "length": sum(s["n_tokens"] for s in some),
        }
    return out


def expected(rows: list[dict], bins: int, absolute: int, draws: int, seed: int) -> dict:
    """The rows of `profiles` of one slice: (axis, bin, statistic) -> value, n."""
    columns = [*(("relative", i) for i in range(bins)), *(("absolute", i) for i in range(absolute)), ("whole", 0)]
    entropy = np.array([r["entropy"] for r in rows])
    replicates, rng = [], np.random.default_rng(seed)
    for _ in range(draws):
        drawn = entropy[rng.integers(len(rows), size=len(rows))]
        replicates.append([np.mean(c[~np.isnan(c)]) if (~np.isnan(c)).any() else np.nan for c in drawn.T])
    out = {}
    for i, (axis, bin) in enumerate(columns):
        known = [r["entropy"][i] for r in rows if not math.isnan(r["entropy"][i])]
        if not known:
            continue
        means = [r[i] for r in replicates if not math.isnan(r[i])]
        found = {
            "mean": np.mean(known), "se": np.std(known, ddof=1) / math.sqrt(len(known)) if len(known) > 1 else None,
            **{f"q{q:02}": np.quantile(known, q / 100) for q in (5, 25, 50, 75, 95)},
            "lo": np.quantile(means, 0.025), "hi": np.quantile(means, 0.975),
        }  # fmt: skip
        out |= {(axis, bin, name): (value, len(known)) for name, value in found.items()}
        for name in ("tokens", "top20", "peaks"):
            there = [r[name][i] for r in rows if not math.isnan(r[name][i])]
            shown = "peak_position" if (axis, name) == ("whole", "peaks") else name
            out[axis, bin, shown] = (np.mean(there) if there else None, len(there))
    for name in ("segments", "length"):
        out["whole", 0, name] = (np.mean([r[name] for r in rows]), len(rows))
    return out


def numbers(store, label: str) -> dict[str, dict]:
    """slice -> (axis, bin, statistic) -> value, n."""
    out: dict[str, dict] = {}
    with Lab(store) as lab:
        for r in lab.sql(f"SELECT * FROM profiles WHERE profile = '{label}'").to_dicts():
            out.setdefault(r["slice"], {})[r["axis"], r["bin"], r["statistic"]] = (r["value"], r["n"])
    return out


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for key, (value, n) in wanted.items():
        assert found[key][1] == n, key
        assert found[key][0] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), key


def test_every_number_of_every_slice_is_that_of_a_slow_computation(filled):
    trajectories = many(60, seed=3)
    store = filled(trajectories)
    made = profile(store, "p", "true", bins=7, segments=5, bootstrap=60, seed=11)
    curves = curves_of(store, 7, 5)
    by_id = {t["rollout_id"]: t for t in trajectories}
    lengths = sorted(c["length"] for c in curves.values())
    low, high = np.quantile(lengths, 1 / 3), np.quantile(lengths, 2 / 3)

    def slices(rollout):
        t, length = by_id[rollout], curves[rollout]["length"]
        yield "all"
        yield f"length={'short' if length <= low else 'middle' if length <= high else 'long'}"
        yield "outcome=" + {0.0: "failure", 1.0: "success", None: "unrewarded"}[t["reward"]]
        if t["source"]:
            yield f"source={t['source']}"

    parts: dict[str, list[dict]] = {}
    for rollout in sorted(curves):
        for part in slices(rollout):
            parts.setdefault(part, []).append(curves[rollout])
    found = numbers(store, "p@1")
    assert found.keys() == parts.keys() and len(parts) == 9
    for part, rows in parts.items():
        assert_same(found[part], expected(rows, 7, 5, 60, 11))
    assert made.facts["trajectories"] == len(curves) < 60
    assert made.facts["blank"] == 60 - len(curves)
    with Lab(store) as lab:
        members = lab.sql("SELECT rollout_id, problem_id FROM profile_members ORDER BY 1").rows()
    assert members == [(r, ids.problem_id(by_id[r]["problem"])) for r in sorted(curves)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.one_of(st.none(), st.floats(0, 9, width=32)), max_size=30), min_size=1, max_size=6), st.integers(1, 40)
)
def test_resampling_is_the_mean_of_a_step_function_over_each_bin(segments, bins):
    flat = np.array([math.nan if v is None else v for s in segments for v in s])
    found = resample(flat, np.array([len(s) for s in segments]), bins)
    for row, s in zip(found, segments, strict=True):
        wanted = slow_resample(s, bins) if s else [math.nan] * bins
        np.testing.assert_allclose(row, wanted, rtol=1e-12, atol=0)
        if s and all(v is not None for v in s):  # nothing is lost: the mean over bins is the mean over segments
            assert np.mean(row) == pytest.approx(sum(s) / len(s), abs=1e-9)


def test_fewer_segments_than_bins_leave_no_hole_and_three_fine_bins_are_one_coarse():
    values, counts = np.array([1.0, 3.0, 7.0, 5.0]), np.array([1, 3])
    assert resample(values, counts, 6).tolist() == [[1.0] * 6, [3, 3, 7, 7, 5, 5]]
    assert resample(values[1:], counts[1:], 2).tolist() == [[(3 + 7 / 2) / 1.5, (7 / 2 + 5) / 1.5]]
    fine, coarse = resample(values, counts, 48), resample(values, counts, 16)
    np.testing.assert_allclose(fine.reshape(2, 16, 3).mean(axis=2), coarse, rtol=1e-14)


def test_a_curve_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, 200)
    values = rng.random(counts.sum())
    after = np.cumsum(counts)
    together = resample(values, counts, 48)
    for i in range(200):
        alone = resample(values[after[i] - counts[i] : after[i]], counts[i : i + 1], 48)[0]
        assert together[i].tobytes() == alone.tobytes()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.5]), st.booleans()), min_size=1, max_size=25),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([0.2, 0.5, 1.0]),
)
def test_top_tokens_are_counted_in_each_trajectory_and_equal_ones_shared(rows, share):
    """Segments of at most four tokens."""
    ends = [[*range(4, len(r), 4), len(r)] for r in rows]
    batch = pa.record_batch({
        "entropies": pa.array([[e for e, _ in r] for r in rows], pa.list_(pa.float32())),
        "loss_mask": pa.array([[m for _, m in r] if i % 2 else None for i, r in enumerate(rows)], pa.list_(pa.bool_())),
    })  # fmt: skip
    sizes = np.array([b - a for e in ends for a, b in itertools.pairwise([0, *e])])
    whole, parts = top_shares(batch, sizes, np.array([len(e) for e in ends]), share)
    wanted_parts = []
    for i, r in enumerate(rows):
        counted = [(e, p // 4) for p, (e, m) in enumerate(r) if m or i % 2 == 0]
        wanted, of_segments = slow_top(counted, share, len(ends[i]))
        np.testing.assert_allclose(whole[i], wanted, rtol=1e-6)
        wanted_parts += of_segments
    np.testing.assert_allclose(parts, wanted_parts, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 29), st.integers(1, 20), st.integers(1, 20))
def test_a_peak_is_spread_over_the_bins_that_its_segment_covers(n, peak, bins, segments):
    peak %= n
    found = Axes(bins, segments).peaks(np.array([peak, -1]), np.array([n, n]))
    wanted = [
        float(max(min(Fraction(k + 1, bins), Fraction(peak + 1, n)) - max(Fraction(k, bins), Fraction(peak, n)), 0) * n)
        for k in range(bins)
    ]
    np.testing.assert_allclose(found[0, :bins], wanted, rtol=1e-6)
    assert found[0, :bins].sum() == pytest.approx(1, abs=1e-5)
    assert found[0, bins:-1].tolist() == [float(i == peak) for i in range(segments)]
    assert found[0, -1] == pytest.approx((peak + 0.5) / n)
    assert np.isnan(found[1]).all()


def test_the_order_of_rows_and_files_changes_nothing(make_store, add_reading, add_rows):
    trajectories = many(40, seed=5)
    for i, t in enumerate(trajectories):
        t["rollout_id"] = f"{i:02}"
    made = []
    for order in (trajectories, trajectories[::-1]):
        store = make_store()
        register(store)
        for some in (order[:15], order[15:]):
            fill(store, add_reading, add_rows, some)
        profile(store, "p", "true", bins=9, segments=4, bootstrap=30)
        profile(store, "q", "reward = 1", bins=9, segments=4, bootstrap=30)
        made.append((numbers(store, "p@1"), compare(store.snapshot(), "p", "q", permutations=30)))
    assert made[0] == made[1]


def test_the_same_profile_is_not_made_twice_and_a_new_one_is_a_new_version(filled, add_reading, add_rows):
    store = filled(many(12))
    first = profile(store, "p", "true", bins=4, bootstrap=10)
    again = profile(store, "p", "true", bins=4, bootstrap=10)
    assert (first.label, first.new, again.label, again.new) == ("p@1", True, "p@1", False)
    assert again.slices == first.slices == stored(store.snapshot(), "p").slices
    assert profile(store, "p", "true", bins=4, bootstrap=10, seed=1).label == "p@2"
    before = numbers(store, "p@2")
    fill(store, add_reading, add_rows, many(3, seed=9, role="policy"))
    assert profile(store, "p", "true", bins=4, bootstrap=10, seed=1).label == "p@3"
    assert numbers(store, "p@2") == before
    with Lab(store) as lab:
        pins = {p["id"]: p["tables"] for p in lab.info()["pins"]}
        assert lab.validate() == []
    assert pins["p@1"].keys() == {"ingests", "rollouts", "scores", "segmentations"}


def test_other_trajectories_are_a_new_version_whatever_chose_them(filled):
    store = filled(many(20))
    others = "rollout_id NOT IN (SELECT rollout_id FROM profile_members WHERE profile = 'a@1')"
    assert [profile(store, "p", others, bootstrap=0).label for _ in range(2)] == ["p@1", "p@1"]
    profile(store, "a", "reward = 1", bootstrap=0)
    assert [profile(store, "p", others, bootstrap=0).label for _ in range(2)] == ["p@2", "p@2"]


def test_two_profiles_of_one_seed_have_the_same_bands(filled):
    store = filled(many(20))
    a, b = profile(store, "a", "true", seed=4), profile(store, "b", "true", seed=4)
    assert a.slices == b.slices
    assert profile(store, "c", "true", seed=5).slices != a.slices


# Bands and tests.


def test_a_bootstrap_is_a_loop_over_trajectories_with_the_same_seed():
    rng = np.random.default_rng(1)
    rows = rng.gamma(1, 1, (30, 5)).astype(np.float32)
    rows[rng.random(rows.shape) < 0.3] = np.nan
    rows[1:, 4] = np.nan  # a draw without the first row knows nothing of this column
    found, loop = bootstrap(rows, 200, 7), np.random.default_rng(7)
    for row in found:
        drawn = rows[loop.integers(30, size=30)].astype(np.float64)
        known = [c[~np.isnan(c)] for c in drawn.T]
        np.testing.assert_allclose(row, [c.mean() if len(c) else np.nan for c in known], rtol=1e-6)
    assert np.isnan(found[:, 4]).any()


def test_bands_hold_a_normal_mean_as_often_as_they_say():
    rng, inside = np.random.default_rng(2), 0
    for seed in range(200):
        low, high = band(rng.normal(3, 1, (60, 1)), 300, seed)
        inside += low[0] < 3 < high[0]
    assert 180 <= inside <= 199  # of 200, 95 % less what 60 rows cost


def test_no_band_where_nothing_is_known():
    low, high = band(np.array([[1.0, np.nan], [3.0, np.nan]]), 50, 0)
    assert 1 <= low[0] < high[0] <= 3 and np.isnan([low[1], high[1]]).all()


def slow_distances(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    pearson = np.corrcoef(a, b)[0, 1]
    return {"mse": float(np.mean((a - b) ** 2)), "one_minus_pearson": float(1 - pearson), "max_abs": float(np.max(abs(a - b)))}


def holey(rng, n, shift=0.0):
    rows = rng.normal(shift + np.arange(6) / 6, 1, (n, 6)).astype(np.float32)
    rows[rng.random(rows.shape) < 0.1] = np.nan
    return rows


def test_a_permutation_test_is_a_loop_with_the_same_seed():
    rng = np.random.default_rng(3)
    a, b = holey(rng, 9, 0.5), holey(rng, 14)
    found = permutation_test(a, b, distances, 300, 5)
    rows = np.concatenate([a, b]).astype(np.float64)

    def of(side):
        return slow_distances(np.nanmean(rows[side], axis=0), np.nanmean(rows[~side], axis=0))

    observed, loop = of(np.arange(23) < 9), np.random.default_rng(5)
    larger = dict.fromkeys(observed, 0)
    for _ in range(300):
        side = np.zeros(23, bool)
        side[loop.permutation(23)[:9]] = True
        for name, value in of(side).items():
            larger[name] += value >= observed[name] - 1e-9
    for name, value in observed.items():
        assert found[name] == (pytest.approx(value, rel=1e-6), pytest.approx((1 + larger[name]) / 301)), name


def test_few_rows_have_the_p_value_of_all_their_splits():
    rng = np.random.default_rng(8)
    a, b = rng.normal(0, 1, (4, 3)), rng.normal(1, 1, (4, 3))
    rows = np.concatenate([a, b])
    splits = [np.isin(np.arange(8), s) for s in itertools.combinations(range(8), 4)]
    mse = [np.mean((rows[s].mean(axis=0) - rows[~s].mean(axis=0)) ** 2) for s in splits]
    exact = np.mean(np.array(mse) >= np.mean((a.mean(axis=0) - b.mean(axis=0)) ** 2) - 1e-12)
    assert permutation_test(a, b, distances, 20_000, 0)["mse"][1] == pytest.approx(exact, abs=0.012)


def test_p_values_are_small_for_what_differs_one_for_what_is_equal_and_even_for_chance():
    rng = np.random.default_rng(4)
    far = permutation_test(rng.normal(0, 1, (30, 4)), rng.normal(5, 1, (30, 4)), distances, 199, 0)
    assert far["mse"][1] == far["max_abs"][1] == 1 / 200
    same = np.tile(rng.random(4), (6, 1))
    assert permutation_test(same, same, distances, 50, 0)["mse"] == (pytest.approx(0, abs=1e-15), 1.0)
    chance = [rng.normal(0, 1, (2, 8, 3)) for _ in range(300)]
    ps = [permutation_test(a, b, distances, 49, i)["mse"][1] for i, (a, b) in enumerate(chance)]
    assert np.mean(ps) == pytest.approx(0.5, abs=0.06) and np.mean(np.array(ps) <= 0.1) == pytest.approx(0.1, abs=0.05)


def test_level_curves_have_no_correlation():
    level = permutation_test(np.ones((3, 4)) * 1.1, np.arange(12.0).reshape(3, 4), distances, 20, 0)
    assert np.isnan(level["one_minus_pearson"]).all() and level["mse"][0] > 0
    one_bin = permutation_test(np.ones((3, 1)), np.zeros((3, 1)), distances, 20, 0)
    assert np.isnan(one_bin["one_minus_pearson"][0]) and one_bin["max_abs"][0] == 1


@pytest.mark.parametrize("differences", [[0.3, 0.1, 0.4, -0.05, 0.2], [1.0, 2.0, 3.0], [0.0, 0.0]])
def test_sign_flips_have_the_p_value_of_all_signs(differences):
    d = np.array(differences)
    every = [abs(np.mean(d * s)) for s in itertools.product([-1, 1], repeat=len(d))]
    exact = np.mean(np.array(every) >= abs(d.mean()) - 1e-12)
    assert sign_flip_test(d, 20_000, 0) == pytest.approx(exact, abs=0.012)


# Comparisons.


def test_a_comparison_reads_the_members_again_and_pairs_by_problem(filled):
    store = filled([*many(30, seed=1), *many(40, seed=2, role="policy")])
    for name, role in (("golden", "expert"), ("own", "policy")):
        profile(store, name, f"role = '{role}'", bins=12, bootstrap=0)
    found = compare(store.snapshot(), "golden", "own", permutations=99, seed=3)
    curves = curves_of(store, 12, 1)
    with Lab(store) as lab:
        problem = dict(lab.sql("SELECT rollout_id, problem_id FROM rollouts").rows())
    sides = [[r for r in sorted(curves) if r.startswith(role)] for role in ("t", "policy")]
    a, b = (np.array([curves[r]["entropy"][:12] for r in side]) for side in sides)
    mean_a, mean_b = np.nanmean(a, axis=0), np.nanmean(b, axis=0)
    assert (found.bins, found.a.profile, found.a.trajectories, found.b.trajectories) == (12, "golden@1", len(a), len(b))
    np.testing.assert_allclose(np.array(found.a.curve, float), mean_a, rtol=1e-6)
    np.testing.assert_allclose(np.array(found.difference, float), mean_a - mean_b, atol=1e-6)
    for name, value in slow_distances(mean_a, mean_b).items():
        assert found.distances[name]["value"] == pytest.approx(value, rel=1e-4)
    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    assert found.distances["mse"]["p"] == permutation_test(a32, b32, distances, 99, 3)["mse"][1]
    shared = sorted({problem[r] for r in sides[0]} & {problem[r] for r in sides[1]})
    apart = []
    for p in shared:
        means = [np.nanmean(x[[problem[r] == p for r in side]], axis=0) for x, side in zip((a, b), sides, strict=True)]
        apart.append(np.nanmean(means[0] - means[1]))
    assert found.paired is not None and found.paired.problems == len(shared)
    assert found.paired.difference == pytest.approx(np.mean(apart), abs=1e-6)
    assert found.paired.p == sign_flip_test(np.array(apart), 99, 3)
    low, high = band(np.array(apart)[:, None], 99, 3)[:, 0]
    assert (found.paired.lo, found.paired.hi) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    assert found.notes == []


def test_a_comparison_says_what_makes_it_doubtful(filled, add_rows):
    store = filled(many(10))
    register(store, "two", "other")
    with Lab(store) as lab:
        there = lab.sql("SELECT rollout_id, token_ids AS tokens, entropies, loss_mask AS mask FROM scores").to_dicts()
    add_rows(store, "scores", score_rows(there, "two"))
    resegment(store, "two", Segmenter())
    profile(store, "a", "true", scorer="base", bins=4, bootstrap=0)
    profile(store, "b", "reward = 1", scorer="other", bins=6, bootstrap=0)
    found = compare(store.snapshot(), "a", "b", permutations=5)
    n = stored(store.snapshot(), "b").facts["trajectories"]
    assert found.bins == 4 and found.notes == [
        "a@1 has scorer base@1, b@1 other@1: what differs may be the scorer",
        f"{n} trajectories are members of both: the permutation test takes them for different ones",
    ]
    assert compare(store.snapshot(), "a", "b", bins=6, permutations=5).bins == 6


def test_one_problem_in_common_has_a_difference_and_no_test(filled):
    one = many(8, seed=6, problem="same", mask=None)
    for i, t in enumerate(one):
        t |= {"tokens": [1, 2, 1], "entropies": [i * 1.0] * 3, "role": "expert" if i < 4 else "policy"}
    store = filled(one)
    for role in ("expert", "policy"):
        profile(store, role, f"role = '{role}'", bootstrap=0)
    paired = compare(store.snapshot(), "expert", "policy", permutations=5).paired
    assert paired is not None and (paired.problems, paired.difference, paired.p) == (1, -4.0, None)


def test_without_a_problem_in_common_nothing_is_paired(filled):
    trajectories = [
        t | {"problem": t["role"], "mask": None, "tokens": [1, 2], "entropies": [0.1, 0.2]}
        for t in [*many(4), *many(4, role="policy")]
    ]
    store = filled(trajectories)
    for role in ("expert", "policy"):
        profile(store, role, f"role = '{role}'", bootstrap=0)
    assert compare(store.snapshot(), "expert", "policy", permutations=5).paired is None


# What goes wrong, in one line.


def test_what_has_no_score_is_counted_and_the_command_is_named(filled, add_reading):
    store = filled(many(10, mask=None, tokens=[1, 2], entropies=[0.5, 0.25]))
    add_reading(store, [{"role": "expert", "reward": 1.0} for _ in range(3)])
    made = profile(store, "p", "role = 'expert'", bootstrap=0)
    assert made.facts["trajectories"] == 10
    command = "echolab score --model base --dtype float32 --where \"role = 'expert'\""
    assert made.notes == [f"3 of 13 rollouts lack a score of base@1 and were left out: {command}"]
    add_reading(store, [{"run": "bare"} for _ in range(2)])
    with pytest.raises(EcholabError) as error:
        profile(store, "q", "run = 'bare'")
    assert str(error.value) == (
        "2 of 2 rollouts lack a score of base@1: echolab score --model base --dtype float32 --where \"run = 'bare'\""
    )


def test_what_is_scored_but_not_cut_names_the_command_that_cuts(make_store, add_reading, add_rows):
    store = make_store()
    register(store)
    plain = many(6, mask=None, tokens=[1, 2], entropies=[0.5, 0.25])
    add_reading(store, [{k: t[k] for k in FIELDS} for t in plain])
    add_rows(store, "scores", score_rows(plain[:4]))
    command = "echolab score resegment --scorer base@1 --mode newline"
    with pytest.raises(EcholabError, match=f"nothing is cut into segments: {command}"):
        profile(store, "p", "true")
    resegment(store, "one", Segmenter())
    add_rows(store, "scores", score_rows(plain[4:]))
    made = profile(store, "p", "true", bootstrap=0)
    assert made.notes == [f"2 of 6 rollouts are scored but not cut into segments and were left out: {command}"]
    with pytest.raises(EcholabError, match=f"2 of 2 scored rollouts are not cut into segments: {command}"):
        profile(store, "q", f"rollout_id > '{plain[3]['rollout_id']}'")


MISTAKES: list[tuple[str, dict, type[EcholabError], str]] = [
    ("false", {}, EcholabError, "no rollout fits the condition: false"),
    ("nope = 1", {}, EcholabError, 'Referenced column "nope" not found'),
    ("role = 'expert') UNION (SELECT 1", {}, EcholabError, "Set operations"),
    ("true; DELETE FROM rollouts", {}, EcholabError, "syntax error"),
    ("random() < 0.5", {}, EcholabError, "for a sample write hash(rollout_id) % 10 = 0, not random()"),
    ("true", {"scorer": "nobody"}, EcholabError, "no scorer 'nobody' in this store; there are: base@1"),
    ("true", {"verifier": "math"}, EcholabError, "no verifier 'math'"),
    ("true", {"bins": 0}, WrongUsage, "bins: from 1 to 1000"),
    ("true", {"bin": 4}, WrongUsage, "bin: no such option; did you mean bins?"),
    ("  ", {}, WrongUsage, "where: a condition on rollouts"),
]


def test_what_cannot_be_profiled_is_one_line_and_leaves_nothing(filled):
    store = filled(many(30))
    for where, options, error, message in MISTAKES:
        with pytest.raises(error) as found:
            profile(store, "p", where, **options)
        assert message in str(found.value) and "\n" not in str(found.value)
    assert "cohorts" not in store.snapshot().versions and "profiles" not in store.snapshot().versions
    assert not list(store.job_folder("").iterdir())


def test_a_comment_or_a_line_break_in_a_condition_does_no_harm(filled):
    store = filled(many(10))
    a = profile(store, "a", "reward = 1 -- the right ones", bootstrap=0)
    b = profile(store, "b", "reward\n= 1", bootstrap=0)
    assert a.facts == b.facts


def test_a_verifier_says_which_trajectories_are_right(filled, add_rows):
    plain = many(6, mask=None, tokens=[1, 2], entropies=[0.5, 0.25])
    store = filled(plain)
    with store.lock():
        store.register("verifiers", "v", "math", {})
    word = {"verifier": "v", "input_hash": "h", "status": "ok", "created_at": now()}
    add_rows(store, "verdicts", [{**word, "rollout_id": t["rollout_id"], "success": i < 2} for i, t in enumerate(plain[:5])])
    made = profile(store, "p", "success", verifier="math", bootstrap=0)
    assert (made.facts["trajectories"], made.verifier) == (2, "math@1")
    parts = {s["slice"]: s["n"] for s in profile(store, "q", "true", verifier="math", bootstrap=0).slices}
    assert [parts[f"outcome={o}"] for o in ("success", "failure", "unrewarded")] == [2, 3, 1]


def test_several_scorers_or_segmenters_need_a_choice(filled):
    store = filled(many(10))
    resegment(store, "one", Segmenter(mode="fixed:3"))
    with pytest.raises(EcholabError, match="there are several segmenters: .*; choose with --segmenter"):
        profile(store, "p", "true")
    newline = profile(store, "p", "true", segmenter="newline", bootstrap=0)
    fixed = profile(store, "p", "true", segmenter="fixed:3", bootstrap=0)
    assert (newline.segmenter, fixed.segmenter, fixed.label) == ("newline@1", "fixed:3@1", "p@2")


def test_a_store_without_scores_says_how_to_score(make_store):
    store = make_store([{"role": "expert", "reward": 1.0}])
    with pytest.raises(EcholabError, match='nothing is scored in this store: echolab score --model MODEL --where "success"'):
        profile(store, "p", "success")


def test_nothing_that_counts_is_nothing_to_profile(filled):
    store = filled(many(3, tokens=[1, 2], entropies=[0.1, 0.2], mask=[False, False]))
    with pytest.raises(EcholabError, match="none of 3 trajectories has a token that its loss mask counts"):
        profile(store, "p", "true")


def test_an_unknown_profile_lists_those_there_are(filled):
    store = filled(many(5))
    profile(store, "p", "true", bootstrap=0)
    for ask in (lambda s: stored(s, "q"), lambda s: compare(s, "p", "q"), lambda s: overlap(s, "q", [])):
        with pytest.raises(EcholabError, match="no profile 'q' in this store; there are: p@1"):
            ask(store.snapshot())


# Benchmarks.


def test_problems_of_a_profile_are_found_by_text_line_or_id(make_store, add_rows):
    prompts = {
        "plain": "What is $1 + 1$?", "template": "<|im_start|>user\nName a  Prime.<|im_end|>\n<|im_start|>assistant\n",
        "hint": "How many?\nThink step by step.", "other": "What is 2 + 2?", "mapped": "rendered beyond recognition",
    }  # fmt: skip
    rows = [{"rollout_id": k, "prompt": p, "problem": p, "prompt_id": k, "reward": 1.0} for k, p in prompts.items()]
    rows[-1] |= {"problem": "Mapped to this."}
    store = make_store(rows)
    register(store)
    scored = [t | {"rollout_id": k} for t, k in zip(many(5, mask=None, tokens=[1], entropies=[0.5]), prompts, strict=True)]
    add_rows(store, "scores", score_rows(scored))
    resegment(store, "one", Segmenter())
    profile(store, "p", "true", bootstrap=0)
    texts = ["what is  $1+1$ ?", "Name a prime.", "How many?", "Mapped to this.", "What is 2 - 2?", ""]
    found = overlap(store.snapshot(), "p", iter(texts))
    hits = {ids.problem_id(rows[i]["problem"]) for i in (0, 1, 2, 4)}
    assert (found.profile, found.problems, found.texts, set(found.shared)) == ("p@1", 5, 6, hits)


def test_each_number_stands_once(filled):
    store = filled(many(20))
    profile(store, "p", "true", bins=3, segments=2, bootstrap=5)
    keys = store.snapshot().table("profiles").select(list(TABLES["profiles"].key)).to_pylist()
    assert len({tuple(k.values()) for k in keys}) == len(keys)
