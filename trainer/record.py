"""Every step's rollouts into the store, in the background: a file a step, read in by the same door as any other dump.

A file is deleted once the store has it. A run that goes on from a checkpoint is another attempt: what the one before sampled
beyond that checkpoint is superseded."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import echolab
from echolab import ids
from echolab.entropy.scorer import Scorer
from echolab.errors import EcholabError
from echolab.readers.own import write
from echolab.recorded import Scorer as Sampler
from echolab.scoring import resegment
from echolab.segment import Segmenter
from trainer.config import TrainConfig
from trainer.rollouts import Rollout, Step

COMMIT_FILES, COMMIT_SECONDS = 16, 30.0
MOST_WAITING = 64  # files; a store that cannot follow holds the run up, and no memory fills


@dataclass
class Facts:
    """What is the same for all rollouts of a run."""

    run: str
    model: str
    tokenizer: str
    temperature: float
    dtype: str
    sampling: str
    chat: bool


class Recorder:
    """`put` returns at once. What went wrong in the background is raised by the next `put`, or by `flush`."""

    def __init__(self, store: str, folder: Path, facts: Facts, segmenter: Segmenter):
        self.store, self.folder, self.facts, self.segmenter = store, folder, facts, segmenter
        folder.mkdir(parents=True, exist_ok=True)
        self.attempt = self._next_attempt()
        self.error: BaseException | None = None
        self.waiting: queue.Queue[Path | None | threading.Event] = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    @classmethod
    def open(cls, config: TrainConfig, policy: Scorer) -> Recorder:
        s = config.sampling
        sampling = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "max_tokens": s.max_tokens}
        facts = Facts(
            run=config.run,
            model=config.model.path,
            tokenizer=policy.vocab.tokenizer,
            temperature=s.temperature,
            dtype=config.model.dtype,
            sampling=json.dumps(sampling),
            chat=config.task.template == "chat",
        )
        with echolab.open(config.store, create=True) as lab:
            policy.vocab.keep(lab.store)
            with lab.store.lock():
                sampler = Sampler(facts.run, facts.tokenizer, facts.temperature, facts.dtype)
                sampler.register(lab.store, policy.eos)
        return cls(config.store, Path(config.out) / "rollouts", facts, Segmenter())

    def _next_attempt(self) -> int:
        """After those of this run in the store, and of files that did not get there."""
        with echolab.open(self.store) as lab:
            known = [r.attempt for r in lab.snapshot.ledger.readings if r.run == self.facts.run]
        known += [int(m[1]) for f in self.folder.glob("*.parquet") if (m := re.match(r"attempt_(\d+)_", f.name))]
        return 1 + max(known, default=0)

    def put(self, step: Step, advantages: Tensor) -> None:
        """The rollouts of a training step; an advantage that differs by token is not kept."""
        values = advantages.tolist() if advantages.ndim == 1 else [None] * len(step.rollouts)
        self._write(f"step_{step.number:06d}", "train", step.number, step.rollouts, values)

    def put_evaluation(self, step: int, rollouts: Sequence[Rollout]) -> None:
        self._write(f"eval_{step:06d}", "eval", step, rollouts, [None] * len(rollouts))

    def _write(self, name: str, split: str, step: int, rollouts: Sequence[Rollout], advantages: Sequence[float | None]) -> None:
        self._check()
        rows = [self._row(r, split, step, a) for r, a in zip(rollouts, advantages, strict=True)]
        path = self.folder / f"attempt_{self.attempt}_{name}.parquet"
        unfinished = path.with_suffix(".tmp")
        try:
            write(unfinished, rows)
            unfinished.rename(path)
        except OSError as e:
            raise EcholabError(f"cannot write {path}: {e.strerror or e}") from None
        self.waiting.put(path)

    def _row(self, r: Rollout, split: str, step: int, advantage: float | None) -> dict[str, Any]:
        facts, problem = self.facts, r.problem
        return {
            "split": split,
            "step": step,
            "role": "policy",
            "model": facts.model,
            "source": problem.source,
            "group_id": ids.group_id(facts.run, split, step, ("trainer", r.group)),
            "group_source": "explicit",
            "sample": r.sample,
            "prompt": problem.prompt,
            "messages": None if problem.messages is None else json.dumps(problem.messages),
            "prompt_format": "chat" if facts.chat else "raw",
            "completion": r.text,
            "tokenizer": facts.tokenizer,
            "prompt_ids": problem.prompt_ids,
            "completion_ids": r.completion_ids,
            "logprobs": r.logprobs,
            "reward": r.reward,
            "advantage": advantage,
            "finish_reason": "stop" if r.ended else "length",
            "ground_truth": problem.ground_truth,
            "policy_version": str(step - 1 if split == "train" else step),  # updates that it had seen
            "sampling": facts.sampling,
            "extra": json.dumps(problem.extra) if problem.extra else None,
            "entropies": r.entropies,
        }

    def flush(self) -> None:
        """Everything so far is in the store when this returns."""
        if self.thread.is_alive():
            done = threading.Event()
            self.waiting.put(done)
            while not done.wait(0.2) and self.thread.is_alive():
                pass
        self._check()

    def close(self) -> None:
        if self.thread.is_alive():
            self.waiting.put(None)
            self.thread.join()
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error if isinstance(error, EcholabError) else EcholabError(f"rollouts cannot be stored: {error}")

    # In the background.

    def _work(self) -> None:
        held: list[Path] = []
        since = time.monotonic()
        try:
            while True:
                try:
                    item = self.waiting.get(timeout=max(0.1, COMMIT_SECONDS - (time.monotonic() - since)))
                except queue.Empty:
                    item = threading.Event()  # time to commit what there is
                if isinstance(item, Path):
                    held.append(item)
                if held and (not isinstance(item, Path) or len(held) >= COMMIT_FILES):
                    self._store(held)
                    held = []
                if not isinstance(item, Path) or not held:
                    since = time.monotonic()
                if isinstance(item, threading.Event):
                    item.set()
                if item is None:
                    return
        except BaseException as e:  # whatever it is, the run is told
            self.error = e

    def _store(self, files: Sequence[Path]) -> None:
        facts = self.facts
        with echolab.open(self.store) as lab:
            report = lab.ingest(
                files,
                run=facts.run,
                attempt=self.attempt,
                format="echolab",
                tokenizer=facts.tokenizer,
                temperature=facts.temperature,
                dtype=facts.dtype,
            )
            bad = [f for f in report.files if f.status not in ("ingested", "unchanged") or f.quarantined]
            if bad:
                raise EcholabError(
                    f"rollouts of {bad[0].file} could not be stored: {bad[0].status}, {bad[0].quarantined} bad rows"
                )
            resegment(lab.store, facts.run, self.segmenter)
        for file in files:
            file.unlink()
