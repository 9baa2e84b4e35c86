"""OpenRLHF's prompts: input (text or messages), label (the ground truth) and datasource."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from echolab.export.base import CHAT, MESSAGES, PROMPT, Job, Shape, by_row
from echolab.export.prompts import messages_of
from echolab.schema import STRING

NAME, TAKES, FILES = "openrlhf", ("prompts",), "{split}.jsonl"
FORMS = ("text", "chat")
DATASOURCE = "default"  # OpenRLHF's own word for prompts of no named source


def shape(what: str, form: str) -> Shape:
    chat = form == "chat"
    schema = pa.schema([("input", MESSAGES if chat else STRING), ("label", STRING), ("datasource", STRING)])

    def convert(row: dict[str, Any], job: Job) -> dict[str, Any]:
        asked = messages_of(row, job) if chat else row["prompt"]
        return {"input": asked, "label": row["ground_truth"], "datasource": row["source"] or DATASOURCE}

    reads = ("prompt", "messages", "ground_truth", "source")
    return Shape(schema, reads, CHAT if chat else PROMPT, by_row(schema, convert))
