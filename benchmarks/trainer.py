"""The trainer against TRL's GRPOTrainer, and what echo and the store cost it, on one thread of a CPU.

    python benchmarks/trainer.py

Writes benchmarks/results/trainer.md as it came out. Sampling alone is measured by generation.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from measure import FOLDER, RESULTS, machine, paragraph, run, table

CHILD = f"""
import runpy, sys
sys.path.append({str(FOLDER)!r})
runpy.run_path({__file__!r}, run_name="__main__")
"""
WARM_UP = 2  # steps that are not counted
STEPS = {
    "ours": {"mazes": 34, "lengths vary": 12, "like lengths": 7},
    "TRL": {"mazes": 8, "lengths vary": 6, "like lengths": 5},
}
LONG = 5.0  # seconds of a step whose store may cost 2 %
EXHAUSTED, STORED = "half of the groups all-success", "steps of five seconds"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--only", choices=PARTS, action="append")
    options.add_argument("--out", type=Path, default=RESULTS / "trainer.md")
    options.add_argument("--child", nargs=4, help=argparse.SUPPRESS)  # side, case, its folder, a name of the run
    o = options.parse_args()
    if o.child:
        side, case, folder, name = o.child
        print(json.dumps(CHILDREN[side](case, Path(folder), name)))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as work:
        parts = []
        for name in o.only or PARTS:
            parts.append(PARTS[name](o.turns, Path(work) / name))
            print(parts[-1], flush=True)
    about = paragraph(f"""
        {machine(("torch", "transformers", "trl", "deltalake"))}, 1 thread. Made by `python benchmarks/trainer.py`. **The
        machine was shared** with other work (load {load:.1f} on {os.cpu_count()} cores when this began): read ratios and
        CPU seconds, not wall seconds. Sampling alone against transformers' generate: [generation.md](generation.md).""")
    if not o.only:
        o.out.write_text(f"# The trainer\n\n{about}" + "\n".join(parts))


def child(side: str, case: str, folder: Path, name: str = "run") -> dict[str, Any]:
    return run(CHILD, "--child", side, case, folder, name).said


# A step, ours and TRL's.


def cases() -> dict[str, Any]:
    from trainer_runs import Case

    return {
        "lengths vary": Case("random, lengths vary", 16, 8, 16, 128, ends=23),
        "like lengths": Case("random, like lengths", 16, 8, 16, 128),
        EXHAUSTED: Case("random, half easy", 16, 8, 16, 128, ends=12, easy=0.5),
        STORED: Case("random, long steps", 24, 8, 16, 128),
    }


def config_of(case: str, folder: Path, name: str) -> Any:
    own = {"out": f"{folder}/{name}", "store": f"{folder}/{name}-store"}
    if case != "mazes":
        return cases()[case].make(folder).model_copy(update=own)
    from trainer.config import load
    from trainer.pretrain import pretrain, save

    if not (folder / "policy").exists():
        save(pretrain(steps=160), folder / "policy")
    config = load("maze", [f"model.path={folder}/policy", "steps=1000", "optimizer.lr=1e-12"])
    return config.model_copy(update={**own, "evaluation": config.evaluation.model_copy(update={"prompts": None})})


def steps(turns: int, work: Path) -> str:
    rows, found = [], {}
    for turn in range(turns):
        for case in STEPS["ours"]:
            for side in STEPS:
                found.setdefault((case, side), []).append(child(side, case, work / case, f"{side}{turn}"))
    for case in STEPS["ours"]:
        ours, theirs = (_medians(found[case, side]) for side in STEPS)
        for side, m in (("ours", ours), ("TRL", theirs)):
            faster = [theirs[k] / m[k] for k in ("cpu", "wall")] if side == "ours" else ["", ""]
            rows.append([f"**{case}**: {side}", m["cpu"], m["wall"], m["length"], *faster, m["peak"], m["more"]])
    least = _medians([child("floor", "like lengths", work / "like lengths") for _ in range(turns)])
    rows.append(["**like lengths**: floor", least["cpu"], least["wall"], *[""] * 5])
    about = paragraph(f"""
        GRPO on 16 prompts x 8 completions, one update, no KL, no evaluation, the same model, tokenizer, prompts and reward.
        Ours also computes log-probabilities and entropies, and writes every rollout to the store. TRL samples with
        transformers' generate. Rows of groups whose rewards are alike get no pass in ours: many of `mazes`, next to none
        elsewhere. `mazes`: the built-in task, a policy of 0.36 M parameters after 160 steps of pre-training, up to 29
        tokens. The others: a random Qwen2 of 1.77 M (4 layers of width 192, vocabulary 1,024), prompts of 16 tokens,
        completions of up to 128; 23 tokens of the vocabulary (`lengths vary`) or one (`like lengths`) end one. Rivals take
        turns, each in its own process; medians of {turns} turns, in which seconds are means over the steps after the first
        {WARM_UP} (so that commits to the store count). Memory: the highest resident set, and how much that is above what
        was held before the first step. Floor: the linear layers of decoding and of one forward and backward pass, all rows
        to the longest, and nothing else. Goal: 2 times faster.""")
    titles = ["", "CPU s", "wall s", "mean length", "CPU, theirs / ours", "wall, theirs / ours", "peak MB", "MB above start"]
    return f"## A step, from prompts to the next weights\n\n{about}{table(titles, rows)}"


def _medians(turns: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}


class Marks:
    """Clocks at the beginning of each step, and the memory from there on."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.start = self.peak = 0.0

    def mark(self) -> None:
        from trainer_runs import cpu_seconds

        self.times.append((cpu_seconds(), time.perf_counter()))
        self.start = self.start or _memory("VmRSS")
        self.peak = _memory("VmHWM")

    def said(self, length: float) -> dict[str, float]:
        counted = self.times[WARM_UP:]
        cpu, wall = ((counted[-1][i] - counted[0][i]) / (len(counted) - 1) for i in (0, 1))
        return {"cpu": cpu, "wall": wall, "length": length, "peak": self.peak, "more": self.peak - self.start}


def _memory(key: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def of_ours(case: str, folder: Path, name: str) -> dict[str, float]:
    from trainer import loop

    config, marks, lengths, step = config_of(case, folder, name), Marks(), [], loop.one_step

    def marked(run: Any, number: int) -> dict[str, Any]:
        marks.mark()
        values = step(run, number)
        lengths.append(values["length"])
        return values

    loop.one_step = marked
    loop.train(config.model_copy(update={"steps": STEPS["ours"][case]}))
    return marks.said(statistics.mean(lengths[WARM_UP:]))


def of_trl(case: str, folder: Path, name: str) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    peer: Any = import_module("trl")
    config, marks = config_of(case, folder, name), Marks()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    verify, problems = _task(config)

    class Marked(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.mark()

    rows = config.sampling.prompts * config.sampling.n
    arguments: dict[str, Any] = {
        "output_dir": config.out, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
        "num_generations": config.sampling.n, "max_completion_length": config.sampling.max_tokens, "temperature": 1.0,
        "loss_type": "grpo", "beta": 0.0, "learning_rate": 1e-12, "max_steps": STEPS["TRL"][case], "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip
    trainer = peer.GRPOTrainer(
        model=model,
        reward_funcs=lambda prompts, completions, ground_truth, **_: [
            float(verify(c, g, p)) for p, c, g in zip(prompts, completions, ground_truth, strict=True)
        ],
        args=peer.GRPOConfig(**arguments),
        train_dataset=Dataset.from_list(problems),
        processing_class=PreTrainedTokenizerFast.from_pretrained(config.model.path),
        callbacks=[Marked()],
    )
    trainer.train()
    lengths = [x["completions/mean_length"] for x in trainer.state.log_history if "completions/mean_length" in x]
    return marks.said(statistics.mean(lengths[WARM_UP:]))


def of_floor(case: str, folder: Path, name: str) -> dict[str, float]:
    import torch
    from generation import floor
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    sizes, together = cases()[case], 2048
    model = AutoModelForCausalLM.from_pretrained(config_of(case, folder, name).model.path)
    clocks = time.process_time(), time.perf_counter()
    floor(model, sizes)
    with torch.no_grad():
        for _ in range(round(sizes.rows * (sizes.prompt + sizes.tokens) / together)):
            for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
                given = torch.ones(together, layer.in_features)
                made = layer(given)
                _ = made @ layer.weight, made.T @ given  # as large as the gradients are
    return {"cpu": time.process_time() - clocks[0], "wall": time.perf_counter() - clocks[1]}


def _task(config: Any) -> tuple[Any, list[dict[str, Any]]]:
    from trainer_runs import verify

    from trainer import maze

    if config.task.prompts == "maze":
        rows = maze.problems(config.task.problems, config.task.levels, config.seed)
        return maze.verify, [{k: row[k] for k in ("prompt", "ground_truth")} for row in rows]
    rows = [json.loads(line) for line in Path(config.task.prompts).read_text().splitlines()]
    return lambda completion, gold, _: verify(completion, gold), rows


# What echo costs.


def echo(turns: int, work: Path) -> str:
    from trainer_runs import Cost, echo_table

    found = {kind: Cost(**c) for kind, c in child("echo", EXHAUSTED, work).items()}
    about = paragraph(f"""
        The random policy of above on 16 x 8 completions of up to 128 tokens; 12 of the vocabulary's tokens end one. Half of
        the problems are always solved: their groups have no advantage, and GRPO skips their rows
        ({found["grpo"].values["degenerate"]:.0%} of the groups of the last step). Echo chooses one clip a group. Three runs
        take turns step by step on the same rollouts; medians over the steps. Tokens: those that went through the model as
        it learnt.""")
    return f"## The cost of online echo\n\n{about}{echo_table(found, 'CPU s')}"


def echo_child(case: str, folder: Path, name: str) -> dict[str, dict[str, Any]]:
    from trainer_runs import echo as measured

    return {kind: asdict(cost) for kind, cost in measured(cases()[case], folder, steps=11).items()}


# What the store costs.


def store(turns: int, work: Path) -> str:
    found = child("store", STORED, work)
    facts, step = found.pop("facts"), found["a step, without the store"][0]
    about = paragraph(f"""
        The same policy on 24 x 8 completions of 128 tokens: steps of about five seconds. The store is measured while
        nothing else runs in the process: the files of {facts["steps"]} steps, and the commit that takes them in, as it
        happens every {facts["seconds"]:.0f} seconds in the background. Medians of {facts["turns"]}. Goal: 2 %.""")
    rows = [[name, *(f"{x:.3f}" for x in seconds), seconds[0] / step * 100] for name, seconds in found.items()]
    return f"## The cost of the store\n\n{about}{table(['a step', 'CPU s', 'wall s', '% of its CPU'], rows)}"


def store_child(case: str, folder: Path, name: str) -> dict[str, Any]:
    from trainer_runs import cpu_seconds

    from trainer import loop, record
    from trainer.run import Run

    turns, together = 5, round(record.COMMIT_SECONDS / LONG)
    times: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, work: Any, share: int = 1) -> Any:
        clocks = cpu_seconds(), time.perf_counter()
        made = work()
        used = cpu_seconds() - clocks[0], time.perf_counter() - clocks[1]
        times.setdefault(name, []).append((used[0] / share, used[1] / share))
        return made

    with Run.open(config_of(case, folder, name)) as opened:
        put, kept = opened.recorder.put, []
        opened.recorder.put = lambda *step: kept.append(step)  # type: ignore[method-assign]
        for number in range(1, together + 1):
            timed("a step, without the store", lambda n=number: loop.one_step(opened, n))
        for turn in range(turns):
            for i, (step, advantages) in enumerate(kept):
                made = replace(step, number=100 + turn * together + i)
                timed("writing its file", lambda made=made, a=advantages: put(made, a))
            timed("its share of a commit", opened.recorder.flush, together)
    found: dict[str, Any] = {name: [statistics.median(x) for x in zip(*of, strict=True)] for name, of in times.items()}
    both = zip(found["writing its file"], found["its share of a commit"], strict=True)
    return {
        **found,
        "both": [a + b for a, b in both],
        "facts": {"seconds": record.COMMIT_SECONDS, "turns": turns, "steps": together},
    }


PARTS = {"steps": steps, "echo": echo, "store": store}
CHILDREN = {"ours": of_ours, "TRL": of_trl, "floor": of_floor, "echo": echo_child, "store": store_child}


if __name__ == "__main__":
    main()
