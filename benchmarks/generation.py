"""Sampling against transformers.generate, on one thread, in one process.

    python benchmarks/generation.py

Writes benchmarks/results/generation.md as it came out. Rivals take turns; the best turn counts. Only real tokens count.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from measure import RESULTS, machine, table

from echolab.engines import Sampling, lean
from echolab.engines.torch_engine import TorchEngine

VOCABULARY, N = 1024, 8
GOALS = (
    "1.4 times the tokens a second at 256 rows, 1.7 at 32, 2.5 where lengths vary; within 2.5 times the floor at equal lengths"
)


@dataclass(frozen=True)
class Case:
    """`rows` completions, eight of each prompt; `ends` of the tokens end one."""

    name: str
    rows: int
    prompt: int
    tokens: int
    ends: int = 0

    @property
    def eos(self) -> list[int]:
        return list(range(self.ends))

    def prompts(self) -> torch.Tensor:
        g = torch.Generator().manual_seed(self.rows)
        return torch.randint(self.ends, VOCABULARY, (self.rows // N, self.prompt), generator=g)


CASES = (
    Case("256 rows, 128 tokens", 256, 16, 128),
    Case("256 rows, 32 tokens", 256, 16, 32),
    Case("32 rows, 64 tokens", 32, 16, 64),
    Case("64 rows, prompts of 256, 32 tokens", 64, 256, 32),
    Case("256 rows, up to 128 tokens, lengths vary", 256, 64, 128, ends=23),
    Case("32 rows, up to 128 tokens, lengths vary", 32, 64, 128, ends=23),
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--out", type=Path, default=RESULTS / "generation.md")
    o = options.parse_args()
    torch.set_num_threads(1)
    model = policy()
    load = os.getloadavg()[0]
    rows = [row for case in CASES for row in measured(model, case, o.repeat)]
    titles = ["", "CPU s", "wall s", "tokens", "tokens / CPU s", "ours / theirs", "CPU / floor"]
    where = f"{machine(('torch', 'transformers'))}, {torch.backends.cpu.get_cpu_capability()}, 1 thread"
    made = f"# Sampling\n\n{where}. Made by `python benchmarks/generation.py`.\n\n"
    text = f"{made}{about(model, o.repeat, load)}\n\nGoals: {GOALS}.\n\n{table(titles, rows)}"
    o.out.write_text(text)
    print(text)


def about(model: Any, repeat: int, load: float) -> str:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"A random Qwen2 of {parameters:.2f} M parameters (4 layers of width 192, 6 heads, 2 of keys, vocabulary"
        f" {VOCABULARY:,}), float32; prompts of 16 tokens where nothing else is said, {N} completions of each, temperature 1,"
        f" no top-k or top-p. Rivals take turns in one process; best of {repeat} turns. **The machine was shared** with other"
        f" work (load {load:.1f} on {os.cpu_count()} cores when this began): read ratios, not seconds. Ours gives the"
        ' log-probability and entropy of each token; transformers is asked for neither. "Through the model\'s forward" is ours'
        " for models that are not built as Llama is. Floor: the linear layers of the decode steps, all rows to the longest,"
        f" and nothing else. Where lengths vary, {CASES[-1].ends} of the tokens end a completion. Nothing was measured on CUDA."
    )


def policy() -> Any:
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = transformers.Qwen2Config(vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None, **sizes, **heads)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def measured(model: Any, case: Case, repeat: int) -> list[list[Any]]:
    rivals: dict[str, Callable[[Any, Case], int]] = {
        "ours": ours,
        "ours, through the model's forward": general,
        "theirs": theirs,
    }
    best: dict[str, tuple[float, float, int]] = {}
    for name in ("floor", *rivals) * repeat:
        clocks = time.process_time(), time.perf_counter()
        n = floor(model, case) if name == "floor" else rivals[name](model, case)
        used = time.process_time() - clocks[0], time.perf_counter() - clocks[1], n
        best[name] = min(best.get(name, used), used)
    rate = {name: best[name][2] / best[name][0] for name in rivals}
    rows: list[list[Any]] = [[f"**{case.name}**: floor", *best["floor"][:2], "", "", "", 1.0]]
    for name in rivals:
        cpu, wall, n = best[name]
        faster = "" if name == "theirs" else rate[name] / rate["theirs"]
        rows.append(
            [name if name != "theirs" else "transformers.generate", cpu, wall, n, rate[name], faster, cpu / best["floor"][0]]
        )
    return rows


def ours(model: Any, case: Case) -> int:
    engine = TorchEngine(model, case.eos)
    made = engine.sample(case.prompts().tolist(), N, Sampling(max_tokens=case.tokens), seed=0)
    return sum(map(len, made.completion_ids))


def general(model: Any, case: Case) -> int:
    known, lean.MODELS = lean.MODELS, ()
    try:
        return ours(model, case)
    finally:
        lean.MODELS = known


@torch.inference_mode()
def theirs(model: Any, case: Case) -> int:
    torch.manual_seed(1)
    prompts = case.prompts().repeat_interleave(N, 0)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": VOCABULARY - 1}
    ends = {"eos_token_id": case.eos} if case.eos else {"min_new_tokens": case.tokens}
    made = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=case.tokens, **options, **ends)
    made = made[:, case.prompt :]
    ended = (made < case.ends).cumsum(-1)
    return int(((ended - (made < case.ends).long()) == 0).sum())  # with the token that ends it


@torch.inference_mode()
def floor(model: Any, case: Case) -> int:
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {layer.in_features: torch.randn(case.rows, layer.in_features) for layer in layers}
    for _ in range(case.tokens):
        for layer in layers:
            layer(inputs[layer.in_features])
    return case.rows * case.tokens


if __name__ == "__main__":
    main()
