"""The policy: a causal language model that learns, and the log-probabilities that it gives to rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from echolab.entropy.head import token_logprobs
from echolab.entropy.scorer import Scorer, ScorerConfig
from trainer.config import ModelConfig
from trainer.maze import WEIGHTS

MICRO_TOKENS = {"cpu": 2048, "cuda": 16_384}


def load(config: ModelConfig, temperature: float, path: str | None = None) -> Scorer:
    """The model with its tokenizer and head, ready to learn. Dropout stays off: it would make every ratio differ from 1."""
    path = path or config.path
    policy = Scorer.load(
        ScorerConfig.make(
            model=str(WEIGHTS) if path == "maze" else path,
            tokenizer=config.tokenizer,
            dtype=config.dtype,
            temperature=temperature,
            template="raw",
            device=config.device,
            threads=config.threads,
        )
    )
    _ = policy.head  # checked while nothing needs a gradient
    policy.model.requires_grad_(True)
    return policy


@dataclass(frozen=True, eq=False)
class Rows:
    """Prompts and completions of a step as one tensor, padded to the right; nothing sees the padding."""

    tokens: Tensor  # [N, P + T]
    prompts: Tensor  # [N] tokens of the prompt
    lengths: Tensor  # [N] tokens of the completion

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Rows:
        prompts = torch.tensor([len(p) for p, _ in pairs])
        lengths = torch.tensor([len(c) for _, c in pairs])
        tokens = torch.zeros(len(pairs), int((prompts + lengths).max()), dtype=torch.long)
        for row, (prompt, completion) in enumerate(pairs):
            tokens[row, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        return cls(tokens, prompts, lengths)

    def up_to(self, lengths: Tensor) -> Rows:
        """Only the first tokens of each completion."""
        return replace(self, lengths=torch.minimum(self.lengths, lengths))

    @property
    def width(self) -> int:
        """T: the tokens of the longest completion."""
        return int(self.lengths.max())

    @property
    def mask(self) -> Tensor:
        """[N, T]: which tokens of the completions there are."""
        return torch.arange(self.width) < self.lengths[:, None]


def micro_batches(rows: Rows, chosen: Tensor, tokens: int) -> Iterator[Tensor]:
    """The chosen rows in batches of like length, each of at most so many tokens with its padding, or one row."""
    sizes = (rows.prompts + rows.lengths)[chosen]
    held: list[int] = []
    for place in sizes.argsort(descending=True, stable=True).tolist():
        longest = int(sizes[held[0]]) if held else 0
        if held and (len(held) + 1) * longest > tokens:
            yield chosen[held]
            held = []
        held.append(place)
    if held:
        yield chosen[held]


def logprobs(policy: Scorer, rows: Rows, chosen: Tensor, *, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of the completions of some rows, [n, T] with T that of their longest; 0 behind their ends."""
    prompts, lengths = rows.prompts[chosen], rows.lengths[chosen]
    width, device = int(lengths.max()), policy.device
    ids = rows.tokens[chosen, : int((prompts + lengths).max())].to(device)
    hidden = policy.body(input_ids=ids, use_cache=False).last_hidden_state
    row, token = (torch.arange(width) < lengths[:, None]).nonzero(as_tuple=True)
    row, token, place = row.to(device), token.to(device), (prompts[row] + token).to(device)
    logp, entropy = token_logprobs(
        hidden[row, place - 1], policy.head, ids[row, place], policy.config.temperature, entropy_grad=entropy_grad
    )
    shape = len(chosen), width
    return (x.new_zeros(shape).index_put((row, token), x) for x in (logp, entropy))  # type: ignore[return-value]


@torch.no_grad()
def all_logprobs(policy: Scorer, rows: Rows, chosen: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The same of all chosen rows, without a gradient, as [N, T] on the CPU; 0 in rows that were not chosen."""
    found = torch.zeros(2, len(rows.lengths), rows.width)
    for part in micro_batches(rows, chosen, tokens):
        for kind, x in zip(found, logprobs(policy, rows, part), strict=True):
            kind[part, : x.shape[1]] = x.float().cpu()
    return found[0], found[1]
