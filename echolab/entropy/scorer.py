"""A causal language model as a scorer: the entropy and log-probability of every completion token of stored rollouts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from pydantic import field_validator

from echolab import ids
from echolab.config import Config
from echolab.entropy import packed, passes
from echolab.entropy.batching import Sample
from echolab.entropy.head import Head
from echolab.entropy.render import COLUMNS, Renderer, Unfit
from echolab.errors import EcholabError
from echolab.hub import located
from echolab.jobs import Done
from echolab.schema import SCORES
from echolab.segment import Segmenter, segmentations
from echolab.vocab import Vocab, load_tokenizer

__all__ = ["COLUMNS", "Scorer", "ScorerConfig"]

VERSION = 1  # of the numbers: rendering and arithmetic


class ScorerConfig(Config):
    """What a score depends on, and how the work is done."""

    model: str
    tokenizer: str | None = None  # another than the model's own
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    temperature: float = 1.0
    template: Literal["auto", "raw", "chat"] = "auto"  # auto: as each rollout's prompt_format says
    segmenters: tuple[Segmenter, ...] = (Segmenter(),)
    too_long: Literal["skip", "truncate"] = "skip"
    max_tokens: int | None = None  # None: the model's context
    batch_tokens: int | None = None
    share_prompts: bool = True
    compiled: bool = False
    device: str | None = None
    threads: int | None = None

    @field_validator("model", "tokenizer")
    @classmethod
    def _found_from_anywhere(cls, name: str | None) -> str | None:
        """A folder by its whole path: a job may go on from another one."""
        local = Path(name or "").expanduser()
        return str(local.resolve()) if name and local.exists() else name

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float) -> float:
        if not (math.isfinite(value) and value > 0):
            raise ValueError("must be a number above 0")
        return value

    @field_validator("max_tokens", "batch_tokens", "threads")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("must be at least 1")
        return value


@dataclass
class Scorer:
    """A loaded model. Call it with the rollouts of one work item."""

    config: ScorerConfig
    model: Any
    tokenizer: Any
    vocab: Vocab
    device: torch.device

    @classmethod
    def load(cls, config: ScorerConfig) -> Scorer:
        device = _device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        where, options = located(config.model, "config.json")
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        model = _load_model(config, device, where, options)
        _check_weights(model, config.model)
        scorer = cls(config, model, tokenizer, Vocab.of(tokenizer), device)
        _check_tokenizer(scorer)
        return scorer

    @cached_property
    def body(self) -> Any:
        return self.model.base_model

    @cached_property
    def head(self) -> Head:
        head = Head.of(self.model)
        head.check(self.model)
        return head

    @cached_property
    def packs(self) -> bool:
        """Does it take sequences packed end to end?"""
        if not packed.usable(self.model, self.device):
            return False
        _ = self.head  # it is checked by the model's own attention
        packed.install(self.model)
        return True

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end a completion: they count in no mean."""
        named = [self.tokenizer.eos_token_id, self.model.config.eos_token_id]
        if self.model.generation_config is not None:
            named.append(self.model.generation_config.eos_token_id)
        return tuple(sorted({i for n in named if n is not None for i in ([n] if isinstance(n, int) else n)}))

    def text(self, completion: Sequence[int]) -> str:
        """A sampled completion, without the token that ended it."""
        body = completion[:-1] if completion and completion[-1] in self.eos else completion
        return self.tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the numbers depend on: what the registry keeps, and the id is made of."""
        return {
            "kind": "model",
            "weights": _fingerprint(self.model),
            "configuration": _configuration(self.model),
            "tokenizer": self.vocab.tokenizer,
            "chat_template": None if self.config.template == "raw" else _digest(str(self.tokenizer.chat_template)),
            "temperature": self.config.temperature,
            "dtype": str(self.head.weight.dtype).removeprefix("torch."),
            "rendering": self.config.template,
            "max_tokens": self.limit if self.config.too_long == "truncate" else None,
            "eos": list(self.eos),
            "version": VERSION,
        }

    @cached_property
    def id(self) -> str:
        return ids.config_id("scorer", list(self.settings.values()))

    @property
    def name(self) -> str:
        return Path(self.config.model).name or self.config.model

    @cached_property
    def limit(self) -> int:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        return min(self.config.max_tokens or context, context)

    @cached_property
    def renderer(self) -> Renderer:
        sizes = self.head.weight.shape[0], self.limit
        return Renderer(self.tokenizer, self.vocab, self.config.template, *sizes, self.config.too_long == "truncate")

    def release(self) -> None:
        """Let the model go, for work that others do; what the scorer is called stays known."""
        _ = self.settings, self.name
        del self.model, self.head
        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, rows: pa.Table) -> Done:
        """Rows of `scores` and `segmentations` for the rollouts of an item."""
        samples: dict[int, Sample] = {}
        skipped: list[tuple[str, str]] = []
        rollouts = rows.to_pylist()
        for place, row in enumerate(rollouts):
            try:
                prompt, completion = self.renderer(row)
                samples[place] = Sample(place, tuple(prompt), tuple(completion))
            except Unfit as e:
                skipped.append((row["rollout_id"], str(e)))
        numbers = self.numbers(list(samples.values()))
        kept = []
        for place, sample in samples.items():
            entropies, logprobs = numbers[place]
            if not bool(torch.isfinite(entropies).all()):
                skipped.append((rollouts[place]["rollout_id"], "the model's output is not finite"))
                continue
            kept.append(self._row(rollouts[place], sample, entropies, logprobs))
        scores, cuts = self._tables(kept)
        return Done({"scores": scores, "segmentations": cuts}, skipped, sum(len(s.completion) for s in samples.values()))

    def numbers(self, samples: Sequence[Sample]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Of each sample, by its place: entropy and log-probability of its completion's tokens."""
        how = {"temperature": self.config.temperature, "share": self.config.share_prompts, "compiled": self.config.compiled}
        return passes.numbers(self.body, self.head, samples, self.config.batch_tokens, pack=self.packs, **how)

    def _row(self, rollout: dict[str, Any], sample: Sample, entropies: torch.Tensor, logprobs: torch.Tensor) -> dict[str, Any]:
        mask = rollout["loss_mask"]
        if mask is not None:  # it speaks of the rollout's own tokens
            mask = mask[: len(sample.completion)] if self.renderer.uses_ids(rollout) else None
        return {
            "rollout_id": rollout["rollout_id"],
            "scorer": self.id,
            "run": rollout["run"],
            "step": rollout["step"],
            "token_ids": sample.completion,
            "loss_mask": mask,
            "entropies": entropies.numpy(),
            "logprobs": logprobs.numpy(),
            "mean_entropy": None,
            "n_tokens": 0,
        }

    def _tables(self, rows: list[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
        scores = pa.Table.from_pylist(rows, schema=SCORES.arrow)
        scores = with_means(scores, self.vocab, self.eos)
        cuts = [segmentations(scores, self.vocab, s, self.eos) for s in self.config.segmenters]
        return scores, pa.concat_tables(cuts)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise EcholabError(f"--device {name} cannot be used: {str(e).splitlines()[0][:200]}") from None
    return device


def _load_model(config: ScorerConfig, device: torch.device, where: str, options: dict[str, Any]) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # ours is the one
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    except Exception as e:  # of many kinds: no such model, no network, a damaged file, an unknown architecture
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
        raise EcholabError(f"model {config.model} cannot be loaded: {reason}") from None
    model = model.eval().requires_grad_(False)
    return model.to(device=device)  # pyright: ignore[reportCallIssue]


def _check_weights(model: Any, name: str) -> None:
    for parameter, values in model.named_parameters():
        if not bool(torch.isfinite(values).all()):
            raise EcholabError(f"model {name} holds NaN or infinite weights, in {parameter}: nothing can be scored with it")


def _check_tokenizer(scorer: Scorer) -> None:
    """Added tokens may lie beyond the model's vocabulary (images of a model that sees none): only who uses them is unfit."""
    tokens, known = scorer.tokenizer.vocab_size, len(scorer.head.weight)
    if tokens > known:
        config = scorer.config
        said = f"tokenizer {config.tokenizer or config.model} does not fit model {config.model}"
        raise EcholabError(f"{said}: it has {tokens:,} tokens, the model knows {known:,}; give the model's own")


def _fingerprint(model: Any) -> str:
    """Of the weights: names, shapes, and 4,096 values of each tensor, spread evenly. Training changes nearly all values."""
    digest = blake2b(digest_size=16)
    for name, values in sorted(model.state_dict().items()):
        flat = values.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 4096)].float().cpu().numpy()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(some.astype("<f4").tobytes())
    return digest.hexdigest()


def _configuration(model: Any) -> str:
    """Of all that the architecture is told: rotary scaling, windows, caps. Names, versions and precision do not count."""
    config = model.config.to_dict()
    apart = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation")
    return _digest(json.dumps({k: v for k, v in config.items() if k not in apart}, sort_keys=True, default=str))


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def with_means(scores: pa.Table, vocab: Vocab, eos: Sequence[int]) -> pa.Table:
    """Fill in `n_tokens` and `mean_entropy`: of one segment that holds all tokens but a final EOS."""
    whole = segmentations(scores, vocab, Segmenter(mode=f"fixed:{1 << 30}"), eos)
    ends, means = whole["segment_ends"].to_pylist(), whole["segment_entropies"].to_pylist()
    columns = {"n_tokens": [e[-1] if e else 0 for e in ends], "mean_entropy": [m[0] if m else None for m in means]}
    for name, values in columns.items():
        at = scores.column_names.index(name)
        scores = scores.set_column(at, scores.schema.field(name), pa.array(values, scores.schema.field(name).type))
    return scores
