"""What a run holds between its steps, how it starts, and how it goes on where it was."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from echolab.engines import Engine
from echolab.engines.torch_engine import TorchEngine
from echolab.entropy.scorer import Scorer
from echolab.errors import EcholabError
from echolab.segment import Segmenter
from trainer import checkpoint, policy
from trainer.algorithms import Algorithm
from trainer.config import TrainConfig
from trainer.judge import Judge
from trainer.metrics import Watch
from trainer.record import Recorder
from trainer.replay import Buffer, stored
from trainer.rollouts import Problem, Rollout
from trainer.tasks import Tasks, held_out

CONFIG = "config.json"
WINDOW = 12  # steps of which `until_degenerate` takes the mean


@dataclass(eq=False)
class Run:
    """Everything but the metrics file. `open` makes it and takes it down."""

    config: TrainConfig
    algorithm: Algorithm
    policy: Scorer
    reference: Scorer | None
    engine: Engine
    judge: Judge
    tasks: Tasks
    held_out: list[Problem]
    buffer: Buffer
    optimizer: torch.optim.Optimizer
    recorder: Recorder
    segmenter: Segmenter = Segmenter()
    watch: Watch = field(default_factory=Watch)
    step: int = 0  # that is done
    best: tuple[float, int] | None = None  # evaluation, and its step
    bad: int = 0  # steps in a row without a finite gradient
    failure: float = 0.0  # the reward of a plain failure, see `judged`
    shares: list[float] = field(default_factory=list)  # of degenerate groups, in the last steps
    facts: dict[str, Any] = field(default_factory=dict)  # the newest evaluation

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def done(self) -> bool:
        """After the last step, or once the prompts have little left to teach."""
        until = self.config.until_degenerate
        exhausted = until is not None and len(self.shares) == WINDOW and sum(self.shares) >= until * WINDOW - 1e-9
        return exhausted or self.step >= self.config.steps

    @property
    def replays(self) -> bool:
        return self.config.replay.source is not None

    @classmethod
    @contextmanager
    def open(cls, config: TrainConfig) -> Iterator[Run]:
        """A new run, or the one of this folder from its newest checkpoint on."""
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        _check_config(folder / CONFIG, config)
        found = checkpoint.all_of(folder / "checkpoints")
        torch.manual_seed(config.seed)
        model = policy.load(config.model, config.sampling.temperature, str(found[-1]) if found else None)
        row = config.resolved_algorithm
        judge = Judge(config.task.verifier, config.task.options, config.task.timeout)
        tasks = Tasks.open(config, model.tokenizer, judge.verifier.needs_gold)
        source = config.replay.source
        clips = stored(source, config.store, model.vocab.tokenizer) if source not in (None, "run") and not found else ()
        run = cls(
            config=config,
            algorithm=row,
            policy=model,
            reference=_reference(config) if row.beta else None,
            engine=TorchEngine(model.model, model.eos, config.sampling.rows),
            judge=judge,
            tasks=tasks,
            held_out=held_out(config, model.tokenizer),
            buffer=Buffer(config.replay, config.seed, clips),
            optimizer=torch.optim.AdamW(
                model.model.parameters(),
                lr=config.optimizer.lr,
                betas=config.optimizer.betas,
                weight_decay=config.optimizer.weight_decay,
            ),
            recorder=Recorder.open(config, model),
        )
        try:
            if found:
                run._restore(found[-1])
            _keep_config(folder / CONFIG, config)  # only now: one that cannot begin does not own the folder
            yield run
        finally:
            run.judge.close()
            run.recorder.close()

    def save(self) -> Path:
        """A checkpoint of the step that is done; older ones go, but for the best."""
        self.recorder.flush()
        state = {
            "optimizer": self.optimizer.state_dict(),
            "position": self.tasks.position,
            "buffer": self.buffer.state(),
            "watch": self.watch.state(),
            "random": torch.get_rng_state(),
            "bad": self.bad,
            "shares": self.shares,
            "failure": self.failure,
        }
        facts = {"run": self.config.run, "best": self.best, "evaluation": self.facts}
        place = checkpoint.save(self.checkpoints, self.step, self.policy.model, self.policy.tokenizer, state, facts)
        checkpoint.prune(self.checkpoints, self.config.checkpoint.keep, self.best[1] if self.best else None)
        return place

    def _restore(self, place: Path) -> None:
        state, facts = checkpoint.load_state(place), checkpoint.load_facts(place)
        self.optimizer.load_state_dict(state["optimizer"])
        self.tasks.position = state["position"]
        self.buffer.restore(state["buffer"])
        self.watch.restore(state["watch"])
        torch.set_rng_state(state["random"])
        self.bad, self.shares, self.failure = state["bad"], state["shares"], state["failure"]
        self.step = facts["step"]
        self.best = tuple(facts["best"]) if facts["best"] else None
        self.facts = facts["evaluation"]

    def judged(self, rollouts: Iterable[Rollout]) -> None:
        """A failure's reward is 0, or the run's lowest where rewards are negative, as the store has it."""
        self.failure = min([self.failure, *(r.reward for r in rollouts if not math.isnan(r.reward))])

    def evaluated(self, values: dict[str, float]) -> None:
        """Remember the newest figures, and the step of the best."""
        self.facts = dict(values)
        if self.best is None or values["eval/mean"] > self.best[0]:
            self.best = (values["eval/mean"], self.step)

    def warn(self, values: dict[str, Any]) -> None:
        for warning in self.watch.look(values):
            print(f"\nstep {self.step}: {warning}", file=sys.stderr, flush=True)

    def count_bad(self, moved: bool) -> None:
        """A step without a finite gradient is skipped; many in a row end the run, whose checkpoints are good."""
        self.bad = 0 if moved else self.bad + 1
        if self.bad >= self.config.optimizer.bad_steps:
            kept = checkpoint.all_of(self.checkpoints)
            last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise EcholabError(f"no finite gradient in {self.bad} steps in a row: lower optimizer.lr; {last}")


def _reference(config: TrainConfig) -> Scorer:
    """The policy as it was before the first step."""
    frozen = policy.load(config.model, config.sampling.temperature)
    frozen.model.requires_grad_(False)
    return frozen


def _check_config(path: Path, config: TrainConfig) -> None:
    """A folder belongs to one configuration; only when it ends, checkpoints and logs may change."""
    now = _compared(config.model_dump(mode="json"))
    if path.exists() and (before := _compared(json.loads(path.read_text()))) != now:
        key = next(k for k in sorted({*before, *now}) if before.get(k) != now.get(k))
        was = f"{key} = {before.get(key)!r}, not {now.get(key)!r}"
        raise EcholabError(f"{path.parent} holds a run with {was}: give another `out`, or delete it")


def _keep_config(path: Path, config: TrainConfig) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(config.model_dump(mode="json"), indent=1))
    unfinished.rename(path)


def _compared(document: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        if above == "" and key in ("steps", "until_degenerate", "checkpoint", "log"):
            continue
        if isinstance(value, dict):
            found |= _compared(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found
