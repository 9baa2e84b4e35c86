"""From what a reader yields to rows of `rollouts`: ids, groups, types. Rows that do not fit go back as bad."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from echolab import ids
from echolab.readers.base import Bad, Row, dumps
from echolab.recorded import check
from echolab.schema import ROLLOUTS

CACHED = 20_000  # prompts, and groups, of one reading
MADE = ("rollout_id", "group_id", "group_source", "prompt_id", "problem_id")  # by Identify, after all else fits
_SCHEMA = pa.schema([f for f in ROLLOUTS.arrow if f.name not in MADE])
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
    temperature: float | None = None
    group_size: int | None = None
    strip_template: re.Pattern[str] | None = None
    problems: Mapping[str, str] = field(default_factory=dict)  # prompt text or prompt_id -> name of the problem


@dataclass
class Stored:
    """What the readings that this one continues brought: counting goes on from there."""

    rollout_ids: frozenset[bytes] = frozenset()
    per_prompt: dict[tuple, int] = field(default_factory=dict)


@dataclass
class Identify:
    """Turns what a reader yields into rows of `rollouts`. One instance a reading, as it counts what repeats."""

    ingest_id: str
    rel: str
    overrides: Overrides
    path_step: int | None = None
    stored: Stored = field(default_factory=Stored)
    step_of_path_used: bool = False
    _seen: dict[bytes, int] = field(default_factory=dict)  # content -> occurrences; about 150 bytes a row of one file
    _problems: dict[str, str | None] = field(default_factory=dict)  # of prompts
    _groups: dict[str, str] = field(default_factory=dict)

    def prepare(self, row: Row) -> dict[str, Any]:
        """The row as columns, but for its ids: nothing is counted yet. Raises ValueError where it cannot be one."""
        o, f = self.overrides, row.fields
        if o.temperature is not None and isinstance(f.get("sampling"), dict | None):
            f["sampling"] = {**(f.get("sampling") or {}), "temperature": o.temperature}
        for name in _JSON_COLUMNS:
            if not isinstance(f.get(name), str | None):
                f[name] = dumps(f[name])
        if isinstance(f.get("rewards"), dict):
            f["rewards"] = list(f["rewards"].items()) or None
        f["ingest_id"], f["run"] = self.ingest_id, o.run
        f["role"] = o.role if o.role != "policy" else f.get("role") or "policy"  # a dump may know its experts
        if o.step is not None:
            f["step"] = o.step
        elif f.get("step") is None:
            f["step"] = self.path_step
            self.step_of_path_used = self.path_step is not None
        f["split"] = o.split or f.get("split") or "train"
        for name in ("model", "source", "tokenizer"):
            if getattr(o, name) is not None:
                f[name] = getattr(o, name)
        f.setdefault("prompt_format", "unknown")
        f["origin"] = {"file": self.rel, "row": row.row}
        _count(f)
        if row.key is None and f.get("prompt") is f.get("messages") is f.get("prompt_ids") is None:
            raise ValueError("neither a prompt nor a group: which rollouts belong together is unknown")
        if row.scores:
            check(f, row.scores)
        return f

    def __call__(self, row: Row) -> dict[str, str | None]:
        """The ids of a row that was prepared and fits the schema. Raises ValueError if it stands in the group already."""
        f = row.fields
        prompt_id, problem_id = self._prompt(f)
        rule, source, member = self._rule(f, row.key, prompt_id)
        group_id = self._group(f, rule)
        rollout_id = self._rollout(f, group_id, prompt_id)
        if member:  # counted only now that the row is one
            self.stored.per_prompt[member] = self.stored.per_prompt.get(member, 0) + 1
        made = (rollout_id, group_id, f.get("group_source") or source, prompt_id, problem_id)
        return dict(zip(MADE, made, strict=True))

    def _prompt(self, f: dict[str, Any]) -> tuple[str | None, str | None]:
        """Ids of the prompt and of the problem behind it."""
        prompt, messages, tokens = f.get("prompt"), f.get("messages"), f.get("prompt_ids")
        exact: str | bytes | None = ids.tokens(tokens) if tokens is not None else messages or prompt
        if exact is None:
            return None, None
        prompt_id = ids.prompt_id(exact)
        if prompt_id not in self._problems:
            if len(self._problems) >= CACHED:
                self._problems.clear()
            asked = json.loads(messages) if messages else None
            problem = ids.problem_text(prompt, asked if isinstance(asked, list) else None, self.overrides.strip_template)
            problems = self.overrides.problems
            problem = problems.get(prompt_id) or problems.get(prompt or "") or problem
            self._problems[prompt_id] = ids.problem_id(problem) if problem is not None else None
        return prompt_id, self._problems[prompt_id]

    def _rule(self, f: dict[str, Any], key: tuple | None, prompt_id: str | None) -> tuple[tuple, str, tuple | None]:
        """The group's key by the first rule that applies, the rule's name, and what is counted for --group-size."""
        member = None
        if key is not None:
            rule, source = ("key", *key), "explicit"
        else:
            source = "prompt_ids" if f.get("prompt_ids") is not None else "prompt_text"
            rule = ("prompt", prompt_id, f.get("ground_truth"))
            if self.overrides.group_size:
                member = (f["split"], f["step"], prompt_id, f.get("ground_truth"))
                rule = (*rule, self.stored.per_prompt.get(member, 0) // self.overrides.group_size)
        return (rule if f["step"] is not None else ("file", self.rel, *rule)), source, member

    def _group(self, f: dict[str, Any], rule: tuple) -> str:
        cached = repr((f["split"], f["step"], rule))  # as text: 1, 1.0 and True are equal, but not as ids
        if cached not in self._groups:
            if len(self._groups) >= CACHED:
                self._groups.clear()
            self._groups[cached] = ids.group_id(self.overrides.run, f["split"], f["step"], rule)
        return self._groups[cached]

    def _rollout(self, f: dict[str, Any], group_id: str, prompt_id: str | None) -> str:
        completion = ids.tokens(f["completion_ids"]) if f.get("completion_ids") is not None else f["completion"]
        sample, part = f.get("sample"), f.get("part")

        def id_of(occurrence: int) -> str:
            return ids.rollout_id(group_id, prompt_id, completion, part, sample, occurrence)

        first = id_of(0)
        content = bytes.fromhex(first)
        occurrence = self._seen.get(content, 0)
        if sample is not None:
            if occurrence or content in self.stored.rollout_ids:
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


def _count(f: dict[str, Any]) -> None:
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


def with_ids(table: pa.Table, made: Sequence[Mapping[str, str | None] | None]) -> pa.Table:
    """The table with its ids, and without the rows that got none."""
    for name in MADE:
        table = table.append_column(name, pa.array([m and m[name] for m in made], pa.string()))
    if None in made:
        table = table.filter(pa.array([m is not None for m in made], pa.bool_()))
    return table.select(ROLLOUTS.arrow.names).cast(ROLLOUTS.arrow)


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
