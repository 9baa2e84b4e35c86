"""Estimators against enumeration, the worked examples of their definitions, and simulated coverage."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import estimators
from trainer.estimators import interval, maj_at_k, paired, pass_at_k, sampling_error


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_the_paper_and_where_there_are_too_few_samples():
    assert pass_at_k(10, 3, 4) == pytest.approx(0.83333333)
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples"):
        pass_at_k(4, 2, 5)


def test_maj_at_k_splits_ties_and_unanswered_samples_never_win():
    answers = ["3", "3", "4", "4", "5", None]
    right = [a == "3" for a in answers]
    found = [maj_at_k(answers, right, k) for k in (1, 2, 3, 4, 6)]
    assert found == pytest.approx([0.3333, 0.4, 0.4167, 0.4556, 0.5], abs=5e-5)
    assert maj_at_k([None, None], [False, False], 2) == 0.0


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), st.data())
def test_maj_at_k_is_a_uniform_tie_break_over_all_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    credits = []
    for chosen in itertools.combinations(answers, k):
        votes = Counter(a for a in chosen if a)
        winners = [a for a in votes if votes[a] == max(votes.values())]
        credits.append(winners.count("a") / len(winners) if winners else 0.0)
    assert maj_at_k(answers, [a == "a" for a in answers], k) == pytest.approx(np.mean(credits))


def test_maj_at_k_of_many_subsets_is_near_the_exact_one(monkeypatch):
    rng = np.random.default_rng(0)
    answers = rng.choice(["a", "b", "c"], 12, p=[0.5, 0.3, 0.2]).tolist()
    exact = maj_at_k(answers, [a == "a" for a in answers], 5)
    monkeypatch.setattr(estimators, "MOST_SUBSETS", 10)
    assert maj_at_k(answers, [a == "a" for a in answers], 5) == pytest.approx(exact, abs=0.05)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(150):
        found = interval(rng.beta(2, 3, 60), seed)
        hits += found.low <= 0.4 <= found.high
    assert 0.88 <= hits / 150 <= 0.99


def test_a_paired_comparison_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(2)
    hard = rng.uniform(0, 1, 80)
    better = np.clip(hard + rng.normal(0.05, 0.05, 80), 0, 1)
    a, b, d = interval(hard), interval(better), paired(hard, better)
    assert a.high > b.low and d.low > 0 and d.p < 0.01
    assert paired(hard, hard).p == 1.0 and paired(better, hard).mean == pytest.approx(-d.mean)
    with pytest.raises(ValueError, match="same questions"):
        paired([1.0], [1.0, 0.0])


def test_the_sampling_error_is_the_spread_of_means_over_repeated_sampling():
    rng = np.random.default_rng(3)
    rates, n = rng.uniform(0, 1, 40), 16
    means = rng.binomial(n, rates, size=(4000, 40)).mean(1) / n
    assert np.mean([sampling_error(rng.binomial(n, rates), n) for _ in range(200)]) == pytest.approx(means.std(), rel=0.05)
