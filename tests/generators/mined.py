"""Clip sets as mining writes them, of rows that say only what a test is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from echolab import ids
from echolab.named import draft
from echolab.schema import TABLES
from echolab.store import Store

DERIVED = ("clips", "clipsets", "cohorts", "exports")


def clip(n: int, label: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Number n of a set. Texts have a token for each character; the problem is the prompt unless it is named."""
    row = {"prompt": f"What is {n} plus {n}?", "clip": f"It is {2 * n}.\n", "run": "r", "step": 1, **row}
    rollout, problem = row.setdefault("rollout_id", f"rollout{n}"), row.pop("problem", row["prompt"])
    clip_ids = row.setdefault("clip_ids", None if row["clip"] is None else [ord(c) for c in row["clip"]])
    defaults = {
        "clip_id": ids.clip_id(rollout, "t", n),
        "clipset": label,
        "group_id": f"group of {problem}",
        "problem_id": None if problem is None else ids.problem_id(problem),
        "prompt_id": None if row["prompt"] is None else ids.prompt_id(row["prompt"]),
        "selector": "peak",
        "tokenizer": "t",
        "end_token": len(clip_ids or "x"),
        "n_tokens": len(clip_ids or "x"),
        "peak_entropy": 1.0,
        "prompt_ids": None if row["prompt"] is None else [ord(c) for c in row["prompt"]],
    }
    return {**defaults, **row}


def mined(
    store: Store, rows: Iterable[Mapping[str, Any]], name: str = "mined", files: int = 1, **config: Any
) -> list[dict[str, Any]]:
    """Publish a clip set in so many files; returns its rows as they were written."""
    with draft(store, "clipset", name) as made:
        full = [clip(n, made.label, row) for n, row in enumerate(rows)]
        parts = [pa.Table.from_pylist(part, TABLES["clips"].arrow) for i in range(files) if (part := full[i::files])]
        staged = [s for part in parts for s in store.stage("clips", part, made.folder)]
        versions = {t: v for t, v in store.snapshot().versions.items() if t not in DERIVED}
        made.publish({"clips": staged}, {"selector": "peak", **config}, {"versions": versions})
    return full
