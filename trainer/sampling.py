"""From problems to judged rollouts: the engine samples, the judge looks at the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from echolab.engines import Engine, Sampling
from echolab.entropy.scorer import Scorer
from trainer.config import TrainConfig
from trainer.judge import Judge
from trainer.rollouts import Problem, Rollout


class Sampler(Protocol):
    """What sampling needs: a run has it, and so has an evaluation."""

    config: TrainConfig
    policy: Scorer
    engine: Engine
    judge: Judge


def sample(run: Sampler, problems: Sequence[Problem], step: int, first_group: int = 0) -> list[Rollout]:
    """A group of rollouts for each problem. What is drawn depends on seed, step and group alone."""
    config = run.config.sampling
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_tokens=config.max_tokens)
    keys = [f"{step}/{first_group + i}" for i in range(len(problems))]
    return rollouts(run, problems, config.n, sampling, run.config.seed, keys, first_group)


def rollouts(
    run: Sampler,
    problems: Sequence[Problem],
    n: int,
    sampling: Sampling,
    seed: int,
    keys: Sequence[str],
    first_group: int = 0,
) -> list[Rollout]:
    """`n` judged completions of each problem, in order."""
    with torch.inference_mode():
        drawn = run.engine.sample([p.prompt_ids for p in problems], n, sampling, seed, keys)
    texts = [run.policy.text(ids) for ids in drawn.completion_ids]
    asked = [problems[i // n] for i in range(len(drawn))]
    ended = [reason == "stop" for reason in drawn.finish_reason]
    rewards = run.judge(list(zip(asked, texts, strict=True)))
    if run.config.task.require_end:
        rewards = [r if e or math.isnan(r) else min(r, 0.0) for r, e in zip(rewards, ended, strict=True)]
    return [
        Rollout(
            problem=asked[i],
            group=first_group + i // n,
            sample=i % n,
            completion_ids=drawn.completion_ids[i],
            logprobs=drawn.logprobs[i],
            entropies=drawn.entropies[i],
            ended=ended[i],
            text=texts[i],
            reward=rewards[i],
        )
        for i in range(len(drawn))
    ]
