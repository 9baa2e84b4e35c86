"""Rows as they are, in Parquet."""

from __future__ import annotations

from echolab.export.base import Shape
from echolab.export.select import plain

NAME, TAKES, FILES = "parquet", ("clips", "rollouts", "prompts"), "{split}.parquet"
FORMS = ()


def shape(what: str, form: str) -> Shape:
    return plain(what)
