"""TRL's completions, as trl/trainer/grpo_trainer.py logs them: the buffer of its last rows, as often as it logs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Blocks = list[tuple[str, list[float]]]


def standardised(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-4) for r in rewards]


def table(blocks: Blocks, advantages: Callable | None = standardised, step: int = 5, **more: list) -> pa.Table:
    """Blocks of consecutive rows, one for each visit of a prompt."""
    rewards = [r for _, rs in blocks for r in rs]
    prompts = [p for p, rs in blocks for _ in rs]
    columns = {"step": pa.array([step] * len(rewards)), "prompt": pa.array(prompts, pa.large_string())}
    columns["completion"] = pa.array([f"c{i}" for i in range(len(rewards))], pa.large_string())
    columns["accuracy"] = pa.array(rewards, pa.float64())
    columns |= {name: pa.array(values) for name, values in more.items()}
    if advantages:
        columns["advantage"] = pa.array([a for _, rs in blocks for a in advantages(rs)], pa.float64())
    return pa.table(columns)


def dump(path: Path, rows: pa.Table | None = None) -> Path:
    if rows is None:
        rows = table([("a", [0.0, 1.0, 1.0, 0.5]), ("b", [1.0, 1.0, 1.0, 1.0]), ("c", [0.0, 0.0, 0.0, 1.0])])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=5)
    return path


class Trainer:
    """What `_logs` and `log()` do: a deque of `generation_batch_size` rows that generations extend, never cleared."""

    def __init__(self, folder: Path, generation_batch_size: int = 8):
        self.folder, self.logs = folder / "completions", deque(maxlen=generation_batch_size)

    def generate(self, said: str, blocks: Blocks) -> None:
        for number, (prompt, rewards) in enumerate(blocks):
            for i, (reward, advantage) in enumerate(zip(rewards, standardised(rewards), strict=True)):
                completion = f"{said}: completion {i} of {prompt}, block {number}"
                self.logs.append({"prompt": prompt, "completion": completion, "accuracy": reward, "advantage": advantage})

    def log(self, step: int) -> Path:
        columns = {name: [row[name] for row in self.logs] for name in ("prompt", "completion", "accuracy", "advantage")}
        return dump(self.folder / f"completions_{step:05d}.parquet", pa.table({"step": [step] * len(self.logs), **columns}))


def fixture(folder: Path) -> list[Path]:
    trainer, paths = Trainer(folder / "grpo-output"), []
    for step in (1, 2):
        trainer.generate(f"step {step}", [("What is 1+1?", [0.0, 1.0, 1.0, 0.5]), ("What is 2+2?", [1.0, 0.0, 0.0, 0.0])])
        paths.append(trainer.log(step))
    return paths
