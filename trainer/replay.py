"""Clips that come back: where they are from, which are kept, and which stand beside the online rollouts of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.dataset as ds
from pydantic import ConfigDict, Field

import echolab
from echolab.clips.facts import batches
from echolab.config import Config
from echolab.errors import EcholabError
from echolab.named import find

_COLUMNS = (
    "clip_id", "prompt_ids", "clip_ids", "clip_mask", "weight", "problem_id", "tokenizer", "peak_entropy", "split",
)  # fmt: skip


class ReplayConfig(Config):
    """Stored clips in the loss, beside the rollouts of each step."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    source: str | None = None
    """`clipset:NAME`: a clip set of the run's store. A folder written by `echolab export --to replay`. `run`: the clips of this
    run's own steps. None: no replay."""

    coefficient: float = Field(0.001, ge=0)
    """The weight of the clips' loss."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the coefficient falls, to 0 at `until`."""

    until: int | None = Field(None, ge=1)
    """The step at which the schedule has come to 0; none: the last one."""

    ratio: float = Field(0.25, gt=0)
    """Clips of a step, for each of its rollouts."""

    reduction: Literal["clip_mean", "token_mean"] = "clip_mean"
    """`clip_mean`: the mean over clips of their token means. `token_mean`: the mean over all clip tokens."""

    capacity: int = Field(4096, ge=1)
    """Clips that are kept; the oldest make room."""

    per_problem: int = Field(4, ge=1)
    """Clips of one problem that are kept, the newest."""

    max_age: int | None = Field(None, ge=1)
    """Steps after which a clip of this run is no longer used."""

    priority: Literal["uniform", "entropy", "recency"] = "uniform"
    """What makes a clip likelier to be drawn, beside its weight: the entropy of its peak, which an exported folder does not
    hold, or how new it is."""

    half_life: float = Field(50.0, gt=0)
    """With priority `recency`: steps after which a clip counts half."""

    def coefficient_at(self, step: int, steps: int) -> float:
        """Of one step, counted from 1."""
        done = min(1.0, (step - 1) / max(1, (self.until or steps)))
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.coefficient * fall[self.schedule]


@dataclass(frozen=True)
class Clip:
    """A prompt and the tokens that are learnt again after it."""

    clip_id: str
    prompt_ids: list[int]
    clip_ids: list[int]
    mask: list[bool] | None = None  # which of clip_ids count; None: all
    weight: float = 1.0
    problem: str | None = None
    step: int | None = None  # of this run; None: from elsewhere, and never too old
    entropy: float | None = None  # of its peak


class Buffer:
    """The clips at hand, in the order they came. What it draws depends on the seed, the step and its content, nothing else."""

    def __init__(self, config: ReplayConfig, seed: int, clips: Iterable[Clip] = ()):
        self.config, self.seed = config, seed
        self.clips: dict[str, Clip] = {}
        self.add(clips)

    def __len__(self) -> int:
        return len(self.clips)

    def add(self, clips: Iterable[Clip]) -> None:
        """Newer ones take the place of the same clip, of older ones of their problem, and of the oldest of all."""
        for clip in clips:
            self.clips.pop(clip.clip_id, None)
            self.clips[clip.clip_id] = clip
            if clip.problem is not None:
                same = [c.clip_id for c in self.clips.values() if c.problem == clip.problem]
                for old in same[: -self.config.per_problem]:
                    del self.clips[old]
        while len(self.clips) > self.config.capacity:
            del self.clips[next(iter(self.clips))]

    def draw(self, n: int, step: int) -> list[Clip]:
        """At most n different clips for one step, without those that are too old."""
        usable = [c for c in self.clips.values() if not self._too_old(c, step)]
        chances = np.array([self._chance(c, step) for c in usable])
        n = min(n, int((chances > 0).sum()))
        if not n:
            return []
        rng = np.random.default_rng((self.seed, step, 0xEC40))
        return [usable[i] for i in rng.choice(len(usable), n, replace=False, p=chances / chances.sum())]

    def _too_old(self, clip: Clip, step: int) -> bool:
        return self.config.max_age is not None and clip.step is not None and step - clip.step > self.config.max_age

    def _chance(self, clip: Clip, step: int) -> float:
        if self.config.priority == "entropy":
            return clip.weight * max(clip.entropy or 0.0, 1e-6)
        if self.config.priority == "recency" and clip.step is not None:
            return clip.weight * 0.5 ** ((step - clip.step) / self.config.half_life)
        return clip.weight

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [asdict(c) for c in self.clips.values()]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        self.clips = {c["clip_id"]: Clip(**c) for c in state}


def stored(source: str, store: str, tokenizer: str) -> Iterator[Clip]:
    """The training clips that `replay.source` names. Those of another tokenizer are refused: their ids mean other text."""
    kind, colon, name = source.partition(":")
    for row in _of_clipset(store, name) if colon and kind == "clipset" else _of_export(source):
        if row["tokenizer"] != tokenizer:
            raise EcholabError(
                f"the clips of {source} were made with tokenizer {row['tokenizer']}, the model has {tokenizer}: mine them"
                " with a scorer of this model's tokenizer"
            )
        if row["prompt_ids"] is None or row["clip_ids"] is None:
            raise EcholabError(f"clip {row['clip_id']} of {source} has no token ids: leave it out with an export's --where")
        weight = 1.0 if row["weight"] is None else row["weight"]
        fields = row["prompt_ids"], row["clip_ids"], row["clip_mask"], weight, row["problem_id"]
        yield Clip(row["clip_id"], *fields, entropy=row.get("peak_entropy"))


def _of_export(folder: str) -> Iterator[dict[str, Any]]:
    files = sorted(Path(folder).glob("train*.parquet"))
    if not files:
        raise EcholabError(
            f"{folder} is no replay export: make one with `echolab export --clipset NAME --to replay --out {folder}`, or name a"
            " clip set of the store as clipset:NAME"
        )
    for batch in ds.dataset([str(f) for f in files]).to_batches():
        yield from batch.to_pylist()


def _of_clipset(store: str, name: str) -> Iterator[dict[str, Any]]:
    with echolab.open(store) as lab:
        for batch in batches(lab.snapshot, find(lab.snapshot, "clipset", name).label, _COLUMNS):
            yield from (row for row in batch.to_pylist() if row["split"] in (None, "train"))
