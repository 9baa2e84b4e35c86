"""Dumps of each format, generated from what the trainers write, and one way to read a file in a test."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echolab.readers.base import Bad, ReadOptions, Row, Source

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip("../shared/data not found: real-data test skipped")
    return DATA


@dataclass
class Result:
    rows: list[Row]
    bad: list[Bad]
    source: Source

    @property
    def said(self) -> list[tuple]:
        """All that a reading brought, comparable."""
        return [(r.row, r.key, r.fields) for r in self.rows] + [(b.row, b.reason, b.raw) for b in self.bad]


def read_file(
    reader: ModuleType,
    path: Path,
    typed: str = "",
    start: int = 0,
    start_row: int = 0,
    found: dict | None = None,
    **options: Any,
) -> Result:
    typed, options_of = typed or path.name, ReadOptions(**options)
    source = Source(path, path.name, typed, options_of, start=start, start_row=start_row, found=found or {})
    items = list(reader.read(source))
    return Result([i for i in items if isinstance(i, Row)], [i for i in items if isinstance(i, Bad)], source)


@pytest.fixture(scope="session")
def read() -> Callable[..., Result]:
    return read_file


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for property tests, which write the same file again and again."""
    return tmp_path_factory.mktemp("scratch")


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def verl_v0(path: Path, prompts: int = 3, n: int = 4, step: int = 7, seed: int = 0) -> Path:
    """ray_trainer.py: no uid, rows permuted by _balance_batch, numpy scalars in extras as text (default=str)."""
    rng = random.Random(seed)
    rows = []
    for p in range(prompts):
        for s in range(n):
            right = rng.random() < 0.5
            row = {"input": f"user\nWhat is {p}+{p}?\nassistant\n", "output": f"sample {s}: \\boxed{{{2 * p + 1 - right}}}"}
            row |= {"gts": str(2 * p), "score": float(right), "step": step, "acc": str(right), "pred": str(2 * p + 1 - right)}
            rows.append(row)
    rng.shuffle(rows)
    return lines(path, rows)


def verl_v1(path: Path, prompts: int = 3, n: int = 4, parts: int = 1, step: int = 7) -> Path:
    """ppo/v1/trainer_base.py: sorted by the uid {prompt uid}_{session}_{index}; a prompt uid may hold underscores."""
    rows = [
        {
            "input": f"Q{p}",
            "output": f"A{p}.{s}.{i}",
            "gts": str(p),
            "score": float(s % 2),
            "step": step,
            "uid": f"6b_{p}_{s}_{i}",
        }
        for p in range(prompts)
        for s in range(n)
        for i in range(parts)
    ]
    return lines(path, rows)


def standardised(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-4) for r in rewards]


def trl_table(blocks: list[tuple[str, list[float]]], advantages: Callable | None = standardised, **more: list) -> pa.Table:
    """grpo_trainer.py: blocks of consecutive rows, one for each visit of a prompt."""
    rewards = [r for _, rs in blocks for r in rs]
    prompts = [p for p, rs in blocks for _ in rs]
    columns = {"step": pa.array([5] * len(rewards)), "prompt": pa.array(prompts, pa.large_string())}
    columns["completion"] = pa.array([f"c{i}" for i in range(len(rewards))], pa.large_string())
    columns["accuracy"] = pa.array(rewards, pa.float64())
    columns |= {name: pa.array(values) for name, values in more.items()}
    if advantages:
        columns["advantage"] = pa.array([a for _, rs in blocks for a in advantages(rs)], pa.float64())
    return pa.table(columns)


def trl(path: Path, table: pa.Table | None = None) -> Path:
    if table is None:
        table = trl_table([("a", [0.0, 1.0, 1.0, 0.5]), ("b", [1.0, 1.0, 1.0, 1.0]), ("c", [0.0, 0.0, 0.0, 1.0])])
    pq.write_table(table, path, row_group_size=5)
    return path


def gym_document(results: int = 2, samples: int = 3, datasets: int = 2, name: Callable[[int], str] = "set{}".format) -> dict:
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


def reasoning_gym(path: Path, **options: Any) -> Path:
    path.write_text(json.dumps(gym_document(**options), indent=2))
    return path


def qwen_math(path: Path, problems: int = 3, n: int = 2) -> Path:
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


def plain(path: Path, n: int = 4) -> Path:
    return lines(path, [{"prompt": f"Q{i // 2}", "completion": f"A{i}", "reward": i % 2, "step": 3} for i in range(n)])


@pytest.fixture(scope="session")
def dumps() -> SimpleNamespace:
    makers = (lines, verl_v0, verl_v1, trl, trl_table, standardised, reasoning_gym, gym_document, qwen_math, plain)
    return SimpleNamespace(**{m.__name__: m for m in makers})
