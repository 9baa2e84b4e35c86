"""The EchoRL objective: the likelihood of clips, as pure functions on tensors.

A clip is the beginning of a completion that was verified as right, up to the end of the chosen segment. Of L tokens,

    nll(clip) = -1/L * sum of ln pi(token)          LOSS = L_RLVR + coefficient * REDUCE[nll]

There is no advantage, no ratio, no clipping and no KL in this term, and the choice of the clip carries no gradient. A clip is
a mask over log-probs that the policy loss has computed anyway. Every tensor here has one row a clip: `logp[rows]` are the
log-probs of the rows that clips lie on, and a row may hold several.

`clip_nll` returns a sum and a count, never a mean. The count that belongs to an optimizer step is that of all its
micro-batches on all ranks; a mean for each micro-batch would weigh clips by how the step happened to be cut."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["clip_mean", "group_mean", "token_mean"]
"""Over what the clips of a step are averaged: all clips (the default), all groups, also those without a clip, or all tokens
of clips, where a long clip weighs more."""


def clip_mask(ends: Tensor, lengths: Tensor, eos: Tensor, width: int) -> Tensor:
    """[C, width]: the tokens of its completion that each clip holds.

    `ends` are the store's `end_token`: tokens from the first on, a final EOS not counted; 0 is no clip. `lengths` are all
    tokens of the completion, and `eos` says whether the last one is an EOS. A clip holds the EOS only where it is the whole
    completion: else the policy would unlearn to stop."""
    body = lengths - eos.long()
    if bool((ends > body).any()):
        worst = int((ends - body).argmax())
        raise ValueError(f"a clip of {int(ends[worst])} tokens does not fit a completion of {int(body[worst])} before its EOS")
    reach = torch.where((ends == body) & (ends > 0), lengths, ends)
    return torch.arange(width, device=ends.device) < reach[:, None]


def clip_nll(
    logp: Tensor, mask: Tensor, weight: Tensor | None = None, reduction: Reduction = "clip_mean"
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the negative log-likelihood of clips; `logp` and `mask` are [C, T], `weight` is [C].

    The sum is over clips of their mean NLL, or with `token_mean` over their tokens. The count is `clip_count`; with
    `group_mean`, whose denominator only the caller knows, it is that of `clip_mean`. Clips without a token count nothing."""
    per_clip = -torch.where(mask, logp, 0).sum(-1)
    if reduction != "token_mean":
        per_clip = per_clip / mask.sum(-1).clamp(min=1)
    total = per_clip.sum() if weight is None else (per_clip * weight).sum()
    return total, clip_count(mask, weight, reduction)


def clip_count(mask: Tensor, weight: Tensor | None = None, reduction: Reduction = "clip_mean") -> Tensor:
    """What the sum of `clip_nll` is divided by for a mean: the weights of all clips, or of all their tokens."""
    tokens = mask.sum(-1)
    counted = tokens if reduction == "token_mean" else tokens.clamp(max=1)
    return counted.sum() if weight is None else (counted * weight).sum()
