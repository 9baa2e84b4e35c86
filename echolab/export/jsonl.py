"""Rows as they are, one JSON object a line. NaN is null."""

from __future__ import annotations

from echolab.export.base import Shape
from echolab.export.select import plain

NAME, TAKES, FILES = "jsonl", ("clips", "rollouts", "prompts"), "{split}.jsonl"
FORMS = ()


def shape(what: str, form: str) -> Shape:
    return plain(what)
