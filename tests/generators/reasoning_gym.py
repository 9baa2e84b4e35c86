"""reasoning-gym's results.json: one document, samples of an entry in a list."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def document(results: int = 2, samples: int = 3, datasets: int = 2, name: Callable[[int], str] = "set{}".format) -> dict:
    def result(d: int, r: int) -> dict:
        scores = [(d + r + s) % 2 for s in range(samples)]
        completions = [
            {"model_answer": None if s else f"{r}", "full_model_response": f"{d}.{r}.{s}", "score": x}
            for s, x in enumerate(scores)
        ]
        summary = {"best_score": max(scores), "mean_score": sum(scores) / samples}
        return {"question": f"Q{r}", "expected_answer": f"{r}", **summary, "completions": completions}

    sets = [
        {"name": name(d), "category": "algebra", "config": {"size": None}, "results": [result(d, r) for r in range(results)]}
        for d in range(datasets)
    ]
    metadata = {"model": "m", "temperature": 0.6, "top_p": 0.9, "max_tokens": 64, "eval_repeats": samples}
    return {"metadata": metadata, "categories": [{"name": "algebra", "datasets": sets}]}


def dump(path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(**options), indent=2))
    return path


def fixture(folder: Path) -> list[Path]:
    return [dump(folder / "results" / "m_20260101" / "results.json", samples=4, datasets=1)]
