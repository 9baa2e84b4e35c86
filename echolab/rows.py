"""From what a reader yields to rows of `rollouts`: ids, groups, types. Rows that do not fit go back as bad."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from echolab import ids
from echolab.readers.base import Bad, Row, dumps
from echolab.schema import ROLLOUTS

CACHED_PROMPTS = 20_000
_SCHEMA = ROLLOUTS.arrow
_JSON_COLUMNS = ("messages", "sampling", "extra")
_MISFITS = (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError)


@dataclass
class Overrides:
    """What the user says of all rows of a reading; it wins over what the dump says."""

    run: str
    role: str = "policy"
    step: int | None = None
    split: str | None = None
    model: str | None = None
    source: str | None = None
    tokenizer: str | None = None
    group_size: int | None = None
    strip_template: re.Pattern[str] | None = None
    problems: Mapping[str, str] = field(default_factory=dict)  # prompt text or prompt_id -> name of the problem


@dataclass
class Stored:
    """What earlier readings of the same source brought: counting goes on from there."""

    rollout_ids: frozenset[bytes] = frozenset()
    per_prompt: dict[tuple, int] = field(default_factory=dict)


@dataclass
class Identify:
    """Gives the rows of one reading their ids. One instance a reading, as it counts what repeats."""

    ingest_id: str
    rel: str
    overrides: Overrides
    path_step: int | None = None
    stored: Stored = field(default_factory=Stored)
    step_of_path_used: bool = False
    _seen: dict[bytes, int] = field(default_factory=dict)  # content -> occurrences; about 150 bytes a row of one file
    _prompts: dict[Any, tuple[str | None, str | None]] = field(default_factory=dict)
    _groups: dict[Any, str] = field(default_factory=dict)

    def __call__(self, row: Row) -> dict[str, Any]:
        """The row as columns of `rollouts`. Raises ValueError with the reason where it cannot be one."""
        o, f = self.overrides, row.fields
        for name in _JSON_COLUMNS:
            if not isinstance(f.get(name), str | None):
                f[name] = dumps(f[name])
        if isinstance(f.get("rewards"), dict):
            f["rewards"] = list(f["rewards"].items()) or None
        f["ingest_id"], f["run"], f["role"] = self.ingest_id, o.run, o.role
        if o.step is not None:
            f["step"] = o.step
        elif f.get("step") is None:
            f["step"] = self.path_step
            self.step_of_path_used = self.path_step is not None
        if not isinstance(f["step"], int | None):
            raise ValueError(f"step is not a whole number: {str(f['step'])[:60]!r}")
        f["split"] = o.split or f.get("split") or "train"
        for name in ("model", "source", "tokenizer"):
            if getattr(o, name) is not None:
                f[name] = getattr(o, name)
        f.setdefault("prompt_format", "unknown")
        f["origin"] = {"file": self.rel, "row": row.row}
        self._count(f)
        f["prompt_id"], f["problem_id"] = self._prompt(f)
        f["group_id"] = self._group(f, row.key)
        f["rollout_id"] = self._rollout(f)
        return f

    def _count(self, f: dict[str, Any]) -> None:
        if (text := f.get("completion")) is not None:
            f["n_chars"] = len(text)
        elif f.get("completion_ids") is None:
            raise ValueError("no completion")
        for tokens, count in (("completion_ids", "n_completion_tokens"), ("prompt_ids", "n_prompt_tokens")):
            if f.get(tokens) is not None:
                f[count] = len(f[tokens])
        for name in ("logprobs", "loss_mask"):
            values, n = f.get(name), f.get("n_completion_tokens")
            if values is not None and n is not None and len(values) != n:
                raise ValueError(f"{len(values)} {name} for {n} completion tokens")

    def _prompt(self, f: dict[str, Any]) -> tuple[str | None, str | None]:
        """Ids of the prompt and of the problem behind it."""
        prompt, messages, tokens = f.get("prompt"), f.get("messages"), f.get("prompt_ids")
        exact: str | bytes | None = ids.tokens(tokens) if tokens is not None else messages or prompt
        if exact is None:
            return None, None
        known = self._prompts.get((exact, prompt, messages))
        if known is None:
            if len(self._prompts) >= CACHED_PROMPTS:
                self._prompts.clear()
            prompt_id = ids.prompt_id(exact)
            asked = json.loads(messages) if messages else None
            problem = ids.problem_text(prompt, asked if isinstance(asked, list) else None, self.overrides.strip_template)
            problems = self.overrides.problems
            problem = problems.get(prompt_id) or problems.get(prompt or "") or problem
            known = prompt_id, ids.problem_id(problem) if problem is not None else None
            self._prompts[exact, prompt, messages] = known
        return known

    def _group(self, f: dict[str, Any], key: tuple | None) -> str:
        """The first rule that applies: the dump's own key, else the prompt with the gold answer."""
        step, split, size = f["step"], f["split"], self.overrides.group_size
        if key is not None:
            f.setdefault("group_source", "explicit")
            rule: tuple = ("key", *key)
        elif f["prompt_id"] is None:
            raise ValueError("neither a prompt nor a group: which rollouts belong together is unknown")
        else:
            f["group_source"] = "prompt_ids" if f.get("prompt_ids") is not None else "prompt_text"
            rule = ("prompt", f["prompt_id"], f.get("ground_truth"))
            if size:
                counts, of = self.stored.per_prompt, (split, step, f["prompt_id"], f.get("ground_truth"))
                rule = (*rule, counts.get(of, 0) // size)
                counts[of] = counts.get(of, 0) + 1
        if step is None:
            rule = ("file", self.rel, *rule)
        known = self._groups.get((split, step, rule))
        if known is None:
            if len(self._groups) >= CACHED_PROMPTS:
                self._groups.clear()
            known = self._groups[split, step, rule] = ids.group_id(self.overrides.run, split, step, rule)
        return known

    def _rollout(self, f: dict[str, Any]) -> str:
        completion = ids.tokens(f["completion_ids"]) if f.get("completion_ids") is not None else f["completion"]
        sample, part = f.get("sample"), f.get("part")

        def id_of(occurrence: int) -> str:
            return ids.rollout_id(f["group_id"], f["prompt_id"], completion, part, sample, occurrence)

        first = id_of(0)
        content = bytes.fromhex(first)
        occurrence = self._seen.get(content, 0)
        if sample is not None:
            if occurrence:
                raise ValueError(f"the same rollout again (sample {sample} of its group, same part and text)")
            self._seen[content] = 1
            return first
        # The k-th time that this content stands in the group, counted on from what the source already stored.
        rollout = id_of(occurrence) if occurrence else first
        while bytes.fromhex(rollout) in self.stored.rollout_ids:
            occurrence += 1
            rollout = id_of(occurrence)
        self._seen[content] = occurrence + 1
        return rollout


def to_table(rows: list[dict[str, Any]], reject: Callable[[int, str], None]) -> pa.Table:
    """Rows as Arrow. Those that do not fit the schema are given to `reject` by index, with the reason, and left out."""
    indices = range(len(rows))
    while True:
        arrays, bad = [], {}
        named = set().union(*rows)
        for column in _SCHEMA:
            if column.name not in named and column.nullable:
                arrays.append(pa.nulls(len(rows), column.type))
                continue
            values = [r.get(column.name) for r in rows]
            try:
                array = pa.array(values, column.type)
                if not column.nullable and array.null_count:
                    bad.update({i: f"{column.name} is missing" for i, v in enumerate(values) if v is None})
                arrays.append(array)
            except _MISFITS:
                misfits = {i: reason for i, v in enumerate(values) if (reason := _misfit(column, v))}
                if not misfits:
                    raise
                bad.update(misfits)
        if not bad:
            return pa.Table.from_arrays(arrays, schema=_SCHEMA)
        for i, reason in bad.items():
            reject(indices[i], reason)
        kept = [i for i in range(len(rows)) if i not in bad]
        indices, rows = [indices[i] for i in kept], [rows[i] for i in kept]


def _misfit(column: pa.Field, value: Any) -> str | None:
    try:
        pa.array([value], column.type)
    except UnicodeEncodeError:
        return f"{column.name}: text that is not Unicode (a lone surrogate)"
    except _MISFITS:
        return f"{column.name}: expected {column.type}, got {type(value).__name__} {str(value)[:60]!r}"
    return None


def bad_of(row: Row, reason: str) -> Bad:
    """A row of a reader that turned out to be unusable, with its bytes as they stood or as JSON."""
    raw = row.raw or json.dumps(row.fields, default=str, ensure_ascii=True).encode()
    return Bad(row.row, reason, raw)
