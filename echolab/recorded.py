"""Entropies that a trainer recorded while it sampled: rows of `scores` beside the rollouts of a dump.

They belong to one scorer a run, whose weights vary with the step."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echolab import ids
from echolab.files import pc
from echolab.keys import without_known
from echolab.readers.base import Scores, ScoresOf
from echolab.scan import parquet, scratch, text
from echolab.schema import SCORES
from echolab.store import Snapshot, Staged, Store
from echolab.vocab import special_ids

NEGATIVE = -1e-3  # what rounding may leave of an entropy of 0


@dataclass(frozen=True)
class Scorer:
    """The scorer of what one run recorded. Dumps do not say under which settings: the user does."""

    run: str
    tokenizer: str | None
    temperature: float | None
    dtype: str | None

    @property
    def config(self) -> dict[str, Any]:
        return {"kind": "sampling", **self.__dict__, "rendering": None}

    @property
    def id(self) -> str:
        return ids.config_id("scorer", list(self.config.values()))

    def eos(self, snapshot: Snapshot) -> frozenset[int]:
        """The tokens that end a completion: what its entry says, else the special ones of its tokenizer, if the store has
        it."""
        entry = snapshot.registry("scorers").get(self.id)
        if entry and "eos" in entry["config"]:
            return frozenset(entry["config"]["eos"])
        return special_ids(snapshot, self.tokenizer) if self.tokenizer else frozenset()

    def register(self, store: Store, eos: Sequence[int] | None = None) -> None:
        """Its entry, unless it is there; `eos` where they are known. Under the lock."""
        if self.id not in store.snapshot().registry("scorers"):
            known = {} if eos is None else {"eos": list(eos)}
            store.register("scorers", self.id, self.run, {**self.config, **known})


def check(fields: dict[str, Any], scores: Scores) -> None:
    """Raises ValueError where the numbers cannot be those of the row's tokens."""
    tokens = fields.get("completion_ids")
    if tokens is None:
        raise ValueError("entropies, but no completion_ids that they belong to")
    _check(scores.entropies, scores.logprobs, len(tokens))


def _check(entropies: Sequence[float], logprobs: Sequence[float] | None, n: int) -> None:
    try:
        values = array("d", entropies)
        array("d", logprobs or ())
    except TypeError:
        raise ValueError("entropies or log-probabilities that are no numbers") from None
    if len(values) != n:
        raise ValueError(f"{len(values)} entropies for {n} tokens")
    if logprobs is not None and len(logprobs) != n:
        raise ValueError(f"{len(logprobs)} log-probabilities for {n} tokens")
    if values and (not math.isfinite(sum(values)) or min(values) < NEGATIVE):
        raise ValueError("entropies that are not numbers from 0 on")


def score_row(
    scorer: str, rollout_id: str, fields: dict[str, Any], scores: Scores, eos: Collection[int] = ()
) -> dict[str, Any]:
    """A row of `scores`. Tokens of `eos` at the very end count in no mean."""
    tokens, mask = fields["completion_ids"], fields.get("loss_mask")
    n = len(tokens)
    while n and tokens[n - 1] in eos:
        n -= 1
    counted = [e for e, m in zip(scores.entropies[:n], mask or [True] * n, strict=False) if m]
    return {
        "rollout_id": rollout_id,
        "scorer": scorer,
        "run": fields["run"],
        "step": fields.get("step"),
        "token_ids": tokens,
        "loss_mask": mask,
        "entropies": scores.entropies,
        "logprobs": scores.logprobs,
        "mean_entropy": math.fsum(counted) / len(counted) if counted else None,
        "n_tokens": n,
    }


def to_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCORES.arrow)


class Matcher:
    """Finds the stored rollouts of a run by their tokens. Of rollouts with the same tokens those nearest in step come
    first (a trainer may be ahead of the policy that sampled), each once."""

    def __init__(self, snapshot: Snapshot, run: str, scorer: str, eos: Collection[int], folder: Path):
        self.snapshot, self.run, self.scorer, self.eos, self.folder = snapshot, run, scorer, eos, folder
        self.taken: set[str] = set()
        self.missing = 0  # rows whose rollouts the store does not have: reading them again may find them

    def rows(self, items: Sequence[ScoresOf]) -> Iterable[tuple[ScoresOf, dict[str, Any] | str]]:
        """Of each item its row of `scores`, or the reason why there is none."""
        found = self._found(items)
        for i, item in enumerate(items):
            try:
                _check(item.entropies, item.logprobs, len(item.token_ids))
                yield item, self._row(item, found.get(i, []))
            except ValueError as e:
                yield item, str(e)

    def _row(self, item: ScoresOf, rollouts: list[tuple]) -> dict[str, Any]:
        if not rollouts:
            self.missing += 1
            raise ValueError(f"no rollout of run {self.run!r} has these tokens: ingest their dump, then this one again")
        free = next((r for r in rollouts if r[0] not in self.taken), None)
        if free is None:
            raise ValueError("its rollout has numbers from an earlier row of this file")
        rollout_id, step, n, mask = free
        self.taken.add(rollout_id)
        fields = {"run": self.run, "step": step, "completion_ids": item.token_ids[n:], "loss_mask": mask}
        logprobs = item.logprobs[n:] if item.logprobs is not None else None
        return score_row(self.scorer, rollout_id, fields, Scores(item.entropies[n:], logprobs), self.eos)

    def _found(self, items: Sequence[ScoresOf]) -> dict[int, list[tuple]]:
        files = [f.path for f in self.snapshot.files("rollouts") if f.partition["run"] == self.run]
        if not files:
            return {}
        live = ", ".join(text(r.ingest_id) for r in self.snapshot.ledger.live if r.run == self.run)
        columns = (
            pa.array(range(len(items)), pa.int64()),
            pa.array([item.step for item in items], pa.int64()),
            pa.array([item.token_ids for item in items], pa.list_(pa.int32())),
        )
        asked = pa.Table.from_arrays(columns, names=["i", "asked_step", "tokens"])
        with scratch(self.folder) as db:
            db.register("asked", asked)
            rows = db.execute(
                f"""SELECT DISTINCT ON (i, rollout_id) i, rollout_id, step, len(prompt_ids), loss_mask
                FROM {parquet(files)} JOIN asked ON list_concat(prompt_ids, completion_ids) = tokens
                WHERE ingest_id IN ({live}) AND prompt_ids IS NOT NULL
                ORDER BY i, abs(step - asked_step) NULLS LAST, rollout_id"""
            ).fetchall()
        found: dict[int, list[tuple]] = {}
        for i, *rollout in rows:
            found.setdefault(i, []).append(tuple(rollout))
        return found


def fresh(store: Store, snapshot: Snapshot, staged: Sequence[Staged], drop: set[str], folder: Path) -> list[Staged]:
    """The staged scores without those of `drop`, and without the keys that stand already. Call it under the lock."""
    new: list[Staged] = []
    seen = pa.array(sorted(drop), pa.string())
    for file in staged:
        rows = pq.ParquetFile(file.path).read()
        kept = without_known(snapshot, "scores", rows.filter(pc.invert(pc.is_in(rows["rollout_id"], seen))), folder)
        seen = pa.concat_arrays([seen, *kept["rollout_id"].chunks])
        new += [file] if kept.num_rows == file.rows else store.stage("scores", kept, folder)
    return new
