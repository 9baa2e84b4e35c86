"""The objective: values by hand on two rows of three tokens, and what must not change it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from echolab.clips.selectors import Selector, select  # noqa: E402
from echolab.echo import Reduction  # noqa: E402
from echolab.entropy.head import Head, token_logprobs  # noqa: E402
from echolab.errors import WrongUsage  # noqa: E402
from trainer.advantages import advantages  # noqa: E402
from trainer.algorithms import ALGORITHMS, Algorithm, choose  # noqa: E402
from trainer.objective import (  # noqa: E402
    Batch,
    Clips,
    ClipTerm,
    Metrics,
    denominators,
    objective,
    policy_mask,
    reach,
)

NAN = math.nan
ln = math.log

# Two rows of three and two tokens. Ratios: 1.5, 1, 0.5 with advantage 2, and 0.9, 1.1 with advantage -1.
P = torch.tensor([[0.6, 0.5, 0.2], [0.45, 0.55, NAN]], dtype=torch.float64)
P_OLD = torch.tensor([[0.4, 0.5, 0.4], [0.5, 0.5, NAN]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
A = torch.tensor([2.0, -1.0], dtype=torch.float64)
LONGEST = 10


def run(algorithm, logp=None, *, batch=None, terms=(), groups=None, divisors=None, entropy=None, **changes):
    """(loss, gradient of the log-probs, result) of a whole step as one batch."""
    logp = (P.log() if logp is None else logp).clone().requires_grad_()
    batch = replace(batch or Batch(MASK, A, old=P_OLD.log()), **changes)
    if isinstance(algorithm, str):
        algorithm = ALGORITHMS[algorithm]
    divisors = divisors or denominators([batch], algorithm, terms, longest=LONGEST, groups=groups)
    found = objective(logp, batch, algorithm, divisors, terms, entropy)
    found.total.backward()
    assert logp.grad is not None
    return found.total.item(), logp.grad, found


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


S0, S1 = 0.75 ** (1 / 3), 0.99**0.5  # sequence ratios: geometric means
BY_HAND: dict[str, tuple[float, Any]] = {
    # min(1.5*2, 1.2*2) = 2.4, then 2 and 1; -0.9 and -1.1. Token means -1.8 and 1, their mean.
    "grpo": (-0.4, [[0, -2 / 6, -1 / 6], [0.9 / 4, 1.1 / 4, 0]]),
    "dr_grpo": (-3.4 / 20, [[0, -2 / 20, -1 / 20], [0.9 / 20, 1.1 / 20, 0]]),
    "dapo": ((-2.56 - 3 + 2) / 5, [[0, -2 / 5, -1 / 5], [0.9 / 5, 1.1 / 5, 0]]),
    # 2 * S0 is below 2 * (1 + 4e-4): not held. -S1 is above -(1 - 3e-4): held.
    "gspo": ((-2 * S0 + (1 - 3e-4)) / 2, [[-S0 / 3] * 3, [0, 0, 0]]),
    "gspo_token": ((-2 * S0 + (1 - 3e-4)) / 2, [[-S0 / 3] * 3, [0, 0, 0]]),
    "cispo": (
        (-2 * (1.5 * ln(0.6) + ln(0.5) + 0.5 * ln(0.2)) + 0.9 * ln(0.45) + 1.1 * ln(0.55)) / 5,
        [[-3 / 5, -2 / 5, -1 / 5], [0.9 / 5, 1.1 / 5, 0]],
    ),
    "rloo_tok": (-3.4 / 5, [[0, -2 / 5, -1 / 5], [0.9 / 5, 1.1 / 5, 0]]),
    # The products of the ratios: 0.75 and 0.99.
    "rloo_seq": ((-2 * 0.75 + 0.99) / 2, [[-0.75] * 3, [0.99 / 2] * 2 + [0]]),
    "reinforce_pp": (-3.4 / 5, [[0, -2 / 5, -1 / 5], [0.9 / 5, 1.1 / 5, 0]]),
    "reinforce_pp_baseline": (-3.4 / 5, [[0, -2 / 5, -1 / 5], [0.9 / 5, 1.1 / 5, 0]]),
    "raft": ((-2 * ln(0.6 * 0.5 * 0.2) + ln(0.45 * 0.55)) / 5, [[-2 / 5] * 3, [1 / 5] * 2 + [0]]),
    "raft_pp": (-3.4 / 5, [[0, -2 / 5, -1 / 5], [0.9 / 5, 1.1 / 5, 0]]),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_by_hand(name):
    value, gradient = BY_HAND[name]
    found, grad, _ = run(name)
    assert found == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(grad, torch.tensor(gradient, dtype=torch.float64))


def test_a_cap_of_cispo_holds_the_weight_and_no_gradient():
    value, grad, _ = run(choose("cispo", cap=1.05))
    assert value == pytest.approx((-2 * (1.05 * ln(0.6) + ln(0.5) + 0.5 * ln(0.2)) + 0.9 * ln(0.45) + 1.05 * ln(0.55)) / 5)
    torch.testing.assert_close(grad, rows([-2.1 / 5, -2 / 5, -1 / 5], [0.9 / 5, 1.05 / 5, 0]))


def test_seq_sum_and_no_clip_by_hand():
    value, grad, _ = run(Algorithm(clip="none", aggregation="seq_sum"))
    assert value == pytest.approx((-2 * 3 + 2) / 2)
    torch.testing.assert_close(grad, rows([-1.5, -1, -0.5], [0.45, 0.55, 0]))


def test_the_dual_clip_bounds_what_a_negative_advantage_can_do():
    old = rows([0.4, 0.5, 0.4], [0.09, 0.5, NAN]).log()  # the ratio of token (1, 0) is 5
    value, grad, _ = run(choose("dapo", dual=3.0), old=old)
    assert value == pytest.approx((-2.56 - 3 + 3 + 1.1) / 5)
    assert grad[1].tolist() == pytest.approx([0, 1.1 / 5, 0])
    value, grad, _ = run("dapo", old=old)
    assert value == pytest.approx((-2.56 - 3 + 5 + 1.1) / 5)


REFERENCE = rows([0.3, 0.5, 0.1], [0.9, 0.55, NAN])  # reference / policy = 0.5, 1, 0.5, 2, 1


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("k1", [ln(2), 0, ln(2), -ln(2), 0]),
        ("k2", [ln(2) ** 2 / 2, 0, ln(2) ** 2 / 2, ln(2) ** 2 / 2, 0]),
        ("k3", [0.5 + ln(2) - 1, 0, 0.5 + ln(2) - 1, 2 - ln(2) - 1, 0]),
        ("rho_k3", [1.5 * (ln(2) - 0.5), 0, 0.5 * (ln(2) - 0.5), 0.9 * (1 - ln(2)), 0]),
    ],
)
def test_kl_by_hand(kind, values):
    value, _, found = run(choose("dapo", kl=kind, beta=0.1), reference=REFERENCE.log())
    assert value == pytest.approx(BY_HAND["dapo"][0] + 0.1 * sum(values) / 5)
    assert found.parts["kl"].item() == pytest.approx(0.1 * sum(values) / 5)
    assert found.metrics.values()["kl"] == pytest.approx(sum(values) / 5)
    value, _, _ = run(choose("grpo", kl=kind, beta=0.1), reference=REFERENCE.log())
    assert value == pytest.approx(-0.4 + 0.1 * (sum(values[:3]) / 3 + sum(values[3:]) / 2) / 2)


def exact_gradients(kind):
    """The expected gradient of an estimator on policy over a vocabulary of six, and that of the KL itself."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=g, dtype=torch.float64).requires_grad_()
    reference = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
    p = logp.detach().exp()
    total = torch.zeros(6, dtype=torch.float64)
    for token in range(6):
        batch = Batch(torch.ones(1, 1, dtype=torch.bool), torch.zeros(1), reference=reference[token].view(1, 1))
        algorithm = Algorithm(kl=kind, beta=1.0)
        loss = objective(logp[token].view(1, 1), batch, algorithm, denominators([batch], algorithm)).total
        total += p[token] * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    return total, exact


def test_which_estimators_have_the_gradient_of_the_kl():
    for kind in ("k2", "rho_k3"):
        torch.testing.assert_close(*exact_gradients(kind))
    found, exact = exact_gradients("k1")
    assert found.norm() < 1e-12
    found, exact = exact_gradients("k3")
    assert (found - exact).norm() > 0.1 * exact.norm()


def test_entropy_bonus_is_a_mean_over_tokens():
    entropy = rows([1, 2, 3], [4, 5, NAN]).requires_grad_()
    value, _, found = run(choose("grpo", entropy=0.1), entropy=entropy)
    assert value == pytest.approx(-0.4 - 0.1 * 15 / 5)
    assert entropy.grad is not None
    assert entropy.grad.flatten().tolist() == pytest.approx([-0.02] * 5 + [0])
    assert found.metrics.values()["entropy"] == pytest.approx(3)


def test_truncated_importance_sampling_weighs_the_policy_gradient_alone():
    sampler = rows([0.2, 0.1, 0.8], [NAN, 0.5, NAN]).log()  # trainer / sampler = 2, 5, 0.5, unknown, 1
    weights = [2, 3, 0.5, 1, 1]
    value, grad, found = run(choose("dapo", sampler_cap=3.0, beta=0.1, kl="k2"), sampler=sampler, reference=REFERENCE.log())
    pg = sum(w * x for w, x in zip(weights, [-2.56, -2, -1, 0.9, 1.1], strict=True)) / 5
    assert value == pytest.approx(pg + 0.1 * 3 * ln(2) ** 2 / 2 / 5)
    assert grad[0, 1].item() == pytest.approx(-3 * 2 / 5)
    values = found.metrics.values()
    assert values["sampler/gap"] == pytest.approx((ln(2) + ln(5) + ln(2) + 0) / 4)
    assert values["sampler/gap_max"] == pytest.approx(ln(5))
    assert values["sampler/unknown"] == pytest.approx(1 / 5)
    assert values["sampler/weight"] == pytest.approx(7.5 / 5)
    assert values["sampler/ess"] == pytest.approx(7.5**2 / (5 * (4 + 9 + 0.25 + 1 + 1)))


def test_the_first_update_is_compared_with_the_sampler_through_its_own_log_probs():
    sampler = rows([0.3, 0.5, 0.2], [0.45, 0.55, NAN]).log()  # trainer / sampler of the first token: 2
    value, grad, _ = run(choose("dapo", sampler_cap=3.0), old=None, sampler=sampler)
    assert value == pytest.approx((-4 - 2 - 2 + 1 + 1) / 5)
    assert grad[0].tolist() == pytest.approx([-4 / 5, -2 / 5, -2 / 5])


def test_clipped_shares_and_ratios_by_sign():
    values = run("dapo")[2].metrics.values()
    assert values["clipped/positive"] == pytest.approx(1 / 3)  # 1.5; 0.5 is not held for a positive advantage
    assert values["clipped/negative"] == 0
    assert (values["ratio/max"], values["ratio/min"]) == pytest.approx((1.5, 0.5))
    assert values["ratio/mean"] == pytest.approx(1)
    values = run(choose("dapo", low=0.05, dual=None))[2].metrics.values()
    assert values["clipped/negative"] == pytest.approx(1 / 2)
    assert run(choose("cispo", cap=1.05))[2].metrics.values()["clipped/negative"] == pytest.approx(1 / 2)
    assert (values["count/rows"], values["count/tokens"]) == (2, 5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_policy_every_row_has_the_gradient_of_reinforce(name):
    _, grad, _ = run(name, old=None)
    _, same, _ = run(name, old=P.log())
    torch.testing.assert_close(grad, same)
    weight = A[:, None] * MASK
    expected = {
        "seq_mean": weight / MASK.sum(1, keepdim=True) / 2,
        "token_mean": weight / 5,
        "seq_sum_const": weight / (2 * LONGEST),
    }[ALGORITHMS[name].aggregation]
    if name == "rloo_seq":  # its action is the whole completion: the gradient is of the sum of its log-probs
        expected = weight / 2
    torch.testing.assert_close(grad, -expected)


def random_case(seed, *, rows=6, width=7, clips=True, dtype=torch.float64):
    """Rows of any length from 0 on, with old, sampler's and reference log-probs, entropies and clips of two names."""
    g = torch.Generator().manual_seed(seed)

    def values(scale):
        return torch.randn(rows, width, generator=g, dtype=dtype) * scale

    lengths = torch.randint(0, width + 1, (rows,), generator=g)
    lengths[0] = width
    mask = torch.arange(width) < lengths[:, None]
    logp = -values(1.0).abs()
    batch = Batch(
        mask,
        torch.randint(-1, 2, (rows,), generator=g).to(dtype),
        old=logp + values(0.3),
        sampler=logp + values(0.3),
        reference=logp + values(0.5),
    )
    if clips:
        names = {}
        for name in ("echo", "replay"):
            on = torch.randint(0, rows, (4,), generator=g)
            held = torch.arange(width) < torch.randint(0, width + 1, (4,), generator=g)[:, None]
            names[name] = Clips(on, held, torch.rand(4, generator=g, dtype=dtype))
        batch = replace(batch, clips=names)
    return logp, values(1.0).abs(), batch


TERMS = (ClipTerm("echo", 0.3, "group_mean"), ClipTerm("replay", 0.2, "token_mean"))
EVERYTHING = {"beta": 0.1, "entropy": 0.05, "sampler_cap": 1.5}


def everything(name):
    algorithm = ALGORITHMS[name]
    return choose(name, **EVERYTHING, kl="k3" if algorithm.kl == "reward" else algorithm.kl)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(sorted(ALGORITHMS)), st.randoms(use_true_random=False), st.booleans())
def test_neither_micro_batches_nor_padding_nor_order_change_the_step(seed, name, random, per_token):
    """The same loss, gradients of log-probs and entropies, and metrics; what is outside the masks is NaN."""
    logp, entropy, batch = random_case(seed)
    if per_token:
        batch = replace(batch, advantages=batch.advantages[:, None].expand(-1, 7).clone())
    algorithm = everything(name)
    divisors = denominators([batch], algorithm, TERMS, longest=LONGEST, groups=5)
    x, h = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    whole = objective(x, batch, algorithm, divisors, TERMS, h)
    whole.total.backward()

    order = random.sample(range(6), 6)
    cuts = sorted(random.sample(range(1, 6), random.randint(0, 3)))
    y, k = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    total, metrics = 0.0, Metrics()
    for start, end in zip([0, *cuts], [*cuts, 6], strict=True):
        rows = torch.tensor(order[start:end])
        part = batch.take(rows).to(torch.device("cpu"))
        wide = random.randint(0, 3)

        def padded(t, value: Any = NAN, wide=wide):
            return torch.nn.functional.pad(t, (0, wide), value=value)

        garbage = {n: padded(getattr(part, n).masked_fill(~part.mask, NAN)) for n in ("old", "sampler", "reference")}
        part = replace(
            part,
            mask=padded(part.mask, False),
            clips={n: replace(c, mask=padded(c.mask, False)) for n, c in part.clips.items()},
            advantages=padded(part.advantages) if per_token else part.advantages,
            **garbage,
        )
        found = objective(padded(y[rows]), part, algorithm, divisors, TERMS, padded(k[rows]))
        found.total.backward()
        total, metrics = total + found.total.item(), metrics + found.metrics
    assert total == pytest.approx(whole.total.item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(k.grad, h.grad)
    assert metrics.values() == pytest.approx(whole.metrics.values(), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(sorted(ALGORITHMS)), st.sampled_from([{}, EVERYTHING, {"beta": 0.1}]))
def test_what_lies_behind_a_rows_reach_has_no_gradient_and_may_be_left_out(seed, name, changes):
    logp, entropy, batch = random_case(seed)
    algorithm = choose(name, **changes, kl="k3", kl_rows="advantage" if seed % 2 else "all")
    terms = (TERMS[0], replace(TERMS[1], coefficient=0.0))
    divisors = denominators([batch], algorithm, terms, longest=LONGEST, groups=5)
    x = logp.clone().requires_grad_()
    objective(x, batch, algorithm, divisors, terms, entropy).total.backward()
    needed = reach(batch, algorithm, terms)
    behind = torch.arange(7) >= needed[:, None]
    assert x.grad is not None
    assert (x.grad[behind] == 0).all()
    y = logp.clone().masked_fill(behind, NAN).requires_grad_()
    rows = needed.nonzero()[:, 0]
    objective(y[rows], batch.up_to(needed).take(rows), algorithm, divisors, terms, entropy[rows]).total.backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_without_anything_else_rows_without_advantage_need_no_pass():
    batch = Batch(torch.ones(4, 2, dtype=torch.bool), torch.tensor([1.0, 0.0, 0.0, -1.0]))
    assert reach(batch, ALGORITHMS["grpo"]).tolist() == [2, 0, 0, 2]
    clip = torch.tensor([[True, False], [False, False]])
    batch = replace(batch, clips={"echo": Clips(torch.tensor([2, 1]), clip, torch.ones(2))})
    assert reach(batch, ALGORITHMS["grpo"], [ClipTerm("echo", 0.1)]).tolist() == [2, 0, 1, 2]  # no further than the clip
    assert reach(batch, ALGORITHMS["grpo"], [ClipTerm("echo", 0.0)]).tolist() == [2, 0, 0, 2]
    assert reach(batch, choose("grpo", entropy=0.1)).tolist() == [2] * 4
    assert reach(batch, choose("grpo", beta=0.1)).tolist() == [2] * 4
    assert reach(batch, choose("grpo", beta=0.1, kl_rows="advantage"))[1] == 0
    assert reach(batch, choose("rloo_tok", beta=0.1))[1] == 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_fully_masked_batch_is_a_finite_zero_with_a_graph(name):
    batch = Batch(
        torch.zeros(2, 3, dtype=torch.bool),
        torch.tensor([NAN, 1.0]),
        **{k: torch.full((2, 3), NAN) for k in ("old", "sampler", "reference")},
        clips={"echo": Clips(torch.tensor([0]), torch.zeros(1, 3, dtype=torch.bool), torch.ones(1))},
    )
    terms = [ClipTerm("echo", 0.1), ClipTerm("replay", 0.1)]
    value, grad, found = run(everything(name), torch.full((2, 3), NAN), batch=batch, terms=terms, entropy=torch.ones(2, 3))
    assert value == 0
    assert (grad == 0).all()
    assert all(math.isfinite(v) for v in found.metrics.values().values())
    assert not reach(batch, everything(name), terms).any()


def test_rows_without_tokens_are_not_counted_unless_the_caller_says_so():
    mask = policy_mask(MASK, torch.tensor([True, True]), truncated=torch.tensor([False, True]))
    assert mask.tolist() == [[True] * 3, [False] * 3]
    assert policy_mask(MASK, torch.tensor([False, True])).tolist() == [[False] * 3, [True, True, False]]
    value, grad, _ = run("grpo", mask=mask)
    assert value == pytest.approx(-1.8)  # ours: one row
    assert (grad[1] == 0).all()
    value, _, _ = run("grpo", mask=mask, divisors={"policy": 2.0, "entropy": 3.0})  # TRL's: both
    assert value == pytest.approx(-0.9)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_ratio_that_broke_away_stays_a_number(name):
    """Also where no token does, but the sum over a completion."""
    batch = Batch(torch.ones(2, 9, dtype=torch.bool), torch.tensor([1.0, -1.0]))
    for old, reference in ((-300.0, 300.0), (300.0, -300.0), (-19.0, 19.0)):
        far = {"old": torch.full((2, 9), old), "reference": torch.full((2, 9), reference)}
        value, grad, _ = run(choose(name, beta=0.1, kl="rho_k3"), torch.zeros(2, 9), batch=batch, **far)
        assert math.isfinite(value)
        assert grad.isfinite().all()


@pytest.mark.parametrize("width", [3e-4, 0.05, 0.5])
def test_gspo_is_gspo_token(width):
    logp, _, batch = random_case(3, clips=False)
    value, grad, _ = run(choose("gspo", low=width, high=width), logp, batch=batch)
    value_token, grad_token, _ = run(choose("gspo_token", low=width, high=width), logp, batch=batch)
    assert value == pytest.approx(value_token)
    torch.testing.assert_close(grad, grad_token)


# Echo.


def group_of(rewards, seed=0, width=8):
    """A group with its entropies: (rollouts for the selector, lengths, log-probs, segment ends, entropies of tokens)."""
    g = torch.Generator().manual_seed(seed)
    n = len(rewards)
    logp = -torch.rand(n, width, generator=g, dtype=torch.float64)
    entropies = torch.rand(n, width, generator=g, dtype=torch.float64)
    lengths = torch.randint(4, width + 1, (n,), generator=g)  # with the EOS
    ends = [[*range(2, int(t) - 1, 2), int(t) - 1] for t in lengths]
    table = pa.table(
        {
            "group_id": pa.array(["g"] * n),
            "rollout_id": pa.array([str(i) for i in range(n)]),
            "sample": pa.array(range(n), pa.int32()),
            "success": pa.array([r == 1 for r in rewards]),
            "truncated": pa.array([False] * n),
            "segment_ends": pa.array(ends, pa.list_(pa.int32())),
            "segment_entropies": pa.array(
                [[float(entropies[i, a:b].mean()) for a, b in zip([0, *e[:-1]], e, strict=True)] for i, e in enumerate(ends)],
                pa.list_(pa.float32()),
            ),
        }
    )
    return table, lengths, logp, ends, entropies


def brute_echo(rewards, logp, lengths, ends, entropies):
    """The pseudocode of the method, one step of reasoning at a time."""
    best = None
    for i, r in enumerate(rewards):
        if r != 1:
            continue
        for a, b in zip([0, *ends[i][:-1]], ends[i], strict=True):
            mean = sum(entropies[i, a:b].tolist()) / (b - a)
            if best is None or mean > best[0]:
                best = (mean, i, int(lengths[i]) if b == ends[i][-1] else b)
    if best is None:
        return 0.0, torch.zeros_like(logp)
    _, i, length = best
    gradient = torch.zeros_like(logp)
    gradient[i, :length] = -1 / length
    return -sum(logp[i, :length].tolist()) / length, gradient


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("rewards", [[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
def test_from_rewards_to_the_echo_gradient_as_brute_force_has_it(rewards, seed):
    """The way of a step: advantages, selector, clips, objective. On an all-right group only the echo is left."""
    table, lengths, logp, ends, entropies = group_of(rewards, seed)
    chosen = select(table, Selector())
    eos = torch.ones(4, dtype=torch.bool)
    clips = Clips.of(torch.as_tensor(chosen.row), torch.as_tensor(chosen.end_token), lengths, eos, 8)
    found = advantages(torch.tensor(rewards, dtype=torch.float64), torch.zeros(4), "grpo")
    response = torch.arange(8) < lengths[:, None]
    batch = Batch(policy_mask(response, found.used), found.values, clips={"echo": clips})
    term = ClipTerm("echo", 0.001)
    _, with_echo, result = run("grpo", logp, batch=batch, terms=[term])
    _, without, _ = run("grpo", logp, batch=batch, terms=[])
    _, switched_off, silent = run("grpo", logp, batch=batch, terms=[ClipTerm("echo", 0.0)])
    nll, gradient = brute_echo(rewards, logp, lengths, ends, entropies)
    assert result.metrics.values()["echo/nll"] == pytest.approx(nll)
    torch.testing.assert_close(with_echo - without, 0.001 * gradient, rtol=1e-6, atol=1e-12)
    assert torch.equal(switched_off, without)  # bit for bit
    assert silent.metrics.values()["echo/nll"] == pytest.approx(nll)
    assert set(silent.parts) == {"pg"}
    if len(set(rewards)) == 1:
        assert (without == 0).all()
        assert bool((with_echo != 0).any()) == (sum(rewards) > 0)


def test_reductions_divide_by_what_the_whole_step_has():
    """Three groups, two with a clip: of one token with NLL 1, and, three times as heavy, of three with NLL 2 each."""
    mask = torch.arange(3) < torch.tensor([[1], [3]])
    clips = Clips(torch.tensor([0, 1]), mask, torch.tensor([1.0, 3.0]))
    batch = Batch(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2), clips={"echo": clips})
    logp = torch.tensor([[-1.0, -9, -9], [-2, -2, -2]])
    expected: list[tuple[Reduction, float]] = [("clip_mean", 7 / 4), ("group_mean", 7 / 3), ("token_mean", 19 / 10)]
    for reduction, value in expected:
        term = ClipTerm("echo", 1.0, reduction)
        assert run("grpo", logp, batch=batch, terms=[term], groups=3)[0] == pytest.approx(value)
    with pytest.raises(ValueError, match="group_mean divides by the number of groups"):
        denominators([batch], ALGORITHMS["grpo"], [ClipTerm("echo", 1.0, "group_mean")])


def test_two_clips_on_one_row_and_metrics_of_clips():
    clips = Clips.of(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([3, 2]), torch.tensor([True, False]), 3)
    batch = Batch(MASK, torch.zeros(2), clips={"echo": clips})
    value, grad, found = run("grpo", batch=batch, terms=[ClipTerm("echo", 1.0)])
    assert value == pytest.approx(-(ln(0.6) + (ln(0.6) + ln(0.5) + ln(0.2)) / 3) / 2)  # the second is whole: with its EOS
    torch.testing.assert_close(grad[0], -torch.tensor([1 + 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64) / 2)
    values = found.metrics.values()
    assert (values["echo/clips"], values["echo/tokens"]) == (2, 4)
    assert values["echo/logp"] == pytest.approx((2 * ln(0.6) + ln(0.5) + ln(0.2)) / 4)


def test_an_empty_selection_is_no_clip():
    empty = torch.as_tensor(np.empty(0, np.int64))
    clips = Clips.of(empty, empty, torch.tensor([3, 2]), torch.tensor([False, False]), 3)
    _, grad, found = run("grpo", clips={"echo": clips}, terms=[ClipTerm("echo", 1.0)])
    _, without, _ = run("grpo")
    assert torch.equal(grad, without)
    assert found.parts["echo"].item() == 0


def test_parts_add_up_and_have_gradients_of_their_own():
    logp, entropy, batch = random_case(5)
    algorithm = everything("grpo")
    divisors = denominators([batch], algorithm, TERMS, longest=LONGEST, groups=5)
    x = logp.clone().requires_grad_()
    found = objective(x, batch, algorithm, divisors, TERMS, entropy.clone().requires_grad_())
    assert list(found.parts) == ["pg", "kl", "entropy", "echo", "replay"]
    assert found.total.item() == pytest.approx(sum(p.item() for p in found.parts.values()))
    parts = [torch.autograd.grad(found.parts[n], x, retain_graph=True)[0] for n in ("pg", "kl", "echo", "replay")]
    torch.testing.assert_close(sum(parts), torch.autograd.grad(found.total, x)[0])
    values = found.metrics.values()
    assert values["loss/echo"] == pytest.approx(0.3 * values["echo/nll"])


# Log-probs, and what is refused.


def test_at_a_temperature_log_probs_are_those_of_scaled_logits():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=g), torch.randn(11, 8, generator=g)
    targets = torch.randint(0, 11, (5,), generator=g)
    found, _ = token_logprobs(hidden, Head(weight), targets, 0.7)
    expected = (hidden.double() @ weight.double().T / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_a_term_needs_is_asked_for():
    batch = Batch(MASK, A)
    logp = torch.zeros(2, 3)
    for changes, needs in (({"beta": 0.1}, "reference policy"), ({"entropy": 0.1}, "entropies")):
        algorithm = choose("grpo", **changes)
        with pytest.raises(ValueError, match=needs):
            objective(logp, batch, algorithm, denominators([batch], algorithm))
    with pytest.raises(ValueError, match="longest completion"):
        denominators([batch], ALGORITHMS["dr_grpo"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rloo", {}, "did you mean rloo_tok or rloo_seq"),
        ("ppo2023", {}, "use one of grpo, dr_grpo"),
        ("grpo", {"hihg": 0.3}, "hihg: no such option; did you mean high"),
        ("grpo", {"clip": "cispo"}, "needs a cap"),
        ("grpo", {"cap": 2.0}, "cap belongs to clip = cispo"),
        ("grpo", {"dual": 1.1}, "above 1 [+] high = 1.2"),
        ("grpo", {"ratio": "none"}, "set clip = none"),
        ("dapo", {"soft_overlong": 4096}, "share of the longest completion"),
        ("grpo", {"low": -1}, "low: .*greater than or equal to 0"),
    ],
)
def test_choices_that_make_no_sense_are_refused_in_one_line(name, changes, message):
    with pytest.raises(WrongUsage, match=message) as error:
        choose(name, **changes)
    assert "\n" not in str(error.value)


def test_every_field_of_an_algorithm_is_documented():
    assert all(f.description for f in Algorithm.model_fields.values())
