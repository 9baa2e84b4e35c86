"""Readers of foreign dumps, one file a format. A reader knows its format by `sniff` and yields rows by `read`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from echolab.errors import EcholabError, Unreadable
from echolab.readers import (
    areal,
    echorl,
    open_instruct,
    own,
    plain,
    prime_rl,
    prime_rl_tokens,
    qwen_math,
    reasoning_gym,
    roll,
    skyrl,
    slime,
    trl,
    verl,
    wandb_table,
)
from echolab.readers.base import Bad, Head, Reader, ReadOptions, Row, Scores, ScoresOf, Source, look, step_of_path

# In the order in which they are asked; `plain` takes what no trainer claims.
READERS: tuple[Reader, ...] = tuple(
    cast(Reader, m)
    for m in (
        own,
        trl,
        verl,
        reasoning_gym,
        qwen_math,
        prime_rl,
        prime_rl_tokens,
        areal,
        roll,
        open_instruct,
        slime,
        skyrl,
        echorl,
        wandb_table,
        plain,
    )
)

# Why a file of a dump is not read on its own: each is asked with the path.
ASIDES: tuple[Callable[[Path], str | None], ...] = (
    prime_rl.aside,
    prime_rl_tokens.aside,
    open_instruct.aside,
    slime.aside,
    skyrl.aside,
    echorl.aside,
)

# Of a format: the files that are read along with one of its files.
COMPANIONS: dict[str, Callable[[Path], list[Path]]] = {
    prime_rl.NAME: prime_rl.companions,
    open_instruct.NAME: open_instruct.companions,
    slime.NAME: slime.companions,
    echorl.NAME: echorl.companions,
}

# They hold token numbers of rollouts that other dumps bring, and are read after those.
ONLY_SCORES = frozenset({"prime_rl_tokens"})

__all__ = [
    "ASIDES", "COMPANIONS", "ONLY_SCORES", "READERS", "Bad", "Head", "ReadOptions", "Reader", "Row", "Scores", "ScoresOf",
    "Source", "aside", "choose", "look", "step_of_path",
]  # fmt: skip


def aside(path: Path) -> str | None:
    """Why a file of a known dump is not read on its own, if it is such a file."""
    try:
        return next((reason for ask in ASIDES if (reason := ask(path))), None)
    except (OSError, Unreadable):  # said when it is read
        return None


def choose(path: Path, format: str = "auto", mapped: bool = False) -> tuple[Reader, str] | None:
    """The reader of a file and how it was known, or None where no reader knows the file."""
    if format != "auto":
        reader = next((r for r in READERS if format == r.NAME), None)
        if reader is None:
            raise EcholabError(f"unknown format {format!r}: use auto, {', '.join(r.NAME for r in READERS)}")
        return reader, "as told by --format"
    if mapped:
        return cast(Reader, plain), "as told by --map"
    head = look(path)
    for reader in READERS:
        if reason := reader.sniff(head):
            return reader, reason
    return None
