"""What the rules of curation look at, read from a clip set in one pass: some hundred bytes a clip, whatever its length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from echolab import ids
from echolab.clips.decontaminate import Contamination, Hit
from echolab.clips.dedup import Shingles
from echolab.clips.ngrams import Said, distinct, mix, ngrams
from echolab.files import conform
from echolab.scan import MEMORY
from echolab.schema import CLIPS
from echolab.sql import Options, Session
from echolab.store import DataFile, Snapshot
from echolab.views import text

BATCH = 512
LOOP = 16  # tokens of the n-grams that tell a loop; ordinary mathematics seldom repeats so many
Progress = Callable[[int, int], None]

_READ = (
    "clip_id", "group_id", "prompt_id", "problem_id", "run", "step", "tokenizer", "n_tokens", "peak_entropy", "prompt", "clip",
    "prompt_ids", "clip_ids",
)  # fmt: skip


@dataclass
class Facts:
    """One entry a clip in each array, in the order of the set's files. Codes number equal values, from 0 as they come."""

    clip_id: np.ndarray
    group: np.ndarray  # codes
    run: np.ndarray  # codes
    problem: np.ndarray  # codes into `problems`
    prompt: np.ndarray  # codes of prompt and problem
    step: np.ndarray  # NaN where unknown, as in the next ones
    peak_entropy: np.ndarray
    repetition: np.ndarray
    n_tokens: np.ndarray
    content: np.ndarray  # digests of prompt and tokens
    has_text: np.ndarray
    problems: list[str]
    first_prompt: np.ndarray  # of each problem the code of one prompt, that of lowest digest
    prompt_hits: dict[int, list[Hit]]  # by prompt
    clip_hits: dict[int, list[Hit]]  # by clip
    prompt_grams: Shingles | None
    clip_grams: Shingles | None
    order: np.ndarray = field(init=False)  # the preferred first: newest step, then highest peak entropy, then lowest id
    # What only the rollouts know, where a rule asks.
    source: np.ndarray = field(init=False)  # codes of the datasets, -1 where unknown
    cut_off: np.ndarray = field(init=False)  # a whole completion that ends where sampling was stopped
    success_rate: np.ndarray = field(init=False)  # of its problem in its run; NaN where unknown

    def __post_init__(self) -> None:
        self.order = np.lexsort((self.clip_id, -self.peak_entropy, -self.step))

    def __len__(self) -> int:
        return len(self.clip_id)

    def id_of(self, clip: int) -> str:
        return bytes(self.clip_id[clip]).decode()


def files(snapshot: Snapshot, clipset: str) -> list[DataFile]:
    return [f for f in snapshot.files("clips") if f.partition["clipset"] == clipset]


def batches(snapshot: Snapshot, clipset: str, columns: Sequence[str] = CLIPS.arrow.names) -> Iterator[pa.Table]:
    """The rows of a clip set, always in the same order."""
    schema = _schema(columns)
    for file in files(snapshot, clipset):
        parquet = pq.ParquetFile(file.path)
        there = [c for c in columns if c in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(BATCH, columns=there):
            yield conform(pa.Table.from_batches([batch]), schema)


def _schema(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([CLIPS.arrow.field(c) for c in columns])


class _Codes(dict[Any, int]):
    def of(self, values: Iterable[Any]) -> np.ndarray:
        return np.array([self.setdefault(v, len(self)) for v in values], np.int64)


def read(
    snapshot: Snapshot,
    clipset: str,
    contamination: Contamination | None = None,
    near: Path | None = None,
    repetition: bool = False,
    progress: Progress | None = None,
) -> Facts:
    """Only what is asked for is looked at: hits of a contamination, n-grams for near dedup (kept in the folder `near`),
    repetition."""
    reading = _Reading(contamination, near, repetition)
    total = sum(f.rows for f in files(snapshot, clipset))
    for rows in batches(snapshot, clipset, _READ):
        reading.take(rows)
        if progress:
            progress(reading.n, total)
    return reading.facts()


class _Reading:
    def __init__(self, contamination: Contamination | None, near: Path | None, repetition: bool):
        self.contamination, self.repetition = contamination, repetition
        self.grams = [Shingles(near / name) for name in ("prompts", "clips")] if near else []
        self.problems, self.groups, self.runs, self.prompts = _Codes(), _Codes(), _Codes(), _Codes()
        self.prompt_hits: dict[int, list[Hit]] = {}
        self.clip_hits: dict[int, list[Hit]] = {}
        self.first_prompt: dict[int, tuple[bytes, int]] = {}
        self.pieces: list[dict[str, np.ndarray]] = []
        self.n = 0

    def take(self, rows: pa.Table) -> None:
        row = {c: rows[c].to_pylist() for c in rows.column_names if not pa.types.is_list(rows.schema.field(c).type)}
        known = len(self.prompts)
        digests = [_digest(p, i) for p, i in zip(row["prompt"], row["problem_id"], strict=True)]
        prompt = self.prompts.of(digests)
        problem = self.problems.of(map(_problem, row["problem_id"], row["prompt_id"], row["prompt"], row["group_id"]))
        for digest, code, p in zip(digests, prompt.tolist(), problem.tolist(), strict=True):
            self.first_prompt[p] = min(self.first_prompt.get(p, (digest, code)), (digest, code))
        new = {code: place for place, code in enumerate(prompt.tolist()) if code >= known}
        self._compare(known, [new[code] for code in sorted(new)], row)
        self.pieces.append(
            {
                "clip_id": np.array([i.encode() for i in row["clip_id"]], np.bytes_),
                "group": self.groups.of(row["group_id"]),
                "run": self.runs.of(row["run"]),
                "problem": problem,
                "prompt": prompt,
                **{c: np.array(row[c], np.float64) for c in ("step", "peak_entropy")},
                "repetition": _repetition(rows["clip_ids"]) if self.repetition else np.full(len(prompt), np.nan),
                "n_tokens": np.array(row["n_tokens"], np.int64),
                "content": np.array(_contents(rows, row), "S16"),
                "has_text": ~(_nulls(rows["prompt"]) | _nulls(rows["clip"])),
            }
        )
        self.n += len(prompt)

    def _compare(self, first: int, new: Sequence[int], row: dict[str, list[Any]]) -> None:
        """Prompts that were not there before, and all clips: with the benchmarks, and by n-grams."""
        if not (self.contamination or self.grams):
            return
        asked = Said([ids.problem_text(row["prompt"][i]) or "" for i in new])
        said = Said([c or "" for c in row["clip"]])
        if self.contamination:
            hits = self.contamination.of_prompts(asked, [row["problem_id"][i] for i in new])
            self.prompt_hits |= {first + i: h for i, h in enumerate(hits) if h}
            self.clip_hits |= {self.n + i: h for i, h in enumerate(self.contamination.of_clips(said)) if h}
        for grams, texts in zip(self.grams, (asked, said), strict=False):
            grams.add(texts)

    def facts(self) -> Facts:
        if not self.pieces:  # an empty set has empty arrays
            self.take(_schema(_READ).empty_table())
        for grams in self.grams:
            grams.read()
        return Facts(
            **{name: np.concatenate([p[name] for p in self.pieces]) for name in self.pieces[0]},
            problems=list(self.problems),
            first_prompt=np.array([self.first_prompt[p][1] for p in range(len(self.problems))], np.int64),
            prompt_hits=self.prompt_hits,
            clip_hits=self.clip_hits,
            prompt_grams=self.grams[0] if self.grams else None,
            clip_grams=self.grams[1] if self.grams else None,
        )


def _digest(*texts: str | None) -> bytes:
    """Of texts, NULL or not."""
    digest = blake2b(digest_size=16)
    for t in texts:
        data = b"" if t is None else t.encode()
        digest.update(b"%d " % (-1 if t is None else len(data)) + data)
    return digest.digest()


def _problem(problem_id: str | None, prompt_id: str | None, prompt: str | None, group_id: str) -> str:
    """The problem of a clip, as well as it is known."""
    if problem_id or prompt_id:
        return str(problem_id or prompt_id)
    return group_id if prompt is None else _digest(prompt).hex()


def _contents(rows: pa.Table, row: dict[str, list[Any]]) -> list[bytes]:
    """Digests of prompt and clip: of their ids, and of their texts where there are no ids."""
    prompts, clips = (_id_bytes(rows[c]) for c in ("prompt_ids", "clip_ids"))
    found = []
    for i, tokenizer in enumerate(row["tokenizer"]):
        prompt, clip = prompts[i], clips[i]
        with_ids = prompt is not None or clip is not None
        digest = blake2b(_digest(tokenizer if with_ids else None), digest_size=16)
        for ids_, text_ in ((prompt, row["prompt"][i]), (clip, row["clip"][i])):
            digest.update(blake2b(b"i" + ids_).digest() if ids_ is not None else b"t" + _digest(text_))
        if clip is None and row["clip"][i] is None:  # nothing is known of it: it equals no other
            digest.update(row["clip_id"][i].encode())
        found.append(digest.digest())
    return found


def _nulls(column: pa.ChunkedArray) -> np.ndarray:
    return column.is_null().to_numpy()


def _id_bytes(column: pa.ChunkedArray) -> list[bytes | None]:
    lists = column.combine_chunks()
    values, offsets = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    valid = lists.is_valid().to_numpy(zero_copy_only=False)
    return [values[a:b].tobytes() if v else None for a, b, v in zip(offsets[:-1], offsets[1:], valid, strict=True)]


def _repetition(column: pa.ChunkedArray) -> np.ndarray:
    """The share of a clip's 16-token n-grams that repeat an earlier one; NaN where no ids are known."""
    lists = column.combine_chunks()
    counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    grams, sizes = ngrams(mix(lists.flatten().to_numpy(zero_copy_only=False)), counts, LOOP)
    _, different = distinct(grams, sizes)
    share = 1 - different / np.maximum(sizes, 1)
    return np.where(lists.is_valid().to_numpy(zero_copy_only=False), np.where(sizes > 0, share, 0.0), np.nan)


def from_rollouts(
    facts: Facts, snapshot: Snapshot, clipset: str, verifier: str | None, *, source: bool, cut_off: bool, success_rate: bool
) -> None:
    """Fill in what the rollouts of the clips know."""
    n, sources = len(facts), _Codes()
    facts.source, facts.cut_off, facts.success_rate = np.full(n, -1), np.zeros(n, bool), np.full(n, np.nan)
    if not (source or cut_off or success_rate):
        return
    by_id = np.argsort(facts.clip_id)
    with Session(snapshot, Options(verifier=verifier), memory_limit=MEMORY) as session:
        for batch in session.batches(_query(clipset, cut_off, success_rate)):
            asked = np.array([i.encode() for i in batch["clip_id"].to_pylist()], np.bytes_)
            place = by_id[np.searchsorted(facts.clip_id, asked, sorter=by_id)]
            known = batch["source"].is_valid().to_numpy(zero_copy_only=False)
            facts.source[place[known]] = sources.of(batch["source"].drop_null().to_pylist())
            facts.cut_off[place] = batch["cut_off"].to_numpy(zero_copy_only=False)
            facts.success_rate[place] = np.array(batch["success_rate"].to_pylist(), np.float64)


def _query(clipset: str, cut_off: bool, success_rate: bool) -> str:
    stopped, rate, joins = "false", "NULL::DOUBLE", ["LEFT JOIN base.visible r ON r.rollout_id = c.rollout_id"]
    if cut_off:
        stopped = f"coalesce({_STOPPED}, false)"
        joins.append("LEFT JOIN base.scores s ON s.rollout_id = c.rollout_id AND s.scorer = c.scorer")
    if success_rate:
        rate = "p.rate"
        joins.append(f"LEFT JOIN ({_RATES}) p ON p.problem_id = c.problem_id AND p.run = c.run")
    columns = f"c.clip_id, r.source, {stopped} AS cut_off, {rate} AS success_rate"
    return f"SELECT {columns} FROM base.clips c {' '.join(joins)} WHERE c.clipset = {text(clipset)}"


# Sampling was stopped where the rollout says so, or where it does not and has as many tokens as it was allowed.
_STOPPED = r"""s.n_tokens <= c.end_token AND (r.finish_reason = 'length' OR (r.finish_reason IS NULL
    AND r.n_completion_tokens >= try_cast(regexp_extract(r.sampling, '"max_tokens"\s*:\s*(\d+)', 1) AS BIGINT)))"""
_RATES = """SELECT problem_id, run, sum(n_success) / nullif(sum(n_rewarded), 0) AS rate
    FROM problems WHERE role = 'policy' GROUP BY ALL"""
