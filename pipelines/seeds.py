"""The seeds of the demo's experiment, each in a process of its own: at once as many as there are cores, as long as there is
time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echolab.errors import EcholabError
from echolab.words import percent
from pipelines.experiment import ARMS, Plan

BUDGET = 350.0  # seconds within which seeds are to end that begin unasked
MOST_WORKERS = 5
TOLD_EVERY = 10.0  # seconds between two lines of progress where there is no terminal
Say = Callable[[str], Any]


@dataclass
class Worker:
    """One seed, in a process of its own."""

    seed: int
    process: subprocess.Popen[str]
    began: float
    stages: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, plan: Plan, seed: int) -> Worker:
        logs = plan.folder / "logs"
        logs.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pipelines.experiment", str(plan.folder / "plan.json"), str(seed)]
        with (logs / f"seed-{seed}.txt").open("w") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        worker = cls(seed, process, time.monotonic())
        threading.Thread(target=worker._listen, daemon=True).start()
        return worker

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.stages.append(json.loads(line)["stage"])

    def stop(self) -> None:
        """It leaves a checkpoint, and ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def said(self, plan: Plan) -> str:
        """Where it is, in a few words."""
        stage = self.stages[-1] if self.stages else "starting"
        if stage not in ("pool", *ARMS):
            return f"seed {self.seed}: {stage}"
        run = f"pool-{self.seed}" if stage == "pool" else f"{stage}-s{self.seed}"
        values = _newest(plan.folder / "runs" / run / "metrics.jsonl")
        if "reward" not in values:
            return f"seed {self.seed}: {run} begins"
        figures = f"reward {values['reward']:.2f}, degenerate {percent(values['degenerate'])}"
        return f"seed {self.seed}: {run}, step {values['step']}, {figures}"


def _newest(metrics: Path) -> dict[str, Any]:
    """The last whole line of a metrics file."""
    try:
        lines = metrics.read_bytes()[-20_000:].split(b"\n")
    except OSError:
        return {}
    return json.loads(lines[-2]) if len(lines) > 1 and lines[-2].startswith(b"{") else {}


class Workers:
    """As many seeds at once as there are cores, and one after another as long as there is time, or up to `seeds`. They run
    while this is entered; leaving early stops them."""

    def __init__(self, plan: Plan, seeds: int | None, began: float, say: Say):
        self.plan, self.seeds, self.began, self.say = plan, seeds, began, say
        self.told = time.monotonic()
        self.room = max(1, min(os.cpu_count() or 1, MOST_WORKERS, seeds or MOST_WORKERS))
        self.live: list[Worker] = []
        self.done: list[Worker] = []

    def __enter__(self) -> Workers:
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.live:
            worker.stop()
        for worker in self.live:
            worker.process.wait()

    def passed(self, seed: int, stage: str) -> bool:
        """Whether a seed is beyond a stage."""
        found = [w.stages for w in (*self.live, *self.done) if w.seed == seed]
        return bool(found) and stage in found[0] and found[0][-1] != stage

    def finished(self) -> bool:
        return not self.live

    def look(self) -> None:
        """Take in what has ended, and begin what there is room and time for."""
        for worker in [w for w in self.live if w.process.poll() is not None]:
            if worker.process.returncode:
                log = self.plan.folder / "logs" / f"seed-{worker.seed}.txt"
                words = log.read_text().strip().splitlines() or ["without a word"]
                raise EcholabError(f"seed {worker.seed} failed: {words[-1]} ({log})")
            self.live.remove(worker)
            self.done.append(worker)
        while len(self.live) < self.room and self._another():
            self.live.append(Worker.start(self.plan, len(self.live) + len(self.done)))

    def _another(self) -> bool:
        begun = len(self.live) + len(self.done)
        if self.seeds is not None:
            return begun < self.seeds
        if begun < self.room:
            return True
        took = max((time.monotonic() - w.began for w in self.done), default=0.0)
        return time.monotonic() - self.began + took < BUDGET

    def wait(self, until: Callable[[], bool]) -> None:
        """Until a condition holds; meanwhile it is told where the seeds are."""
        from rich.console import Console

        console = Console(stderr=True)
        with console.status("") as status:
            while not until():
                self.look()
                said = "; ".join(w.said(self.plan) for w in self.live)
                status.update(said)
                if said and not console.is_terminal and time.monotonic() - self.told > TOLD_EVERY:
                    self.told = time.monotonic()
                    self.say(f"    {said}")
                time.sleep(0.2)
