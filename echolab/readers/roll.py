"""ROLL's rollout dumps (`rollout_dump_dir`): rollout_dump_data.step_{N}.jsonl, ONE line for all rollouts of a step, an object
of columns. A rollout's place in them is no sample number: the rollouts of a prompt lie scattered, in the batch's order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from echolab.readers.base import Bad, Head, Row, Source, integer, number, parse_json, raw_json, rows_of_lines, text

NAME = "roll"
VERSION = 1
CONTINUES = True

_NAME = re.compile(r"rollout_dump_data\.step_\d+\.jsonl")
_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"(?!trajectory_data")\w+"\s*:\s*\[')  # an agent's dump has other columns
_FIELDS = frozenset(
    {"global_step", "id", "source", "prompt", "messages", "ground_truth", "responses", "scores", "sampling_params"}
)


def sniff(head: Head) -> str | None:
    if head.schema is not None:
        return None
    if isinstance(head.first, dict):
        columns = [head.first.get(name) for name in ("responses", "scores", "global_step")]
        return "lists responses, scores and global_step in one line" if all(isinstance(c, list) for c in columns) else None
    if _NAME.match(head.path.name) and _START.match(head.start):  # the line is too long to look at
        return "by its name, and its line begins with a column"
    return None


def read(source: Source) -> Iterator[Row | Bad]:
    return rows_of_lines(source, _rollouts)


def _rollouts(row: int, value: dict[str, Any]) -> list[Row | Bad]:
    columns = {name: items for name, items in value.items() if items is not None}
    if "responses" not in columns:
        raise ValueError("responses, the list of completions, is missing")
    for name, items in columns.items():
        if not isinstance(items, list):
            raise ValueError(f"{name} is not a list: {type(items).__name__}")
    for name, items in columns.items():
        if len(items) != len(columns["responses"]):
            raise ValueError(f"{name} has {len(items)} entries, responses {len(columns['responses'])}")
    if not columns["responses"]:
        raise ValueError("responses, the list of completions, is empty")
    rows: list[Row | Bad] = []
    for i in range(len(columns["responses"])):
        entry = {name: items[i] for name, items in columns.items() if items[i] is not None}
        raw = raw_json(entry)  # the line is everybody's
        try:
            rows.append(Row(row, _fields(entry), _key(entry), raw))
        except ValueError as e:
            rows.append(Bad(row, f"entry {i}: {e}", raw))
    return rows


def _key(entry: dict[str, Any]) -> tuple | None:
    """The id is that of a dataset's row, and each domain has datasets of its own."""
    if (id := entry.get("id")) is None:
        return None
    if isinstance(id, bool) or not isinstance(id, int | str):
        raise ValueError(f"id is no number and no text: {type(id).__name__}")
    return text(entry.get("domain")), id


def _fields(entry: dict[str, Any]) -> dict[str, Any]:
    for name in ("responses", "prompt"):
        if not isinstance(entry.get(name, ""), str):
            raise ValueError(f"{name} is not a text: {type(entry[name]).__name__}")
    if "responses" not in entry:
        raise ValueError("responses is missing")
    extra = {name: v for name, v in entry.items() if name not in _FIELDS}
    messages, sampling = _messages(entry, extra), _sampling(entry, extra)
    return {
        "step": integer(entry.get("global_step"), "global_step"),
        "prompt": entry.get("prompt"),
        "messages": messages,
        "prompt_format": "chat" if messages else "unknown",
        "completion": entry["responses"],
        "reward": number(entry.get("scores"), "scores"),
        "ground_truth": text(entry.get("ground_truth")) or None,
        "source": text(entry.get("source")) or None,
        "sampling": sampling,
        "extra": extra,
    }


def _messages(entry: dict[str, Any], extra: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The column is a text, mostly JSON. What is no chat stays as it is."""
    value = _parsed(entry.get("messages"))
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        return value
    if "messages" in entry:
        extra["messages"] = entry["messages"]
    return None


def _sampling(entry: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any] | None:
    """JSON of all that the batch knew; how it was sampled is its `generation_config`."""
    value = _parsed(entry.get("sampling_params"))
    if not isinstance(value, dict):
        if "sampling_params" in entry:
            extra["sampling_params"] = entry["sampling_params"]
        return None
    config = value.get("generation_config")
    if not isinstance(config, dict):
        return value
    if rest := {name: v for name, v in value.items() if name != "generation_config"}:
        extra["sampling_params"] = rest
    return config


def _parsed(value: Any) -> Any:
    try:
        return parse_json(value.encode()) if isinstance(value, str) else value
    except ValueError:
        return value
