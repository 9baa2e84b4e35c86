"""What trainer.py and trainer_gpu.py share: policies with random weights, a task for them, and what echo costs a run on it.

A completion is a row of numbers; its reward depends on the last one, so that half of what is sampled succeeds. Problems that
are marked `easy` are always solved: their groups have no advantage, as those of a saturated run."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from measure import paragraph, table

from trainer import loop, update
from trainer.config import TrainConfig
from trainer.policy import Rows, micro_batches
from trainer.run import Run

NEWLINE_EVERY = 12  # numbers, so that completions have segments
SMALL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Case:
    """A policy of these sizes on `prompts` x `n` completions of at most `tokens`; `ends` of the vocabulary's tokens end one."""

    name: str
    prompts: int
    n: int
    prompt: int
    tokens: int
    vocabulary: int = 1024
    ends: int = 1
    easy: float = 0.0  # of the problems
    sizes: dict[str, Any] = field(default_factory=lambda: dict(SMALL))
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def rows(self) -> int:
        return self.prompts * self.n

    def make(self, folder: Path) -> TrainConfig:
        """The policy and its problems in a folder, and the configuration of a run that learns next to nothing from them."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "problems.jsonl").exists():
            _policy(self, folder / "policy")
            (folder / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in _problems(self)))
        return TrainConfig.model_validate(
            {
                "out": str(folder / "run"),
                "run": "r",
                "store": str(folder / "store"),
                "steps": 1000,
                "model": {"path": str(folder / "policy"), "dtype": self.dtype, "device": self.device, "threads": 1},
                "task": {
                    "prompts": str(folder / "problems.jsonl"),
                    "verifier": "python:trainer_runs:verify",
                    "require_end": False,
                },
                "sampling": {"prompts": self.prompts, "n": self.n, "max_tokens": self.tokens},
                "optimizer": {"lr": 1e-12},
                "checkpoint": {"every": 1000},
            }
        )


def verify(completion: str, ground_truth: str) -> bool:
    numbers = completion.split()
    return ground_truth == "easy" or (bool(numbers) and int(numbers[-1]) % 2 == 0)


def tokenizer(vocabulary: int) -> Any:
    """A token for each number, with the blank behind it; one in twelve has a newline there."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"{i}\n" if i % NEWLINE_EVERY == 0 else f"{i} " for i in range(vocabulary - 1)]
    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words, "<pad>"])}, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+[ \n]"), "isolated")
    bare.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=words[1], pad_token="<pad>")


def _policy(case: Case, folder: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    ends = [i for i in range(case.vocabulary) if i % NEWLINE_EVERY][: case.ends]
    config = Qwen2Config(
        vocab_size=case.vocabulary, tie_word_embeddings=True, eos_token_id=ends, bos_token_id=None,
        pad_token_id=case.vocabulary - 1, max_position_embeddings=32_768, **case.sizes,
    )  # fmt: skip
    with torch.device(case.device):
        model = Qwen2ForCausalLM(config).to(getattr(torch, case.dtype))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer(case.vocabulary).save_pretrained(folder)


def _problems(case: Case) -> Iterator[dict[str, str]]:
    rng, words = random.Random(0), tokenizer(case.vocabulary)
    for i in range(4 * case.prompts):
        prompt = words.decode(rng.choices(range(case.vocabulary - 1), k=case.prompt))
        yield {"prompt": prompt, "ground_truth": "easy" if i < 4 * case.prompts * case.easy else "hard"}


def cpu_seconds() -> float:
    """Of this process and its children."""
    times = [c.cpu_times() for c in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(t.user + t.system for t in times)


# What echo costs.


@dataclass
class Cost:
    """Of one kind of run, the median over its steps. Seconds are those of processors, on CUDA those of a clock."""

    seconds: float
    wall: float
    gigabytes: float  # on CUDA: that of one run
    choose: float  # seconds in which clips were chosen
    learn: float
    tokens: float  # that went through the model as it learnt
    values: dict[str, Any]  # the newest metrics


def echo(case: Case, folder: Path, steps: int, coefficient: float = 0.01) -> dict[str, Cost]:
    """GRPO, GRPO with online echo, and GRPO that skips no row, taking turns on the same rollouts, step by step."""
    kinds = {"grpo": 0.0, "grpo + echo": coefficient, "grpo that skips no row": 0.0}
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    last: dict[str, dict[str, Any]] = {}
    seconds = _synchronized if case.device == "cuda" else cpu_seconds
    with ExitStack() as held:
        runs = {kind: held.enter_context(_run(case, folder, i, c)) for i, (kind, c) in enumerate(kinds.items())}
        for number in range(1, steps + 2):
            for kind, run in runs.items():
                memory = _Memory(len(runs)) if case.device == "cuda" else None
                with _watched(seconds, skips=kind != "grpo that skips no row") as seen:
                    clocks = seconds(), time.perf_counter()
                    last[kind] = loop.one_step(run, number)
                    used = [seconds() - clocks[0], time.perf_counter() - clocks[1], memory.peak if memory else 0.0]
                run.recorder.flush()  # not in the next one's time
                if number > 1:  # the first one warms up
                    found[kind].append([*used, *seen.values()])
    return {kind: Cost(*map(statistics.median, zip(*found[kind], strict=True)), values=last[kind]) for kind in kinds}


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


class _Memory:
    """GB of one of several runs that lie on the device together, and that hold as much each."""

    def __init__(self, runs: int):
        torch.cuda.reset_peak_memory_stats()
        self.others = torch.cuda.memory_allocated() * (runs - 1) / runs

    @property
    def peak(self) -> float:
        return (torch.cuda.max_memory_allocated() - self.others) / 2**30


@contextmanager
def _run(case: Case, folder: Path, number: int, coefficient: float) -> Iterator[Run]:
    config = case.make(folder)
    own = {"out": f"{config.out}{number}", "store": f"{config.store}{number}"}
    document = {**config.model_dump(), **own, "echo": {"coefficient": coefficient}}
    with Run.open(TrainConfig.model_validate(document)) as run:
        yield run


@contextmanager
def _watched(seconds: Callable[[], float], skips: bool) -> Iterator[dict[str, float]]:
    """Seconds of choosing and of learning, and tokens that went through the model; without `skips` all rows of the step do,
    to their ends."""
    seen = {"choose": 0.0, "learn": 0.0, "tokens": 0.0}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def within(*given: Any) -> Any:
            began = seconds()
            made = work(*given)
            seen[name] += seconds() - began
            return made

        return within

    def counted(rows: Rows, chosen: torch.Tensor, tokens: int) -> Iterator[torch.Tensor]:
        seen["tokens"] += float((rows.prompts + rows.lengths)[chosen].sum())
        return micro_batches(rows, chosen, tokens)

    with ExitStack() as held:
        held.enter_context(patch.object(loop, "_clips", timed("choose", loop._clips)))
        held.enter_context(patch.object(loop, "learn", timed("learn", loop.learn)))
        held.enter_context(patch.object(update, "micro_batches", counted))
        if not skips:
            held.enter_context(patch.object(update, "reach", lambda batch, *_: batch.mask.sum(1)))
        yield seen


def echo_table(found: Mapping[str, Cost], seconds: str) -> str:
    """The figures of `echo`, and what they say; `seconds` says whose they are."""
    grpo, echoed, whole = found.values()
    clips = (echoed.tokens - grpo.tokens) / grpo.tokens
    allowed, cost = grpo.learn * clips + 0.03 * grpo.seconds, echoed.seconds - grpo.seconds
    rows = [[kind, c.seconds, c.wall, f"{c.choose:.3f}", c.learn, round(c.tokens)] for kind, c in found.items()]
    said = paragraph(f"""
        Clips add {clips:.1%} to the tokens of training. Echo costs {cost:.3f} {seconds} a step ({cost / grpo.seconds:.1%});
        allowed were {allowed:.3f}: the clips' share of learning, and 3 % of the step. GRPO that skips no row costs
        {whole.seconds - grpo.seconds:.3f} more than GRPO.""")
    return table(["", seconds, "wall s", f"choosing, {seconds}", f"learning, {seconds}", "tokens"], rows) + "\n" + said
