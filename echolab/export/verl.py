"""verl's RL datasets: prompts as messages, which verl renders itself, with the ground truth of a rule reward."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from echolab.export.base import CHAT, MESSAGES, Job, Shape, by_row
from echolab.export.prompts import messages_of
from echolab.schema import FLOAT64, INT64, STRING

NAME, TAKES, FILES = "verl", ("prompts",), "{split}.parquet"
FORMS = ("chat",)

EXTRA = pa.struct(
    [("split", STRING), ("index", INT64), ("answer", STRING), ("question", STRING),
     ("prompt_id", STRING), ("problem_id", STRING), ("success_rate", FLOAT64)]
)  # fmt: skip
SCHEMA = pa.schema(
    [("data_source", STRING), ("prompt", MESSAGES), ("ability", STRING),
     ("reward_model", pa.struct([("style", STRING), ("ground_truth", STRING)])), ("extra_info", EXTRA)]
)  # fmt: skip
NEEDS = CHAT | {
    "have no ground truth": "ground_truth IS NOT NULL",
    "have no source, by which verl chooses the reward (--source NAME gives one)": "source IS NOT NULL",
}


def shape(what: str, form: str) -> Shape:
    reads = ("prompt", "messages", "ground_truth", "source", "prompt_id", "problem_id", "success_rate")
    return Shape(SCHEMA, reads, NEEDS, by_row(SCHEMA, _row))


def _row(row: dict[str, Any], job: Job) -> dict[str, Any]:
    messages = messages_of(row, job)
    asked = [m["content"] for m in messages if m["role"] == "user"]
    return {
        "data_source": row["source"],
        "prompt": messages,
        "ability": job.ability,
        "reward_model": {"style": "rule", "ground_truth": row["ground_truth"]},
        "extra_info": {
            "split": job.split,
            "index": job.row,
            "answer": row["ground_truth"],
            "question": asked[-1] if asked else None,
            **{c: row[c] for c in ("prompt_id", "problem_id", "success_rate")},
        },
    }
