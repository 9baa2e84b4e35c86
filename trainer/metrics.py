"""What a run says of itself: metrics.jsonl, TensorBoard and W&B where asked for, a line on the terminal, and warnings."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from echolab.errors import EcholabError

SHOWN = {"reward": "reward", "degenerate": "degenerate", "entropy": "entropy", "grad_norm": "|g|", "seconds": "s"}
EVERY = 5.0  # seconds between two lines where there is no terminal
SLOW = 0.1  # of the moving averages that warnings look at


class Metrics:
    """The files of one run. A run that goes on from a checkpoint drops what it had logged beyond it."""

    def __init__(self, folder: Path, after: int, config: Mapping[str, Any], tensorboard: bool, wandb: str | None):
        self.path, self.said = folder / "metrics.jsonl", 0.0
        self._cut(after)
        self.file = self.path.open("a")
        self.board = _tensorboard(folder) if tensorboard else None
        self.wandb = _wandb(wandb, config, folder) if wandb else None

    def _cut(self, after: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step(line) <= after]
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text("".join(f"{line}\n" for line in kept))
        unfinished.rename(self.path)

    def log(self, step: int, values: Mapping[str, float | int | str | None]) -> None:
        """Numbers that are none (NaN, infinity) are null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps({"step": step, **plain}) + "\n")
        self.file.flush()
        numbers = {k: v for k, v in plain.items() if isinstance(v, int | float)}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def show(self, step: int, steps: int, values: Mapping[str, Any], eta: float) -> None:
        """One line that is written over on a terminal, and one now and then elsewhere."""
        parts = [f"{name} {values[key]:.3f}" for key, name in SHOWN.items() if isinstance(values.get(key), float)]
        line = f"step {step} of {steps}: {', '.join(parts)}, {eta / 60:.0f} min left"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="\n" if step == steps else "", file=sys.stderr, flush=True)
        elif time.monotonic() - self.said > EVERY or step == steps:
            self.said = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the half line of a kill
        return math.inf


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise EcholabError("log.tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"))


def _wandb(project: str, config: Mapping[str, Any], folder: Path) -> Any:
    try:
        wandb = import_module("wandb")
    except ImportError:
        raise EcholabError("log.wandb needs wandb: pip install wandb") from None
    return wandb.init(project=project, config=dict(config), dir=str(folder))


class Watch:
    """Looks at the metrics of each step for what has gone wrong before; says each thing once until it is well again."""

    def __init__(self) -> None:
        self.slow: dict[str, float] = {}
        self.highest: dict[str, float] = {}
        self.wrong: set[str] = set()

    def look(self, values: Mapping[str, Any]) -> list[str]:
        """Warnings, in words."""
        for name in ("ended", "reward", "eval/mean", "norm/pg", "norm/echo", "norm/replay"):
            if isinstance(value := values.get(name), float) and math.isfinite(value):
                self.slow[name] = self.slow.get(name, value) + SLOW * (value - self.slow.get(name, value))
                self.highest[name] = max(self.highest.get(name, -math.inf), self.slow[name])
        return [self.found[name] for name in self._now_wrong()]

    found = {
        "ended": "fewer completions end by themselves than before: clips without their EOS teach not to stop",
        "echo": "the gradient of the clips (its weight included) is larger than the policy's: lower the coefficient",
        "exhausted": "the reward rises and the evaluation falls: the prompts are exhausted, sample from others",
    }

    def _now_wrong(self) -> list[str]:
        slow, high = self.slow, self.highest
        clips = max(slow.get("norm/echo", 0.0), slow.get("norm/replay", 0.0))
        now = {
            "ended": slow.get("ended", 1.0) < high.get("ended", 1.0) - 0.1,
            "echo": clips > slow.get("norm/pg", math.inf),
            "exhausted": slow.get("eval/mean", 1.0) < high.get("eval/mean", 1.0) - 0.05
            and slow.get("reward", 0.0) > high.get("reward", 0.0) - 0.01,
        }
        fresh = [name for name, is_wrong in now.items() if is_wrong and name not in self.wrong]
        self.wrong = {name for name, is_wrong in now.items() if is_wrong}
        return fresh

    def state(self) -> dict[str, Any]:
        return {"slow": dict(self.slow), "highest": dict(self.highest), "wrong": sorted(self.wrong)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.slow, self.highest, self.wrong = dict(state["slow"]), dict(state["highest"]), set(state["wrong"])
