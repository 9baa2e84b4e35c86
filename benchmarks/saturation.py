"""What becomes of a policy on a fixed pool of prompts: pre-training and GRPO on the built-in task, seed by seed, on one thread.

    python benchmarks/saturation.py

Writes benchmarks/results/saturation.md as it came out, after each seed anew. Twelve processor minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measure import RESULTS, machine, paragraph, table

from echolab.engines import Sampling
from trainer import evaluate, loop, maze, pretrain
from trainer.config import TrainConfig, load
from trainer.judge import Judge
from trainer.sampling import rollouts
from trainer.tasks import held_out

SETS = {"easy": maze.EASY, "hard": maze.HARD}
FIGURES = {"T=1": "mean", "greedy": "greedy", "pass@8": "pass@8", "EOS": "ended"}
WINDOWS = ((0, 10), (40, 50), (90, 100), (140, 150), (190, 200), (240, 250))
LOGGED = {
    "pool reward": "reward",
    "all-success groups": "groups/all_success",
    "all-fail groups": "groups/all_fail",
    "policy-gradient norm": "grad_norm",
    "token entropy": "entropy",
}


@dataclass
class Seed:
    """What one seed came to."""

    pretraining: float  # processor seconds
    grpo: float
    steps: list[dict[str, Any]]
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--pretraining", type=int, default=pretrain.STEPS, help="steps")
    options.add_argument("--steps", type=int, default=600, help="of GRPO, at most")
    options.add_argument("--problems", type=int, default=128, help="held out, of each set")
    options.add_argument("--out", type=Path, default=RESULTS / "saturation.md")
    o = options.parse_args()
    torch.set_num_threads(1)
    found: list[Seed] = []
    with tempfile.TemporaryDirectory() as work:
        for seed in range(o.seeds):
            found.append(one(seed, Path(work) / str(seed), o))
            o.out.write_text(report(found, o))
    print(o.out.read_text())


def one(seed: int, folder: Path, o: argparse.Namespace) -> Seed:
    began = _cpu()
    pretrain.save(pretrain.pretrain(seed, o.pretraining), folder / "policy")
    pretraining = _cpu() - began
    own = {"out": f"{folder}/run", "store": f"{folder}/store", "model.path": f"{folder}/policy", "seed": seed}
    rule = {
        "until_degenerate": 0.92,
        "steps": o.steps,
        "algorithm.aggregation": "token_mean",
        "evaluation.problems": o.problems,
    }
    config = load("maze", [f"{key}={value}" for key, value in {**own, **rule, "checkpoint.every": o.steps}.items()])
    before = judged(config, f"{folder}/policy")
    began = _cpu()
    trained = loop.train(config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"prompts": None})}))
    used = _cpu() - began
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return Seed(pretraining, used, steps, before, judged(config, trained["checkpoint"]))


def _cpu() -> float:
    """Of this process, and of children that have ended."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def judged(config: TrainConfig, model: str) -> dict[str, dict[str, float]]:
    """Held-out figures of a model, by set."""
    found = {}
    for name, levels in SETS.items():
        asked = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"levels": levels})})
        judge = Judge(asked.task.verifier, asked.task.options, asked.task.timeout)
        try:
            evaluation = evaluate.Evaluation.of(asked, model, judge)
            values = evaluate.figures(evaluation.answers(8, config.seed), 8, judge.verifier)
            questions = held_out(asked, evaluation.policy.tokenizer)
            best = Sampling(temperature=0.0, max_tokens=asked.sampling.max_tokens)
            greedy = rollouts(evaluation, questions, 1, best, 0, [f"greedy {i}" for i in range(len(questions))])
            found[name] = {**values, "greedy": statistics.mean(r.success for r in greedy)}
        finally:
            judge.close()
    return found


def report(seeds: list[Seed], o: argparse.Namespace) -> str:
    steps = [len(s.steps) for s in seeds]
    made = paragraph(f"""
        {machine(("torch", "transformers"))}, 1 thread. Made by `python benchmarks/saturation.py`. {len(seeds)} seeds, each
        with a pre-training of its own. The machine was shared with other work: read processor seconds.""")
    first = paragraph(f"""
        {o.pretraining} steps of pre-training on traces of all levels: {_span([s.pretraining for s in seeds], ".0f")} CPU s.
        Then, on {o.problems} held-out mazes of each set, 8 samples and one greedy answer a maze, the range over seeds:""")
    second = paragraph(f"""
        GRPO on 64 easy mazes, 16 x 8 completions a step, temperature 1, mean over tokens, one update, no KL, AdamW 5e-4,
        until the 12-step mean of degenerate groups is .92: {_span(steps, "d")} steps,
        {_span([s.grpo for s in seeds], ".0f")} CPU s with the store. Means over the seeds that came so far:""")
    third = paragraph("""
        Held out, before and after: means over the seeds, and in brackets how many seeds fell, of all.""")
    return (
        f"# Saturation\n\n{made}## After pre-training\n\n{first}{pretrained(seeds)}\n## GRPO on a fixed pool\n\n{second}"
        f"{saturating(seeds)}\n{third}{held(seeds)}\n{paragraph(of_the_prototype(seeds, o.steps))}"
    )


def _span(values: list[float] | list[int], form: str) -> str:
    return f"{min(values):{form}}-{max(values):{form}}"


def pretrained(seeds: list[Seed]) -> str:
    rows = [[name, *(_span([s.before[name][key] for s in seeds], ".2f") for key in FIGURES.values())] for name in SETS]
    return table(["held out", *FIGURES], rows)


def saturating(seeds: list[Seed]) -> str:
    rows = []
    for name, key in LOGGED.items():
        windows = [[s.steps[a:b] for s in seeds if len(s.steps) >= b] for a, b in WINDOWS]
        windows.append([s.steps[-12:] for s in seeds])
        rows.append([name, *(_mean([step[key] for steps in window for step in steps]) for window in windows)])
    return table(["steps", *(f"{a}-{b - 1}" for a, b in WINDOWS), "last 12"], rows)


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" if values else ""


def held(seeds: list[Seed]) -> str:
    rows = []
    for name in SETS:
        cells = []
        for key in FIGURES.values():
            before, after = ([getattr(s, when)[name][key] for s in seeds] for when in ("before", "after"))
            fell = sum(a < b for a, b in zip(after, before, strict=True))
            cells.append(f"{statistics.mean(before):.2f} -> {statistics.mean(after):.2f} ({fell}/{len(seeds)})")
        rows.append([name, *cells])
    return table(["held out", *FIGURES], rows)


def of_the_prototype(seeds: list[Seed], most: int) -> str:
    """What a prototype measured, which these figures are held against."""
    ended = sum(len(s.steps) < most for s in seeds)
    return f"""
        The prototype of this task came to: easy .62-.78 / .88-.96 / .99-1.0 and hard .34-.48 / .64-.81 / .88-.95 after
        pre-training (94-108 CPU s); saturation after 288-387 steps (47-66 CPU s) in 5 of 5 seeds, held out easy .67/.91/1.0 ->
        .65/.75/.92 and hard .40/.74/.93 -> .30/.38/.67. Here {ended} of {len(seeds)} seeds saturated."""


if __name__ == "__main__":
    main()
