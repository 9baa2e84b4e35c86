"""The parts of scoring.py that run a whole model: mixed lengths against a transformers loop, and shared prompts."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import table

from echolab.entropy.batching import Sample, batches
from echolab.entropy.passes import BATCH_TOKENS
from echolab.entropy.scorer import Scorer, ScorerConfig
from echolab.vocab import load_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LONGEST = 2048  # of a rollout: eight of them with all their logits take 10 GB


def lengths(o: argparse.Namespace) -> str:
    """Rollouts of mixed length: ours against a loop over batches of eight with all logits."""
    scorer, samples = _scorer(o), _real(o.rollouts)
    real = sum(map(len, samples))
    random.Random(0).shuffle(samples)
    ordered = sorted(samples, key=len)
    cases: dict[str, Callable[[], Any]] = {
        "ours": lambda: scorer.numbers(samples),
        "transformers, batches of 8": lambda: _peer(scorer.model, samples),
        "transformers, sorted by length": lambda: _peer(scorer.model, ordered),
    }
    cpu, wall, found = _turns(cases, o.repeat)
    expected = found["transformers, batches of 8"]
    error = max(float((a - expected[place][0]).abs().max()) for place, (a, _) in found["ours"].items())
    parts = batches(samples, BATCH_TOKENS["cpu"])
    ratios = [sum(b.computed for b in parts), _computed(samples), _computed(ordered)]
    about = (
        f"{len(samples)} real rollouts of ../shared/data with at most {LONGEST:,} tokens ({real:,} tokens in all), vocabulary"
        f" 151,936, {_shape(o)}, float32. Best of {o.repeat}. The peer pads to the right, gives an attention mask and takes"
        " entropy and log-probability from all logits, sequence by sequence. Goal: 2.5 times the tokens a second of batches"
        f" of 8. Largest difference in entropy: {error:.1e} nats. Tokens computed / real: "
        + ", ".join(f"{name} {n / real:.3f}" for name, n in zip(cases, ratios, strict=True))
        + ".\n\n"
    )
    rows = [[name, cpu[name], wall[name], real / wall[name], cpu[name] / cpu["ours"]] for name in cases]
    return about + table(["", "CPU s", "wall s", "tokens/s", "CPU / ours"], rows)


def prompts(o: argparse.Namespace) -> str:
    """Groups of eight: the prompt computed once against eight times."""
    shared, alone = _scorer(o), _scorer(o, share_prompts=False)
    rows = []
    for prompt, completion in ((200, 800), (200, 300), (1000, 800)):
        rng = random.Random(0)
        asked = tuple(rng.choices(range(1000), k=prompt))
        samples = [Sample(i, asked, tuple(rng.choices(range(1000), k=completion))) for i in range(8)]
        cases = {"shared": lambda s=samples: shared.numbers(s), "not shared": lambda s=samples: alone.numbers(s)}
        cpu, wall, found = _turns(cases, o.repeat)
        error = max(float((found["shared"][i][0] - found["not shared"][i][0]).abs().max()) for i in range(8))
        theory = (prompt + completion) * 8 / (prompt + completion * 8)
        ratio = cpu["not shared"] / cpu["shared"]
        rows.append([f"{prompt} + 8 x {completion}", cpu["shared"], cpu["not shared"], ratio, theory, f"{error:.1e}"])
    about = (
        f"{_shape(o)}, vocabulary 1,000 (the head is the same for both), float32. Best of {o.repeat}. In theory: tokens"
        " through the linear layers. Goal: 1.15 at 200 + 8 x 800, 1.7 at 1000 + 8 x 800.\n\n"
    )
    return about + table(["", "shared, CPU s", "not shared, CPU s", "ratio", "in theory", "largest difference"], rows)


def _scorer(o: argparse.Namespace, **options: Any) -> Scorer:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    vocabulary = 151_936 if o.part == "lengths" else 1000
    shape = {"hidden_size": o.hidden, "intermediate_size": o.hidden * 38 // 7, "num_hidden_layers": o.layers}
    heads = {"num_attention_heads": o.hidden // 64, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=vocabulary, max_position_embeddings=32_768, tie_word_embeddings=True, **shape, **heads)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return Scorer(ScorerConfig(model="random", **options), model, None, None, torch.device("cpu"))  # type: ignore[arg-type]


def _shape(o: argparse.Namespace) -> str:
    return f"a random Qwen2 with {o.layers} layers of width {o.hidden}"


def _real(n: int) -> list[Sample]:
    """Rollouts and expert traces, tokenised: as many of each of three files, spread over it."""
    tokenizer = load_tokenizer(DATA / "tokenizers" / "qwen2.5")
    files = (
        "rollouts/qwen25math_rm_maj_example_math_100x8.jsonl",
        "experts/qwen25_14b_instruct_amc23.jsonl",
        "experts/sky_t1_reflection02_32b_amc23.jsonl",
    )
    samples: list[Sample] = []
    for file in files:
        problems = [json.loads(line) for line in (DATA / file).read_text().splitlines()]
        pairs = [(p["question"], text) for p in problems for text in p["code"]]
        ids = [tuple(tuple(tokenizer(text)["input_ids"]) for text in pair) for pair in pairs[:: len(pairs) // (2 * n) or 1]]
        fit = [i for i in ids if len(i[0]) + len(i[1]) <= LONGEST][: n // len(files)]
        samples += [Sample(len(samples) + i, *pair) for i, pair in enumerate(fit)]
    return samples


@torch.inference_mode()
def _peer(model: Any, samples: Sequence[Sample]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for i in range(0, len(samples), 8):
        batch = samples[i : i + 8]
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, s in enumerate(batch):
            ids[row, : len(s)] = torch.tensor(s.prompt + s.completion)
            mask[row, : len(s)] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, s in enumerate(batch):
            logp = logits[row, len(s.prompt) - 1 : len(s) - 1].float().log_softmax(-1)
            found[s.place] = -(logp.exp() * logp).sum(-1), logp.gather(1, torch.tensor(s.completion)[:, None])[:, 0]
    return found


def _computed(samples: Sequence[Sample]) -> int:
    parts = (samples[i : i + 8] for i in range(0, len(samples), 8))
    return sum(len(p) * max(map(len, p)) for p in parts)


def _turns(cases: dict[str, Callable[[], Any]], repeat: int) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    cpu: dict[str, float] = {}
    wall: dict[str, float] = {}
    found = {}
    for _ in range(repeat):
        for name, case in cases.items():
            clocks = time.process_time(), time.perf_counter()
            found[name] = case()
            used = time.process_time() - clocks[0], time.perf_counter() - clocks[1]
            cpu[name], wall[name] = min(used[0], cpu.get(name, used[0])), min(used[1], wall.get(name, used[1]))
    return cpu, wall, found
