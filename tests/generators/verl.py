"""verl's dumps of rollouts: `{global_step}.jsonl` of both trainers."""

from __future__ import annotations

import random
from pathlib import Path

from generators.plain import lines


def v0(path: Path, prompts: int = 3, n: int = 4, step: int = 7, seed: int = 0) -> Path:
    """ray_trainer.py: no uid, rows permuted by _balance_batch, numpy scalars in extras as text (default=str)."""
    rng = random.Random(seed)
    rows = []
    for p in range(prompts):
        for s in range(n):
            right = rng.random() < 0.5
            row = {"input": f"user\nWhat is {p}+{p}?\nassistant\n", "output": f"sample {s}: \\boxed{{{2 * p + 1 - right}}}"}
            row |= {"gts": str(2 * p), "score": float(right), "step": step, "acc": str(right), "pred": str(2 * p + 1 - right)}
            rows.append(row)
    rng.shuffle(rows)
    return lines(path, rows)


def v1(path: Path, prompts: int = 3, n: int = 4, parts: int = 1, step: int = 7) -> Path:
    """ppo/v1/trainer_base.py: sorted by the uid {prompt uid}_{session}_{index}; a prompt uid may hold underscores."""
    rows = [
        {
            "input": f"Q{p}",
            "output": f"A{p}.{s}.{i}",
            "gts": str(p),
            "score": float(s % 2),
            "step": step,
            "uid": f"6b_{p}_{s}_{i}",
        }
        for p in range(prompts)
        for s in range(n)
        for i in range(parts)
    ]
    return lines(path, rows)


def fixture(folder: Path) -> list[Path]:
    return [v0(folder / "rollout_data" / "7.jsonl", prompts=2), v1(folder / "rollout_data" / "8.jsonl", prompts=2, step=8)]
