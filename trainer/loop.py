"""The run. `train` reads from top to bottom as one step does:

    sample -> judge -> advantages -> clips -> update -> log -> record -> evaluate -> checkpoint

What was left out of a large trainer: any framework, a second process, a critic. Every random draw is keyed by the seed and
the step, so that a run that is killed and goes on from a checkpoint is the run that was not."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint, evaluate
from trainer.advantages import Advantages, advantages, soft_overlong, varied_groups
from trainer.config import TrainConfig
from trainer.metrics import Metrics
from trainer.objective import Batch, Clips, ClipTerm, policy_mask, reach
from trainer.policy import MICRO_TOKENS, Rows, all_logprobs
from trainer.replay import Clip
from trainer.rollouts import Step
from trainer.run import WINDOW, Run
from trainer.sampling import sample
from trainer.update import backward, gradients, step_optimizer


def train(config: TrainConfig) -> dict[str, Any]:
    """Train to the last step, from the newest checkpoint if there is one. Ctrl-C leaves a checkpoint behind."""
    with Run.open(config) as run:
        log = Metrics(run.folder, run.step, config.model_dump(mode="json"), config.log.tensorboard, config.log.wandb)
        began = time.perf_counter(), run.step
        try:
            if run.step == 0 and run.held_out:
                log.log(0, evaluate.during(run))
            while not run.done:
                values = one_step(run, run.step + 1)
                run.step += 1
                run.shares = [*run.shares, values["degenerate"]][-WINDOW:]
                if run.held_out and (run.step % config.evaluation.every == 0 or run.done):
                    values |= evaluate.during(run)
                values["seconds"] = time.perf_counter() - began[0]
                log.log(run.step, values)
                run.warn(values)
                last = run.step if run.done else config.steps
                log.show(run.step, last, values, _left(began, run.step, last))
                if run.step % config.checkpoint.every == 0 or run.done:
                    run.save()
        except KeyboardInterrupt:
            run.save()
            raise
        finally:
            log.close()
        return {"run": config.run, "steps": run.step, "checkpoint": str(checkpoint.all_of(run.checkpoints)[-1]), **run.facts}


def _left(began: tuple[float, int], step: int, steps: int) -> float:
    return (time.perf_counter() - began[0]) / max(1, step - began[1]) * (steps - step)


def one_step(run: Run, number: int) -> dict[str, Any]:
    """Sample, judge, learn; what there is to log."""
    config, clock = run.config, _Clock()
    step, kept = _sampled(run, number)
    clock.lap("sample")
    judged = _advantages(run, step)
    clips = _clips(run, step, judged)
    replayed = run.buffer.draw(round(config.replay.ratio * len(step.rollouts)), number) if run.replays else []
    clock.lap("select")
    run.judged(step.rollouts)
    values = {**step.metrics(run.failure), "groups/kept": float(kept.sum()) / len(step.rollouts) * len(step.groups.unique())}
    values |= learn(run, step, judged, kept, clips, replayed, number)
    clock.lap("update")
    run.recorder.put(step, judged.values)
    if config.replay.source == "run":
        run.buffer.add(_as_clips(run, step, clips))
    clock.lap("record")
    values |= {f"seconds/{name}": s for name, s in clock.laps.items()}
    values["tokens_per_second"] = values["tokens"] / clock.laps["sample"]
    return values | _memory(run)


class _Clock:
    def __init__(self) -> None:
        self.at, self.laps = time.perf_counter(), {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.at = now - self.at, now


# Sampling.


def _sampled(run: Run, number: int) -> tuple[Step, Tensor]:
    """The rollouts of a step, and which the policy's loss is to see: with dynamic sampling those of groups that differ in
    success, sampled until there are enough of them. Clips are chosen among all."""
    config = run.config
    rollouts, kept, rounds = [], torch.zeros(0, dtype=torch.bool), 0
    while rounds < (config.sampling.rounds if run.algorithm.dynamic_sampling else 1):
        rollouts += sample(run, run.tasks.take(config.sampling.prompts), number, first_group=rounds * config.sampling.prompts)
        rounds += 1
        step = Step(config.run, number, rollouts, rounds)
        if not run.algorithm.dynamic_sampling:
            return step, torch.ones(len(rollouts), dtype=torch.bool)
        success = torch.tensor([math.nan if math.isnan(r.reward) else float(r.success) for r in rollouts])
        kept = varied_groups(success, step.groups).rows
        names = step.groups[kept].unique()
        kept &= torch.isin(step.groups, names[: config.sampling.prompts])
        if len(names) >= config.sampling.prompts:
            break
    return step, kept


def _advantages(run: Run, step: Step, penalty: Tensor | None = None) -> Advantages:
    """Of full groups, before anything is dropped."""
    row, longest = run.algorithm, run.config.sampling.max_tokens
    lengths = torch.tensor([len(r.completion_ids) for r in step.rollouts])
    rewards = step.rewards + soft_overlong(lengths, longest, row.soft_overlong)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return advantages(rewards, step.groups, row.advantage, eps=row.eps, mask=mask, penalty=penalty)


def _clips(run: Run, step: Step, judged: Advantages) -> list[tuple[int, int, float]]:
    """(row, end, entropy of the segment) of each clip; the end does not count an EOS."""
    if not (run.config.echo.coefficient or run.config.replay.source == "run"):
        return []
    found = step.clips(run.config.echo.select, run.segmenter, run.policy.vocab, run.policy.eos, judged.degenerate.tolist())
    return [(int(r), int(e), float(h)) for r, e, h in zip(found.row, found.end_token, found.entropy, strict=True)]


def _as_clips(run: Run, step: Step, chosen: Sequence[tuple[int, int, float]]) -> list[Clip]:
    clips = []
    for row, end, entropy in chosen:
        r = step.rollouts[row]
        tokens = r.completion_ids if end == len(r.completion_ids) - r.ended else r.completion_ids[:end]
        name = f"{step.number}/{row}/{end}"
        clips.append(Clip(name, r.problem.prompt_ids, tokens, problem=r.problem.id, step=step.number, entropy=entropy))
    return clips


# Learning.


def learn(
    run: Run,
    step: Step,
    judged: Advantages,
    kept: Tensor,
    chosen: Sequence[tuple[int, int, float]],
    replayed: Sequence[Clip],
    number: int,
) -> dict[str, Any]:
    """The optimizer steps on one step's rollouts, with the clips beside them."""
    config, row = run.config, run.algorithm
    rows = Rows.of(
        [(r.problem.prompt_ids, r.completion_ids) for r in step.rollouts] + [(c.prompt_ids, c.clip_ids) for c in replayed]
    )
    batch, terms = _batch(run, step, rows, judged, kept, chosen, replayed, number)
    parts = _mini_batches(step, len(replayed), config.optimizer.updates)
    in_reward = row.beta > 0 and row.kl == "reward"
    known = batch.mask.any(1) & (in_reward | (reach(batch, row, terms) > 0))
    tokens = config.optimizer.micro_tokens or MICRO_TOKENS.get(run.policy.device.type, MICRO_TOKENS["cuda"])
    passed: Any = rows, known.nonzero()[:, 0], tokens
    if len(parts) > 1 or in_reward:  # else the log-probs before the update are those of the update
        batch = replace(batch, old=all_logprobs(run.policy, *passed)[0])
    if row.beta and run.reference is not None:
        reference = all_logprobs(run.reference, *passed)[0]
        batch = replace(batch, reference=reference)
        if in_reward and batch.old is not None:
            n = len(step.rollouts)
            penalised = _advantages(run, step, row.beta * (batch.old - reference)[:n, : int(rows.lengths[:n].max())])
            batch = replace(batch, advantages=_padded(penalised.values, rows, len(replayed)))
    values: dict[str, Any] = {}
    rate = config.optimizer.rate_at(number, config.steps)
    options: Any = {"longest": config.sampling.max_tokens, "tokens": tokens}
    if config.log.gradients and number % config.log.gradients == 0:
        values |= gradients(run.policy, rows, batch, row, terms, groups=len(step.groups.unique()), **options)
    norms, moved = [], True
    for part in parts:
        some, piece = batch.take(part, rows.width), Rows(rows.tokens[part], rows.prompts[part], rows.lengths[part])
        metrics = backward(run.policy, piece, some, row, terms, groups=_groups(step, part), **options)
        norm, ok = step_optimizer(run.policy, run.optimizer, rate, config.optimizer.grad_clip)
        norms.append(norm)
        moved &= ok
        values |= metrics.values()
    run.count_bad(moved)
    skipped = 1.0 - float(moved)
    return values | {"grad_norm": norms[-1], "lr": rate, "skipped": skipped, **_clip_values(step, chosen, replayed, run)}


def _batch(
    run: Run,
    step: Step,
    rows: Rows,
    judged: Advantages,
    kept: Tensor,
    chosen: Sequence[tuple[int, int, float]],
    replayed: Sequence[Clip],
    number: int,
) -> tuple[Batch, list[ClipTerm]]:
    """Rollouts first, replayed clips behind them: these have no part in the policy's loss."""
    config, n, extra = run.config, len(step.rollouts), len(replayed)
    truncated = torch.tensor([not r.ended for r in step.rollouts]) if run.algorithm.mask_truncated else None
    mask = torch.zeros(n + extra, rows.width, dtype=torch.bool)
    mask[:n] = policy_mask(rows.mask[:n], judged.used & kept, truncated)
    sampler = torch.full((n + extra, rows.width), math.nan)
    for i, r in enumerate(step.rollouts):
        sampler[i, : len(r.logprobs)] = torch.from_numpy(r.logprobs)
    clips, terms = {}, []
    if config.echo.coefficient:
        ended = torch.tensor([r.ended for r in step.rollouts] + [False] * extra)
        at, ends = torch.tensor([(r, e) for r, e, _ in chosen], dtype=torch.long).reshape(-1, 2).unbind(1)
        clips["echo"] = Clips.of(at, ends, rows.lengths, ended, rows.width)
        terms.append(ClipTerm("echo", config.echo.coefficient, config.echo.reduction))
    if replayed:
        counted = rows.mask[n:].clone()
        for i, clip in enumerate(replayed):
            if clip.mask is not None:
                counted[i, : len(clip.mask)] &= torch.tensor(clip.mask)
        weight = torch.tensor([c.weight for c in replayed])
        clips["replay"] = Clips(torch.arange(n, n + extra), counted, weight)
        terms.append(ClipTerm("replay", config.replay.coefficient_at(number, config.steps), config.replay.reduction))
    return Batch(mask, _padded(judged.values, rows, extra), sampler=sampler, clips=clips), terms


def _padded(values: Tensor, rows: Rows, extra: int) -> Tensor:
    """Advantages of the rollouts, and none of replayed clips; those of tokens up to the width of all rows."""
    if values.ndim == 2:
        values = torch.nn.functional.pad(values, (0, rows.width - values.shape[1]))
    return torch.cat([values, values.new_zeros(extra, *values.shape[1:])])


def _mini_batches(step: Step, replayed: int, updates: int) -> list[Tensor]:
    """Rows of each optimizer step: whole groups, and a share of the replayed clips."""
    groups = step.groups
    names = groups.unique()
    parts = []
    for i, some in enumerate(names.tensor_split(min(updates, len(names)))):
        extra = torch.arange(len(groups), len(groups) + replayed)[i::updates]
        parts.append(torch.cat([torch.isin(groups, some).nonzero()[:, 0], extra]))
    return parts


def _groups(step: Step, part: Tensor) -> int:
    return len(step.groups[part[part < len(step.groups)]].unique())


# Logging.


def _clip_values(step: Step, chosen: Sequence[tuple[int, int, float]], replayed: Sequence[Clip], run: Run) -> dict[str, float]:
    """What the clips are like: how long, how often the whole completion, how uncertain their ends."""
    values: dict[str, float] = {}
    if run.replays:
        values |= {"replay/drawn": float(len(replayed)), "replay/stored": float(len(run.buffer))}
    if not chosen:
        return values
    bodies = [len(step.rollouts[r].completion_ids) - step.rollouts[r].ended for r, _, _ in chosen]
    with_clip = len({step.rollouts[r].group for r, _, _ in chosen})
    return values | {
        "clips/groups": with_clip / len(step.groups.unique()),
        "clips/fraction": sum(e / max(1, n) for (_, e, _), n in zip(chosen, bodies, strict=True)) / len(chosen),
        "clips/is_full": sum(e == n for (_, e, _), n in zip(chosen, bodies, strict=True)) / len(chosen),
        "clips/entropy": sum(h for _, _, h in chosen) / len(chosen),
    }


def _memory(run: Run) -> dict[str, float]:
    if run.policy.device.type == "cuda":
        return {"memory_gb": torch.cuda.max_memory_allocated(run.policy.device) / 2**30}
    import resource

    return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
