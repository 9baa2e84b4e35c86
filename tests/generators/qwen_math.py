"""Qwen2.5-Math's evaluation: one problem a line, its samples in lists."""

from __future__ import annotations

from pathlib import Path

from generators.plain import lines


def dump(path: Path, problems: int = 3, n: int = 2) -> Path:
    rows = [
        {
            "idx": 10 + p,
            "question": f"Q{p}",
            "gt_cot": "None",
            "gt": f"{p}",
            "level": f"Level {p}",
            "solution": "long",
            "code": [f"{p}.{s}" for s in range(n)],
            "pred": [f"{s}" for s in range(n)],
            "report": [None] * n,
            "score": [(p + s) % 2 == 0 for s in range(n)],
            "pred_score": [[s / 4] for s in range(n)],
        }
        for p in range(problems)
    ]
    return lines(path, rows)


def fixture(folder: Path) -> list[Path]:
    return [dump(folder / "math_eval" / "math" / "test_qwen25-math-cot_-1_seed0_t0.6_s0_e-1.jsonl", problems=2, n=4)]
