"""LLaMA-Factory, which renders prompts itself: alpaca rows (form text) or sharegpt conversations (form chat), with the
dataset_info.json that names their columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from echolab.errors import EcholabError
from echolab.export.base import CHAT, COMPLETION, Job, Shape, by_row
from echolab.export.files import File
from echolab.export.prompts import Messages, messages_of
from echolab.schema import STRING

NAME, TAKES, FILES = "llamafactory", ("clips", "rollouts"), "{split}.json"
FORMS = ("text", "chat")

ALPACA = pa.schema(
    [("instruction", STRING), ("input", STRING), ("output", STRING), ("system", STRING),
     ("history", pa.list_(pa.list_(STRING)))]
)  # fmt: skip
SHAREGPT = pa.schema(
    [("conversations", pa.list_(pa.struct([("from", STRING), ("value", STRING)]))), ("system", STRING)]
)  # fmt: skip
_ALPACA_COLUMNS = {c: c for c in ("system", "history")} | {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT_COLUMNS = {"messages": "conversations", "system": "system"}
_WHO = {"user": "human", "assistant": "gpt"}


def shape(what: str, form: str) -> Shape:
    schema, convert = (ALPACA, _alpaca) if form == "text" else (SHAREGPT, _sharegpt)
    return Shape(schema, ("prompt", "messages", "completion"), CHAT | COMPLETION, by_row(schema, convert), ends=True)


def beside(shape: Shape, files: Sequence[File], document: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """One dataset for each file, named after its split."""
    kind, columns = ("alpaca", _ALPACA_COLUMNS) if shape.schema == ALPACA else ("sharegpt", _SHAREGPT_COLUMNS)
    entries = {f.split: {"file_name": f.path, "formatting": kind, "columns": columns} for f in files}
    return {"dataset_info.json": json.dumps(entries, indent=2) + "\n"}


def _alpaca(row: dict[str, Any], job: Job) -> dict[str, Any]:
    system, turns = _turns(messages_of(row, job))
    said = [t["content"] for t in turns]
    history = [list(pair) for pair in zip(said[:-1:2], said[1::2], strict=True)]
    return {"instruction": said[-1], "input": "", "output": row["completion"], "system": system, "history": history}


def _sharegpt(row: dict[str, Any], job: Job) -> dict[str, Any]:
    system, turns = _turns(messages_of(row, job))
    said = [{"from": _WHO[t["role"]], "value": t["content"]} for t in turns]
    return {"conversations": [*said, {"from": "gpt", "value": row["completion"]}], "system": system}


def _turns(messages: Messages) -> tuple[str, Messages]:
    """The system's words, and turns of user and assistant. LLaMA-Factory skips what does not alternate."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    turns = messages[1:] if system or (messages and messages[0]["role"] == "system") else messages
    roles = [m["role"] for m in turns]
    if len(roles) % 2 == 0 or any(r != ("user", "assistant")[i % 2] for i, r in enumerate(roles)):
        raise EcholabError(
            f"a prompt has the turns {', '.join(roles) or 'none'}: LLaMA-Factory takes user and assistant in turn, and skips"
            " all else; leave such prompts out by --where"
        )
    return system, turns
