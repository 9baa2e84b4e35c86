"""The sampler in torch: its own decode loop over a model that stays the caller's, so that a trainer's newest weights count.

A prompt goes through the model once, whatever the number of its completions. Rows of like prompt length are decoded together,
up to `rows` of them and `cache_bytes` of keys and values; a row that has ended leaves. Any transformers model that remembers
keys and values is sampled from by its own forward; what is built as Llama is takes a shorter way (lean.py)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from echolab.engines import Samples, Sampling
from echolab.engines.cache import RowCache
from echolab.engines.draw import draw, row_keys, uniforms
from echolab.engines.lean import Lean, fits
from echolab.entropy import packed
from echolab.entropy.passes import out_of_memory
from echolab.errors import EcholabError

ROWS = 256
PREFILL_TOKENS = {"cpu": 4 * 1024, "cuda": 64 * 1024}
CPU_CACHE_BYTES = 2 << 30
# How often it is asked who has ended, and from which share of the rows on these leave: on CUDA asking waits for the device,
# and each number of rows needs a graph of its own.
LOOK_EVERY = {"cpu": 1, "cuda": 8}
LEAVE = {"cpu": 1 / 16, "cuda": 1 / 2}


@dataclass
class TorchEngine:
    """Samples from `model`; `eos` are the tokens that end a completion. See `echolab.engines.Engine`."""

    model: Any
    eos: Sequence[int] = ()
    rows: int = ROWS
    cache_bytes: int | None = None  # None: 2 GB on a CPU, half of what is free on CUDA
    progress: Callable[[int], None] | None = None  # is told how many tokens more there are
    fixed: bool | None = None  # shapes that stay, for CUDA graphs; None: on CUDA

    def __post_init__(self) -> None:
        layers = DynamicCache(config=self.model.config).layers
        if other := {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}:
            what = f"{type(self.model).__name__} remembers more than keys and values ({', '.join(sorted(other))})"
            raise EcholabError(f"{what}: the torch engine cannot sample from it")
        self.layers = len(layers)
        self.config = self.model.config.get_text_config()
        self.context: int = getattr(self.config, "max_position_embeddings", None) or 1 << 30
        self.known = inspect.signature(self.model.forward).parameters

    @property
    def device(self) -> torch.device:
        return self.model.device

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int, keys: Sequence[int | str] | None = None
    ) -> Samples:
        """`n` completions of each prompt, as the protocol has it."""
        self._check(prompts)
        keys = range(len(prompts)) if keys is None else keys
        made = Samples([list(p) for p in prompts for _ in range(n)], *([None] * n * len(prompts) for _ in range(4)))  # type: ignore
        with _as_for_sampling(self.model), torch.inference_mode():
            for groups in self._passes(prompts, n, sampling.max_tokens):
                try:
                    _Pass(self, groups, sampling, seed, keys, made, n).run()
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
                    if not out_of_memory(e):
                        raise
                    rows = sum(len(g.samples) for g in groups)
                    raise EcholabError(f"out of memory with {rows} rollouts at once: sample fewer rows at a time") from None
        return made

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for place, prompt in enumerate(prompts):
            if not prompt:
                raise EcholabError(f"prompt {place} is empty: there is nothing to go on from")
            if len(prompt) >= self.context:
                raise EcholabError(f"prompt {place} leaves no room in the model's context of {self.context} tokens")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise EcholabError(f"prompt {place} has token ids that the model does not know: it has {vocabulary}")

    def _passes(self, prompts: Sequence[Sequence[int]], n: int, tokens: int) -> Iterator[list[_Group]]:
        """Groups (or parts of them, where one is larger than a pass) of like prompt length that go together."""
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        of_token = 2 * self.layers * heads * size * self.model.dtype.itemsize
        held: list[_Group] = []
        for place in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            for first in range(0, n, self.rows):
                group = _Group(place, list(prompts[place]), range(first, min(first + self.rows, n)))
                rows = sum(len(g.samples) for g in held) + len(group.samples)
                longest = len(held[0].prompt if held else group.prompt) + tokens
                if held and (rows > self.rows or rows * longest * of_token > self._cache_bytes):
                    yield held
                    held = []
                held.append(group)
        if held:
            yield held

    @property
    def _cache_bytes(self) -> int:
        if self.cache_bytes is not None:
            return self.cache_bytes
        return torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else CPU_CACHE_BYTES

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Cache]:
        """Logits after each prompt, and keys and values; shorter ones are padded to the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        cache = DynamicCache()
        return self._forward(ids, positions, cache, None if bool(mask.all()) else mask), cache

    def step(self, tokens: Tensor, positions: Tensor, cache: RowCache) -> Tensor:
        """Logits after one more token of each row, by the model's own forward."""
        mask = cache.mask()
        return self._forward(tokens[:, None], positions, cache, None if mask is None else mask.long())

    def _forward(self, ids: Tensor, positions: Tensor, cache: Cache, mask: Tensor | None) -> Tensor:
        options = {"position_ids": positions, "attention_mask": mask, "logits_to_keep": 1}
        known = {name: value for name, value in options.items() if name in self.known}
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, **known).logits[:, -1]


@dataclass(frozen=True)
class _Group:
    """Completions of one prompt that are sampled in one pass."""

    place: int
    prompt: list[int]
    samples: range


class _Pass:
    """Rows that are decoded together, from their prompts to their ends. All that is known of them is in tensors, so that a
    CUDA graph can go on with it."""

    def __init__(
        self,
        engine: TorchEngine,
        groups: Sequence[_Group],
        sampling: Sampling,
        seed: int,
        keys: Sequence[int | str],
        made: Samples,
        n: int,
    ):
        self.engine, self.groups, self.sampling, self.made = engine, groups, sampling, made
        device = engine.device
        rows = [(g, sample) for g in groups for sample in g.samples]
        lengths = [len(g.prompt) for g, _ in rows]
        limits = [min(sampling.max_tokens, engine.context - length) for length in lengths]
        self.most = max(limits)
        capacity = max(lengths) + self.most
        fixed = device.type == "cuda" if engine.fixed is None else engine.fixed
        self.step = Lean(engine.model).step if (short := fits(engine.model, capacity)) else engine.step
        self.cache = RowCache(engine.layers, lengths, capacity, device, fixed and short)
        self.eos = torch.tensor(list(engine.eos), dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # of the next token in the completions
        # Of each row.
        self.row = torch.tensor([g.place * n + sample for g, sample in rows], device=device)  # in `made`
        self.limit = torch.tensor(limits, device=device)
        self.position = torch.tensor(lengths, device=device)[:, None] - 1
        self.token = torch.zeros_like(self.row)
        self.length = torch.zeros_like(self.row)
        self.ended = torch.zeros_like(self.row, dtype=torch.bool)
        self.alive = ~self.ended
        key = row_keys(seed, [keys[g.place] for g, _ in rows], [sample for _, sample in rows]).to(device)
        self.uniform = uniforms(key, self.most)
        self.ids = self.row.new_empty(self.most, len(rows), dtype=torch.int32)
        self.numbers = torch.empty(self.most, 2, len(rows), device=device)

    def run(self) -> None:
        self._take(self._prefill())
        advance = self._advance()
        kind = self.engine.device.type
        every, leave = LOOK_EVERY.get(kind, 8), LEAVE.get(kind, 1 / 2)
        for done in range(1, self.most):
            if done % every == 0:
                alive = int(self.alive.sum())
                if not alive:
                    break
                if self.engine.progress:
                    self.engine.progress(alive * every)
                if self.cache.rows - alive >= leave * self.cache.rows:
                    self._compact(done)
                    advance = self._advance()
            advance()
            self.cache.filled += 1
        self._hand_over(torch.arange(self.cache.rows), self.most)

    def _prefill(self) -> Tensor:
        """The prompts through the model, some at a time; the logits after them, for each row."""
        engine, found, row, held = self.engine, [], 0, []
        budget = PREFILL_TOKENS.get(engine.device.type, PREFILL_TOKENS["cuda"])
        for i, group in enumerate(self.groups):
            held.append(group)
            following = self.groups[i + 1] if i + 1 < len(self.groups) else None
            repeat = len(group.samples)
            same = following is not None and len(following.samples) == repeat
            if same and (len(held) + 1) * len(held[0].prompt) <= budget:
                continue
            logits, cache = engine.prefill([g.prompt for g in held])
            self.cache.fill(row, repeat, cache)
            found.append(logits.repeat_interleave(repeat, 0))
            row, held = row + len(held) * repeat, []
        return torch.cat(found)

    def _advance(self) -> Callable[[], None]:
        """What makes one more token of every row."""

        def step() -> Tensor:
            self.cache.open()
            return self.step(self.token, self.position, self.cache)

        def advance() -> None:
            logits = step()
            self.cache.slot += 1
            self._take(logits)

        return _as_graph(advance, step) if self.cache.fixed and self.engine.device.type == "cuda" else advance

    def _take(self, logits: Tensor) -> None:
        """The next token of every row. Rows that have ended go on with tokens that do not count."""
        token, logprob, entropy = draw(logits, self.uniform.index_select(0, self.place)[0], self.sampling)
        self.token.copy_(token)
        self.ids.index_copy_(0, self.place, token[None].int())
        self.numbers.index_copy_(0, self.place, torch.stack((logprob, entropy))[None])
        self.place += 1
        self.position += 1
        self.length += self.alive
        self.ended |= (token[:, None] == self.eos).any(-1) & self.alive
        self.alive.copy_(~self.ended & (self.length < self.limit))

    def _compact(self, done: int) -> None:
        """Rows that have ended leave: the last ones that go on take their places. `done`: tokens so far."""
        self._hand_over((~self.alive).nonzero()[:, 0], done)
        going = self.alive.nonzero()[:, 0]
        n = len(going)
        target, source = (~self.alive[:n]).nonzero()[:, 0], going[going >= n]
        order = torch.arange(n, device=going.device)
        order[target] = source
        self.cache.keep(order, target, source)
        for name in ("row", "limit", "position", "token", "length", "ended", "alive"):
            setattr(self, name, getattr(self, name)[order])
        for name, used in (("ids", slice(done)), ("numbers", slice(done)), ("uniform", slice(done, None))):
            buffer = getattr(self, name)
            buffer[used].index_copy_(-1, target, buffer[used].index_select(-1, source))
            setattr(self, name, buffer[..., :n])

    def _hand_over(self, rows: Tensor, done: int) -> None:
        """What these rows came to."""
        rows = rows.to(self.row.device)
        ids, numbers = self.ids[:done, rows].cpu().numpy(), self.numbers[:done, :, rows].cpu().numpy()
        for i, (at, n, ended) in enumerate(zip(*(x[rows].tolist() for x in (self.row, self.length, self.ended)), strict=True)):
            logprobs, entropies = numbers[:n, 0, i].copy(), numbers[:n, 1, i].copy()
            if not (np.isfinite(logprobs).all() and np.isfinite(entropies).all()):
                raise EcholabError("the model's output is not finite: nothing can be sampled from it")
            self.made.completion_ids[at] = ids[:n, i].tolist()
            self.made.logprobs[at], self.made.entropies[at] = logprobs, entropies
            self.made.finish_reason[at] = "stop" if ended else "length"


@contextmanager
def _as_for_sampling(model: Any) -> Iterator[None]:
    """Without dropout, and with attention that takes rows side by side."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention == packed.NAME:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.train(training)
        if attention == packed.NAME:
            model.set_attn_implementation(attention)


def _as_graph(advance: Callable[[], None], warm_up: Callable[[], Any]) -> Callable[[], None]:
    """`advance` recorded once as a CUDA graph, and replayed: then only what it does to tensors happens, and it may not ask
    the device for anything. `warm_up` is the part of it that may run more than once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    return graph.replay
