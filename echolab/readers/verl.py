"""verl's rollout dumps: `trainer.rollout_data_dir` and `trainer.validation_data_dir`, JSONL, one row a rollout.

v0 has no group id and writes what JSON does not know as text (`default=str`); v1 has a uid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import PurePath
from typing import Any

from echolab.readers.base import Bad, Head, Row, Source, flag, integer, look, number, rows_of_lines, text

NAME = "verl"
VERSION = 1
CONTINUES = True

_UID = re.compile(r"(.+)_([0-9]{1,9})_([0-9]{1,9})", re.DOTALL)  # {prompt uid}_{session}_{index of output}
_EVAL_PATH = re.compile(r"(?:^|[^a-z])(?:val|vals|valid|validation|validate|eval|evals|evaluation)(?:[^a-z]|$)", re.IGNORECASE)
_FIELDS = frozenset({"input", "output", "gts", "score", "step"})


def sniff(head: Head) -> str | None:
    if head.schema is not None or not {"input", "output", "score"} <= head.keys:
        return None
    return f"its rows have input, output and score{' and a uid' if 'uid' in head.keys else ''}"


def read(source: Source) -> Iterator[Row | Bad]:
    split = _describe(source)
    return rows_of_lines(source, partial(_rollouts, split))


def _describe(source: Source) -> str:
    """Version and split, by the path and the file's first row. A continued file keeps them, wherever it lies now."""
    if source.start and "split" in source.found:
        return source.found["split"]
    first = look(source.path).first
    first = first if isinstance(first, dict) else {}
    source.found["version"] = "v1" if "uid" in first else "v0"
    source.found["split"] = "train"
    if any(_EVAL_PATH.search(part) for part in PurePath(source.typed).parts):
        source.found["split"] = "eval"
        source.notes.append("taken as split 'eval', as its path says (--split decides otherwise)")
    elif "uid" not in first and first.get("reward") is not None and _same_number(first["reward"], first.get("score")):
        source.found["split"] = "eval"
        source.notes.append("taken as split 'eval': a guess, as rows of verl's validation have a reward equal to the score")
    return source.found["split"]


def _same_number(a: Any, b: Any) -> bool:
    try:
        return number(a, "") == number(b, "")
    except ValueError:
        return False


def _rollouts(split: str, row: int, value: dict[str, Any]) -> list[Row | Bad]:
    completion, prompt, score = value.get("output"), value.get("input"), value.get("score")
    if not isinstance(completion, str):
        raise ValueError("output is missing" if completion is None else f"output is not a text: {type(completion).__name__}")
    if not isinstance(prompt, str | None):
        raise ValueError(f"input is not a text: {type(prompt).__name__}")
    extra = {k: v for k, v in value.items() if k not in _FIELDS and v is not None}
    if isinstance(score, str):
        extra["score"] = score
    fields = {
        "prompt": prompt,
        "prompt_format": "rendered",
        "completion": completion,
        "reward": number(score, "score"),
        "success_recorded": _acc(extra),
        "ground_truth": text(value.get("gts")) or None,
        "step": integer(value.get("step"), "step"),
        "split": split,
        "extra": extra,
    }
    key = None
    if (uid := value.get("uid")) is not None:
        match = _UID.fullmatch(uid) if isinstance(uid, str) else None
        key = (match[1],) if match else (text(uid),)
        if match:
            fields |= {"sample": int(match[2]), "part": int(match[3])}
    return [Row(row, fields, key)]


def _acc(extra: dict[str, Any]) -> bool | None:
    """The recorded verdict. It leaves `extra` unless it was no plain boolean there."""
    try:
        success = flag(extra.get("acc"), "acc")
    except ValueError:
        return None
    if isinstance(extra.get("acc"), bool):
        del extra["acc"]
    return success
