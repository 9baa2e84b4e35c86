"""A store whose clips are known: rollouts with ids, scores that hold them, and clip sets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from echolab import ids
from echolab.named import draft
from echolab.schema import TABLES
from echolab.store import Store

TOKENIZER = "a" * 32
SCORER = "b" * 32
HOSTILE = "</script><!-- \"'`|\\ \x00\x1b\u2028\ufffd\U0001f600 --- : {x} ${y}"


def rollout(group: int, sample: int, **more: Any) -> dict[str, Any]:
    """Rollouts 0 and 1 of a group of 3 are right. Token ids spell the group and the sample."""
    completion = [100 + group, 200 + sample, 7, 8, 9]
    return {
        "step": group // 2,
        "group": f"g{group}",
        "problem": f"What is {group} + {group}?",
        "prompt": f"What is {group} + {group}?",
        "rollout_id": ids.config_id("rollout", [group, sample]),
        "sample": sample,
        "completion": f"Let me see {sample}.\nIt is {2 * group}.",
        "prompt_ids": [1, 2, group],
        "completion_ids": completion,
        "tokenizer": TOKENIZER,
        "n_completion_tokens": len(completion),
        "reward": float(sample < 2),
        "ground_truth": str(2 * group),
        "source": "sums",
        "model": "policy-1",
        "sampling": '{"temperature": 1.0}',
        **more,
    }


def score(row: dict[str, Any]) -> dict[str, Any]:
    n = len(row["completion_ids"])
    known = {"rollout_id": row["rollout_id"], "scorer": SCORER, "run": "r", "step": row["step"]}
    return {**known, "token_ids": row["completion_ids"], "entropies": [0.5] * n, "n_tokens": n}


def clip(row: dict[str, Any], end: int = 3, **more: Any) -> dict[str, Any]:
    """The clip of a rollout's first `end` tokens."""
    return {
        "clip_id": ids.clip_id(row["rollout_id"], TOKENIZER, end),
        "rollout_id": row["rollout_id"],
        "group_id": ids.group_id("r", "train", row["step"], (row["group"],)),
        "group_kind": "mixed",
        "prompt_id": ids.prompt_id(row["problem"]),
        "problem_id": ids.problem_id(row["problem"]),
        "run": "r",
        "step": row["step"],
        "scorer": SCORER,
        "selector": "peak",
        "tokenizer": TOKENIZER,
        "temperature": 1.0,
        "end_token": end,
        "n_tokens": end,
        "peak_segment": 0,
        "peak_entropy": 0.5,
        "prompt": row["prompt"],
        "clip": (row["completion"] or "")[:14],
        "prompt_ids": row["prompt_ids"],
        "clip_ids": row["completion_ids"][:end],
        **more,
    }


def add_clipset(
    store: Store, name: str, clips: Iterable[dict[str, Any]], config: dict | None = None, parents: dict | None = None
) -> str:
    with draft(store, "clipset", name) as d:
        rows = [{**c, "clipset": d.label} for c in clips]
        staged = store.stage("clips", pa.Table.from_pylist(rows, schema=TABLES["clips"].arrow), d.folder) if rows else []
        made = d.publish({"clips": staged}, config or {"selector": "peak", "seed": 3}, parents or {"versions": {}})
    return made.label


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]
