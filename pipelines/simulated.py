"""`echolab demo --simulated`: dumps of a run that never was, a store made from them, and the questions about degenerate groups.

The run is simulated, not trained: sixteen prompts a step, eight samples each, a policy whose skill on each problem grows
until most groups are all right, two problems that it never solves, and one that it forgets.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import echolab
from echolab.errors import EcholabError
from pipelines.render import table

if TYPE_CHECKING:
    import polars as pl

STEPS, PROMPTS, SAMPLES, PROBLEMS, SEED = 60, 16, 8, 48, 7
HOPELESS, FORGOTTEN = (46, 47), 5
Say = Callable[[str], Any]

# Of each answer: the columns that fit on a screen.
QUESTIONS = (
    (
        "Which groups teach nothing, since which step?",
        "degenerate_by_step",
        "step n_groups all_success all_fail mixed share_degenerate",
    ),
    ("What did they cost?", "wasted_tokens", "step unit wasted total share"),
    ("Which problems are the reason?", "degenerate_prompts", "prompt status since_step visits success_rate"),
    ("Which hopeless ones could an expert teach?", "all_fail_with_expert", "step prompt n n_experts expert_chars"),
)
SHOWN = 12
MARKER = ".echolab-simulated"  # says whose folder it is


def simulated(folder: Path, fresh: bool, say: Say = print) -> dict[str, Any]:
    """Make (or reuse) the demo in `folder`, and say what its store answers."""
    dumps, store = folder / "dumps", folder / "store"
    marker = folder / MARKER
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        raise EcholabError(f"{folder} is not empty and no simulated run: give another --keep")
    if fresh:  # what it makes, and nothing else that may lie there
        for made in (dumps / "train", dumps / "expert", store):
            shutil.rmtree(made, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    say(f"A simulated run of {STEPS} steps, {PROMPTS} prompts a step, {SAMPLES} samples a prompt, dumped as verl does: {dumps}")
    write_dumps(dumps)
    with echolab.open(store, create=True) as lab:
        policy = lab.ingest(dumps / "train", run="demo")
        expert = lab.ingest(dumps / "expert", run="expert", role="expert")
        say(f"echolab ingest: {policy.rows + expert.rows:,} rollouts new in {store}")
        answers = {name: lab.query(name, run="demo") for _, name, _ in QUESTIONS}
    for question, name, columns in QUESTIONS:
        shown, which = _some(answers[name])
        say(f"\n{question}\n$ echolab query {name} --param run=demo --store {store}{which}\n")
        say(table(shown.select(columns.split()), 0))
    say(_in_words(answers))
    say(f'Ask on: echolab sql "SELECT kind, count(*) FROM groups GROUP BY kind" --store {store}')
    return {"store": str(store), "answers": {name: frame.to_dicts() for name, frame in answers.items()}}


def _some(frame: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """Rows for a screen and a word that says which: spread over the steps, else the first ones."""
    every = -(-frame.height // SHOWN)
    if every <= 1:
        return frame, ""
    if "step" not in frame.columns:
        return frame.head(SHOWN // 2), f"   (the first of {frame.height})"
    return frame.gather_every(every, offset=every - 1), f"   (every {every}th row)"


def _in_words(answers: dict[str, pl.DataFrame]) -> str:
    shares = answers["degenerate_by_step"].select("step", "share_degenerate").rows()
    below = max((step for step, share in shares if share < 0.9), default=0)
    cost = answers["wasted_tokens"]
    problems = Counter(answers["degenerate_prompts"]["status"])
    return (
        f"In short: from step {below + 1} on at least 90 % of the groups teach nothing. In all, {cost['wasted'].sum():,} of"
        f" {cost['total'].sum():,} characters went into such groups.\nProblems: {problems['saturated']} solved for good,"
        f" {problems['never_solved']} never solved, {problems['forgotten']} solved and lost again.\n"
    )


def write_dumps(folder: Path) -> None:
    """The same files every time, so that a second demo has nothing new to ingest."""
    rng = random.Random(SEED)
    problems = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(PROBLEMS)]
    (folder / "train").mkdir(parents=True, exist_ok=True)
    (folder / "expert").mkdir(exist_ok=True)
    for step in range(1, STEPS + 1):
        lines = []
        for problem in rng.sample(range(PROBLEMS), PROMPTS):
            right = _skill(problem, step)
            for sample in range(SAMPLES):
                solved = rng.random() < right
                lines.append(_rollout(problems[problem], step, f"{step:04d}-{problem:02d}_{sample}_0", solved, rng))
        _write(folder / "train" / f"{step}.jsonl", lines)
    golden = [
        {"prompt": _prompt(p), "completion": _solution(p, sum(p)), "reward": 1.0, "ground_truth": str(sum(p)), "source": "sums"}
        for p in problems
    ]
    _write(folder / "expert" / "solutions.jsonl", golden)


def _skill(problem: int, step: int) -> float:
    """Chance of a right answer: a logistic curve that starts later for later problems."""
    if problem in HOPELESS:
        return 0.0
    if problem == FORGOTTEN and step > 40:
        return 0.0
    chance = 1 / (1 + math.exp(-(step - 6 - 0.6 * problem) / 4))
    return 1.0 if chance > 0.98 else chance


def _prompt(problem: tuple[int, int]) -> str:
    return f"What is {problem[0]} + {problem[1]}?"


def _solution(problem: tuple[int, int], answer: int) -> str:
    a, b = problem
    return f"Tens first: {a // 10 * 10} + {b // 10 * 10}.\nThen the rest: {a % 10} + {b % 10}.\n\\boxed{{{answer}}}"


def _rollout(problem: tuple[int, int], step: int, uid: str, solved: bool, rng: random.Random) -> dict[str, Any]:
    answer = sum(problem) + (0 if solved else rng.choice((-10, -1, 1, 10)))
    doubts = "".join(f"Let me check that again: {rng.randint(10, 99)}.\n" for _ in range(rng.randint(0, 6 if solved else 12)))
    return {
        "input": f"user\n{_prompt(problem)}\nassistant\n",
        "output": doubts + _solution(problem, answer),
        "gts": str(sum(problem)),
        "score": float(solved),
        "step": step,
        "uid": uid,
    }


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
