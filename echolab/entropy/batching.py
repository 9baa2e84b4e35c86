"""Which sequences go through a model together, and the hidden states that predict their completions.

Sequences are right padded: a causal model's real positions never see what stands behind them, so no mask is needed, and
the attention kernels without a mask are the fast ones. A batch holds sequences of like length, up to a budget of tokens.
Rollouts of one prompt may share it: then it is computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from echolab.entropy import packed

SHARED_PAYS = 0.97  # of the tokens that separate sequences cost: what sharing costs is hardly more than what it computes
SHARED_PASSES = 8  # behind one computed prompt: their hidden states are held together


@dataclass(frozen=True)
class Sample:
    """One prompt and completion as token ids, both with at least one token; `place` is the caller's number for it."""

    place: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


class Layout(StrEnum):
    """How the samples of a batch go through the model."""

    PADDED = "padded"  # one row each, right padded
    SHARED = "shared"  # all with one prompt: it is computed once, then the completions as rows behind it, some at a time
    PACKED = "packed"  # end to end, each prompt once: see packed.py


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together: in one pass, or behind a shared prompt in passes of `budget` tokens."""

    samples: tuple[Sample, ...]
    layout: Layout = Layout.PADDED
    budget: int = 1 << 60

    @property
    def computed(self) -> int:
        """Tokens that go through the model."""
        if self.layout is Layout.PACKED:
            return sum(map(len, {s.prompt for s in self.samples})) + sum(len(s.completion) for s in self.samples)
        if self.layout is Layout.SHARED:
            return len(self.samples[0].prompt) + sum(len(p) * max(len(s.completion) for s in p) for p in self.passes)
        return len(self.samples) * max(len(s) for s in self.samples)

    @property
    def passes(self) -> list[tuple[Sample, ...]]:
        """The completions that stand behind a shared prompt at a time."""
        return _fill(self.samples, self.budget, lambda s: len(s.completion))

    def halves(self) -> tuple[Batch, Batch]:
        middle, budget = len(self.samples) // 2, min(self.budget, self.computed) // 2
        return Batch(self.samples[:middle], self.layout, budget), Batch(self.samples[middle:], self.layout, budget)


def batches(samples: Sequence[Sample], budget: int, share: bool = True, pack: bool = False) -> list[Batch]:
    """All samples in batches. A pass computes at most `budget` tokens, or a single sample; a shared prompt comes before."""
    together: dict[tuple[int, ...], list[Sample]] = {}
    for s in samples:
        together.setdefault(s.prompt, []).append(s)
    if pack:
        return _packed(list(together.values()), budget)
    found: list[Batch] = []
    alone: list[Sample] = []
    for group in together.values():
        parts = _behind_prompt(group, budget) if share and len(group) > 1 else []
        if parts and sum(b.computed for b in parts) < SHARED_PAYS * sum(len(s) for s in group):
            found += parts
        else:
            alone += group
    return found + [Batch(part) for part in _fill(_longest_first(alone), budget, len)]


def _longest_first(samples: Sequence[Sample]) -> list[Sample]:
    """Then those of a pass are of like length, and the first one's is that of all its rows."""
    return sorted(samples, key=lambda s: (-len(s), s.place))


def _fill(samples: Sequence[Sample], budget: int, length: Callable[[Sample], int]) -> list[tuple[Sample, ...]]:
    """Rows of one pass after the other; the longest come first."""
    found: list[tuple[Sample, ...]] = []
    held: list[Sample] = []
    for s in samples:
        if held and (len(held) + 1) * length(held[0]) > budget:
            found.append(tuple(held))
            held = []
        held.append(s)
    return [*found, tuple(held)] if held else found


def _behind_prompt(group: Sequence[Sample], budget: int) -> list[Batch]:
    passes = _fill(_longest_first(group), budget, lambda s: len(s.completion))
    parts = (passes[i : i + SHARED_PASSES] for i in range(0, len(passes), SHARED_PASSES))
    return [Batch(tuple(s for p in part for s in p), Layout.SHARED, budget) for part in parts]


def _packed(groups: Sequence[Sequence[Sample]], budget: int) -> list[Batch]:
    found: list[Batch] = []
    held: list[Sample] = []
    size = 0
    for group in groups:
        fresh = True  # its prompt is not in this batch yet
        for s in group:
            more = len(s.completion) + (len(s.prompt) if fresh else 0)
            if held and size + more > budget:
                found.append(Batch(tuple(held), Layout.PACKED))
                held, size, more = [], 0, len(s)
            held.append(s)
            size, fresh = size + more, False
    return [*found, Batch(tuple(held), Layout.PACKED)] if held else found


def hidden_states(body: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the completion tokens of a batch, sample after sample: the hidden states that predict them, and their ids."""
    targets = torch.tensor([t for s in batch.samples for t in s.completion], device=device)
    if batch.layout is Layout.PACKED:
        groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for s in batch.samples:  # those of one prompt stand together already
            groups.setdefault(s.prompt, []).append(s.completion)
        return packed.hidden_states(body, packed.layout(list(groups), list(groups.values())), device), targets
    return (_shared if batch.layout is Layout.SHARED else _padded)(body, batch, device), targets


def _padded(body: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    rows = [s.prompt + s.completion for s in batch.samples]
    hidden = body(input_ids=_pad(rows, device), use_cache=False).last_hidden_state
    return torch.cat([hidden[i, len(s.prompt) - 1 : len(s) - 1] for i, s in enumerate(batch.samples)])


def _shared(body: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    prompt, found = batch.samples[0].prompt, []
    first = body(input_ids=_pad([prompt], device), use_cache=True)
    last = first.last_hidden_state[0, -1:]
    for samples in batch.passes:
        cache = copy.deepcopy(first.past_key_values)  # a pass writes into it
        cache.batch_repeat_interleave(len(samples))
        ids = _pad([s.completion for s in samples], device)
        positions = torch.arange(len(prompt), len(prompt) + ids.shape[1], device=device).expand(len(ids), -1)
        hidden = body(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True).last_hidden_state
        found += [t for i, s in enumerate(samples) for t in (last, hidden[i, : len(s.completion) - 1])]
    return torch.cat(found)


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Right padded with token 0, which no real position sees."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device)


def split(values: torch.Tensor, batch: Batch) -> Iterator[tuple[Sample, torch.Tensor]]:
    """Values of all completion tokens of a batch, sample by sample."""
    lengths = [len(s.completion) for s in batch.samples]
    return zip(batch.samples, values.split(lengths), strict=True)
