"""The rollouts of a step: what was sampled, what the verifier said, and which clips are worth learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from echolab import ids
from echolab.clips.selectors import Selection, Selector, select
from echolab.schema import FLOATS, INT64, STRING, TOKEN_IDS
from echolab.segment import Segmenter, segmentations
from echolab.vocab import Vocab
from trainer.advantages import TOLERANCE

SUCCESS = 1.0  # rewards from here on are successes, as the store has it


@dataclass(frozen=True)
class Problem:
    """One prompt of a task."""

    prompt_ids: list[int]
    prompt: str | None
    ground_truth: str | None = None
    messages: list[dict[str, Any]] | None = None
    source: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """As the store names the problem."""
        return ids.problem_id(ids.problem_text(self.prompt, self.messages) or "")


@dataclass(frozen=True, eq=False)
class Rollout:
    """One completion. Numbers are those of the sampler: float32, one a token."""

    problem: Problem
    group: int  # of the step
    sample: int  # of the group
    completion_ids: list[int]  # with the EOS, if it ended by itself
    logprobs: np.ndarray
    entropies: np.ndarray
    ended: bool
    text: str
    reward: float  # NaN: the verifier had no word

    @property
    def success(self) -> bool:
        return self.reward >= SUCCESS - TOLERANCE


@dataclass(frozen=True, eq=False)
class Step:
    """All that was sampled in one step, in the order of groups and samples."""

    run: str
    number: int
    rollouts: list[Rollout]
    rounds: int = 1

    @property
    def rewards(self) -> torch.Tensor:
        return torch.tensor([r.reward for r in self.rollouts], dtype=torch.float64)

    @property
    def groups(self) -> torch.Tensor:
        return torch.tensor([r.group for r in self.rollouts])

    def clips(self, selector: Selector, segmenter: Segmenter, vocab: Vocab, eos: Sequence[int], degenerate: Any) -> Selection:
        """The clips of these rollouts: `row` are places in `rollouts`."""
        return select(self._table(segmenter, vocab, eos, degenerate, selector), selector)

    def _table(self, segmenter: Segmenter, vocab: Vocab, eos: Sequence[int], degenerate: Any, selector: Selector) -> pa.Table:
        """What selectors look at. Only successes are cut: nothing else can be a clip."""
        chosen = [i for i, r in enumerate(self.rollouts) if r.success]
        scores = pa.table(
            {
                "rollout_id": pa.array([str(i) for i in chosen], STRING),
                "scorer": pa.array(["sampling"] * len(chosen), STRING),
                "token_ids": pa.array([self.rollouts[i].completion_ids for i in chosen], TOKEN_IDS),
                "loss_mask": pa.nulls(len(chosen), pa.list_(pa.bool_())),
                "entropies": pa.array([self.rollouts[i].entropies for i in chosen], FLOATS),
            }
        )
        cuts = segmentations(scores, vocab, segmenter, tuple(eos))
        place = np.full(len(self.rollouts), -1)
        place[chosen] = np.arange(len(chosen))
        at = pa.array(place, INT64, mask=place < 0)
        columns = {
            "group_id": pa.array([str(r.group) for r in self.rollouts], STRING),
            "rollout_id": pa.array([f"{i:09d}" for i in range(len(self.rollouts))], STRING),
            "sample": pa.array([r.sample for r in self.rollouts], INT64),
            "success": pa.array([r.success for r in self.rollouts]),
            "truncated": pa.array([not r.ended for r in self.rollouts]),
            "segment_ends": cuts["segment_ends"].take(at),
            "segment_entropies": cuts["segment_entropies"].take(at),
            "degenerate": pa.array(np.asarray(degenerate, bool)),
            "run": pa.array([self.run] * len(self.rollouts), STRING),
            "step": pa.array([self.number] * len(self.rollouts), INT64),
        }
        if selector.region == "think":
            from echolab.clips.selectors import thinking

            columns["n_thinking"] = pa.array(thinking(pa.array([r.completion_ids for r in self.rollouts], TOKEN_IDS), vocab))
        return pa.table(columns)

    def metrics(self, failure: float) -> dict[str, float]:
        """Means over what was sampled; `failure` is the reward of a plain failure."""
        rewards = [r.reward for r in self.rollouts if not math.isnan(r.reward)]
        tokens = [len(r.completion_ids) for r in self.rollouts]
        return {
            "reward": float(np.mean(rewards)) if rewards else math.nan,
            "unrewarded": 1 - len(rewards) / len(self.rollouts),
            "ended": float(np.mean([r.ended for r in self.rollouts])),
            "length": float(np.mean(tokens)),
            "entropy": float(np.concatenate([r.entropies for r in self.rollouts]).mean()),
            "tokens": float(sum(tokens)),
            "rounds": float(self.rounds),
            **self._kinds(failure),
        }

    def _kinds(self, failure: float) -> dict[str, float]:
        """Shares of the groups with more than one rewarded rollout, by kind, as the store has them."""
        count = {"all_success": 0, "all_fail": 0, "constant": 0, "mixed": 0}
        found: dict[int, list[float]] = {}
        for r in self.rollouts:
            if not math.isnan(r.reward):
                found.setdefault(r.group, []).append(r.reward)
        judged = [rewards for rewards in found.values() if len(rewards) > 1]
        for rewards in judged:
            if max(rewards) - min(rewards) > TOLERANCE:
                count["mixed"] += 1
            elif min(rewards) >= SUCCESS - TOLERANCE:
                count["all_success"] += 1
            else:
                count["all_fail" if abs(min(rewards) - failure) <= TOLERANCE else "constant"] += 1
        shares = {f"groups/{kind}": n / len(judged) if judged else math.nan for kind, n in count.items()}
        return {"degenerate": 1 - shares["groups/mixed"], **shares}
