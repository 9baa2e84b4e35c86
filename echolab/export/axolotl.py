"""axolotl: segments of text with a label (input_output), or tokenised rows. Neither gets an end token added."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from echolab.export.base import COMPLETION, PROMPT, Job, Shape, by_row, tokenised
from echolab.schema import BOOL, STRING

NAME, TAKES, FILES = "axolotl", ("clips", "rollouts"), "{split}.jsonl"
FORMS = ("text", "tokens")
SCHEMA = pa.schema([("segments", pa.list_(pa.struct([("label", BOOL), ("text", STRING)])))])


def shape(what: str, form: str) -> Shape:
    if form == "tokens":
        return tokenised()
    return Shape(SCHEMA, ("prompt", "completion"), PROMPT | COMPLETION, by_row(SCHEMA, _row))


def _row(row: dict[str, Any], job: Job) -> dict[str, Any]:
    return {"segments": [{"label": False, "text": row["prompt"]}, {"label": True, "text": row["completion"]}]}
