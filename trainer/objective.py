"""The loss of one optimizer step, as a sum of components that each have their own weight and their own denominator:

    LOSS = AGG[w * pg + beta * kl] - entropy * MEAN[H] + sum over terms of coefficient * REDUCE[nll of clips]

`Batch` holds what is known of the rows before the model runs. `denominators` counts once over the whole step, `reach` says
how far each row has to be computed, if at all, and `objective` turns the log-probs of a micro-batch into its share of the
loss. No number here depends on how a step is cut into micro-batches, how far rows are padded, or how they are ordered: the
shares add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from echolab.echo import Reduction, clip_count, clip_mask, clip_nll
from trainer.algorithms import Aggregation, Algorithm, Ratio

LARGEST = 20.0  # of a log-ratio: exp(20) is far beyond any cap, and still a number


@dataclass(frozen=True, eq=False)
class Clips:
    """Clips that lie on rows of a batch; several may lie on one row."""

    rows: Tensor  # [C] the row of each
    mask: Tensor  # [C, T] bool
    weight: Tensor  # [C]

    @classmethod
    def of(cls, rows: Tensor, ends: Tensor, lengths: Tensor, eos: Tensor, width: int) -> Clips:
        """From the rows and `end_token`s that a selector chose; `lengths` and `eos` are of all rows, see `clip_mask`."""
        mask = clip_mask(ends, lengths[rows], eos[rows], width)
        return cls(rows, mask, torch.ones(len(rows), device=rows.device))


@dataclass(frozen=True)
class ClipTerm:
    """How the clips of one name enter the loss: `echo` for those of this step's rollouts, `replay` for stored ones."""

    name: str
    coefficient: float
    reduction: Reduction = "clip_mean"


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one optimizer step, N of them with up to T completion tokens. Where a mask is False, anything may stand."""

    mask: Tensor  # [N, T] bool: tokens of the policy's loss; none in rows that only carry clips
    advantages: Tensor  # [N] or [N, T]
    old: Tensor | None = None  # [N, T] log-probs before the update; None: this is the first update, they are the current ones
    sampler: Tensor | None = None  # [N, T] log-probs as the sampler had them; NaN: unknown
    reference: Tensor | None = None  # [N, T] log-probs of the reference policy
    clips: Mapping[str, Clips] = field(default_factory=dict)

    def up_to(self, lengths: Tensor) -> Batch:
        """Only the first tokens of each row count."""
        places = torch.arange(self.mask.shape[1], device=lengths.device)
        return replace(self, mask=self.mask & (places < lengths[:, None]))

    def take(self, rows: Tensor, width: int | None = None) -> Batch:
        """Some of the rows, cut to a width, with the clips that lie on them."""
        place = torch.full((len(self.mask),), -1, device=rows.device).scatter(
            0, rows, torch.arange(len(rows), device=rows.device)
        )

        def taken(clips: Clips) -> Clips:
            here = place[clips.rows] >= 0
            return Clips(place[clips.rows[here]], clips.mask[here, :width], clips.weight[here])

        return self._each(lambda x: x[rows] if x.ndim == 1 else x[rows, :width], taken)

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda x: x.to(device), lambda c: Clips(c.rows.to(device), c.mask.to(device), c.weight.to(device)))

    def _each(self, change: Callable[[Tensor], Tensor], change_clips: Callable[[Clips], Clips]) -> Batch:
        tensors = {
            k: change(v) for k in ("mask", "advantages", "old", "sampler", "reference") if (v := getattr(self, k)) is not None
        }
        return replace(self, **tensors, clips={name: change_clips(c) for name, c in self.clips.items()})


def policy_mask(response: Tensor, used: Tensor, truncated: Tensor | None = None) -> Tensor:
    """Tokens of the policy's loss: those of the response [N, T], in rows that are used [N] and, if given, not cut off [N]."""
    rows = used if truncated is None else used & ~truncated
    return response & rows[:, None]


def reach(batch: Batch, algorithm: Algorithm, terms: Iterable[ClipTerm] = ()) -> Tensor:
    """[N]: how many tokens of each row can have a gradient, counted from the first. Rows without any need no pass, and those
    that only carry clips none behind their clips; all of them still count in the denominators."""
    advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None]
    pulled = algorithm.entropy > 0 or (kl_in_loss(algorithm) and algorithm.kl_rows == "all")
    rows = batch.mask.any(1) if pulled else ((advantages != 0) & batch.mask).any(1)
    places = torch.arange(1, batch.mask.shape[1] + 1, device=rows.device)
    found = torch.where(rows, (batch.mask * places).amax(1), 0)
    for term in terms:
        if term.coefficient and term.name in batch.clips:
            clips = batch.clips[term.name]
            ends = (clips.mask * (clips.weight != 0)[:, None] * places).amax(1)
            found = found.scatter_reduce(0, clips.rows, ends, "amax")
    return found


def denominators(
    batches: Iterable[Batch],
    algorithm: Algorithm,
    terms: Iterable[ClipTerm] = (),
    *,
    longest: int | None = None,
    groups: int | None = None,
) -> dict[str, float]:
    """What the sums of each component are divided by: counts over all rows of the step, also those that get no pass.

    `longest` is the longest completion that may be sampled (`seq_sum_const` needs it), `groups` the number of groups in the
    step (`group_mean` needs it). Rows without a token are not counted. All are counts: over several ranks they add up."""
    batches = list(batches)
    tokens = float(sum(int(b.mask.sum()) for b in batches))
    rows = float(sum(int(b.mask.any(1).sum()) for b in batches))
    if algorithm.aggregation == "seq_sum_const":
        if longest is None:
            raise ValueError("seq_sum_const divides by the longest completion that may be sampled: give `longest`")
        policy = rows * longest
    else:
        policy = tokens if algorithm.aggregation == "token_mean" else rows
    found = {"policy": policy, "entropy": tokens}
    for term in terms:
        if term.reduction != "group_mean":
            clips = [b.clips[term.name] for b in batches if term.name in b.clips]
            found[term.name] = float(sum(clip_count(c.mask, c.weight, term.reduction) for c in clips))
        elif groups is None:
            raise ValueError("group_mean divides by the number of groups: give `groups`")
        else:
            found[term.name] = float(groups)
    return found


class Loss(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]  # what `total` is the sum of: pg, kl, entropy and the clip terms, as far as they have a weight
    metrics: Metrics


def objective(
    logp: Tensor,
    batch: Batch,
    algorithm: Algorithm,
    divisors: Mapping[str, float],
    terms: Iterable[ClipTerm] = (),
    entropy: Tensor | None = None,
) -> Loss:
    """The share of a micro-batch in the loss of its step: call `backward` on each, then step.

    `logp` [N, T] are the current log-probs of the completions, at the temperature of sampling. `entropy` [N, T] needs a
    gradient only for the entropy bonus; else it is a metric. `divisors` are `denominators` of the whole step."""
    mask, metrics = batch.mask, Metrics()
    advantages = batch.advantages[:, None] if batch.advantages.ndim == 1 else batch.advantages
    advantages = torch.where(mask, advantages, 0)
    current = torch.where(mask, logp, 0)
    old = current.detach() if batch.old is None else torch.where(mask, batch.old, 0)
    change = (current - old).clamp(-LARGEST, LARGEST)
    ratio = log_ratio(change, mask, algorithm.ratio).exp()
    pg = policy_gradient(ratio, current, advantages, algorithm)
    if batch.sampler is not None:
        weight, gap = sampler_weight(old, batch.sampler, algorithm.sampler_cap)
        metrics.sampler(weight, gap, mask)
        pg = pg if algorithm.sampler_cap is None else weight * pg
    parts = {"pg": _share(aggregate(pg, mask, algorithm.aggregation), divisors["policy"])}
    metrics.policy(mask, advantages, ratio, change, algorithm)

    if batch.reference is not None:
        distance = kl(batch.reference - current, change, algorithm)
        metrics.mean("kl", distance, mask)
        if kl_in_loss(algorithm):
            distance = distance if algorithm.kl_rows == "all" else distance * (advantages != 0)
            parts["kl"] = algorithm.beta * _share(aggregate(distance, mask, algorithm.aggregation), divisors["policy"])
    elif kl_in_loss(algorithm):
        raise ValueError("a KL in the loss needs the log-probs of the reference policy")

    if entropy is not None:
        metrics.mean("entropy", entropy, mask)
        if algorithm.entropy:
            parts["entropy"] = -algorithm.entropy * _share(torch.where(mask, entropy, 0).sum(), divisors["entropy"])
    elif algorithm.entropy:
        raise ValueError("the entropy bonus needs the entropies, with their gradient")

    for term in terms:
        if (clips := batch.clips.get(term.name)) is not None:
            own = logp[clips.rows]
            nll = _share(clip_nll(own, clips.mask, clips.weight, term.reduction)[0], divisors[term.name])
            metrics.clips(term.name, nll, own, clips)
            if term.coefficient:  # without weight it is no part of the graph: not one bit of a gradient changes
                parts[term.name] = term.coefficient * nll
    metrics.sums |= {f"loss/{name}": part.detach() for name, part in parts.items()}
    return Loss(torch.stack(list(parts.values())).sum(), parts, metrics)


def log_ratio(change: Tensor, mask: Tensor, level: Ratio) -> Tensor:
    """ln of the ratio that an update is held by, [N, T] or [N, 1]; `change` is ln(current / old), 0 outside the mask."""
    if level == "none":
        return torch.zeros_like(change)
    if level == "token":
        return change
    if level == "sequence_sum":
        return change.sum(1, keepdim=True).clamp(-LARGEST, LARGEST)
    mean = change.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean if level == "sequence" else mean.detach() + (change - change.detach())


def policy_gradient(ratio: Tensor, logp: Tensor, advantages: Tensor, algorithm: Algorithm) -> Tensor:
    """[N, T]: what is minimised at each token."""
    if algorithm.clip == "cispo":
        return -ratio.detach().clamp(max=algorithm.cap) * advantages * logp
    if algorithm.ratio == "none":
        return -advantages * logp
    if algorithm.clip == "none":
        return -ratio * advantages
    held = ratio.clamp(1 - algorithm.low, 1 + algorithm.high)
    free = ratio if algorithm.dual is None else ratio.clamp(max=algorithm.dual)
    return -torch.minimum(free * advantages, held * advantages)


def sampler_weight(old: Tensor, sampler: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """(weight, gap): min(trainer / sampler, cap) and ln(trainer / sampler); 1 and NaN where the sampler's is unknown."""
    gap = old.detach() - sampler
    weight = gap.nan_to_num(nan=0.0).clamp(max=LARGEST).exp()
    return weight if cap is None else weight.clamp(max=cap), gap


def kl(x: Tensor, change: Tensor, algorithm: Algorithm) -> Tensor:
    """[N, T]: the estimate of KL(policy, reference) at each token, of x = ln(reference / policy)."""
    x = x.clamp(-LARGEST, LARGEST)
    if algorithm.kl in ("k1", "reward"):
        return -x
    if algorithm.kl == "k2":
        return x**2 / 2
    k3 = x.exp() - x - 1
    return k3 if algorithm.kl == "k3" else change.exp() * k3


def kl_in_loss(algorithm: Algorithm) -> bool:
    return algorithm.beta > 0 and algorithm.kl != "reward"


def aggregate(x: Tensor, mask: Tensor, how: Aggregation) -> Tensor:
    """The sum that `denominators` divides: over tokens, or over the token means of rows."""
    per_row = torch.where(mask, x, 0).sum(1)
    return (per_row / mask.sum(1).clamp(min=1)).sum() if how == "seq_mean" else per_row.sum()


def _share(total: Tensor, divisor: float) -> Tensor:
    """A step in which nothing counts has a loss of 0, with a graph: every rank calls backward."""
    return total / (divisor or 1.0)


@dataclass
class Metrics:
    """Of one micro-batch or, added up, of a step. They stay on the device until `values` brings them over at once."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (sum, count)
    highs: dict[str, Tensor] = field(default_factory=dict)
    lows: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Metrics) -> Metrics:
        def both(a: dict, b: dict, how: Callable) -> dict:
            return {k: how(a[k], b[k]) if k in a and k in b else a.get(k, b.get(k)) for k in {**a, **b}}

        return Metrics(
            both(self.sums, other.sums, torch.add),
            both(self.means, other.means, lambda a, b: (a[0] + b[0], a[1] + b[1])),
            both(self.highs, other.highs, torch.maximum),
            both(self.lows, other.lows, torch.minimum),
        )

    def values(self) -> dict[str, float]:
        """All as numbers; a mean over nothing is left out."""
        single = self.sums | self.highs | self.lows
        flat = [*single.values(), *(x for pair in self.means.values() for x in pair)]
        numbers = torch.stack([x.double() for x in flat]).tolist() if flat else []  # a step in which no row has a gradient
        nothing = dict.fromkeys(self.highs, -math.inf) | dict.fromkeys(self.lows, math.inf)
        found = {k: v for k, v in zip(single, numbers, strict=False) if v != nothing.get(k)}
        pairs = numbers[len(single) :]
        found |= {k: total / n for k, total, n in zip(self.means, pairs[::2], pairs[1::2], strict=True) if n}
        if square := found.pop("sampler/square", None):
            found["sampler/ess"] = found["sampler/weight"] ** 2 / square  # of 1: the share of tokens that are left, in effect
        return found

    @torch.no_grad()
    def mean(self, name: str, x: Tensor, where: Tensor) -> None:
        self.means[name] = torch.where(where, x, 0).sum(), where.sum()

    def policy(self, mask: Tensor, advantages: Tensor, ratio: Tensor, change: Tensor, algorithm: Algorithm) -> None:
        ratio, change = ratio.detach().expand_as(mask), change.detach()
        self.sums |= {"count/rows": mask.any(1).sum(), "count/tokens": mask.sum()}
        self.mean("ratio/mean", ratio, mask)
        self.mean("ratio/kl", change.exp() - 1 - change, mask)  # to the policy before the update
        if mask.numel():
            self.highs["ratio/max"] = torch.where(mask, ratio, -math.inf).amax()
            self.lows["ratio/min"] = torch.where(mask, ratio, math.inf).amin()
        if algorithm.clip != "none":
            bound = 1 + algorithm.high if algorithm.cap is None else algorithm.cap
            low, high = (1 - algorithm.low, algorithm.dual or math.inf) if algorithm.clip == "ppo" else (0.0, bound)
            self.mean("clipped/positive", (ratio > bound).float(), mask & (advantages > 0))
            self.mean("clipped/negative", ((ratio < low) | (ratio > high)).float(), mask & (advantages < 0))

    def sampler(self, weight: Tensor, gap: Tensor, mask: Tensor) -> None:
        known = mask & ~gap.isnan()
        self.mean("sampler/unknown", gap.isnan().float(), mask)
        self.mean("sampler/gap", gap.abs(), known)
        self.mean("sampler/weight", weight, mask)
        self.mean("sampler/square", weight**2, mask)
        if mask.numel():
            self.highs["sampler/gap_max"] = torch.where(known, gap.abs(), -math.inf).amax()

    def clips(self, name: str, nll: Tensor, logp: Tensor, clips: Clips) -> None:
        self.mean(f"{name}/logp", logp, clips.mask)
        self.sums |= {f"{name}/nll": nll.detach(), f"{name}/clips": clips.mask.any(1).sum(), f"{name}/tokens": clips.mask.sum()}
