"""Tables that no trainer's format claims: one object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def dump(path: Path, n: int = 4) -> Path:
    return lines(path, [{"prompt": f"Q{i // 2}", "completion": f"A{i}", "reward": i % 2, "step": 3} for i in range(n)])


def fixture(folder: Path) -> list[Path]:
    return [dump(folder / "samples" / "rows.jsonl", n=8)]
