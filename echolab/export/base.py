"""What a target format says of itself, and what the formats share.

Each format is a module with NAME, TAKES (clips, rollouts, prompts: what it can hold; the first is the usual), CONTAINER, FORMS
(how a prompt may be written; the first is the usual, none: rows as they are) and `shape(what, form)`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from echolab.schema import STRING, TOKEN_IDS

MESSAGES = pa.list_(pa.struct([("role", STRING), ("content", STRING)]))
IGNORED = -100  # label of a token that is not trained on

PROMPT = {
    "have no prompt": "prompt IS NOT NULL",
    "are chats, whose text depends on a template": "prompt_format IS DISTINCT FROM 'chat'",
}
CHAT = {"have no prompt": "coalesce(messages, prompt) IS NOT NULL"}
COMPLETION = {
    "have no text": "completion IS NOT NULL",
    "have tokens that the loss leaves out, which text cannot say": "NOT coalesce(list_contains(loss_mask, false), false)",
}
IDS = {
    "have no prompt_ids": "prompt_ids IS NOT NULL",
    "have no token ids": "completion_ids IS NOT NULL",
    "have ids of an unnamed tokenizer": "tokenizer IS NOT NULL",
}


@dataclass
class Job:
    """What a converter may ask of the export, and where it counts what should be said of it."""

    ability: str
    split: str = "train"
    row: int = 0  # rows of this split before the ones that are converted
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Shape:
    """The rows of a format: their exact columns, the columns they are made from, and what none of these rows may lack
    (a reason, and the SQL condition that holds for good ones)."""

    schema: pa.Schema
    reads: tuple[str, ...]
    needs: Mapping[str, str]
    convert: Callable[[pa.Table, Job], pa.Table]
    ends: bool = False  # the trainer ends every completion with a token of its own


def by_row(schema: pa.Schema, convert: Callable[[dict[str, Any], Job], dict[str, Any]]) -> Callable[[pa.Table, Job], pa.Table]:
    """A converter of tables from one of rows."""

    def convert_table(rows: pa.Table, job: Job) -> pa.Table:
        made = []
        for row in rows.to_pylist():
            made.append(convert(row, job))
            job.row += 1
        return pa.Table.from_pylist(made, schema=schema)

    return convert_table


def tokenised() -> Shape:
    """Token ids and labels, as axolotl and TRL take them: the prompt and masked tokens are not trained on."""
    schema = pa.schema([("input_ids", TOKEN_IDS), ("attention_mask", TOKEN_IDS), ("labels", TOKEN_IDS)])

    def convert(row: dict[str, Any], job: Job) -> dict[str, Any]:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        mask = row["loss_mask"] or [True] * len(completion)
        labels = [token if counted else IGNORED for token, counted in zip(completion, mask, strict=True)]
        return {
            "input_ids": prompt + completion,
            "attention_mask": [1] * (len(prompt) + len(completion)),
            "labels": [IGNORED] * len(prompt) + labels,
        }

    return Shape(schema, ("prompt_ids", "completion_ids", "loss_mask"), IDS, by_row(schema, convert))
