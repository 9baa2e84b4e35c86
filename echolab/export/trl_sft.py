"""TRL's SFTTrainer: prompt and completion, both text or both messages; or token ids with labels."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from echolab.export.base import CHAT, COMPLETION, MESSAGES, PROMPT, Job, Shape, by_row, tokenised
from echolab.export.prompts import messages_of
from echolab.schema import STRING

NAME, TAKES, FILES = "trl-sft", ("clips", "rollouts"), "{split}.parquet"
FORMS = ("text", "chat", "tokens")


def shape(what: str, form: str) -> Shape:
    if form == "tokens":
        return tokenised()
    if form == "text":
        schema = pa.schema([("prompt", STRING), ("completion", STRING)])
        return Shape(schema, ("prompt", "completion"), PROMPT | COMPLETION, lambda rows, job: rows, ends=True)
    schema = pa.schema([("prompt", MESSAGES), ("completion", MESSAGES)])
    return Shape(schema, ("prompt", "messages", "completion"), CHAT | COMPLETION, by_row(schema, _chat), ends=True)


def _chat(row: dict[str, Any], job: Job) -> dict[str, Any]:
    return {"prompt": messages_of(row, job), "completion": [{"role": "assistant", "content": row["completion"]}]}
