"""Scoring on a GPU against the hardware's limits and its peers. Nothing is downloaded, weights are random.

    python benchmarks/scoring_gpu.py head
    python benchmarks/scoring_gpu.py models

Each part writes benchmarks/results/scoring_gpu_<part>.md as it came out. It needs torch, transformers, triton and psutil; where
echolab is not installed, PYTHONPATH=. finds it. Peers that are not installed are said to be missing. `--trial` runs the same
code with tiny shapes, also on a CPU, and writes nothing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import RESULTS, machine, table

from echolab.entropy import head as head_module
from echolab.entropy import packed, passes
from echolab.entropy.batching import Sample, batches
from echolab.entropy.head import Head, token_stats

LIMIT = 790e12  # floating point operations a second of large bfloat16 matmuls on an H200
HEAD_GOALS = {896: 1.30, 1536: 1.30, 3584: 1.15}  # of the floor, by hidden size


class Size(NamedTuple):
    """The sizes of a model, as Qwen2.5 has them, and the share of the limit that is the goal."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    goal: float


MODELS = {
    "0.5B": Size(896, 4864, 24, 14, 2, True, 0.50),
    "1.5B": Size(1536, 8960, 28, 12, 2, True, 0.65),
    "7B": Size(3584, 18944, 28, 28, 4, False, 0.75),
}


def main() -> None:
    parts = {"head": head, "models": models}
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=parts)
    options.add_argument("--repeat", type=int, default=None, help="turns: 20 of the head, 3 of the models")
    options.add_argument("--tokens", type=int, default=8192, help="rows of the head part")
    options.add_argument("--vocabulary", type=int, default=151_936)
    options.add_argument("--rollouts", type=int, default=512, help="rollouts of the models part, in groups of 8")
    options.add_argument("--only", choices=MODELS, default=None)
    options.add_argument("--trial", action="store_true", help="tiny shapes, on any device; nothing is written")
    options.add_argument("--out", type=Path, default=None)
    o = options.parse_args()
    o.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if o.trial:
        o.tokens, o.vocabulary, o.rollouts, o.repeat = 64, 1000, 16, o.repeat or 2
    elif o.device.type != "cuda":
        raise SystemExit("this benchmark needs a CUDA device; --trial runs it with tiny shapes on a CPU")
    device = torch.cuda.get_device_name() if o.device.type == "cuda" else "no GPU: a trial"
    where = f"{device}, {machine(('torch', 'triton', 'transformers', 'trl', 'verl'))}"
    text = (
        f"# Scoring on a GPU: {o.part}\n\n{where}. Made by `python benchmarks/scoring_gpu.py {o.part}`.\n\n{parts[o.part](o)}"
    )
    print(text)
    if not o.trial:
        out = o.out or RESULTS / f"scoring_gpu_{o.part}.md"
        out.parent.mkdir(exist_ok=True)
        out.write_text(text)


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """By CUDA's own clock, where there is one."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_of(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What it gives, and the MB that it needed meanwhile."""
    if device.type != "cuda":
        return work(), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = work()
    torch.cuda.synchronize()
    return found, (torch.cuda.max_memory_allocated() - before) / 1e6


# The head.


def head(o: argparse.Namespace) -> str:
    how = "one pass of a Triton kernel over the logits of 4,096 rows"
    if o.device.type == "cuda" and head_module._kernels() is None:
        how = "WITHOUT Triton, which is not installed: tiles, as on a CPU"
    about = (
        f"{o.tokens:,} tokens x {o.vocabulary:,}, bfloat16, random weights, logits of standard deviation 4.8. Ours: {how}."
        f" Floor: the bare matmul in chunks of 4,096 rows. Median of {o.repeat or 20} turns, in which all take part. Peak:"
        " memory beyond weights and hidden states. Errors against float64 over 64 tokens, mean, in nats. Goals for ours:"
        f" {', '.join(f'{goal:.2f} of the floor at {hidden}' for hidden, goal in HEAD_GOALS.items())}; 1.6 times faster than"
        " the TRL pair, 1.5 than verl's kernel.\n\n"
    )
    rows = [row for hidden in HEAD_GOALS for row in _head_rows(hidden, o)]
    titles = ["hidden", "", "ms", "of the floor", "of ours", "peak MB", "entropy error", "logprob error"]
    return about + table(titles, rows)


@torch.no_grad()
def _head_rows(hidden: int, o: argparse.Namespace) -> list[list[Any]]:
    g = torch.Generator(device=o.device).manual_seed(0)
    weight = torch.randn(o.vocabulary, hidden, generator=g, device=o.device).mul_(4.8 / hidden**0.5).bfloat16()
    states = torch.randn(o.tokens, hidden, generator=g, device=o.device).bfloat16()
    targets = torch.randint(0, o.vocabulary, (o.tokens,), generator=g, device=o.device)
    expected = _exact(states[:64], weight, targets[:64])
    cases, rows = _head_cases(states, weight, targets), {}
    for name, case in list(cases.items()):
        try:
            found, peak = peak_of(case, o.device)
        except Exception as e:  # also a peer that does not run here: the others are measured
            rows[name] = [name, f"{type(e).__name__}: {str(e).splitlines()[0][:80]}" if str(e) else type(e).__name__]
            del cases[name]
            continue
        errors = ["", ""] if found is None else [_error(a, b) for a, b in zip(found, expected, strict=True)]
        rows[name] = [name, peak, *errors]
    for case in cases.values():  # memory is held from here on, and what compiles is compiled
        case()
    turns = [{name: milliseconds(case, o.device) for name, case in cases.items()} for _ in range(o.repeat or 20)]
    ms = {name: statistics.median(turn[name] for turn in turns) for name in cases}
    done = [[hidden, n, ms[n], ms[n] / ms["floor"], ms[n] / ms["ours"], *rows[n][1:]] for n in cases]
    missing = [[hidden, name, *row[1:], *[""] * 5] for name, row in rows.items() if name not in cases]
    return done + missing + [[hidden, name, "not installed", *[""] * 5] for name in PEERS if name not in rows]


def _exact(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.cat([(h.double() @ weight.double().T).log_softmax(-1) for h in states.split(8)])
    return -(logp.exp() * logp).sum(-1), logp.gather(1, targets[:, None])[:, 0]


def _error(found: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{float((found[:64].double() - expected).abs().mean()):.1e}"


PEERS = ("TRL pair", "verl, Triton")


def _head_cases(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Each gives entropies and log-probabilities; the floor gives nothing."""

    def floor() -> None:
        for rows in states.split(4096):
            torch.mm(rows, weight.T)

    def naive() -> tuple[torch.Tensor, torch.Tensor]:
        logp = (states @ weight.T).float().log_softmax(-1)
        return -(logp.exp() * logp).sum(-1), logp.gather(1, targets[:, None])[:, 0]

    cases: dict[str, Callable[[], Any]] = {
        "floor": floor,
        "ours": lambda: token_stats(states, Head(weight), targets)[:2],
        "ours, with margin and rank": lambda: token_stats(states, Head(weight), targets, extras=True)[:2],
        "naive": naive,
    }
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax  # pyright: ignore[reportMissingImports]

        def pair() -> tuple[torch.Tensor, torch.Tensor]:
            logits = states @ weight.T
            return entropy_from_logits(logits[None])[0], selective_log_softmax(logits[None], targets[None])[0]

        cases["TRL pair"] = pair
    except ImportError:
        pass
    try:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        cases["verl, Triton"] = lambda: linear_cross_entropy(states, weight, targets, 1.0, "none")[:2][::-1]
    except ImportError:
        pass
    return cases


# Whole models.


def models(o: argparse.Namespace) -> str:
    about = (
        f"{o.rollouts:,} rollouts in groups of 8, prompts of about 200 tokens, completions lognormal with median 800 (at most"
        " 4,096), bfloat16, random weights. Real tokens a second, prompts counted once for each rollout. Limit: the operations"
        " of body, attention and head, the last for completions only, at 790 TFLOP/s; in the column `prompts once` a prompt"
        f" counts once for its group, as it is computed. Median of {o.repeat or 3} turns.\n\n"
    )
    sizes = {"trial": Size(64, 96, 2, 4, 2, True, 0.5)} if o.trial else MODELS
    rows = []
    for name, size in sizes.items():
        if o.only in (None, name) or o.trial:
            rows += _model_rows(name, size, o)
            if o.device.type == "cuda":
                torch.cuda.empty_cache()
    titles = ["model", "batches", "tokens/s", "of the limit", "goal", "prompts once", "computed / real", "peak MB"]
    return about + table(titles, rows)


def _model_rows(name: str, size: Size, o: argparse.Namespace) -> list[list[Any]]:
    model, samples = _model(size, o), _rollouts(o.rollouts, o.vocabulary, 64 if o.trial else 4096)
    body, head = model.base_model, Head.of(model)
    head.check(model)
    real = sum(map(len, samples))
    limits = [_operations(size, samples, o.vocabulary, once) / LIMIT * 1000 for once in (False, True)]
    rows = []
    for pack in (False, True):
        layout = "packed" if pack else "padded"
        if pack and not packed.usable(model, o.device):
            rows.append([name, layout, "no kernel", *[""] * 5])
            continue
        if pack:
            packed.install(model)
        work = lambda pack=pack: passes.numbers(body, head, samples, pack=pack)  # noqa: E731
        _, peak = peak_of(work, o.device)
        ms = statistics.median(milliseconds(work, o.device) for _ in range(o.repeat or 3))
        computed = sum(b.computed for b in batches(samples, passes.BATCH_TOKENS[o.device.type], pack=pack)) / real
        rows.append([name, layout, real / ms * 1000, limits[0] / ms, size.goal, limits[1] / ms, computed, peak])
    return rows


def _operations(size: Size, samples: list[Sample], vocabulary: int, once: bool) -> float:
    """Multiplications and additions that cannot be done without, causal attention counted by half."""
    grouped = size.hidden // size.heads * size.kv_heads
    body = 2 * size.layers * (2 * size.hidden * (size.hidden + grouped) + 3 * size.hidden * size.inner)
    seen, total = set(), 0.0
    for s in samples:
        shared = len(s.prompt) if once and s.prompt in seen else 0
        seen.add(s.prompt)
        total += body * (len(s) - shared) + 2 * size.layers * size.hidden * (len(s) ** 2 - shared**2)
        total += 2 * size.hidden * vocabulary * len(s.completion)
    return total


def _model(size: Size, o: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=o.vocabulary, hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, tie_word_embeddings=size.tied,
        max_position_embeddings=32_768,
    )  # fmt: skip
    torch.manual_seed(0)
    with o.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(o.device).eval().requires_grad_(False)


def _rollouts(n: int, vocabulary: int, longest: int) -> list[Sample]:
    rng = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocabulary), k=length))

    prompts = [tokens(min(longest, rng.randrange(100, 300))) for _ in range((n + 7) // 8)]
    return [Sample(i, prompts[i // 8], tokens(int(min(longest, max(16, rng.lognormvariate(6.68, 0.6)))))) for i in range(n)]


if __name__ == "__main__":
    main()
