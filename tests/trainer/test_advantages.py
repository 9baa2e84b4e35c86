"""Advantages: values by hand, brute force over groups, and the rewards that broke others."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from trainer.advantages import advantages, soft_overlong, varied_groups  # noqa: E402
from trainer.algorithms import ALGORITHMS  # noqa: E402

NAN = math.nan
CENTRED = ("grpo", "centred", "batch_std", "rloo")
KINDS = sorted({a.advantage for a in ALGORITHMS.values()} | set(CENTRED))


def of(rewards, groups=None, kind: Any = "grpo", **options):
    groups = torch.zeros(len(rewards), dtype=torch.long) if groups is None else torch.tensor(groups)
    return advantages(torch.tensor(rewards, dtype=torch.float64), groups, kind, **options)


def brute(rewards, groups, kind, eps=1e-4, lengths=None):
    """One rollout at a time, from the table of the paper's formulas."""
    known = [(r, n) for r, n in zip(rewards, lengths or [1] * len(rewards), strict=True) if not math.isnan(r)]
    found = []
    for r, group in zip(rewards, groups, strict=True):
        own = [x for x, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(x)]
        if math.isnan(r) or len(own) < 2:
            found.append(0.0)
        elif kind == "grpo":
            found.append((r - statistics.mean(own)) / (statistics.stdev(own) + eps))
        elif kind == "centred":
            found.append(r - statistics.mean(own))
        elif kind == "batch_std":
            found.append((r - statistics.mean(own)) / (statistics.stdev([x for x, _ in known]) + eps))
        else:
            found.append(r - (sum(own) - r) / (len(own) - 1))
    return found


def test_one_right_of_four_by_hand():
    rewards = [1.0, 0.0, 0.0, 0.0]  # mean 1/4, unbiased std 1/2
    assert of(rewards).values.tolist() == pytest.approx([1.5 / 1.0002, -0.5 / 1.0002, -0.5 / 1.0002, -0.5 / 1.0002])
    assert of(rewards, kind="centred").values.tolist() == [0.75, -0.25, -0.25, -0.25]
    assert of(rewards, kind="rloo").values.tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert of([-1.0, 2.0], kind="raft").values.tolist() == [0, 2]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.5, -1.0, 0.3, NAN]), st.integers(0, 3)), min_size=2, max_size=16),
    st.sampled_from(CENTRED),
)
def test_values_are_those_of_brute_force_in_any_order(rows, kind):
    rewards, groups = map(list, zip(*rows, strict=True))
    if kind == "batch_std" and sum(not math.isnan(r) for r in rewards) < 2:
        return
    found = of(rewards, groups, kind)
    assert found.values.tolist() == pytest.approx(brute(rewards, groups, kind), rel=1e-5, abs=1e-6)
    back = of(rewards[::-1], groups[::-1], kind)
    assert back.values.flip(0).tolist() == pytest.approx(found.values.tolist(), abs=1e-7)


def test_rloo_is_the_centred_reward_times_g_over_g_minus_1():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist()
    groups = [0] * 4 + [1] * 8
    factor = torch.tensor([4 / 3] * 4 + [8 / 7] * 8)
    centred = of(rewards, groups, "centred").values
    torch.testing.assert_close(of(rewards, groups, "rloo").values, factor * centred)


@pytest.mark.parametrize("kind", CENTRED)
@pytest.mark.parametrize("rewards", [[0.1] * 3, [0.0] * 8, [1.0, 1 + 1e-7, 1 - 1e-7], [1e9] * 5])
def test_alike_rewards_give_exactly_nothing(kind, rewards):
    """Three times 0.1, divided by 3, is not 0.1: an exact comparison would find a std and divide by it."""
    found = of(rewards, kind=kind)
    assert found.values.tolist() == [0] * len(rewards)
    assert found.degenerate.all()


def test_what_is_degenerate():
    found = of([1, 1, 0, 1, 0.5, 0.5, 1, NAN, NAN, 1], [0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
    assert found.degenerate.tolist() == [True, True, False, False, True, True, False, False, False, False]
    assert of([1, NAN, 1]).degenerate.tolist() == [True, False, True]
    assert not of([0.0, 1e-5]).degenerate.any()
    assert of([0.0, 1e-5], tolerance=1e-4).degenerate.all()


@pytest.mark.parametrize("kind", KINDS)
def test_unrewarded_rows_change_nothing_and_are_counted(kind):
    mask = torch.ones(6, 3, dtype=torch.bool)
    some = of([1.0, 0.0, 0.5, 1.0], [0, 0, 1, 1], kind, mask=mask[:4])
    all_rows = of([1.0, NAN, 0.0, 0.5, 1.0, NAN], [0, 0, 0, 1, 1, 2], kind, mask=mask)
    assert all_rows.values[[0, 2, 3, 4]].tolist() == some.values.tolist()
    assert all_rows.values[[1, 5]].tolist() == [0, 0]
    assert all_rows.used.tolist() == [True, False, True, True, True, False]
    assert (all_rows.unrewarded, all_rows.single) == (2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_is_dropped_where_the_baseline_is_the_group(kind):
    found = of([1.0, 1.0, 0.0], [0, 1, 1], kind, mask=torch.ones(3, 2, dtype=torch.bool))
    alone = kind in ("raft", "reinforce_pp")
    assert found.used.tolist() == [alone, True, True]
    assert found.single == (not alone)
    assert (found.values[0] != 0) == alone


def test_bfloat16_rewards_are_counted_in_float64():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    exact = advantages(rewards, torch.zeros(7)).values
    assert torch.equal(advantages(rewards.bfloat16(), torch.zeros(7)).values, exact)


LENGTHS = torch.tensor([1, 3, 2, 2])
MASK = torch.arange(3) < LENGTHS[:, None]


def whitened(values, weights):
    n = sum(weights)
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / n
    std = math.sqrt(sum((v - mean) ** 2 * w for v, w in zip(values, weights, strict=True)) / n)
    return [(v - mean) / std for v in values]


def test_reinforce_pp_whitens_over_tokens():
    rewards = [1.0, 0.0, 0.0, 1.0]
    found = of(rewards, kind="reinforce_pp", mask=MASK)
    assert found.values.tolist() == pytest.approx(whitened(rewards, LENGTHS.tolist()), rel=1e-6)
    found = of(rewards, [0, 0, 1, 1], "reinforce_pp_baseline", mask=MASK)
    assert found.values.tolist() == pytest.approx(whitened([0.5, -0.5, -0.5, 0.5], LENGTHS.tolist()), rel=1e-6)


def test_a_batch_of_alike_rewards_has_nothing_to_whiten():
    """0.1 a token, over six tokens, is 1e-17 more than 0.1."""
    assert of([0.1] * 3, kind="reinforce_pp", mask=MASK[:3]).values.tolist() == [0] * 3


def test_reinforce_pp_takes_the_kl_from_the_rewards_to_come():
    penalty = torch.where(MASK, torch.tensor([[0.1, 0, 0], [0.2, 0.3, 0.1], [0, 0.5, 0], [0.4, -0.2, 0]]), NAN)
    found = of([1.0, 0.0, 0.0, 1.0], kind="reinforce_pp", mask=MASK, penalty=penalty)
    returns = [0.9, -0.6, -0.4, -0.1, -0.5, -0.5, 0.8, 1.2]  # token after token
    assert found.values[MASK].tolist() == pytest.approx(whitened(returns, [1] * 8), rel=1e-6)


def test_elsewhere_the_sum_of_the_kl_is_taken_from_the_reward():
    penalty = torch.tensor([[0.1, 9, 9], [0.2, 0.3, 0.1], [0, 0.5, 9], [0.4, -0.2, 9]])
    shaped = of([0.9, -0.6, -0.5, 0.8], [0, 0, 1, 1], "rloo")
    found = of([1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1], "rloo", mask=MASK, penalty=penalty)
    torch.testing.assert_close(found.values, shaped.values)
    alike = of([1.0, 1.0], kind="rloo", mask=MASK[:2], penalty=penalty[:2])
    assert alike.degenerate.all()  # judged on the rewards themselves
    assert alike.values.tolist() == pytest.approx([0.5, -0.5])


def test_soft_overlong_by_hand_and_as_a_reason_to_filter_on_success():
    lengths = torch.tensor([10, 80, 90, 100])
    assert soft_overlong(lengths, 100, 0.2).tolist() == pytest.approx([0, 0, -0.5, -1])
    assert soft_overlong(lengths, 100, 0.2, factor=0.5).tolist() == pytest.approx([0, 0, -0.25, -0.5])
    assert soft_overlong(lengths, 100, 0).tolist() == [0] * 4
    shaped = 1 + soft_overlong(lengths, 100, 0.2)
    assert varied_groups(shaped, torch.zeros(4)).kept == 1
    assert varied_groups(torch.ones(4), torch.zeros(4)).kept == 0


def test_dynamic_sampling_keeps_groups_whose_success_varies():
    metric = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, NAN, 1.0, 0.0])
    groups = torch.tensor([7, 7, 3, 3, 5, 5, 4, 4, 9, 9])
    found = varied_groups(metric, groups)
    assert found.rows.tolist() == [True, True, *[False] * 6, True, True]
    assert (found.kept, found.dropped) == (2, 3)
