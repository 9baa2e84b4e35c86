"""`echolab demo`: a real experiment on this machine, from nothing to a page, told as it happens.

A tiny policy learns to walk mazes, RL saturates it on a fixed pool of them, and four ways to go on are compared. Training runs
in processes of their own (pipelines/seeds.py, pipelines/experiment.py); this file asks their store, and tells what it answers.
What is there is not made again: a demo that was stopped goes on, and a finished one prints its page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl
from filelock import FileLock, Timeout

import echolab
from echolab.errors import EcholabError
from echolab.lab import Lab
from echolab.words import THIN, count, percent, short
from pipelines.experiment import ARMS, SELECTORS, VERIFIER, Plan, held_out, write_lines
from pipelines.render import table
from pipelines.seeds import Say, Workers
from trainer import checkpoint, maze

MARKER = "demo.json"  # says that a folder is a demo's, of which kind, and when it was finished
AGREEMENT = ["step", "n", "n_compared", "n_agree", "agreement", "only_verifier", "only_recorded"]


def plan_of(folder: Path, fast: bool) -> Plan:
    if fast:
        small: dict[str, Any] = {"pool": 16, "pool_steps": 150, "fresh": 256, "steps": 20, "evaluations": 2, "questions": 24}
        return Plan(folder=folder, **small)
    return Plan(folder=folder)


def demo(
    folder: Path, *, fast: bool = False, seeds: int | None = None, fresh: bool = False, say: Say = print
) -> dict[str, Any]:
    """Make the demo in `folder`, or go on with it, and tell it with `say`. A finished one is only told where its page is."""
    folder = folder.absolute()
    facts = _begin(folder, fast, fresh)
    if facts is not None and facts["seeds"] >= (seeds or 1):
        facts |= {"page": str(folder / "report.html"), "store": str(folder / "store")}  # it may have been moved
        say(f"{facts['headline']}.\nThe page: {facts['page']}\n`--fresh` makes the demo anew.")
        return facts
    try:
        with FileLock(folder / "demo.lock", timeout=0):
            return _make(plan_of(folder, fast), fast, seeds, say)
    except Timeout:
        raise EcholabError(f"another demo is at work in {folder}: --keep names another folder") from None


def _make(plan: Plan, fast: bool, seeds: int | None, say: Say) -> dict[str, Any]:
    began = time.monotonic()
    write_lines(plan.prompts("held_out"), held_out(plan))
    (plan.folder / "plan.json").write_text(plan.model_dump_json())
    _tell_task(say)
    _policy(plan, fast, say)
    with Workers(plan, seeds or (1 if fast else None), began, say) as workers:
        workers.wait(lambda: workers.passed(0, "pool"))
        with echolab.open(plan.store) as lab:
            _tell_degeneracy(lab, say)
            _tell_uncertainty(lab, plan, say)
        workers.wait(lambda: workers.passed(0, "mine"))
        with echolab.open(plan.store) as lab:
            _tell_clips(lab, say)
        workers.wait(workers.finished)
    return _end(plan, fast, len(workers.done), time.monotonic() - began, say)


def _begin(folder: Path, fast: bool, fresh: bool) -> dict[str, Any] | None:
    """The facts of a demo that is finished."""
    marker = folder / MARKER
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        raise EcholabError(f"{folder} is not empty and no demo: give another --keep")
    if fresh and folder.exists():  # what a demo makes, and nothing else that may lie there
        for made in ("store", "policy", "policy.part", "runs", "exports", "probes", "logs"):
            shutil.rmtree(folder / made, ignore_errors=True)
        for made in (MARKER, "plan.json", "report.html", "prompts/*.jsonl", "dumps/solver-*.jsonl"):
            for file in folder.glob(made):
                file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if marker.exists():
        known = json.loads(marker.read_text())
        if known["fast"] != fast:
            kind = "fast" if known["fast"] else "full"
            shows = "`--fast` shows it" if known["fast"] else "without --fast it is shown"
            raise EcholabError(f"{folder} holds a {kind} demo: {shows}, --fresh makes it anew, --keep names another folder")
        return known["facts"]
    marker.write_text(json.dumps({"fast": fast, "facts": None}))
    return None


# What is trained.


def _policy(plan: Plan, fast: bool, say: Say) -> None:
    """Pre-training; a fast demo begins with the weights that the same recipe gave."""
    place = plan.folder / "policy"
    if place.exists():
        return
    if fast:
        shutil.copytree(maze.WEIGHTS, place)
        say("\nA policy of 364,000 parameters that has read such traces: the weights in trainer/weights, made by")
        say("    python -m trainer.pretrain --out trainer/weights --half")
        return
    say("\nA policy of 364,000 parameters reads the traces of a solver that wanders, from nothing:")
    unfinished = plan.folder / "policy.part"
    threads = min(2, os.cpu_count() or 1)
    command = [sys.executable, "-m", "trainer.pretrain", "--out", str(unfinished), "--threads", str(threads)]
    waiting = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin cost several times as much on busy cores
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=waiting) as process:
        assert process.stderr is not None
        lines = [_shown(line, say) for line in process.stderr]
    if process.returncode:
        raise EcholabError(f"pre-training failed: {(lines or ['without a word'])[-1]}")
    unfinished.rename(place)


def _shown(line: str, say: Say) -> str:
    if line.startswith("step "):
        say(f"    {line.rstrip()}")
    return line.strip()


# What is told.


def _tell_task(say: Say) -> None:
    row = maze.problems(1, maze.EASY, "told")[0]
    path = maze.traces([row], "told")[0]["completion"].split()
    say(
        "The task: from a start to a goal in a maze of 6 x 6 cells, one straight move a line. Many answers are right,\n"
        "and a program checks them. Here s leads to g; # are walls, and one answer is " + " ".join(path) + "\n"
    )
    say(_drawn(maze.Maze.read(row["prompt"])))


def _drawn(m: maze.Maze) -> str:
    marks = {m.start: "s", m.goal: "g"} | dict.fromkeys(m.walls, "#")
    cells = [[marks.get(c * maze.SIZE + r, ".") for c in range(maze.SIZE)] for r in range(maze.SIZE)]
    lines = [f"    {r + 1} {' '.join(row)}" for r, row in enumerate(cells)]
    return "\n".join(["      a b c d e f", *lines])


def _asked(
    lab: Lab, say: Say, query: str, columns: str, rows: Callable[[pl.DataFrame], pl.DataFrame], **params: Any
) -> pl.DataFrame:
    """The answer of a named query, some of it shown under the command that gives it."""
    answer = lab.query(query, **params)
    options = "".join(f" --param {k}={v}" for k, v in params.items())
    say(f"\n$ echolab query {query}{options} --store {_short(lab.store.root)}\n")
    say(table(rows(answer).select(columns.split()), 0))
    return answer


def _short(path: Path) -> str:
    """As seen from here, where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _spread(frame: pl.DataFrame, n: int = 10) -> pl.DataFrame:
    """About n rows, the last one among them."""
    every = max(1, -(-frame.height // n))
    return frame.gather_every(every, offset=(frame.height - 1) % every)


def _tell_degeneracy(lab: Lab, say: Say) -> None:
    say("\nDEGENERACY APPEARS. GRPO on a fixed pool of prompts; a group whose rewards are all equal teaches nothing:")
    where: dict[str, Any] = {"run": "pool-0", "split": "train"}
    kinds = _asked(
        lab, say, "degenerate_by_step", "step n_groups all_success all_fail mixed share_degenerate", _spread, **where
    )
    say("\nTHIS IS WHAT IT COSTS.")
    cost = _asked(lab, say, "wasted_tokens", "step wasted total share", lambda f: _spread(f, 5), **where)
    wasted, total = int(cost["wasted"].sum()), int(cost["total"].sum())
    last = kinds["share_degenerate"][-1]
    say(
        f"In all, {percent(wasted / total)} of {short(total)} sampled tokens were wasted;"
        f" {percent(last)} of the last step's groups taught nothing."
    )
    say(f"\nMemory or skill? {_held_out(lab)}")


def _held_out(lab: Lab) -> str:
    """How the policy fared on the questions that it never trains on, in its first and in its last evaluation."""
    rows = lab.sql(
        """SELECT step, source, avg(n_success / n_rewarded) AS rate FROM groups
        WHERE run = 'pool-0' AND split = 'eval' GROUP BY step, source ORDER BY step"""
    )
    pool = lab.query("reward_by_step", run="pool-0", split="train")
    told = [f"the pool's reward went from {pool['mean'][0]:.2f} to {pool['mean'][-1]:.2f}"]
    for source in ("easy", "hard"):
        rates = rows.filter(pl.col("source") == source)["rate"]
        told.append(f"on held-out {source} mazes from {rates[0]:.2f} to {rates[-1]:.2f}")
    return ", ".join(told) + "."


def _tell_uncertainty(lab: Lab, plan: Plan, say: Say) -> None:
    say("\nAre the rewards right? The last steps' answers are judged again, from outside:")
    last = lab.sql("SELECT max(step) AS s FROM rollouts WHERE run = 'pool-0'")["s"][0]
    policy = f"run = 'pool-0' AND split = 'train' AND step > {last - 12}"
    lab.verify(VERIFIER, where=policy, workers=1)
    agreement = lab.query("verifier_agreement", run="pool-0", verifier=VERIFIER).select(AGREEMENT)
    say(f'\n$ echolab verify --verifier {VERIFIER} --where "{policy}" --store {_short(lab.store.root)}')
    say(f"$ echolab query verifier_agreement --verifier {VERIFIER} --param run=pool-0 --store {_short(lab.store.root)}\n")
    say(table(_spread(agreement, 4), 0))
    say("\nWhere is the policy uncertain, on an expert's answers and on its own? Scored under the saturated policy:")
    saturated = checkpoint.all_of(plan.folder / "runs" / "pool-0" / "checkpoints")[-1]
    report, scorer = lab.score(saturated, where=f"run = 'solver' OR ({policy})", threads=1, device="cpu")
    lab.profile("solver", "role = 'expert' AND success", scorer=scorer)
    lab.profile("policy", f"({policy}) AND success", scorer=scorer)
    compared = lab.compare_profiles("solver", "policy")
    say(f'\n$ echolab score --model {_short(saturated)} --where "..." --store {_short(lab.store.root)}')
    say(f"$ echolab profile --compare solver policy --store {_short(lab.store.root)}\n")
    say(
        f"{count(report.rows, 'rollout')} scored. Mean segment entropy: {compared.a.mean:.2f} nats on the solver's answers,"
        f" {compared.b.mean:.2f} on its own."
    )


def _tell_clips(lab: Lab, say: Say) -> None:
    say(
        "\nWhat is still worth learning? Prefixes of right answers up to their most uncertain line, and random ones"
        " beside them:"
    )
    columns = "clipset selector n_clips n_problems n_tokens fraction_q50 mean_entropy"
    _asked(lab, say, "clip_stats", columns, lambda f: f.filter(pl.col("clipset").str.contains("^(peak|random)-0@")))


def _gradients(plan: Plan, selector: str) -> str:
    """How the gradient of replayed clips lies to that of the policy, over all steps at which both were measured."""
    lines = [line for path in plan.folder.glob(f"runs/{selector}-s*/metrics.jsonl") for line in path.read_text().splitlines()]
    both = [v for v in map(json.loads, lines) if v.get("norm/pg") and v.get("norm/replay")]
    if not both:
        return f"The gradient of {selector} clips was never measured beside one of the policy."
    length = fmean(v["norm/replay"] / v["norm/pg"] for v in both)
    cosine = fmean(v["cosine/replay"] for v in both)
    return (
        f"The gradient of {selector} clips was {length:.1f} times as long as the policy's, at a cosine of {cosine:+.2f} to it."
    )


def _end(plan: Plan, fast: bool, seeds: int, seconds: float, say: Say) -> dict[str, Any]:
    from echolab.chartdata import Answers
    from echolab.report.findings import experiment

    runs = ["pool-0", *(f"{arm}-s0" for arm in ARMS)]
    with echolab.open(plan.store) as lab:
        say("\nTHESE ARE THE REMEDIES, MEASURED. Four ways to go on, with the same random numbers, on held-out mazes:")
        columns = "arm source n_seeds start success_rate gain gain_low gain_high solved solved_gain"
        arms = _asked(lab, say, "arms", columns, lambda f: f)
        headline, figures = experiment(Answers.of(lab.session(), runs)) or ("No arms to compare", "")
        say(f"\n{headline}.\n{figures}.")
        for selector in SELECTORS:
            say(_gradients(plan, selector))
        say(
            f"Each arm learnt from {plan.steps * 128:,} rollouts a seed; fresh sampled {4 * plan.fresh:,} more to choose its"
            " prompts by."
        )
        page = lab.report(plan.folder / "report.html", runs=runs, clipset="peak-0")
        problems = lab.validate()
    if problems:
        raise EcholabError(f"the store is not sound: {problems[0]}")
    minutes = f"{seconds // 60:.0f}:{seconds % 60:02.0f} min"
    facts = {
        "page": page.path, "store": str(plan.store), "headline": headline, "seeds": seeds, "seconds": round(seconds, 1),
        "arms": arms.to_dicts(),
    }  # fmt: skip
    (plan.folder / MARKER).write_text(json.dumps({"fast": fast, "facts": facts}))
    say(f"\nAll of it as a page, {page.size / 1e6:.1f}{THIN}MB, after {minutes}: {page.path}")
    say(f"Read on: echolab view --store {_short(plan.store)}")
    say(f'Ask on:  echolab sql "SELECT kind, count(*) FROM groups GROUP BY kind" --store {_short(plan.store)}')
    return facts
