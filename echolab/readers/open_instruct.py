"""open-instruct's rollout shards (`--save_traces`): {run_name}_rollouts_{shard}.jsonl, one row a rollout, with token ids and
without texts. {run_name}_metadata.jsonl beside them names the model.

`sample_idx` counts the whole batch of a step, `prompt_idx` its prompts. Runs that write into one folder, as a run that was
started anew does, number their prompts alike: the run's name is part of a group."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from echolab.errors import Unreadable
from echolab.readers.base import Bad, Head, Row, Source, integer, look, number, rows_of_lines, text
from echolab.readers.plain import numbers, token_ids

NAME = "open_instruct"
VERSION = 1
CONTINUES = True

_SHARD = re.compile(r"(.+)_rollouts_\d+\.jsonl")
_FIELDS = frozenset(
    {
        "step", "sample_idx", "prompt_tokens", "response_tokens", "reward", "advantage", "finish_reason", "dataset",
        "ground_truth", "logprobs",
    }
)  # fmt: skip


def sniff(head: Head) -> str | None:
    known = {"step", "sample_idx", "prompt_idx", "prompt_tokens", "response_tokens"}
    return "its rows have prompt_idx, prompt_tokens and response_tokens" if head.schema is None and known <= head.keys else None


def aside(path: Path) -> str | None:
    return "metadata of an open-instruct run, read along with its rollouts" if _metadata(path) else None


def companions(path: Path) -> list[Path]:
    match = _SHARD.match(path.name)
    metadata = path.with_name(f"{match[1]}_metadata.jsonl") if match else path
    return [metadata] if _metadata(metadata) else []


def _metadata(path: Path) -> dict[str, Any]:
    """What a metadata file says; nothing if it is none."""
    if not path.name.endswith("_metadata.jsonl") or not path.is_file():
        return {}
    try:
        first = look(path).first
    except (Unreadable, OSError):
        return {}
    return first if isinstance(first, dict) and {"run_name", "git_commit", "model_name"} <= first.keys() else {}


def read(source: Source) -> Iterator[Row | Bad]:
    source.found["completeness"] = "filtered"
    if not source.start:
        source.notes.append(
            "filtered upstream: open-instruct drops groups of equal rewards before it writes, unless told not to"
        )
    match = _SHARD.match(source.path.name)
    model = next((_metadata(path).get("model_name") for path in companions(source.path)), None)
    model = model if isinstance(model, str) and model != "unknown" else None
    return rows_of_lines(source, partial(_rollout, match[1] if match else None, model))


def _rollout(run: str | None, model: str | None, row: int, value: dict[str, Any]) -> list[Row | Bad]:
    for name in ("prompt_tokens", "response_tokens"):
        if value.get(name) is None:
            raise ValueError(f"{name} is missing")
    step, prompt = integer(value.get("step"), "step"), integer(value.get("prompt_idx"), "prompt_idx")
    if prompt is None:
        raise ValueError("prompt_idx is missing")
    logprobs = value.get("logprobs")
    fields = {
        "step": step,
        "sample": integer(value.get("sample_idx"), "sample_idx"),
        "prompt_ids": token_ids(value["prompt_tokens"], "prompt_tokens"),
        "completion_ids": token_ids(value["response_tokens"], "response_tokens"),
        "logprobs": None if logprobs is None else numbers("d", logprobs, "logprobs"),
        "reward": number(value.get("reward"), "reward"),
        "advantage": number(value.get("advantage"), "advantage"),
        "finish_reason": text(value.get("finish_reason")) or None,
        "source": text(value.get("dataset")) or None,
        "ground_truth": text(value.get("ground_truth")) or None,
        "model": model,
        "extra": {k: v for k, v in value.items() if k not in _FIELDS and v is not None},
    }
    return [Row(row, fields, (run, step, prompt))]
