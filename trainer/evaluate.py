"""What a policy can do: mean@k, unbiased pass@k, maj@k and greedy, with intervals over questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from echolab import answers
from echolab.engines import Engine, Sampling
from echolab.engines.torch_engine import TorchEngine
from echolab.entropy.scorer import Scorer
from echolab.errors import EcholabError
from echolab.verifiers import Verifier
from trainer.config import TrainConfig
from trainer.estimators import interval, maj_at_k, paired, pass_at_k, sampling_error
from trainer.judge import Judge
from trainer.policy import load
from trainer.rollouts import Rollout
from trainer.run import Run
from trainer.sampling import rollouts
from trainer.tasks import held_out

SEED = 0x5EED  # of evaluation: it never draws what training draws


def during(run: Run) -> dict[str, float]:
    """One evaluation of a run, as metrics; its rollouts go to the store with split eval."""
    config = run.config.evaluation
    sampling = Sampling(temperature=run.config.sampling.temperature, max_tokens=run.config.sampling.max_tokens)
    keys = [f"eval {i}" for i in range(len(run.held_out))]
    drawn = rollouts(run, run.held_out, config.n, sampling, SEED + run.config.seed, keys)
    values = {f"eval/{k}": v for k, v in figures(drawn, config.n, run.judge.verifier).items()}
    if config.greedy:
        greedy = rollouts(run, run.held_out, 1, Sampling(temperature=0.0, max_tokens=sampling.max_tokens), 0, keys)
        values["eval/greedy"] = float(np.mean([r.success for r in greedy]))
    run.judged(drawn)
    run.recorder.put_evaluation(run.step, drawn)
    run.evaluated(values)
    return values


@dataclass
class Evaluation:
    """One model on the questions of a configuration."""

    config: TrainConfig
    policy: Scorer
    engine: Engine
    judge: Judge

    @classmethod
    def of(cls, config: TrainConfig, model: str, judge: Judge) -> Evaluation:
        policy = load(config.model, config.sampling.temperature, model)
        policy.model.requires_grad_(False)
        return cls(config, policy, TorchEngine(policy.model, policy.eos, config.sampling.rows), judge)

    def answers(self, n: int, seed: int) -> list[Rollout]:
        """`n` completions of each question."""
        questions = held_out(self.config, self.policy.tokenizer)
        if not questions:
            raise EcholabError("the configuration names no questions: set evaluation.prompts")
        s = self.config.sampling
        sampling = Sampling(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, max_tokens=s.max_tokens)
        return rollouts(self, questions, n, sampling, SEED + seed, [f"eval {i}" for i in range(len(questions))])


def compare(config: TrainConfig, models: Sequence[str], n: int, seed: int = 0) -> dict[str, Any]:
    """The figures of one or two models; of two also the difference of the second to the first on the same questions, drawn
    with the same random numbers."""
    judge = Judge(config.task.verifier, config.task.options, config.task.timeout)
    found: dict[str, Any] = {"n": n, "temperature": config.sampling.temperature, "models": {}}
    means = []
    try:
        for model in models:
            drawn = Evaluation.of(config, model, judge).answers(n, seed)
            found["models"][model] = figures(drawn, n, judge.verifier)
            means.append([np.mean([r.success for r in drawn[i : i + n]]) for i in range(0, len(drawn), n)])
            found["questions"] = len(means[-1])
    finally:
        judge.close()
    if len(means) == 2:
        found["difference"] = paired(means[0], means[1])._asdict()
    return found


def figures(drawn: Sequence[Rollout], n: int, verifier: Verifier) -> dict[str, float]:
    """Of n completions a question. Those without a verdict count as wrong, and `unrewarded` says how many there are."""
    questions = [drawn[i : i + n] for i in range(0, len(drawn), n)]
    correct = [sum(r.success for r in q) for q in questions]
    mean = interval([c / n for c in correct])
    found = {"mean": mean.mean, "mean/low": mean.low, "mean/high": mean.high, "mean/sampling_error": sampling_error(correct, n)}
    ks = sorted({k for k in (1 << i for i in range(1, 11)) if k <= n} | {n}) if n > 1 else []
    for k in ks:
        found[f"pass@{k}"] = float(np.mean([pass_at_k(n, c, k) for c in correct]))
    if n > 1:
        found[f"maj@{n}"] = float(
            np.mean([maj_at_k([_answer(r, verifier) for r in q], [r.success for r in q], n) for q in questions])
        )
    return {
        **found,
        "ended": float(np.mean([r.ended for r in drawn])),
        "length": float(np.mean([len(r.completion_ids) for r in drawn])),
        "unrewarded": float(np.mean([math.isnan(r.reward) for r in drawn])),
    }


def _answer(r: Rollout, verifier: Verifier) -> Any:
    """Right answers are one class, as they equal the gold; the others are told apart by what the verifier got to see."""
    given = verifier.input(r.text, r.problem.ground_truth, r.problem.prompt)
    if r.success or given is None:
        return r.success or None
    return given[0] if verifier.reads_all else answers.plain(given[1] or "")
