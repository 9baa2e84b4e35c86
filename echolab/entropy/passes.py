"""Samples through a model, batch by batch: the entropy and log-probability of every completion token.

Body and head run apart, so that no tensor of tokens x vocabulary is ever built. Where memory does not suffice, a batch is
halved. On a GPU the numbers of one batch are fetched when the next one is on its way. Needs nothing but torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from echolab.entropy.batching import Batch, Sample, batches, hidden_states, split
from echolab.entropy.head import Head, Stats, token_stats
from echolab.errors import EcholabError

BATCH_TOKENS = {"cpu": 2 * 1024, "cuda": 64 * 1024}


def numbers(
    body: Any,
    head: Head,
    samples: Sequence[Sample],
    budget: int | None = None,
    *,
    temperature: float = 1.0,
    share: bool = True,
    pack: bool = False,
    compiled: bool = False,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of each sample, by its place: entropy and log-probability of its completion's tokens. `budget`: tokens of a batch."""
    device = head.weight.device
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def compute(batch: Batch) -> Stats:
        hidden, targets = hidden_states(body, batch, device)
        return token_stats(hidden, head, targets, temperature, compiled=compiled)

    def fetch(batch: Batch, stats: Stats) -> None:
        pairs = zip(split(stats.entropy.cpu(), batch), split(stats.logprob.cpu(), batch), strict=True)
        found.update({sample.place: (e, lp) for (sample, e), (_, lp) in pairs})

    with torch.inference_mode():
        before: tuple[Batch, Stats] | None = None
        for batch in batches(samples, budget or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]), share, pack):
            for done in _halved(compute, batch):
                if before:
                    fetch(*before)
                before = done
        if before:
            fetch(*before)
    return found


def _halved(compute: Callable[[Batch], Stats], batch: Batch) -> Iterator[tuple[Batch, Stats]]:
    """One batch through the model, or its halves where memory does not suffice."""
    try:
        yield batch, compute(batch)
        return
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        if len(batch.samples) == 1:
            raise EcholabError(f"out of memory for a single rollout of {len(batch.samples[0])} tokens") from None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for half in batch.halves():
        yield from _halved(compute, half)


def out_of_memory(error: Exception) -> bool:
    """Also a CPU's allocator, whose error is a RuntimeError like any other."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
