"""Prompts as chat messages: those that were recorded, or what stands between the role markers of a rendered prompt."""

from __future__ import annotations

import json
import re
from typing import Any

from echolab.export.base import Job

Messages = list[dict[str, str]]

_TAGGED = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)",
        r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n*(.*?)(?:<\|eot_id\|>|\Z)",
        r"<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>|\Z)",
    )
)
# One question, its special tokens lost: as verl writes prompts.
_BARE = re.compile(r"(?:system\n(.*?)\n)?user\n(.*?)\n?(?:assistant\n?(?:<think>\n?)?)?", re.DOTALL)
_DEEPSEEK = re.compile(r"(?:<｜begin▁of▁sentence｜>)?(.*?)<｜User｜>(.*?)(?:<｜Assistant｜>.*)?", re.DOTALL)
_INST = re.compile(r"(?:<s>)?\s*\[INST\]\s*(.*?)\s*\[/INST\]\s*", re.DOTALL)
BARE = r"^(?:system\n|user\n)"  # in SQL: a template without its special tokens


def messages_of(row: dict[str, Any], job: Job) -> Messages:
    """Of a row with prompt and messages. What a message holds beside its text is left out, and counted."""
    if row["messages"] is not None:
        return [_message(m, job) for m in json.loads(row["messages"])]
    return split(row["prompt"])


def split(prompt: str) -> Messages:
    """The messages of a rendered prompt without the turn that it opens; a prompt without markers is what a user says."""
    for pattern in _TAGGED:
        turns = pattern.findall(prompt)
        if any(role == "user" for role, _ in turns):
            turns = turns[:-1] if turns[-1][0] in ("assistant", "model") else turns
            return [{"role": "assistant" if r == "model" else r, "content": t} for r, t in turns]
    for pattern in (_BARE, _DEEPSEEK):
        if found := pattern.fullmatch(prompt):
            return _asked(found[2], found[1])
    found = _INST.fullmatch(prompt)
    return _asked(found[1] if found else prompt)


def _asked(user: str, system: str | None = None) -> Messages:
    asked = [{"role": "user", "content": user}]
    return [{"role": "system", "content": system}, *asked] if system else asked


def _message(message: dict[str, Any], job: Job) -> dict[str, str]:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)
    elif content is not None and not isinstance(content, str):
        job.notes["messages have a content that is no text: it is written as JSON"] += 1
        content = json.dumps(content, ensure_ascii=False)
    if rest := sorted(k for k, v in message.items() if k not in ("role", "content") and v is not None):
        job.notes[f"messages have {', '.join(rest)} beside role and content: left out"] += 1
    return {"role": _text(message.get("role") or "user", job), "content": _text(content or "", job)}


def _text(text: Any, job: Job) -> str:
    """JSON can hold half of a character (a lone surrogate), which no file of text can."""
    text = str(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        job.notes["messages hold half of a character: U+FFFD stands in its place"] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
