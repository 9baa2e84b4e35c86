"""From the rewards of full groups to advantages.

Everything here sees all sampled rollouts, before any filter, so that what a filter drops never moves the baseline of what it
keeps. Sums are made in float64: a group whose rewards differ by rounding only has no advantage at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.algorithms import Advantage

TOLERANCE = 1e-6  # rewards of a group that differ by less are alike
LEAST_VARIANCE = 1e-8  # of what is whitened, as in OpenRLHF
GROUP_FREE = ("reinforce_pp", "raft")  # they need no other rollout of the same prompt


@dataclass(frozen=True)
class Advantages:
    """One value a rollout, or a token."""

    values: Tensor  # [N] or [N, T], float32; 0 where `used` is False
    used: Tensor  # [N] bool: rewarded, and with company in its group where the baseline needs it
    degenerate: Tensor  # [N] bool: of a group of several rewarded rollouts whose rewards are alike
    unrewarded: int  # rollouts whose reward is not a number
    single: int  # rollouts that were dropped since no other one of their group has a reward


def advantages(
    rewards: Tensor,
    groups: Tensor,
    kind: Advantage = "grpo",
    *,
    eps: float = 1e-4,
    mask: Tensor | None = None,
    penalty: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Advantages:
    """Advantages of `rewards` [N] (NaN: not rewarded); rows with the same number in `groups` [N] were sampled together.

    With mean and std of the rewarded rollouts of the group, and G of them:

    - `grpo`: (r - mean) / (std + eps), unbiased std; `centred`: r - mean; `batch_std`: (r - mean) / (std of the batch + eps);
    - `rloo`: r - mean of the other rewards = G / (G - 1) * (r - mean);
    - `reinforce_pp`: the rewards that are still to come at a token, whitened over all tokens of the batch;
      `reinforce_pp_baseline`: r - mean, whitened the same way. Long completions weigh more, and a degenerate group can have an
      advantage: both are part of the method;
    - `raft`: max(r, 0).

    `mask` [N, T] are the tokens of the completions, which whitening needs. `penalty` [N, T], such as beta * k1, is taken from
    the reward: token by token in `reinforce_pp`, elsewhere its sum."""
    rewards = rewards.double()
    rewarded = ~rewards.isnan()
    plain = _Groups.of(rewards, groups)
    company = plain.count > 1
    used = rewarded if kind in GROUP_FREE else rewarded & company
    if penalty is not None:
        if mask is None:
            raise ValueError("a penalty needs the mask of its tokens")
        penalty = torch.where(mask, penalty, 0).double()
    if kind == "reinforce_pp":
        values = rewards if penalty is None else rewards[:, None] - penalty.flip(1).cumsum(1).flip(1)
    else:
        rewards = rewards if penalty is None else rewards - penalty.sum(1)
        values = _of_groups(rewards, _Groups.of(rewards, groups), kind, eps, tolerance)
    if kind.startswith("reinforce_pp"):
        values = _whitened(values, used, mask)
    values = torch.where(used if values.ndim == 1 else used[:, None], values, 0).float()
    degenerate = rewarded & company & (plain.spread <= tolerance)
    return Advantages(values, used, degenerate, int((~rewarded).sum()), int((rewarded & ~used).sum()))


@dataclass(frozen=True)
class _Groups:
    """Statistics of each row's group, over its rows with a number; [N] each."""

    count: Tensor
    mean: Tensor
    spread: Tensor  # largest - smallest
    deviations: Tensor  # sum of squared distances from the mean

    @classmethod
    def of(cls, x: Tensor, groups: Tensor) -> _Groups:
        names, group = groups.unique(return_inverse=True)
        known = ~x.isnan()

        def collect(values: Tensor, empty: float, how: str) -> Tensor:
            start = torch.full((len(names),), empty, dtype=x.dtype, device=x.device)
            return start.scatter_reduce(0, group[known], values[known], how)[group]

        count = collect(torch.ones_like(x), 0, "sum")
        mean = collect(x, 0, "sum") / count
        spread = collect(x, -math.inf, "amax") - collect(x, math.inf, "amin")
        return cls(count, mean, spread, collect((x - mean) ** 2, 0, "sum"))


def _of_groups(rewards: Tensor, stats: _Groups, kind: Advantage, eps: float, tolerance: float) -> Tensor:
    """What needs one number a rollout. Alike rewards give exactly 0: their rounding is not divided by a tiny std."""
    if kind == "raft":
        return rewards.clamp(min=0)
    centred = torch.where(stats.spread <= tolerance, 0, rewards - stats.mean)
    others = (stats.count - 1).clamp(min=1)
    if kind == "grpo":
        return centred / ((stats.deviations / others).sqrt() + eps)
    if kind == "rloo":
        return centred * stats.count / others
    if kind == "batch_std":
        known = rewards[~rewards.isnan()]
        return centred / (known.std() + eps) if len(known) > 1 else centred
    return centred  # and the baseline of reinforce_pp_baseline


def _whitened(values: Tensor, used: Tensor, mask: Tensor | None) -> Tensor:
    """Mean 0 and variance 1 over all tokens of rows that are used; a value of a row stands for each of its tokens."""
    if mask is None:
        raise ValueError("whitening is over tokens: it needs their mask")
    weight = (mask if values.ndim == 2 else mask.sum(1)) * (used[:, None] if values.ndim == 2 else used)
    n = weight.sum().clamp(min=1)
    values = torch.where(weight > 0, values, 0)
    centred = values - (values * weight).sum() / n
    variance = (centred**2 * weight).sum() / n
    if variance <= TOLERANCE**2:
        return torch.zeros_like(values)
    return centred * variance.clamp(min=LEAST_VARIANCE).rsqrt()


def soft_overlong(lengths: Tensor, longest: int, share: float, factor: float = 1.0) -> Tensor:
    """What DAPO adds to the reward of long completions: 0 until the last `share` of the longest, from there down to -factor.

    The shaped reward is for advantages only: whether an answer is right is judged on the reward without it."""
    buffer = share * longest
    if not buffer:
        return torch.zeros_like(lengths, dtype=torch.float64)
    over = lengths.double() - (longest - buffer)
    return -(over / buffer).clamp(min=0) * factor


@dataclass(frozen=True)
class Filtered:
    """Rows that a filter keeps, and how many groups that was."""

    rows: Tensor  # [N] bool
    kept: int
    dropped: int


def varied_groups(metric: Tensor, groups: Tensor, tolerance: float = TOLERANCE) -> Filtered:
    """Dynamic sampling keeps groups whose metric is not constant (NaN: unknown, and left out).

    The metric is the success, not the reward: with `soft_overlong` the rewards of an all-right group differ."""
    stats = _Groups.of(metric.double(), groups)
    rows = stats.spread > tolerance
    total, kept = len(groups.unique()), len(groups[rows].unique())
    return Filtered(rows, kept, total - kept)
