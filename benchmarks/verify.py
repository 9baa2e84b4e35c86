"""`echolab verify` against a plain loop over math-verify, and what texts that hang the library cost.

    python benchmarks/verify.py --folder /somewhere --data ../shared/data

The texts are genuine: AMC23 rollouts, and long expert traces. Each program runs in a process of its own, and they take
turns; the table is written as it came out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

from measure import RESULTS, Measured, machine, run, table

import echolab

ROLLOUTS = "rollouts/reasoning_gym_llama3b_step{}_amc23.json"
HANG = r"9^{{9^{{9^{{{}}}}}}}"  # math-verify does not finish these
HANGS = (12, 24, 48)

LOOP = """
import json, logging, sys, time
from math_verify import LatexExtractionConfig, parse, verify
from echolab import answers
logging.disable(logging.ERROR)
latex = [LatexExtractionConfig()]
read = lambda text: parse("$" + text + "$", extraction_config=latex, parsing_timeout=None)
verify(read("1"), read("2"), timeout_seconds=None)
started = time.monotonic()
right, rows, golds = 0, 0, {}
for line in open(sys.argv[1]):
    row = json.loads(line)
    rows += 1
    gold = row["ground_truth"]
    if gold not in golds:
        golds[gold] = read(gold)
    answer = answers.extract(row["completion"], ("boxed", "answer", "hashes"))
    right += answer is not None and verify(golds[gold], read(answer), timeout_seconds=None)
print(json.dumps({"steady": time.monotonic() - started, "right": int(right), "rows": rows}))
"""
OURS = """
import json, sys, time, echolab, echolab.verify as v
began, run = [], v.run_tasks
def timed(*given, **limits):
    for pair in run(*given, **limits):
        began or began.append(time.monotonic())
        yield pair
v.run_tasks = timed
with echolab.open(sys.argv[1]) as lab:
    report = lab.verify("math")
print(json.dumps({"steady": time.monotonic() - began[0], "right": report.right, "rows": report.made,
                  "statuses": report.statuses}))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--times", type=int, default=5, help="how often the 4,000 AMC23 rollouts are taken")
    options.add_argument("--texts", type=int, default=2_000, help="long texts without hangs")
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--out", type=Path, default=RESULTS / "verify.md")
    o = options.parse_args()
    o.folder.mkdir(parents=True, exist_ok=True)
    rows = amc(o.data)
    load = os.getloadavg()[1]
    parts = [
        f"# Verify\n\n{machine()}, math-verify 0.9.0, load {load:.1f} from elsewhere when it began."
        " Made by `python benchmarks/verify.py`.\n",
        throughput(o.folder, rows, o.times, o.repeat),
        hangs(o.folder, rows, traces(o.data), o.texts),
    ]
    o.out.parent.mkdir(exist_ok=True)
    o.out.write_text("\n".join(parts))
    print("\n".join(parts))


def amc(data: Path) -> list[dict[str, Any]]:
    rows = []
    for step in (400, 800):
        document = json.loads((data / ROLLOUTS.format(step)).read_text())
        for result in document["categories"][0]["datasets"][0]["results"]:
            rows += [
                {
                    "prompt": result["question"],
                    "completion": c["full_model_response"],
                    "ground_truth": result["expected_answer"],
                    "reward": c["score"],
                    "answer": c["model_answer"],
                }
                for c in result["completions"]
            ]
    return rows


def traces(data: Path) -> list[str]:
    """Expert solutions of more than 4,000 characters that ended their thought, up to their answer."""
    texts = [json.loads(line)["code"][0] for p in sorted((data / "experts").glob("*.jsonl")) for line in p.open()]
    return [t[: t.rfind(r"\boxed")] for t in texts if len(t) > 4_000 and "<|end_of_thought|>" in t and r"\boxed" in t]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def store(folder: Path, dump: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    with echolab.open(folder, create=True) as lab:
        lab.ingest(dump, run="bench", format="plain")
    return folder


def different(rows: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """`n` rollouts of which no two share ground truth and answer: further ones add the same number to both."""
    given = list({(r["ground_truth"], r["answer"]): r for r in rows if r["answer"]}.values())
    made = []
    for k in range(-(-n // len(given))):
        for r in given:
            answer, gold = (f"{r['answer']} + {k}", f"{r['ground_truth']} + {k}") if k else (r["answer"], r["ground_truth"])
            made.append({**r, "answer": answer, "ground_truth": gold, "completion": f"<answer>{answer}</answer>"})
    return made[:n]


def throughput(folder: Path, rows: list[dict[str, Any]], times: int, repeat: int) -> str:
    lines: list[list[Any]] = []
    for what, given in (("rollouts as they are", rows * times), ("no two answers alike", different(rows, 1_200 * times))):
        dump = folder / "amc.jsonl"
        write(dump, given)
        best: dict[str, Measured] = {}
        for _ in range(repeat):
            for name, code in (("plain loop", LOOP), ("echolab", OURS)):
                m = run(code, dump if code == LOOP else store(folder / "store", dump))
                if name not in best or m.wall < best[name].wall:
                    best[name] = m
        if len({m.said["right"] for m in best.values()}) != 1:
            raise SystemExit(f"they do not agree: { {n: m.said['right'] for n, m in best.items()} }")
        loop = best["plain loop"]
        for name, m in best.items():
            said = m.said
            speed = [loop.said["steady"] / said["steady"], loop.wall / m.wall]
            lines.append(
                [f"{len(given):,} {what}, {name}", said["steady"], m.wall, m.cpu, said["rows"] / said["steady"], *speed]
            )
    about = (
        "AMC23 rollouts, of which many give the same answer to the same question, and as many different answers made from them."
        " The loop is one process that extracts as we do, parses each ground truth once, and stores nothing; ours reads a"
        " store, judges equal answers once, and commits verdicts. Judging: from the first verdict on, start and imports left"
        f" out; whole: the process from its start to its end. Best of {repeat}, equal verdicts. Goal: 1.7 times the loop on 2"
        " cores."
    )
    head = ["", "judging s", "whole s", "CPU s", "texts/s", "speed, judging", "speed, whole"]
    return f"## Throughput\n\n{about}\n\n{table(head, lines)}"


def hangs(folder: Path, rows: list[dict[str, Any]], traces: list[str], texts: int) -> str:
    """Long traces, each with the answer of an AMC23 rollout at its end; among them answers that hang the library."""
    plain = [
        {"prompt": r["prompt"], "completion": f"{t}\\boxed{{{r['answer']}}}", "ground_truth": r["ground_truth"], "reward": 0}
        for t, r in zip(cycle(traces), different(rows, texts), strict=False)
    ]
    lines: list[list[Any]] = []
    for n in (0, *HANGS):
        mixed = list(plain)
        for i in range(n):
            answer = HANG.format(i + 9)
            mixed.insert(i * (texts // n), {**plain[i], "completion": f"{traces[0]}\\boxed{{{answer}}}"})
        dump = folder / "hangs.jsonl"
        write(dump, mixed)
        m = run(OURS, store(folder / "store", dump))
        if m.said["statuses"]["timeout"] != n or m.said["rows"] != texts + n:
            raise SystemExit(f"{n} texts hang, the verdicts are {m.said['statuses']}")
        lines.append([f"{n} that hang", m.wall, m.wall / lines[0][1] if lines else 1.0, m.cpu, m.peak_mb])
    mean = sum(len(p["completion"]) for p in plain) // len(plain)
    about = (
        f"{texts:,} expert traces of {mean:,} characters on average, and some more whose answer math-verify does not finish,"
        " spread evenly; no two answers are alike. 5 seconds a text, so that one that hangs at the very end costs 5 s by"
        " itself. Every one is a `timeout`, all others are judged. Goal: at most twice the time of the others."
    )
    return f"## Texts that hang\n\n{about}\n\n{table(['', 'whole s', 'ratio', 'CPU s', 'peak MB'], lines)}"


if __name__ == "__main__":
    main()
