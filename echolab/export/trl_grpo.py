"""TRL's GRPOTrainer: prompts, as text or as messages. Every other column reaches the reward functions by its name."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from echolab.export.base import CHAT, MESSAGES, PROMPT, Job, Shape, by_row
from echolab.export.prompts import messages_of
from echolab.schema import FLOAT64, STRING

NAME, TAKES, FILES = "trl-grpo", ("prompts",), "{split}.parquet"
FORMS = ("text", "chat")

_REST = (("ground_truth", STRING), ("source", STRING), ("prompt_id", STRING), ("problem_id", STRING), ("success_rate", FLOAT64))


def shape(what: str, form: str) -> Shape:
    columns = tuple(name for name, _ in _REST)
    if form == "text":
        return Shape(pa.schema([("prompt", STRING), *_REST]), ("prompt", *columns), PROMPT, lambda rows, job: rows)
    schema = pa.schema([("prompt", MESSAGES), *_REST])

    def chat(row: dict[str, Any], job: Job) -> dict[str, Any]:
        return {"prompt": messages_of(row, job), **{c: row[c] for c in columns}}

    return Shape(schema, ("prompt", "messages", *columns), CHAT, by_row(schema, chat))
