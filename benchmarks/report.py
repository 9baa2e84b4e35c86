"""How long a report takes, how large it is, and how long it takes to open; and how long `echolab view` takes to answer.

    python benchmarks/report.py --folder /somewhere/with/5/GB
    python benchmarks/report.py view --folder /somewhere/with/5/GB

For reports, two generated runs: many rollouts of ordinary length, and fewer long ones, all scored. Each report is written in
a process of its own and then opened in Chromium, where there is one. Beside it: the same charts, each saved by Altair as a page
of its own. For the viewer, one generated run of a million rollouts, served by the command and asked over HTTP, one request
after another.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import psutil
import pyarrow as pa
from measure import RESULTS, machine, run, table

import echolab
from echolab import ids
from echolab.files import pc
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
    options.add_argument("what", nargs="?", choices=("report", "view"), default="report")
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--rows", type=int, help="rollouts: 100,000 for a report, 1,000,000 for the viewer")
    options.add_argument("--out", type=Path, help="the table, else in benchmarks/results")
    o = options.parse_args()
    o.rows, o.out = o.rows or (100_000 if o.what == "report" else 1_000_000), o.out or RESULTS / f"{o.what}.md"
    o.folder.mkdir(parents=True, exist_ok=True)
    (reports if o.what == "report" else viewer)(o)
    print(o.out.read_text())


def reports(o: argparse.Namespace) -> None:
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


class Served:
    """A store that the command serves, in a process of its own."""

    def __init__(self, root: Path):
        started = time.monotonic()
        command = [sys.executable, "-c", "from pipelines.cli import main; main()", "view", "--json", "--store", str(root)]
        self.process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = urlsplit(json.loads(self.process.stdout.readline())["url"])
        self.began = time.monotonic() - started
        while not json.loads(self.ask("state")[1])["overview"]:
            time.sleep(0.1)
        self.drawn = time.monotonic() - started

    def ask(self, what: str, **given: object) -> tuple[float, bytes]:
        """Milliseconds of one request, and its answer."""
        started = time.perf_counter()
        connection = http.client.HTTPConnection(self.url.hostname or "", self.url.port)
        connection.request("GET", f"{self.url.path}{what}?{urlencode(given)}")
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return (time.perf_counter() - started) * 1000, body

    def answers(self, name: str, requests: Sequence[tuple[str, Mapping[str, object]]]) -> list[Any]:
        """A line of the table."""
        times = [self.ask(what, **given)[0] for what, given in requests]
        return [name, len(times), round(statistics.median(times)), round(max(times)), round(self.mb)]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()

    @property
    def mb(self) -> float:
        return self.process.memory_info().rss / 2**20


def viewer(o: argparse.Namespace) -> None:
    load = f"load {os.getloadavg()[1]:.1f} from elsewhere when it began"
    steps, tokens = 250, 256
    store = generate(o.folder / f"view-{o.rows}", o.rows, tokens, steps, where=f"step > {steps - 10}")
    served = Served(store.root)
    began, pages = served.mb, json.loads(served.ask("groups")[1])["pages"]
    deep = [1 + i * (pages - 1) // 29 for i in range(30)]
    groups = [g["group_id"] for page in deep for g in json.loads(served.ask("groups", page=page)[1])["groups"][:1]]
    inside = "group_id IN (SELECT group_id FROM rollouts WHERE reward = 1 AND sample = 3)"
    asked: dict[str, list[tuple[str, dict[str, object]]]] = {
        "the page itself": [("", {})] * 30,
        "first page of the list": [("groups", {})] * 30,
        "a page deep in it": [("groups", {"page": page}) for page in deep],
        "deep, by reward": [("groups", {"page": page, "sort": "lowest"}) for page in deep],
        "of one kind": [("groups", {"kind": kind}) for kind in ("mixed", "all_fail", "all_success") * 10],
        "SQL over groups": [("groups", {"where": f"n_success = 1 AND step > {5 * i}"}) for i in range(30)],
        "SQL over rollouts": [("groups", {"where": inside})] * 5,
        "a group is opened": [(f"group/{id}", {}) for id in groups],
        "the charts": [("overview", {})] * 30,
        "is there more?": [("state", {})] * 30,
        "search, all texts": [("groups", {"words": f"word{i} word{i + 1}"}) for i in range(3)],
        "search, one step": [("groups", {"words": "word3 word4", "where": f"step = {8 * i + 1}"}) for i in range(30)],
    }
    lines = [served.answers(name, requests) for name, requests in asked.items()]
    served.stop()
    long = Served(generate(o.folder / f"view-long-{o.rows}", o.rows // 50, 2000, 5, where="step = 1").root)
    groups = [g["group_id"] for page in range(1, 31) for g in json.loads(long.ask("groups", page=page)[1])["groups"][:1]]
    lines.append(long.answers("a group of long rollouts", [(f"group/{id}", {}) for id in groups]))
    long.stop()
    about = (
        f"{o.rows:,} rollouts of {tokens} tokens, scored, in {o.rows // SAMPLES:,} groups of {steps} steps, {steps} files a"
        f" table ({_size(store.root):.1f} GB). The address is printed after {served.began:.1f} s, the charts are there after"
        f" {served.drawn:.1f} s; the server then has {began:,.0f} MB. Requests come one after another, each with a new"
        " connection; of pages, groups and searches each is another one. Long rollouts have 2,000 tokens, in a store of their"
        f" own, of {o.rows // 50:,} in 5 steps. Goal: 200 ms for a page."
    )
    names = ("starlette", "uvicorn", "duckdb", "polars")
    made = f"{machine(names)}, {load}. Made by `python benchmarks/report.py view`."
    head = ["what is asked", "times", "median ms", "max ms", "MB after it"]
    o.out.write_text(f"# View\n\n{made}\n\n{about}\n\n{table(head, lines)}")


def _size(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e9


def generate(root: Path, rows: int, tokens: int, steps: int, where: str = "true") -> Store:
    """A run whose groups become degenerate, in one reading a step; entropies by chance; clips of the rollouts `where`."""
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
        lab.mine("clips", where=where)
    return store


def _add_step(
    store: Store, rng: np.random.Generator, words: np.ndarray, step: int, steps: int, groups: int, tokens: int
) -> None:
    n, reading, spelled = groups * SAMPLES, ids.random_id(), pa.array(words)
    drawn = rng.integers(1, WORDS, n * tokens).astype(np.int32)
    drawn[rng.random(n * tokens) < 0.04] = 0
    entropies = rng.exponential(0.5, n * tokens).astype(np.float32)
    texts = pc.binary_join(_lists(spelled.take(pa.array(drawn)), tokens), "")
    number = (np.arange(groups) * 7 + step) % (3 * groups)
    problems = [f"Problem {i}: what is it?" for i in number]
    skill = 1 / (1 + np.exp(6 - 12 * step / steps + 4 * number / (3 * groups)))
    known = {"run": "bench", "split": "train", "step": step, "role": "policy", "ingest_id": reading, "group_source": "explicit",
             "prompt_format": "raw", "n_completion_tokens": tokens, "origin": {"file": "generated", "row": 0}}  # fmt: skip
    of_groups = {
        "group_id": [ids.group_id("bench", "train", step, (group,)) for group in range(groups)], "prompt": problems,
        "prompt_id": list(map(ids.prompt_id, problems)), "problem_id": list(map(ids.problem_id, problems)),
    }  # fmt: skip
    rollout_ids = [ids.random_id() for _ in range(n)]
    rollouts = pa.table({
        **{name: pa.repeat(pa.scalar(value, TABLES["rollouts"].arrow.field(name).type), n) for name, value in known.items()},
        **{name: [value for value in values for _ in range(SAMPLES)] for name, values in of_groups.items()},
        "rollout_id": rollout_ids, "sample": list(range(SAMPLES)) * groups, "completion": texts,
        "n_chars": pc.utf8_length(texts), "reward": (rng.random(n) < np.repeat(skill, SAMPLES)).astype(float),
    })  # fmt: skip
    scores = pa.table({
        "rollout_id": rollout_ids, "scorer": ["scorer"] * n, "run": ["bench"] * n, "step": [step] * n,
        "token_ids": _lists(pa.array(drawn), tokens), "entropies": _lists(pa.array(entropies), tokens),
        "logprobs": _lists(pa.array(-entropies), tokens), "mean_entropy": entropies.reshape(n, -1).mean(1, np.float64),
        "n_tokens": [tokens] * n,
    })  # fmt: skip
    ledger = {
        "ingest_id": reading, "run": "bench", "source_path": f"{step}.jsonl", "attempt": 1, "start_step": step, "bytes_read": 1,
        "sha256": "0", "format": "generated", "reader_version": 1, "options": "{}", "n_rows": n, "n_shared": 0,
        "n_quarantined": 0, "group_source": "explicit", "completeness": "all", "supersedes": [], "created_at": now(),
    }  # fmt: skip
    with store.lock():
        store.add("rollouts", rollouts)
        store.add("scores", scores)
        store.add("ingests", pa.Table.from_pylist([ledger], schema=TABLES["ingests"].arrow))


def _lists(values: pa.Array, size: int) -> pa.Array:
    """Lists of the same size."""
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32)), values)


if __name__ == "__main__":
    main()
