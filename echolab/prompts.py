"""Prompts to sample from or to train on: the rows of a local file (JSON lines, a JSON list, Parquet) or of a folder of them.

Columns are known by their names, as TRL, verl and the benchmarks have them; `{"prompt": "question"}` names others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from echolab.clips.benchmarks import rows, value
from echolab.errors import EcholabError

COLUMNS = {
    "prompt": ("prompt", "messages", "question", "problem"),
    "ground_truth": ("ground_truth", "reward_model.ground_truth", "answer", "gold", "gt", "final_answer", "solution"),
    "source": ("source", "data_source"),
}
SUFFIXES = (".jsonl", ".json", ".parquet")


def read(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows with `prompt` (a text) or `messages`, `ground_truth`, `source`, and the row's other columns in `extra`."""
    columns = columns or {}
    if unknown := [c for c in columns if c not in COLUMNS]:
        raise EcholabError(f"{unknown[0]} is no column of a prompt: use {', '.join(COLUMNS)}")
    for file in _files(Path(path).expanduser()):
        try:
            for number, row in enumerate(rows(file)):
                yield _prompt(file, number, row, columns)
        except OSError as e:
            raise EcholabError(f"{file}: {e.strerror or e}") from None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and not f.name.startswith((".", "dataset_info", "state")))
    if not files:
        raise EcholabError(f"{path}: no {', '.join(SUFFIXES)} file in it")
    return files


def _prompt(file: Path, number: int, row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    used = set()
    for name, known in COLUMNS.items():
        wanted = (columns[name],) if name in columns else known
        column = next((c for c in wanted if value(row, c) is not None), None)
        if column is None and name in columns and columns[name].partition(".")[0] not in row:
            raise EcholabError(f"{file}: row {number} has no column {columns[name]}; its columns are {', '.join(row)}")
        if column is not None:
            found[name] = value(row, column)
            used.add(column.partition(".")[0])
    prompt = found.pop("prompt", None)
    if isinstance(prompt, list):
        found["messages"] = prompt
    elif prompt is None or not str(prompt).strip():
        raise EcholabError(f"{file}: row {number} has no prompt; its columns are {', '.join(row)}: name the one with it")
    else:
        found["prompt"] = str(prompt)
    if (truth := found.get("ground_truth")) is not None and not isinstance(truth, str):
        found["ground_truth"] = orjson.dumps(truth).decode() if isinstance(truth, dict | list) else f"{truth}"
    rest = {k: v for k, v in row.items() if k not in used and v is not None}
    return {**found, "extra": rest}
