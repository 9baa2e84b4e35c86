"""The trainer on a GPU with models of real shapes: tokens a second, memory, and what echo costs. Nothing is downloaded, weights
are random.

    python benchmarks/trainer_gpu.py

Writes benchmarks/results/trainer_gpu.md as it came out. Where echolab is not installed, PYTHONPATH=. finds it. `--trial` runs
the same code with a tiny model, also on a CPU, and writes nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine, paragraph, table
from trainer_runs import SMALL, Case, Cost, echo, echo_table


def sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip


# As Qwen2.5 has them; one token in 500 ends a completion.
ON_GPU = {"vocabulary": 151_936, "ends": 300, "easy": 0.5, "dtype": "bfloat16", "device": "cuda"}
CASES = {
    "0.5B": Case("0.5B", 32, 8, 200, 1024, sizes=sizes(896, 4864, 24, 14, 2), **ON_GPU),
    "1.5B": Case("1.5B", 32, 8, 200, 1024, sizes=sizes(1536, 8960, 28, 12, 2), **ON_GPU),
}
TRIAL = Case("trial", 4, 4, 8, 24, vocabulary=500, ends=20, easy=0.5, sizes=SMALL)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--only", choices=CASES, default=None)
    options.add_argument("--trial", action="store_true", help="a tiny model, on any device; nothing is written")
    options.add_argument("--out", type=Path, default=RESULTS / "trainer_gpu.md")
    o = options.parse_args()
    on_gpu = torch.cuda.is_available()
    if o.trial:
        o.steps, cases = 2, [replace(TRIAL, device="cuda" if on_gpu else "cpu")]
    elif on_gpu:
        cases = [case for name, case in CASES.items() if o.only in (None, name)]
    else:
        raise SystemExit("this benchmark needs a CUDA device; --trial runs it with a tiny model on a CPU")
    device = torch.cuda.get_device_name() if on_gpu else "no GPU: a trial"
    with tempfile.TemporaryDirectory() as work:
        parts = [part(case, echo(case, Path(work) / case.name, o.steps), o.steps) for case in cases]
    about = f"{device}, {machine(('torch', 'triton', 'transformers'))}. Made by `python benchmarks/trainer_gpu.py`."
    text = f"# The trainer on a GPU\n\n{about}\n\n" + "\n".join(parts)
    print(text)
    if not o.trial:
        o.out.write_text(text)


def part(case: Case, found: dict[str, Cost], steps: int) -> str:
    about = paragraph(f"""
        GRPO on {case.prompts} prompts of {case.prompt} tokens x {case.n} completions of at most {case.tokens}
        ({case.dtype}, random weights, vocabulary {case.vocabulary:,}); medians of {steps} steps. Half of the problems are
        always solved: their groups have no advantage. Sampling: completion tokens a second. Learning: tokens of prompts and
        completions that went through the model, forward and backward, with the optimizer's step. Memory: the highest that
        one run held.""")
    rows = [
        [
            kind,
            c.values["tokens"] / case.rows,
            round(c.values["tokens_per_second"]),
            round(c.tokens / c.learn),
            f"{c.gigabytes:.1f}",
        ]
        for kind, c in found.items()
    ]
    rates = table(["", "mean length", "sampling, tokens/s", "learning, tokens/s", "GB"], rows)
    return f"## {case.name}\n\n{about}{rates}\n{echo_table(found, 's' if case.device == 'cuda' else 'CPU s')}"


if __name__ == "__main__":
    main()
