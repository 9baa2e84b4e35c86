"""One token for each row of logits, by inverse CDF, with its log-probability and the entropy of its distribution."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from echolab.engines import Sampling

PART = 2**23  # logits at a time: 32 MB in float32, and a few copies of them
LOWEST = -87.0  # e**LOWEST is about the smallest normal float32: nothing is lost below it, and 0 * -inf is avoided
_MIX = tuple(v - 2**64 for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as signed integers


def row_keys(seed: int, keys: Sequence[int | str], samples: Sequence[int]) -> Tensor:
    """One random key for each row: of the seed, its prompt's key and its sample's number."""
    found = [blake2b(repr((seed, k, s)).encode(), digest_size=8) for k, s in zip(keys, samples, strict=True)]
    return torch.tensor([int.from_bytes(d.digest(), "little", signed=True) for d in found])


def uniforms(keys: Tensor, places: int) -> Tensor:
    """Numbers in (0, 1] for each row at the places of its completion, [places, rows]: splitmix64, which needs no state."""
    z = keys + torch.arange(places, device=keys.device)[:, None] * _MIX[0]  # integers wrap around
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    return (z >> 40 & 0xFFFFFF).add_(1).float().mul_(2.0**-24)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Token, log-probability and entropy of each row; `uniform` decides. The numbers are float32, before top-k and top-p."""
    rows = max(1, PART // logits.shape[1])
    parts = [_draw(x, u, sampling) for x, u in zip(logits.split(rows), uniform.split(rows), strict=True)]
    if len(parts) == 1:
        return parts[0]
    token, logprob, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return token, logprob, entropy


def _draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.float()
    if sampling.temperature not in (0, 1):
        x = x / sampling.temperature
    y = (x - x.amax(-1, keepdim=True)).clamp_(min=LOWEST)
    p = y.exp()
    if sampling.temperature == 0:
        token = x.argmax(-1, keepdim=True)
    elif sampling.top_p < 1 or 0 < sampling.top_k < p.shape[1]:
        weights, order = _restricted(p, sampling)
        token = order.gather(1, _choose(weights, uniform))
    else:
        token = _choose(p, uniform)
    total = p.sum(-1)
    log_total = total.log()
    logprob = y.gather(1, token)[:, 0] - log_total
    return token[:, 0], logprob, log_total - p.mul_(y).sum(-1) / total


def _choose(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first place at which the sum of the weights reaches its share: never one whose weight is 0."""
    cdf = weights.cumsum(-1)
    place = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:])
    return place.clamp_(max=weights.shape[1] - 1)  # where the logits were no numbers, which is found out later


def _restricted(p: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The weights that top-k and top-p leave, largest first, and whose they are."""
    top = 0 < sampling.top_k < p.shape[1]
    weights, order = p.topk(sampling.top_k) if top else p.sort(descending=True, stable=True)
    if sampling.top_p < 1:
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= sampling.top_p * weights.sum(-1, keepdim=True), 0)
    return weights, order
