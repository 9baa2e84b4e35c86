"""Tables of Weights & Biases: the media file of a run (`sort_keys` off), and the same table in an artifact (keys sorted)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TRL = ["step", "prompt", "completion", "accuracy_reward", "format_reward", "advantage"]
OPENRLHF = ["global_step", "text", "reward"]


def standardised(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-4) for r in rewards]


def completions(blocks: list[tuple[str, list[float]]] | None = None, step: int = 5) -> list[list[Any]]:
    """Rows of TRL's `completions`: blocks of num_generations rows, one for each visit of a prompt. Every row has the format
    right, which earns 0.5."""
    rows = []
    for prompt, rewards in blocks or [("What is 1+1?", [0.0, 1.0, 1.0, 0.0]), ("What is 2+2?", [1.0, 0.0, 0.0, 0.0])]:
        advantages = standardised([r + 0.5 for r in rewards])
        rows += [[step, prompt, f"<think>{i}</think>", r, 0.5, advantages[i]] for i, r in enumerate(rewards)]
    return rows


def table(path: Path, rows: list[list[Any]] | None = None, columns: list[str] | None = None, artifact: bool = False) -> Path:
    rows, columns = completions() if rows is None else rows, columns or TRL
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"columns": columns, "data": rows}
    if artifact:
        types = {"wb_type": "typedDict", "params": {"type_map": {name: {"wb_type": "any"} for name in columns}}}
        document |= {"_type": "table", "column_types": types, "ncols": len(columns), "nrows": len(rows)}
        document |= {"log_mode": "IMMUTABLE"}
    path.write_text(json.dumps(document, sort_keys=artifact))
    return path


def samples(path: Path, steps: int = 3) -> Path:
    """OpenRLHF's: the table of a step holds the samples of all steps before it too."""
    return table(path, [[s, f"Q{s}\nA{s}", float(s % 2)] for s in range(1, steps + 1)], OPENRLHF)


def fixture(folder: Path) -> list[Path]:
    media = folder / "wandb" / "run-20260820_101500-ab12cd34" / "files" / "media" / "table"
    openrlhf = folder / "wandb" / "run-20260820_111500-ef56ab78" / "files" / "media" / "table" / "train"
    return [
        table(media / "completions_5_0a1b2c3d4e5f.table.json"),
        table(media / "completions_6_5f4e3d2c1b0a.table.json", completions(step=6), artifact=True),
        samples(openrlhf / "generated_samples_3_00ff00ff00ff.table.json"),
    ]
