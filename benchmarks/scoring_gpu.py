"""Scoring on a GPU against the hardware's limits and its peers. Needs CUDA; nothing is downloaded, weights are random.

    python benchmarks/scoring_gpu.py head
    python benchmarks/scoring_gpu.py models

Each part writes benchmarks/results/scoring_gpu_<part>.md as it came out.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine, table

from echolab.entropy.batching import Layout, Sample, batches
from echolab.entropy.head import Head, token_stats
from echolab.entropy.scorer import Scorer, ScorerConfig

VOCABULARY = 151_936
TOKENS = 8192

# Shapes of Qwen2.5, and tokens a second at the matmul limit of an H200 (790 TFLOP/s everywhere) with contexts of about 1,000.
MODELS = {
    "0.5B": ({"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
              "num_key_value_heads": 2, "tie_word_embeddings": True}, 766_000, 0.50),
    "1.5B": ({"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
              "num_key_value_heads": 2, "tie_word_embeddings": True}, 249_000, 0.65),
    "7B": ({"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "tie_word_embeddings": False}, 55_100, 0.75),
}  # fmt: skip
HEAD_GOALS = {896: 1.30, 1536: 1.30, 3584: 1.15}


def main() -> None:
    parts = {"head": head, "models": models}
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=parts)
    options.add_argument("--repeat", type=int, default=20)
    options.add_argument("--rollouts", type=int, default=512, help="rollouts of the models part, in groups of 8")
    options.add_argument("--only", choices=MODELS, default=None)
    options.add_argument("--out", type=Path, default=None)
    o = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    where = f"{torch.cuda.get_device_name()}, {machine(('torch', 'triton', 'transformers', 'trl'))}"
    text = (
        f"# Scoring on a GPU: {o.part}\n\n{where}. Made by `python benchmarks/scoring_gpu.py {o.part}`.\n\n{parts[o.part](o)}"
    )
    out = o.out or RESULTS / f"scoring_gpu_{o.part}.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(text)
    print(text)


def timed(work: Callable[[], Any], repeat: int) -> float:
    """Median milliseconds, by CUDA's own clock."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


# The head.


def head(o: argparse.Namespace) -> str:
    about = (
        f"{TOKENS:,} tokens x {VOCABULARY:,}, bfloat16, random weights, logits of standard deviation 4.8. Median of {o.repeat}."
        " Floor: the bare matmul in chunks of 4,096 rows. Peak: memory beyond weights and hidden states. Errors of entropy"
        f" against float64, mean over 64 tokens, in nats. Goals for ours: {HEAD_GOALS} of the floor.\n\n"
    )
    rows = [row for hidden in HEAD_GOALS for row in _head_rows(hidden, o.repeat)]
    return about + table(["hidden", "", "ms", "of the floor", "peak MB", "mean error"], rows)


def _head_rows(hidden: int, repeat: int) -> list[list[Any]]:
    g = torch.Generator(device="cuda").manual_seed(0)
    weight = (torch.randn(VOCABULARY, hidden, generator=g, device="cuda") * (4.8 / hidden**0.5)).bfloat16()
    states = torch.randn(TOKENS, hidden, generator=g, device="cuda").bfloat16()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=g, device="cuda")
    exact = torch.cat([(h.double() @ weight.double().T).log_softmax(-1) for h in states[:64].split(8)])
    expected = -(exact.exp() * exact).sum(-1)
    cases = _head_cases(states, weight, targets)
    floor, rows = 0.0, []
    for name, case in cases.items():
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = case()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
            ms = timed(case, repeat)
        except torch.OutOfMemoryError:
            rows.append([hidden, name, "out of memory", "", "", ""])
            continue
        floor = floor or ms
        error = "" if found is None else f"{float((found[:64].double() - expected).abs().mean()):.1e}"
        rows.append([hidden, name, ms, ms / floor, peak, error])
    return rows


def _head_cases(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def floor() -> None:
        for rows in states.split(4096):
            torch.mm(rows, weight.T)

    def naive() -> torch.Tensor:
        logp = (states @ weight.T).float().log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    cases: dict[str, Callable[[], Any]] = {
        "floor": floor,
        "ours": lambda: token_stats(states, Head(weight), targets).entropy,
        "naive": naive,
    }
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax  # pyright: ignore[reportMissingImports]

        def pair() -> torch.Tensor:
            logits = states @ weight.T
            selective_log_softmax(logits[None], targets[None])
            return entropy_from_logits(logits[None])[0]

        cases["TRL pair"] = pair
    except ImportError:
        pass
    try:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        cases["verl, Triton"] = lambda: linear_cross_entropy(states, weight, targets, 1.0, "none")[1]
    except ImportError:
        pass
    return cases


# Whole models.


def models(o: argparse.Namespace) -> str:
    about = (
        f"{o.rollouts:,} rollouts in groups of 8, prompts of about 200 tokens, completions lognormal with median 800 (at most"
        " 4,096), bfloat16, random weights. Real tokens a second, prompts counted once for each rollout. Share: of the tokens a"
        " second that a matmul limit of 790 TFLOP/s allows at contexts of 1,000. Goals: 50 / 65 / 75 %.\n\n"
    )
    rows = []
    for name, (shape, limit, goal) in MODELS.items():
        if o.only in (None, name):
            rows += _model_rows(name, shape, limit, goal, o.rollouts)
            torch.cuda.empty_cache()
    return about + table(["model", "batches", "tokens/s", "of the limit", "goal", "computed / real", "peak GB"], rows)


def _model_rows(name: str, shape: dict[str, Any], limit: int, goal: float, n: int) -> list[list[Any]]:
    scorer, samples = _scorer(shape), _rollouts(n)
    real = sum(map(len, samples))
    rows = []
    for layout in (Layout.PACKED, Layout.PADDED):
        if layout is Layout.PACKED and not scorer.packs:
            rows.append([name, "packed", "no kernel", "", "", "", ""])
            continue
        scorer.__dict__["packs"] = layout is Layout.PACKED
        scorer.model.set_attn_implementation("echolab_packed" if layout is Layout.PACKED else "sdpa")
        scorer.numbers(samples[:32])
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        scorer.numbers(samples)
        end.record()
        end.synchronize()
        rate = real / start.elapsed_time(end) * 1000
        parts = batches(samples, 64 * 1024, pack=layout is Layout.PACKED)
        computed = sum(b.computed for b in parts) / real
        rows.append([name, str(layout), rate, rate / limit, goal, computed, torch.cuda.max_memory_allocated() / 1e9])
    return rows


def _scorer(shape: dict[str, Any]) -> Scorer:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=32_768, **shape)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    return Scorer(ScorerConfig(model="random"), model, None, None, torch.device("cuda"))  # type: ignore[arg-type]


def _rollouts(n: int) -> list[Sample]:
    rng = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(VOCABULARY), k=length))

    prompts = [tokens(rng.randrange(100, 300)) for _ in range((n + 7) // 8)]
    return [Sample(i, prompts[i // 8], tokens(int(min(4096, max(16, rng.lognormvariate(6.68, 0.6)))))) for i in range(n)]


if __name__ == "__main__":
    main()
