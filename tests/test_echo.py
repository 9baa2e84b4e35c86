"""The echo terms against brute force in float64, written from the formula."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from echolab.echo import clip_count, clip_mask, clip_nll  # noqa: E402

REDUCTIONS = ("clip_mean", "group_mean", "token_mean")


def tensor(*values):
    return torch.tensor(values)


def brute(logp, mask, weight, reduction):
    """-1/L sum ln pi of each clip, weighted; with token_mean all tokens."""
    total = count = 0.0
    for values, held, w in zip(logp.tolist(), mask.tolist(), weight.tolist(), strict=True):
        tokens = [-v for v, h in zip(values, held, strict=True) if h]
        if tokens:
            total += w * (sum(tokens) if reduction == "token_mean" else sum(tokens) / len(tokens))
            count += w * (len(tokens) if reduction == "token_mean" else 1)
    return total, count


@st.composite
def clips(draw):
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**16))
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, width, generator=g, dtype=torch.float64) * 5
    mask = torch.rand(rows, width, generator=g) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    return logp, mask, torch.rand(rows, generator=g, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(clips(), st.sampled_from(REDUCTIONS))
def test_sum_and_count_are_those_of_brute_force(case, reduction):
    logp, mask, weight = case
    for w in (weight, torch.ones_like(weight)):
        total, count = clip_nll(logp, mask, None if bool((w == 1).all()) else w, reduction)
        expected = brute(logp, mask, w, reduction)
        assert (float(total), float(count)) == pytest.approx(expected, abs=1e-12)
        assert float(clip_count(mask, w, reduction)) == pytest.approx(expected[1], abs=1e-12)


def test_two_clips_by_hand():
    logp = torch.tensor([[0.5, 0.25, 0.1], [0.2, 0.9, 0.9]]).log()
    mask = clip_mask(tensor(2, 1), tensor(3, 3), tensor(False, False), 3)
    total, count = clip_nll(logp, mask)
    assert float(total) == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2 - math.log(0.2))
    assert int(count) == 2
    total, count = clip_nll(logp, mask, reduction="token_mean")
    assert float(total) == pytest.approx(-math.log(0.5 * 0.25 * 0.2))
    assert int(count) == 3


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sums_and_counts_of_parts_add_up(reduction):
    g = torch.Generator().manual_seed(0)
    logp, mask = -torch.rand(6, 5, generator=g), torch.rand(6, 5, generator=g) < 0.5
    weight = torch.rand(6, generator=g)
    parts = [clip_nll(logp[i : i + 2], mask[i : i + 2], weight[i : i + 2], reduction) for i in (0, 2, 4)]
    whole = clip_nll(logp, mask, weight, reduction)
    assert float(sum(p[0] for p in parts)) == pytest.approx(float(whole[0]), rel=1e-6)
    assert float(sum(p[1] for p in parts)) == pytest.approx(float(whole[1]), rel=1e-6)


def test_the_gradient_is_minus_one_over_the_length_and_nothing_outside():
    logp = torch.zeros(2, 4, requires_grad=True)
    clip_nll(logp, clip_mask(tensor(2, 4), tensor(4, 4), tensor(False, False), 4))[0].backward()
    assert logp.grad.tolist() == [[-0.5, -0.5, 0, 0], [-0.25] * 4]


def test_what_lies_outside_a_clip_may_be_anything():
    logp = torch.tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    total, _ = clip_nll(logp, torch.tensor([[True, False, False]]))
    total.backward()
    assert total.item() == 1
    assert logp.grad.tolist() == [[-1, 0, 0]]


def test_a_row_without_a_clip_counts_nothing_and_none_at_all_is_zero_with_a_graph():
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    none = clip_mask(tensor(0, 0), tensor(3, 3), tensor(True, False), 3)
    for rows in (slice(None), slice(0)):
        total, count = clip_nll(logp[rows], none[rows])
        total.backward()
        assert (total.item(), count.item()) == (0, 0)
    assert logp.grad.tolist() == [[0] * 3] * 2


def test_the_eos_is_in_a_clip_only_where_the_clip_is_the_whole_completion():
    ends, lengths = tensor(2, 3, 3, 4, 0), tensor(4, 4, 4, 4, 1)
    eos = tensor(True, True, False, False, True)
    assert clip_mask(ends, lengths, eos, 5).sum(1).tolist() == [2, 4, 3, 4, 0]


def test_a_clip_beyond_its_completion_is_refused():
    with pytest.raises(ValueError, match="a clip of 4 tokens does not fit a completion of 3 before its EOS"):
        clip_mask(tensor(1, 4), tensor(4, 4), tensor(True, True), 5)


def test_padding_changes_nothing():
    g = torch.Generator().manual_seed(1)
    logp = -torch.rand(3, 4, generator=g)
    ends, lengths, eos = tensor(1, 3, 4), tensor(4, 4, 4), tensor(True, True, False)
    narrow = clip_nll(logp, clip_mask(ends, lengths, eos, 4))
    wide = clip_nll(torch.nn.functional.pad(logp, (0, 9), value=math.nan), clip_mask(ends, lengths, eos, 13))
    assert float(narrow[0]) == pytest.approx(float(wide[0]))
