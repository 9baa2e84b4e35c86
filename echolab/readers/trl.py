"""TRL's completions_*.parquet, written by `GRPOConfig(log_completions=True)`.

It has no group id: groups are blocks of `num_generations` consecutive rows, and the size stands nowhere in the file. It is
inferred from the runs of equal prompts, and the recorded advantages, which TRL computes within each block, confirm it.

TRL logs its buffer, the last `generation_batch_size` rows, as often as it logs: a file may begin with the last rows of the
file before it. These are the same rollouts, and get the ids that they have there."""

from __future__ import annotations

import hashlib
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from echolab.errors import EcholabError, Unreadable
from echolab.readers.base import Bad, Head, Row, Source, hash_whole, integer, number, open_parquet, parquet_rows, raw_json

NAME = "trl"
VERSION = 2
CONTINUES = False

TOLERANCE = 1e-3  # advantages are float32
STD_EPSILON = 1e-4  # TRL's

DIGEST = 16  # bytes

_FILE = re.compile(r"completions_(\d+)\.parquet")
_FIXED = ("step", "prompt", "completion", "advantage")
# A table with any of these was not written by TRL's logging.
_OTHERS = frozenset({"rollout_id", "group_id", "sample", "run", "completion_ids", "messages", "split"})


def sniff(head: Head) -> str | None:
    if head.schema is None or not set(_FIXED) <= head.keys or _OTHERS & head.keys:
        return None
    text_columns = all(_is_text(head.schema.field(name).type) for name in ("prompt", "completion"))
    rewards = [f.name for f in head.schema if pa.types.is_floating(f.type) and f.name not in _FIXED]
    if not text_columns or not rewards or not pa.types.is_integer(head.schema.field("step").type):
        return None
    return f"Parquet with step, prompt, completion, advantage and the rewards {', '.join(rewards)}"


def _is_text(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return pa.types.is_string(type) or pa.types.is_large_string(type)


def read(source: Source) -> Iterator[Row | Bad]:
    hash_whole(source)
    if source.size == 0:
        return
    hint = source.found.get("group_size")
    weights, size = _prepare(source)
    again = _logged_before(source, hint)
    for item in parquet_rows(source):
        if isinstance(item, Bad):
            yield item
        elif item[0] >= len(again):
            yield rollout(source, *item, weights, size)
        else:
            yield _as_before(*item, *again[item[0]], weights)


def _as_before(row: int, values: dict[str, Any], first: Source, at: int, step: int, weights: dict[str, float]) -> Row | Bad:
    """A row that an earlier file holds, as it is there: then it gets the same ids."""
    found = rollout(first, at, values, weights, first.found["group_size"])
    found.row = row
    if isinstance(found, Row):
        found.fields["step"] = step
    return found


def rollout(source: Source, row: int, values: dict[str, Any], weights: dict[str, float], size: int | None) -> Row | Bad:
    """One row of a completions table."""
    try:
        fields = _fields(values, weights)
    except ValueError as e:
        return Bad(row, str(e), raw_json(values))
    if size:
        return Row(row, {**fields, "group_source": "contiguous"}, key=(source.rel, row // size))
    return Row(row, fields)


def _fields(values: dict[str, Any], weights: dict[str, float]) -> dict[str, Any]:
    completion = values["completion"]
    if not isinstance(completion, str):
        raise ValueError("completion is missing" if completion is None else "completion is not a text")
    rewards = {name: number(values[name], name) for name in weights}
    rewards = {name: r for name, r in rewards.items() if r is not None and not math.isnan(r)}  # NaN: the function returned None
    advantage = number(values.get("advantage"), "advantage")
    return {
        "step": integer(values["step"], "step"),
        "prompt": values["prompt"],
        "prompt_format": "rendered",
        "completion": completion,
        "rewards": rewards or None,
        "reward": sum(weights[name] * r for name, r in rewards.items()) if rewards else None,
        "advantage": None if advantage is None or math.isnan(advantage) else advantage,
        "split": "train",
        "extra": {k: v for k, v in values.items() if k not in weights and k not in _FIXED and v is not None},
    }


def _prepare(source: Source) -> tuple[dict[str, float], int | None]:
    """The reward columns with their weights, and the group size."""
    file = open_parquet(source.path)
    try:
        weights = _weights(source, file.schema_arrow)
        facts = _facts(file, weights)
    except (pa.ArrowException, OSError) as e:
        raise Unreadable(f"{source.path}: damaged Parquet file ({str(e).splitlines()[0]})") from None
    finally:
        file.close()
    return weights, group_size(source, facts)


def group_size(source: Source, facts: Facts) -> int | None:
    """How many consecutive rows are a group, as given or inferred; None where the prompt has to decide."""
    if source.options.group_size is not None:
        size, note = _given_size(source.options.group_size, facts)
    else:
        hint = source.found.get("group_size")
        size, note = _infer_size(facts, hint)
        if hint and note and size != hint:
            note += f"; the run's other dumps have groups of {hint}: it may be an evaluation's, written in place of training's"
    source.found["group_size"] = size
    if note:
        source.notes.append(note)
    return size


def _logged_before(source: Source, hint: int | None) -> list[tuple[Source, int, int]]:
    """Of the rows that the file begins with and that earlier files hold: the first of these, the row there, its step."""
    again: list[tuple[Source, int, int]] = []
    own = after = b""
    shift = 0  # the file's row i is row i + shift of the one that `after` stands for
    for path in _earlier(source.path):
        try:
            first = Source(path, str(PurePosixPath(source.rel).with_name(path.name)), "", source.options)
            first.found["group_size"] = hint
            _, size = _prepare(first)
            before, steps = _digests(path)
        except (EcholabError, OSError):
            source.notes.append(f"{path.name} before it cannot be read: whether rows of it are here again is unknown")
            break
        own = own or _digests(source.path)[0]
        n = _overlap(before, after or own, size or 1)
        back = n - shift
        shift += len(steps) - n
        known = [(first, i + shift, step) for i, step in enumerate(steps[shift : shift + max(back, 0)]) if step is not None]
        if len(known) < max(back, 1):
            break
        again[:back] = known
        after = before
    if again:
        files = Counter((first.path.name, step) for first, _, step in again)
        rows = len(own) // DIGEST
        said = (f"{n} of its {rows} rows are those of {name} again (step {step})" for (name, step), n in files.items())
        source.notes.append(f"{'; '.join(said)}: TRL logs its buffer until it is replaced")
    return again


def _earlier(path: Path) -> list[Path]:
    """The dumps of lower steps in the same folder, the latest first."""
    own = _FILE.fullmatch(path.name)
    if not own:
        return []
    found = {int(m[1]): path.with_name(m[0]) for name in os.listdir(path.parent) if (m := _FILE.fullmatch(name))}
    return [found[step] for step in sorted(found, reverse=True) if step < int(own[1])]


def _digests(path: Path) -> tuple[bytes, list[int | None]]:
    """Of each row a digest of what it holds but for the step, one after the other; and the steps."""
    digests, steps = bytearray(), []
    simple = (_is_text, pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    try:
        with open_parquet(path) as file:
            types = {f.name: f.type for f in file.schema_arrow if f.name != "step" and any(t(f.type) for t in simple)}
            for batch in file.iter_batches(batch_size=64, columns=["step", *types]):
                for values in zip(*(_values(batch[name]) for name in types), strict=True):
                    digests += hashlib.blake2b(repr((*types, values)).encode(), digest_size=DIGEST).digest()
                steps += (s if isinstance(s, int) else None for s in _values(batch["step"]))
    except (pa.ArrowException, OSError) as e:
        raise Unreadable(f"{path}: damaged Parquet file ({str(e).splitlines()[0]})") from None
    return bytes(digests), steps


def _overlap(before: bytes, after: bytes, least: int) -> int:
    """How many rows at the end of one file are those at the beginning of the other, if at least so many are."""
    most = min(len(before), len(after)) // DIGEST
    return next((n for n in range(most, least - 1, -1) if before.endswith(memoryview(after)[: n * DIGEST])), 0)


def _weights(source: Source, schema: pa.Schema) -> dict[str, float]:
    missing = [name for name in ("step", "prompt", "completion") if name not in schema.names]
    if missing:
        raise Unreadable(f"{source.path}: not a TRL dump, it has no column {', '.join(missing)}")
    numeric = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean)
    columns = {f.name: pa.types.is_floating(f.type) for f in schema if any(t(f.type) for t in numeric)}
    return weights_of(source, columns)


def weights_of(source: Source, numeric: dict[str, bool]) -> dict[str, float]:
    """The weights of the reward columns: those given, else 1 for each of the columns that hold floats."""
    columns = [name for name in numeric if name not in _FIXED]
    given = source.options.reward_weights
    if unknown := [name for name in given if name not in columns]:
        raise EcholabError(f"{source.path}: no reward column {', '.join(unknown)}; there are: {', '.join(columns) or 'none'}")
    return dict(given) or {name: 1.0 for name in columns if numeric[name]}


@dataclass
class Facts:
    """What the group size is inferred from: the lengths of the runs of equal prompts; total rewards; advantages."""

    runs: list[int] = field(default_factory=list)
    rewards: array = field(default_factory=lambda: array("d"))
    advantages: array = field(default_factory=lambda: array("d"))  # NaN: not recorded

    @property
    def recorded(self) -> list[float]:
        return [a for a in self.advantages if not math.isnan(a)]

    def blocks(self, size: int) -> Iterator[tuple[array, array]]:
        for i in range(0, len(self.rewards) // size * size, size):
            yield self.rewards[i : i + size], self.advantages[i : i + size]


def _facts(file: Any, weights: dict[str, float]) -> Facts:
    facts, last = Facts(), None
    has_advantage = "advantage" in file.schema_arrow.names
    columns = ["step", "prompt", *weights, *(["advantage"] if has_advantage else [])]
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        for visit in zip(_values(batch["step"]), _values(batch["prompt"]), strict=True):
            if facts.runs and visit == last:
                facts.runs[-1] += 1
            else:
                facts.runs.append(1)
            last = visit
        total = [0.0] * batch.num_rows
        for name, weight in weights.items():  # as TRL sums: a function that returned None counts as 0
            values = map(as_float, _values(batch[name]))
            total = [t if math.isnan(v) else t + weight * v for t, v in zip(total, values, strict=True)]
        facts.rewards.extend(total)
        advantages = _values(batch["advantage"]) if has_advantage else [None] * batch.num_rows
        facts.advantages.extend(map(as_float, advantages))
    return facts


def _values(column: pa.Array) -> list[Any]:
    """For comparisons: text as its bytes, also where they are not UTF-8."""
    if _is_text(column.type):
        column = column.cast(pa.large_string()).cast(pa.large_binary())
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # no text and no number at that
        return [None] * len(column)


def as_float(value: Any) -> float:
    """NaN where it is no number."""
    try:
        found = number(value, "")
    except ValueError:
        return math.nan
    return math.nan if found is None else found


def _centred(rewards: array) -> list[float]:
    mean = sum(rewards) / len(rewards)
    return [r - mean for r in rewards]


def _standardised(rewards: array) -> list[float]:
    centred = _centred(rewards)
    std = math.sqrt(sum(c * c for c in centred) / (len(centred) - 1))
    return [c / (std + STD_EPSILON) for c in centred]


FORMULAS = {"(reward - mean) / (std + 1e-4)": _standardised, "reward - mean": _centred}  # of scale_rewards


def _formula(facts: Facts, size: int) -> str | None:
    """The formula that the recorded advantages follow in every full block of this size."""
    if size < 2 or not any(abs(a) > TOLERANCE for a in facts.recorded):
        return None  # zeros fit every size
    for name, formula in FORMULAS.items():
        pairs = (pair for rewards, advantages in facts.blocks(size) for pair in zip(advantages, formula(rewards), strict=True))
        if all(math.isnan(a) or abs(a - expected) <= TOLERANCE for a, expected in pairs):
            return name
    return None


def _sums_to_zero(facts: Facts, size: int) -> bool:
    """Less than a formula says, as it holds for every multiple of the true size too."""
    if not any(abs(a) > TOLERANCE for a in facts.recorded):
        return False
    return all(abs(sum(advantages)) <= TOLERANCE * size for _, advantages in facts.blocks(size))


def _infer_size(facts: Facts, hint: int | None) -> tuple[int | None, str]:
    """`hint`: the size that the run's other dumps have, for a file that leaves it open."""
    if not facts.runs:
        return None, ""
    gcd = math.gcd(*facts.runs)
    if gcd == 1:
        return None, "no group size fits the runs of equal prompts: rows are grouped by their prompt; set it by --group-size"
    sizes = [n for n in range(gcd, 1, -1) if gcd % n == 0]
    size = next((n for n in sizes if _formula(facts, n)), None)
    if size is None and hint in sizes:
        return hint, f"{_blocks_of(hint)}, as in the run's other dumps; {_confirmation(facts, hint)}"
    size = size or next((n for n in sizes if _sums_to_zero(facts, n)), gcd)
    return size, f"{_blocks_of(size)}, as the runs of equal prompts say; {_confirmation(facts, size)}"


def _given_size(size: int, facts: Facts) -> tuple[int, str]:
    if size < 1:
        raise EcholabError(f"--group-size must be at least 1, not {size}")
    note = f"{_blocks_of(size)} (--group-size); {_confirmation(facts, size)}"
    if any(border % size for border in list(accumulate(facts.runs))[:-1]):
        note += "; but some blocks hold different prompts"
    if short := len(facts.rewards) % size:
        note += f"; the last block has only {short}"
    return size, note


def _blocks_of(size: int) -> str:
    return f"groups are blocks of {size} consecutive rows"


def _confirmation(facts: Facts, size: int) -> str:
    if formula := _formula(facts, size):
        return f"the recorded advantages confirm it: they are {formula} of each block"
    if _sums_to_zero(facts, size):
        return "the recorded advantages agree: they add up to 0 in each block"
    if not facts.recorded:
        return "no advantages are recorded that could confirm it"
    if not any(abs(a) > TOLERANCE for a in facts.recorded):
        return "the recorded advantages are all zero and do not confirm it"
    return "the recorded advantages do not confirm it (reward weights other than 1? see --reward-weights)"
