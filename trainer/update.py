"""One optimizer step: the objective of its rows, cut into micro-batches, and what its gradient is like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from echolab.entropy.scorer import Scorer
from trainer.algorithms import Algorithm
from trainer.objective import Batch, ClipTerm, Metrics, denominators, objective, reach
from trainer.policy import Rows, logprobs, micro_batches


def backward(
    policy: Scorer,
    rows: Rows,
    batch: Batch,
    algorithm: Algorithm,
    terms: Sequence[ClipTerm],
    *,
    longest: int,
    groups: int,
    tokens: int,
    only: str | None = None,
) -> Metrics:
    """Add the gradient of the step's loss, or of `only` one of its components, to what the parameters hold. Rows that have
    none get no pass, and no row one beyond its last token that has."""
    divisors = denominators([batch], algorithm, terms, longest=longest, groups=groups)
    needed = reach(batch, algorithm, terms)
    rows, batch, chosen = rows.up_to(needed), batch.up_to(needed), needed.nonzero()[:, 0]
    total = Metrics()
    for part in micro_batches(rows, chosen, tokens):
        logp, entropy = logprobs(policy, rows, part, entropy_grad=algorithm.entropy > 0)
        micro = batch.take(part, logp.shape[1]).to(policy.device)
        loss = objective(logp, micro, algorithm, divisors, terms, entropy)
        share = loss.total if only is None else loss.parts.get(only)
        if share is not None and share.requires_grad:
            share.backward()
        total = total + loss.metrics
    return total


def gradients(policy: Scorer, *step: Any, **options: Any) -> dict[str, float]:
    """The norm of each component's gradient, its coefficient included, and how the others lie to that of the policy.

    A pass for each component; afterwards the parameters hold no gradient."""
    terms: Sequence[ClipTerm] = step[3]
    found: dict[str, Tensor] = {}
    for name in ("pg", "kl", "entropy", *(t.name for t in terms)):
        backward(policy, *step, **options, only=name)
        parts = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
        policy.model.zero_grad()
        if parts:
            found[name] = torch.cat(parts)
    values = {f"norm/{name}": float(g.norm()) for name, g in found.items()}
    if "pg" in found and values["norm/pg"]:
        for name, g in found.items():
            if name != "pg" and values[f"norm/{name}"]:
                values[f"cosine/{name}"] = float(found["pg"] @ g) / (values["norm/pg"] * values[f"norm/{name}"])
    return values


def step_optimizer(policy: Scorer, optimizer: Any, rate: float, clip: float) -> tuple[float, bool]:
    """The norm of the gradient, and whether the parameters moved: a gradient that is no number is thrown away."""
    norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), clip))
    if moved := math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, moved
