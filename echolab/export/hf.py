"""A dataset folder for the Hub, and for `datasets.load_dataset(DIR)`: Parquet shards of each split, and a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from echolab.export.base import Shape
from echolab.export.card import card
from echolab.export.files import File
from echolab.export.select import plain

NAME, TAKES, FILES = "hf", ("clips", "rollouts", "prompts"), "data/{split}-{shard}.parquet"
FORMS = ()


def shape(what: str, form: str) -> Shape:
    return plain(what)


def beside(shape: Shape, files: Sequence[File], document: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    return {"README.md": card(document, facts, shape.schema, files)}
