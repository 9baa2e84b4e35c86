"""ROLL's dumps, as roll/pipeline/rlvr/utils.py writes them: one object of columns, rollouts of a prompt scattered."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

META = {"global_step": 3, "is_offload_states": False, "generation_config": {"temperature": 0.99, "top_p": 0.99, "top_k": 100}}


def columns(prompts: int = 2, n: int = 4, step: int = 3, seed: int = 0) -> dict[str, list[Any]]:
    order = [(p, s) for p in range(prompts) for s in range(n)]
    random.Random(seed).shuffle(order)
    return {
        "id": [f"q{p}" for p, _ in order],
        "source": ["deepmath" for _ in order],
        "difficulty": [0.5 for _ in order],
        "prompt": [f"What is {p}+{p}?" for p, _ in order],
        "messages": [json.dumps([{"role": "user", "content": f"What is {p}+{p}?"}]) for p, _ in order],
        "ground_truth": [str(2 * p) for p, _ in order],
        "tag": ["math" for _ in order],
        "domain": ["math_rule" for _ in order],
        "responses": [f"sample {s}: \\boxed{{{2 * p + s % 2}}}" for p, s in order],
        "scores": [float(s % 2 == 0) for _, s in order],
        "sampling_params": [json.dumps(META) for _ in order],
        "global_step": [step for _ in order],
    }


def dump(folder: Path, data: dict[str, Any] | None = None, **options: Any) -> Path:
    data = columns(**options) if data is None else data
    path = folder / f"rollout_dump_data.step_{data.get('global_step', [0])[0]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def fixture(folder: Path) -> list[Path]:
    return [dump(folder / "rollout_dump", step=3), dump(folder / "rollout_dump", step=4, seed=1)]
