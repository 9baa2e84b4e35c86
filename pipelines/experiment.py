"""One seed of the demo's experiment, from a pre-trained policy to its arms: `python -m pipelines.experiment PLAN.json SEED`.

    saturate -> mine, curate, export -> sample fresh prompts -> train on in arms

GRPO on a fixed pool of prompts until its groups are degenerate; then the policy goes on in arms that differ in one thing. All
of them begin with the same weights, draw the same random numbers and take as many steps of as many rollouts. Each stage is done
once: a run that was stopped goes on from its checkpoint, and what is there is not made again."""

from __future__ import annotations

import _thread
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import echolab
from echolab.config import Config
from echolab.errors import EcholabError
from trainer import checkpoint, maze
from trainer.config import TrainConfig
from trainer.loop import train

VERIFIER = "python:trainer.maze:verify"
SELECTORS = ("peak", "random")
ARMS = ("grpo", *SELECTORS, "fresh")
RECENT = 60  # steps of the pool's run that clips are mined from
PROBE = 4  # steps over which the norms of the clips' gradients are compared


class Plan(Config):
    """How large the experiment is."""

    folder: Path
    pool: int = 32  # prompts that the policy saturates on
    pool_steps: int = 500  # at most
    until_degenerate: float = 0.9  # of its groups, over 12 steps
    fresh: int = 640  # new prompts that the policy is asked to choose from
    steps: int = 40  # of each arm
    evaluations: int = 5  # of each arm, beside the one before it
    questions: int = 48  # that are held out, of each of two levels
    coefficient: float = 0.1  # of the loss of peak clips

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def prompts(self, name: str) -> Path:
        return self.folder / "prompts" / f"{name}.jsonl"


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A file that is whole, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    unfinished.replace(path)
    return path


def held_out(plan: Plan) -> list[dict[str, Any]]:
    """The questions of every evaluation: easy ones as in the pool, and hard ones that are never trained on."""
    easy = maze.problems(plan.questions, maze.EASY, "held out, easy")
    hard = maze.problems(plan.questions, maze.HARD, "held out, hard")
    return [{**row, "source": "easy"} for row in easy] + [{**row, "source": "hard"} for row in hard]


def pool(plan: Plan, seed: int) -> list[dict[str, Any]]:
    """Easy mazes, and a few of the hardest, so that some groups are all wrong."""
    few = plan.pool // 16
    rows = maze.problems(plan.pool - few, maze.EASY, f"pool {seed}") + maze.problems(few, (10, 10), f"pool {seed}, hard")
    return _without(rows, held_out(plan))


def fresh(plan: Plan, seed: int) -> list[dict[str, Any]]:
    """Easy mazes that are neither in the pool nor held out."""
    return _without(maze.problems(plan.fresh, maze.EASY, f"fresh {seed}"), held_out(plan) + pool(plan, seed))


def _without(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {row["prompt"] for row in others}
    return [row for row in rows if row["prompt"] not in known]


def saturate(plan: Plan, seed: int) -> Path:
    """GRPO on the pool until it has little left to teach; the policy that comes out."""
    write_lines(plan.prompts(f"pool-{seed}"), pool(plan, seed))
    task = {"prompts": str(plan.prompts(f"pool-{seed}"))}
    every = plan.pool_steps // 5
    facts = train(
        _config(
            plan, f"pool-{seed}", seed, plan.folder / "policy", task, every, steps=plan.pool_steps,
            until_degenerate=plan.until_degenerate, checkpoint={"every": 50, "keep": 1},
        )
    )  # fmt: skip
    return Path(facts["checkpoint"])


def learn_from_experts(plan: Plan, seed: int) -> None:
    """The solver's answers to the pool, as any dump of an expert comes in."""
    dump = plan.folder / "dumps" / f"solver-{seed}.jsonl"
    write_lines(dump, maze.traces(pool(plan, seed), seed))
    with echolab.open(plan.store, create=True) as lab:
        lab.ingest(dump, run="solver", role="expert")


def mine(plan: Plan, seed: int, last: int) -> None:
    """Clips of the pool's last steps by each selector: mined, curated, exported for replay."""
    with echolab.open(plan.store) as lab:
        for selector in SELECTORS:
            out = plan.folder / "exports" / f"{selector}-{seed}"
            if out.exists():
                continue
            mined = f"{selector}-{seed}-mined"
            run, where = f"pool-{seed}", f"step > {last - RECENT}"
            lab.mine(mined, selector=selector, run=run, split="train", scorer=run, where=where)
            lab.curate(mined, f"{selector}-{seed}", dedup=True)
            lab.export(out, "replay", clipset=f"{selector}-{seed}")


def scout(plan: Plan, seed: int, policy: Path) -> None:
    """Four samples of each fresh prompt, and the verifier's word on them: an arm chooses its prompts by these."""
    write_lines(plan.prompts(f"fresh-{seed}"), fresh(plan, seed))
    with echolab.open(plan.store) as lab:
        lab.generate(
            policy, plan.prompts(f"fresh-{seed}"), run=f"scout-{seed}", n=4, max_tokens=maze.MAX_TOKENS, seed=seed, threads=1,
            device="cpu",
        )  # fmt: skip
        lab.verify(VERIFIER, run=f"scout-{seed}", workers=1)


def equal_norm(plan: Plan, seed: int, policy: Path) -> dict[str, float]:
    """A coefficient for each selector, so that the gradients of its clips are as long as those of peak clips: what an arm
    does is then the direction of its clips, and not their size. Measured where the arms begin, with weights that stay."""
    found, kept = {}, plan.folder / "probes" / f"{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    for selector in SELECTORS:
        name, probes = f"{selector}-{seed}", plan.folder / "probes"
        shutil.rmtree(probes / name, ignore_errors=True)
        more = {"steps": PROBE, "replay": _replay(plan, name, 1.0), "log": {"gradients": 1}, "optimizer": {"lr": 1e-30}}
        task = {"prompts": str(plan.prompts(f"pool-{seed}"))}
        train(_config(plan, name, seed, policy, task, None, **more, out=str(probes / name), store=str(probes / name / "store")))
        lines = (probes / name / "metrics.jsonl").read_text().splitlines()
        found[selector] = fmean(json.loads(line).get("norm/replay", 0.0) for line in lines)
    coefficients = {s: plan.coefficient * found["peak"] / found[s] if found[s] else plan.coefficient for s in SELECTORS}
    kept.write_text(json.dumps(coefficients))
    return coefficients


def run_arms(plan: Plan, seed: int, policy: Path, say: Any) -> None:
    """The same steps four times, each with one thing that is different."""
    coefficients = equal_norm(plan, seed, policy)
    every = plan.steps // plan.evaluations
    for arm in ARMS:
        task: dict[str, Any] = {"prompts": str(plan.prompts(f"pool-{seed}"))}
        more: dict[str, Any] = {}
        if arm in SELECTORS:
            more["replay"] = _replay(plan, f"{arm}-{seed}", coefficients[arm])
        if arm == "fresh":
            chosen = f"run = 'scout-{seed}' AND success_rate BETWEEN 0.1 AND 0.9"
            task = {"prompts": "store", "where": chosen, "verdicts": VERIFIER}
        say(arm)
        train(_config(plan, f"{arm}-s{seed}", seed, policy, task, every, steps=plan.steps, **more, log={"gradients": 10}))


def _replay(plan: Plan, name: str, coefficient: float) -> dict[str, Any]:
    return {"source": str(plan.folder / "exports" / name), "coefficient": coefficient}


def _config(plan: Plan, run: str, seed: int, policy: Path, task: dict[str, Any], every: int | None, **more: Any) -> TrainConfig:
    document = {
        "out": str(plan.folder / "runs" / run),
        "run": run,
        "store": str(plan.store),
        "seed": seed,
        "model": {"path": str(policy), "threads": 1, "device": "cpu"},
        "task": {"verifier": VERIFIER, **task},
        "sampling": {"prompts": 16, "n": 8, "max_tokens": maze.MAX_TOKENS},
        "evaluation": {"prompts": str(plan.prompts("held_out")), "every": every, "n": 4, "greedy": False} if every else {},
        "optimizer": {"lr": 5e-4},
        **more,
    }
    return TrainConfig(**document)


def run_seed(plan: Plan, seed: int, say: Any) -> None:
    """Everything of one seed; `say` hears of each stage as it begins."""
    say("pool")
    learn_from_experts(plan, seed)
    policy = saturate(plan, seed)
    last = checkpoint.load_facts(policy)["step"]
    say("mine")
    mine(plan, seed, last)
    say("scout")
    scout(plan, seed, policy)
    run_arms(plan, seed, policy, say)
    say("done")


def _end_with_parent() -> None:
    """Ctrl-C and the end of the demo both close our standard input: then a checkpoint is left, and we end."""
    os.read(sys.stdin.fileno(), 1)  # no buffer, whose lock would outlive the interpreter
    _thread.interrupt_main()


def main() -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    plan, seed = Plan(**json.loads(Path(sys.argv[1]).read_text())), int(sys.argv[2])
    try:
        run_seed(plan, seed, lambda stage: print(json.dumps({"seed": seed, "stage": stage}), flush=True))
    except EcholabError as e:
        print(f"seed {seed}: {e}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
