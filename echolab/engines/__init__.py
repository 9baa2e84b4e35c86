"""Who samples: engines behind one small protocol. The modules of this package need torch; this page does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import Field

from echolab.config import Config


class Sampling(Config):
    """How completions are drawn. `top_k` counts first, then `top_p` of what it leaves."""

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)  # 0: the likeliest token each time
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)  # 0: off
    max_tokens: int = Field(default=1024, ge=1)  # of a completion


@dataclass(frozen=True, eq=False)
class Samples:
    """Completions: `n` of the first prompt, `n` of the second, and so on; each list has one entry a completion.

    The numbers are those of the distribution that a token was drawn from, divided by the temperature but before top-k
    and top-p: over the full vocabulary, as scoring and training compute them. At temperature 0 they are those at 1."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]  # with the token that ended it
    logprobs: list[np.ndarray]  # float32, one a token
    entropies: list[np.ndarray]  # in nats, the same
    finish_reason: list[str]  # stop, or length

    def __len__(self) -> int:
        return len(self.completion_ids)


class Engine(Protocol):
    """A sampler with a model in it."""

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int, keys: Sequence[int | str] | None = None
    ) -> Samples:
        """`n` completions of each prompt. What is drawn depends on the seed, the prompt's key (its place, unless `keys` are
        given), the sample's number and the place in the completion: not on what else is asked for, nor on the batch."""
        ...
