"""Evaluation files in the style of Qwen2.5-Math: JSONL, one line a problem with the list of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from echolab.readers.base import Bad, Head, Row, Source, flag, number, raw_json, rows_of_lines, scalars, text

NAME = "qwen_math"
VERSION = 1
CONTINUES = True

_LISTS = ("code", "pred", "report", "score", "pred_score", "response")
_KNOWN = frozenset({*_LISTS, "idx", "question", "gt", "gt_cot", "solution", "history", "query"})


def sniff(head: Head) -> str | None:
    first = head.first
    if not isinstance(first, dict) or not {"idx", "code", "score"} <= head.keys or not ({"gt", "pred"} & head.keys):
        return None
    return "its rows have idx and lists code and score" if isinstance(first["code"], list) else None


def read(source: Source) -> Iterator[Row | Bad]:
    return rows_of_lines(source, partial(_problem, source.rel))


def _problem(rel: str, row: int, value: dict[str, Any]) -> list[Row | Bad]:
    lists = {name: value[name] for name in _LISTS if value.get(name) is not None}
    if "code" not in lists:
        raise ValueError("code, the list of completions, is missing")
    if not lists["code"]:
        raise ValueError("code, the list of completions, is empty")
    for name, items in lists.items():
        if not isinstance(items, list):
            raise ValueError(f"{name} is not a list: {type(items).__name__}")
        if len(items) != len(lists["code"]):
            raise ValueError(f"{name} has {len(items)} entries, code {len(lists['code'])}")
    prompt, idx = text(value.get("question")), value.get("idx")
    idx = idx if isinstance(idx, int | str) else row if idx is None else text(idx)
    shared = {"prompt": prompt, "prompt_format": "unknown", "ground_truth": text(value.get("gt")) or None, "split": "eval"}
    about = scalars(value, without=_KNOWN)
    rows: list[Row | Bad] = []
    for i in range(len(lists["code"])):
        sample = {name: items[i] for name, items in lists.items()}
        try:
            rows.append(Row(row, {**shared, "sample": i, **_sample(sample, about)}, key=(rel, None, idx)))
        except ValueError as e:
            rows.append(Bad(row, f"sample {i}: {e}", raw_json({"idx": idx, "sample": i, **sample})))
    return rows


def _sample(sample: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    completion, score = sample["code"], sample.get("score")
    if not isinstance(completion, str):
        raise ValueError(f"code is not a text: {type(completion).__name__}")
    reward = number(score, "score")
    own = {name: sample[name] for name in ("pred", "report") if sample.get(name) is not None}
    if sample.get("response") not in (None, completion):
        own["response"] = sample["response"]
    return {
        "completion": completion,
        "reward": reward,
        "success_recorded": flag(score, "score") if reward in (0.0, 1.0) else None,
        "rewards": _pred_score(sample.get("pred_score")),
        "extra": {**about, **own},
    }


def _pred_score(value: Any) -> dict[str, float] | None:
    """A reward model's score, which comes as a list of one."""
    if isinstance(value, list):
        value = value[0] if value else None
    score = number(value, "pred_score")
    return None if score is None or score != score else {"pred_score": score}
