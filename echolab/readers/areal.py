"""AReaL's rollout dumps (`rollout.dump_to_file=true`): {rollout|eval-rollout}/{version}/{task_id}.jsonl, one row a sample.

A group is a task in one version folder, and that version is its step: its samples may have begun and ended under others. The
files are opened to append. A run that was resumed writes its tasks into them once more: then sample numbers begin anew, and
what follows is a group of its own, but for rows that repeat earlier ones word for word, which are no new rollouts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import PurePath
from typing import Any

from echolab.readers.base import Bad, Head, Row, Source, integer, json_lines, look, number, rows_of_lines, text

NAME = "areal"
VERSION = 1
CONTINUES = True

_FOLDER = re.compile(r"(?:^|/)(rollout|eval-rollout)/(\d{1,18})/[^/]+$")
_FIELDS = frozenset(
    {"task_id", "sample_idx", "seqlen", "prompt_len", "tail_version", "reward", "prompt", "completion", "original_reward"}
)


def sniff(head: Head) -> str | None:
    known = {"task_id", "sample_idx", "tail_version", "prompt", "completion", "reward"}
    return "its rows have task_id, sample_idx and tail_version" if head.schema is None and known <= head.keys else None


@dataclass
class _Visits:
    """Which sampling of its task a row belongs to: the first is 0."""

    last: dict[Any, tuple[int, int]] = field(default_factory=dict)  # task -> number of the sampling, of its last sample
    seen: set[bytes] = field(default_factory=set)

    def of(self, value: dict[str, Any]) -> int:
        """Raises ValueError if the row stands in the file already."""
        task, sample = _task(value), integer(value.get("sample_idx"), "sample_idx")
        visit, last = self.last.get(task, (0, -1))
        if sample is None:
            return visit
        visit += sample <= last
        self.last[task] = visit, sample
        said = (task, sample, *(value.get(k) for k in ("head_version", "tail_version", "prompt", "completion")))
        digest = blake2b(repr(said).encode("utf-8", "backslashreplace"), digest_size=16).digest()
        if digest in self.seen:
            raise ValueError("written again by a resumed run: the same sample of the same task and version, word for word")
        self.seen.add(digest)
        return visit


def read(source: Source) -> Iterator[Row | Bad]:
    split, version = _describe(source)
    visits = _before(source)
    again = 0

    def convert(row: int, value: dict[str, Any]) -> list[Row | Bad]:
        nonlocal again
        visit = visits.of(value)
        fields = {**_fields(value), "step": version, "split": split}
        again += visit > 0
        key = (version, _task(value))
        return [Row(row, fields, (*key, visit) if visit else key)]

    yield from rows_of_lines(source, convert)
    if again:
        source.notes.append(f"a resumed run sampled its task again ({again:,} rows): each sampling is a group of its own")


def _describe(source: Source) -> tuple[str | None, int | None]:
    """Split and version, by the folder; elsewhere the version of the first row. A continued file keeps them."""
    if not source.start or "version" not in source.found:
        paths = (PurePath(source.typed), source.path.absolute())
        folder = next((m for m in (_FOLDER.search(p.as_posix()) for p in paths) if m), None)
        if folder:
            version = int(folder[2])
        else:
            first = look(source.path).first
            try:
                version = integer(first.get("tail_version"), "tail_version") if isinstance(first, dict) else None
            except ValueError:
                version = None
            if version is not None:
                source.notes.append(f"step {version} is the first row's tail_version: the path names no version folder")
        source.found["version"] = version
        source.found["split"] = ("eval" if folder[1].startswith("eval") else "train") if folder else None
    return source.found.get("split"), source.found["version"]


def _before(source: Source) -> _Visits:
    """What stands in the file before this reading goes on. A file holds one task: that is little."""
    visits = _Visits()
    if source.start:
        for item in json_lines(Source(source.path, source.rel, source.typed, size=source.start)):
            try:
                visits.of(item[2]) if not isinstance(item, Bad) else None
            except ValueError:
                continue
    return visits


def _task(value: dict[str, Any]) -> int | str:
    task = value.get("task_id")
    if task is None or isinstance(task, bool) or not isinstance(task, int | str):
        raise ValueError("task_id is missing" if task is None else f"task_id is no number and no text: {type(task).__name__}")
    return task


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    for name in ("prompt", "completion"):
        if not isinstance(value.get(name), str):
            raise ValueError(f"{name} is missing" if value.get(name) is None else f"{name} is not a text")
    seqlen, prompt_len = integer(value.get("seqlen"), "seqlen"), integer(value.get("prompt_len"), "prompt_len")
    if seqlen is not None and prompt_len is not None and not 0 <= prompt_len <= seqlen:
        raise ValueError(f"prompt_len is {prompt_len}, of {seqlen} tokens in all")
    original = number(value.get("original_reward"), "original_reward")
    return {
        "sample": integer(value.get("sample_idx"), "sample_idx"),
        "prompt": value["prompt"],
        "prompt_format": "rendered",
        "completion": value["completion"],
        "n_prompt_tokens": prompt_len,
        "n_completion_tokens": None if seqlen is None or prompt_len is None else seqlen - prompt_len,
        "reward": number(value.get("reward"), "reward"),
        "rewards": None if original is None or original != original else {"original_reward": original},
        "policy_version": text(value.get("tail_version")),
        "extra": {k: v for k, v in value.items() if k not in _FIELDS and v is not None},
    }
