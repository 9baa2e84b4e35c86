"""How long a report takes, how large it is, and how long it takes to open.

    python benchmarks/report.py --folder /somewhere/with/5/GB

Two generated runs: many rollouts of ordinary length, and fewer long ones, all scored. Each report is written in a process of
its own and then opened in Chromium, where there is one. Beside it: the same charts, each saved by Altair as a page of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from measure import RESULTS, machine, run, table

import echolab
from echolab import ids
from echolab.schema import TABLES
from echolab.scoring import resegment
from echolab.segment import Segmenter
from echolab.store import Store, now
from echolab.vocab import Vocab

SAMPLES, WORDS = 8, 4000
REPORT = """
import sys, json, time, echolab
with echolab.open(sys.argv[1]) as lab:
    started = time.monotonic()
    done = lab.report(sys.argv[2])
print(json.dumps({"seconds": time.monotonic() - started, "size": done.size, "groups": done.groups, "charts": len(done.charts)}))
"""
PEER = """
import sys, json, time, pathlib, echolab
from echolab.charts import CHARTS
size, charts, started = 0, 0, time.monotonic()
with echolab.open(sys.argv[1]) as lab:
    for name in CHARTS:
        try:
            chart = lab.chart(name)
        except echolab.EcholabError:
            continue
        path = pathlib.Path(sys.argv[2]).with_name(f"{name}.html")
        chart.save(path, inline=True)
        size, charts = size + path.stat().st_size, charts + 1
print(json.dumps({"seconds": time.monotonic() - started, "size": size, "groups": 0, "charts": charts}))
"""
OPEN = """
import sys, json, shutil
from playwright.sync_api import sync_playwright
args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=args)
    times = []
    for _ in range(3):
        page = browser.new_page()
        page.goto("file://" + sys.argv[1])
        page.wait_for_selector("html[data-ready]", timeout=120_000)
        times.append(page.evaluate("performance.now()"))
        page.close()
print(json.dumps({"ms": sorted(times)[1]}))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--out", type=Path, default=RESULTS / "report.md")
    o = options.parse_args()
    o.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for rows, tokens, steps in ((o.rows, 400, 200), (o.rows // 25, 10_000, 25)):
        store = generate(o.folder / f"store-{rows}", rows, tokens, steps)
        page = o.folder / "report.html"
        for name, code in (("echolab report", REPORT), ("Altair, a page for each chart", PEER)):
            m = run(code, store.root, page)
            opened = round(run(OPEN, page).said["ms"]) if code is REPORT and shutil.which("chromium") else "-"
            said = m.said
            size = round(said["size"] / 1e6, 2)
            lines.append(
                [f"{name}: {rows:,} x {tokens:,}", m.wall, m.cpu, m.peak_mb, said["charts"], said["groups"], size, opened]
            )
    head = ["rollouts x tokens", "wall s", "CPU s", "peak MB", "charts", "groups to read", "MB", "opens in ms"]
    about = (
        "Wall and CPU seconds, and peak memory, are those of the whole process. A page is open when all its charts are drawn"
        " and its first group can be read (median of three). Goals: 100,000 rollouts in under a minute, below 5 MB, open"
        " within 2 s."
    )
    load = f"load {os.getloadavg()[1]:.1f} from elsewhere when it began"
    made = f"{machine(('altair', 'vl-convert-python', 'duckdb', 'polars'))}, {load}. Made by `python benchmarks/report.py`."
    o.out.write_text(f"# Report\n\n{made}\n\n{about}\n\n{table(head, lines)}")
    print(o.out.read_text())


def generate(root: Path, rows: int, tokens: int, steps: int) -> Store:
    """A run whose groups become degenerate, in one reading a step; entropies by chance."""
    if root.exists():
        return Store.open(root)
    store, rng = Store.create(root), np.random.default_rng(0)
    pieces = [b"\n"] + [f" word{i}".encode() for i in range(WORDS - 1)]
    Vocab("tokenizer", dict(enumerate(pieces))).keep(store)
    words = np.array([piece.decode() for piece in pieces])
    config: dict[str, Any] = {"kind": "model", "tokenizer": "tokenizer", "eos": [], "temperature": 1.0, "dtype": "float32"}
    with store.lock():
        store.register("scorers", "scorer", "generated", config, version=1)
    for step in range(1, steps + 1):
        _add_step(store, rng, words, step, steps, rows // steps // SAMPLES, tokens)
    resegment(store, "scorer", Segmenter.make())
    with echolab.open(root) as lab:
        lab.mine("clips")
    return store


def _add_step(
    store: Store, rng: np.random.Generator, words: np.ndarray, step: int, steps: int, groups: int, tokens: int
) -> None:
    reading, rollouts, scores = ids.random_id(), [], []
    for group in range(groups):
        problem = f"Problem {(group * 7 + step) % (3 * groups)}: what is it?"
        skill = 1 / (1 + np.exp(6 - 12 * step / steps + 4 * ((group * 7 + step) % (3 * groups)) / (3 * groups)))
        group_id = ids.group_id("bench", "train", step, (group,))
        for sample in range(SAMPLES):
            drawn = rng.integers(1, WORDS, tokens)
            drawn[rng.random(tokens) < 0.04] = 0
            id, text = ids.random_id(), "".join(words[drawn])
            rollouts.append({
                "rollout_id": id, "ingest_id": reading, "run": "bench", "split": "train", "step": step, "role": "policy",
                "group_id": group_id, "group_source": "explicit", "prompt_id": ids.prompt_id(problem), "prompt": problem,
                "problem_id": ids.problem_id(problem), "sample": sample, "prompt_format": "raw", "completion": text,
                "n_completion_tokens": tokens, "n_chars": len(text), "reward": float(rng.random() < skill),
                "origin": {"file": "generated", "row": 0},
            })  # fmt: skip
            entropies = rng.exponential(0.5, tokens).astype(np.float32)
            scores.append({
                "rollout_id": id, "scorer": "scorer", "run": "bench", "step": step, "token_ids": drawn, "entropies": entropies,
                "logprobs": -entropies, "mean_entropy": float(entropies.mean()), "n_tokens": tokens,
            })  # fmt: skip
    ledger = {
        "ingest_id": reading, "run": "bench", "source_path": f"{step}.jsonl", "attempt": 1, "start_step": step, "bytes_read": 1,
        "sha256": "0", "format": "generated", "reader_version": 1, "options": "{}", "n_rows": len(rollouts), "n_shared": 0,
        "n_quarantined": 0, "group_source": "explicit", "completeness": "all", "supersedes": [], "created_at": now(),
    }  # fmt: skip
    with store.lock():
        for name, made in (("rollouts", rollouts), ("scores", scores), ("ingests", [ledger])):
            store.add(name, pa.Table.from_pylist(made, schema=TABLES[name].arrow))


if __name__ == "__main__":
    main()
