"""AReaL's dumps, as areal/infra/workflow_executor.py `_dump_trajectory` appends them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def sample(task: int, i: int, version: int = 5, reward: float | None = None, said: str = "") -> dict[str, Any]:
    """Sample 0 was begun under the version before, by which its first tokens are."""
    head = version - (i == 0)
    rle = [[head, 300], [version, 280]] if head < version else [[version, 580]]
    row = {"task_id": task, "sample_idx": i, "seqlen": 700, "prompt_len": 120, "head_version": head, "tail_version": version}
    row |= {"version_rle": rle, "reward": float(i % 2) if reward is None else reward}
    row |= {"prompt": f"<|im_start|>user\nWhat is {task}+{task}?<|im_end|>\n<|im_start|>assistant\n"}
    return row | {"completion": f"{said}task {task}, sample {i}: \\boxed{{{2 * task + i % 2}}}<|im_end|>"}


def turns(row: dict[str, Any]) -> dict[str, Any]:
    """The row of an agent: several generations, whose texts stand apart, and a reward before it was shaped."""
    segments = [
        {"role": "prompt", "len": 120, "text": row["prompt"]},
        {"role": "gen", "len": 300, "text": "a call"},
        {"role": "context", "len": 80, "text": "its result"},
        {"role": "gen", "len": 200, "text": "an answer"},
    ]
    return {**row, "segments": segments, "original_reward": row["reward"] * 2}


def append(folder: Path, rows: list[dict[str, Any]], version: int = 5, kind: str = "rollout") -> Path:
    path = folder / kind / str(version) / f"{rows[0]['task_id']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def task(folder: Path, task_id: int = 88, n: int = 4, version: int = 5, kind: str = "rollout") -> Path:
    return append(folder, [sample(task_id, i, version) for i in range(n)], version, kind)


def fixture(folder: Path) -> list[Path]:
    logs = folder / "logs" / "me" / "grpo-math" / "trial0"
    return [task(logs, 88), task(logs, 89), task(logs, 3, n=1, kind="eval-rollout")]
