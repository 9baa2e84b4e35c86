"""prime-rl's token exports: `token_exports/step_N/rank_r.jsonl`, written with `trainer.enable_token_export`, JSONL.

A row is one sequence as it was trained on, with the entropy of each of its tokens under the trainer's weights. It has no reward
and no group: the rollout is the one with the same tokens. Numbers stand at the token that was sampled, so that none belongs to
the first token: what stands there is padding, log(vocabulary) for the entropy, and is never used."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from echolab.readers.base import Bad, Head, Row, ScoresOf, Source, integer, rows_of_lines

NAME = "prime_rl_tokens"
VERSION = 1
CONTINUES = True

SCHEMA = 1
_STABLE = "STABLE"
_SHAPE = frozenset({"schema_version", "rank", "token_ids", "loss_mask", "entropy", "trainer_logprobs"})


def sniff(head: Head) -> str | None:
    if head.schema is not None or not head.keys >= _SHAPE:
        return None
    return "its rows have a schema_version, token_ids and their entropy"


def aside(path: Path) -> str | None:
    if path.name == _STABLE and path.parent.parent.name == "token_exports":
        return "it marks the token exports beside it as complete"
    return None


def read(source: Source) -> Iterator[Row | ScoresOf | Bad]:
    if not (source.path.parent / _STABLE).exists():
        source.notes.append("no STABLE marker beside it: prime-rl may still be writing this step")
    return cast(Iterator[Row | ScoresOf | Bad], rows_of_lines(source, cast(Any, _sequence)))


def _sequence(row: int, value: dict[str, Any]) -> list[ScoresOf]:
    if value.get("schema_version") != SCHEMA:
        raise ValueError(f"schema_version is {str(value.get('schema_version'))[:20]}, only {SCHEMA} is known")
    tokens, mask = _list(value, "token_ids"), _list(value, "loss_mask")
    try:
        ids = list(array("i", tokens))
    except (TypeError, OverflowError):
        raise ValueError("token_ids is not a list of token ids") from None
    if not ids or len(mask) != len(ids) or not all(isinstance(m, int | float) and m in (0, 1) for m in mask):
        raise ValueError(f"loss_mask is not true or false for each of {len(ids)} tokens")
    if mask[0]:
        raise ValueError("the first token is in the loss mask, but no entropy belongs to it")
    entropies = _numbers(value, "entropy", len(ids))
    if None in entropies:
        raise ValueError(f"the entropy of token {entropies.index(None)} is null")
    logprobs = _numbers(value, "trainer_logprobs", len(ids))
    step = integer(value.get("export_step", value.get("step")), "step")
    known = None if None in logprobs else cast(list[float], logprobs)
    return [ScoresOf(row, ids, cast(list[float], entropies), known, step)]


def _list(value: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(value.get(name), list):
        raise ValueError(f"{name} is not a list: {type(value.get(name)).__name__}")
    return value[name]


def _numbers(value: dict[str, Any], name: str, n: int) -> list[float | None]:
    """One number for each token, null where the trainer's was none. That of the first token is padding, and 0 here."""
    numbers = _list(value, name)
    if len(numbers) != n:
        raise ValueError(f"{name} has {len(numbers)} entries for {n} tokens")
    try:
        array("d", [v for v in numbers if v is not None])
    except (TypeError, OverflowError):
        raise ValueError(f"{name} is not a list of numbers") from None
    return [0.0, *(None if v is None else float(v) for v in numbers[1:])]
