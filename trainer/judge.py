"""Rewards: a verifier of `echolab verify` in worker processes, which stay for the whole run and are killed when they hang."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from echolab.verifiers import Judged, Verifier
from echolab.workers import Pool, cores
from trainer.rollouts import Problem


class Judge:
    """`judge([(problem, completion), ...])` gives a reward for each; NaN where the verifier hung or broke."""

    def __init__(self, verifier: str, options: dict[str, Any], timeout: float):
        self.verifier = Verifier.make(verifier, options)
        self.timeout = timeout
        self.statuses: Counter[str] = Counter()  # of the latest call
        self.pool: Pool | None = None

    def __call__(self, answers: Sequence[tuple[Problem, str]]) -> list[float]:
        self.statuses = Counter()
        if self.pool is None:
            self.pool = Pool(self.verifier.task, cores(), self.timeout)
        rewards = [0.0] * len(answers)  # of no answer
        asked: dict[tuple[str | None, ...], list[int]] = {}  # equal answers are judged once
        for i, (problem, text) in enumerate(answers):
            given = self.verifier.input(text, problem.ground_truth, problem.prompt)
            if given is None:
                self.statuses["no_answer"] += 1
            else:
                asked.setdefault(given, []).append(i)
        for given, outcome in self.pool.results((str(n), given) for n, given in enumerate(asked)):
            judged = Judged(*outcome.value) if outcome.status == "ok" else Judged(outcome.status)
            places = asked[given[1]]
            self.statuses[judged.status] += len(places)
            for i in places:
                rewards[i] = _reward(judged)
        return rewards

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None


def _reward(judged: Judged) -> float:
    """As the store has it with `--verifier`."""
    if judged.status == "no_answer":
        return 0.0
    if judged.status != "ok":
        return math.nan
    return float(bool(judged.success)) if judged.score is None else judged.score
