"""Rollouts as they come out of a store by `echolab sql "SELECT * FROM rollouts" --out FILE`: written by Polars, where maps are
lists of pairs, and as JSON in one document."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import polars as pl

NAMES = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN", list: "INTEGER[]", dict: "STRUCT"}


def id_of(*said: Any) -> str:
    return hashlib.md5(repr(said).encode()).hexdigest()


def row(group: int, sample: int | None, i: int, **more: Any) -> dict[str, Any]:
    said = {
        "rollout_id": id_of(group, sample, i),
        "ingest_id": id_of("reading"),
        "run": "r",
        "split": "train",
        "step": 3,
        "role": "policy",
        "group_id": id_of(group),
        "group_source": "explicit",
        "prompt_id": id_of("p", group),
        "problem_id": id_of("q", group),
        "sample": sample,
        "prompt": f"Q{group}",
        "prompt_format": "raw",
        "completion": f"A{i}",
        "completion_ids": [5, 6 + i],
        "logprobs": [-0.5, -0.25],
        "n_chars": 2,
        "reward": float(i % 2),
        "rewards": [{"key": "right", "value": float(i % 2)}, {"key": "style", "value": 0.5}],
        "origin": {"file": "rows.jsonl", "row": i},
        "extra": '{"level": 3}',
        "success": i % 2 == 1,
        "kind": "mixed",
        "success_threshold": 1.0,
        "failure_reward": 0.0,
        "completeness": "all",
    }
    return said | more


def rows(groups: int = 2, n: int = 4, first: int = 0) -> list[dict[str, Any]]:
    return [row(g, s, g * n + s) for g in range(first, first + groups) for s in range(n)]


def jsonl(path: Path, data: list[dict[str, Any]] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in (rows() if data is None else data)))
    return path


def document(path: Path, data: list[dict[str, Any]] | None = None) -> Path:
    data = rows() if data is None else data
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [{"name": name, "type": NAMES.get(type(v), "VARCHAR")} for name, v in data[0].items()]
    path.write_text(json.dumps({"columns": columns, "rows": data})[:-2].replace("}, {", "},\n{") + "]}\n")
    return path


def parquet(path: Path, data: list[dict[str, Any]] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows() if data is None else data, infer_schema_length=None).write_parquet(path)
    return path


def fixture(folder: Path) -> list[Path]:
    return [parquet(folder / "exported" / "rollouts.parquet"), jsonl(folder / "exported" / "more.jsonl", rows(first=2))]
