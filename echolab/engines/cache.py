"""The keys and values of rows that are decoded together, in buffers that are made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RowCache(Cache):
    """A slot holds one token of every row. Prompts end together, in the last of the first `width` slots; a shorter one
    leaves its first slots empty, and `seen` hides them. One slot more is filled at each step.

    `fixed` is for CUDA graphs: attention then looks at all slots through the mask, and the place to write to is a tensor."""

    def __init__(self, layers: int, lengths: Sequence[int], capacity: int, device: torch.device, fixed: bool = False):
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
        self.rows, self.capacity, self.fixed = len(lengths), capacity, fixed
        self.filled = self.width = max(lengths)
        empty = torch.tensor([self.width - n for n in lengths], device=device)
        slots = torch.arange(capacity, device=device)
        self.slot = torch.tensor([self.width], device=device)
        self.seen = (slots >= empty[:, None]) & ((slots < self.width) if fixed else True)
        self.ragged = fixed or min(lengths) < self.width

    def fill(self, first: int, repeat: int, prompts: Cache) -> None:
        """Keys and values of some prompts, each for its next `repeat` rows, from row `first` on."""
        for mine, theirs in zip(self.layers, prompts.layers, strict=True):
            mine.fill(first, repeat, theirs.keys, theirs.values)  # type: ignore[union-attr]

    def mask(self) -> Tensor | None:
        """For the next token of each row: which slots it sees; None for all. [rows, slots]"""
        if not self.ragged:
            return None
        return self.seen if self.fixed else self.seen[:, : self.filled + 1]

    def open(self) -> None:
        """The next token's slot can be seen."""
        if self.fixed:
            self.seen.index_fill_(1, self.slot, True)

    def keep(self, order: Tensor, target: Tensor, source: Tensor) -> None:
        """Only `order` of the rows go on, of which `source` move to the places `target`; nothing else is copied."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):  # type: ignore[union-attr]
                used = buffer[:, :, : self.filled]  # type: ignore[index]
                used.index_copy_(0, target, used.index_select(0, source))
        self.seen = self.seen[order]
        self.rows = len(order)


class _Layer(CacheLayerMixin):
    def __init__(self, owner: RowCache):
        super().__init__()
        self.owner = owner

    def fill(self, first: int, repeat: int, keys: Tensor, values: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        n, _, slots, _ = keys.shape
        before = self.owner.width - slots
        for buffer, new in ((self.keys, keys), (self.values, values)):
            rows: Any = buffer[first : first + n * repeat]  # type: ignore[index]
            rows[:, :, :before] = 0  # what is masked must be a number, and new memory may hold none
            rows.unflatten(0, (n, repeat))[..., before : self.owner.width, :] = new[:, None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, capacity = self.owner.rows, self.owner.capacity
        for name, like in (("keys", key_states), ("values", value_states)):
            make = like.new_zeros if self.owner.fixed else like.new_empty  # a graph's mask also hides what is not written yet
            setattr(self, name, make(rows, like.shape[1], capacity, like.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next token of every row; what attention sees then."""
        owner = self.owner
        keys, values = self.keys[: owner.rows], self.values[: owner.rows]  # type: ignore[index]
        if owner.fixed:
            return keys.index_copy_(2, owner.slot, key_states), values.index_copy_(2, owner.slot, value_states)
        at = owner.filled + 1
        keys[:, :, at - 1 : at] = key_states
        values[:, :, at - 1 : at] = value_states
        return keys[:, :, :at], values[:, :, :at]

    def get_seq_length(self) -> int:
        return self.owner.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.filled + query_length, 0

    def get_max_length(self) -> int:
        return self.owner.capacity
