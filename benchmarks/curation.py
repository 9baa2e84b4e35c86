"""Decontamination and dedup of 100,000 prompts, against loops over Python sets, and the whole of `echolab curate`.

    python benchmarks/curation.py

Every program runs in a process of its own on the same texts, which are made up: words by Zipf's law, some prompts copied from
the benchmark, or from each other with a word in a hundred changed. The table, with what was planted and found, is written as
it came out. datasketch is measured where it is installed."""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
from measure import RESULTS, machine, run, table

from echolab.named import draft
from echolab.store import Store

WORDS = 50_000
COPIED, DOUBLED = 0.01, 0.05  # of the prompts: from the benchmark, and from another prompt

START = """
import json, sys, time
prompts = [json.loads(line)["prompt"] for line in open(sys.argv[1])]
benchmark = sys.argv[2]
began, cpu = time.monotonic(), time.process_time()

def done(found):
    print(json.dumps({"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "found": int(found)}))
"""
AGAINST = """
from echolab.clips.benchmarks import load
from echolab.clips.decontaminate import Contamination
from echolab.clips.ngrams import Said

index = Contamination([load(benchmark)])
batches = (prompts[i : i + 512] for i in range(0, len(prompts), 512))
done(sum(bool(hits) for batch in batches for hits in index.of_prompts(Said(batch), [None] * len(batch))))
"""
AGAINST_LOOP = """
def grams(text):
    words = text.lower().split()
    return (" ".join(words[i : i + 8]) for i in range(len(words) - 7))

known = {g for line in open(benchmark) for g in grams(json.loads(line)["problem"])}
done(sum(any(g in known for g in grams(p)) for p in prompts))
"""
NEAR = """
import tempfile
from pathlib import Path
import numpy as np
from echolab.clips.dedup import Shingles, leaders
from echolab.clips.ngrams import Said

with tempfile.TemporaryDirectory() as folder:
    grams = Shingles(Path(folder) / "grams")
    for i in range(0, len(prompts), 512):
        grams.add(Said(prompts[i : i + 512]))
    grams.read()
    order = np.arange(len(prompts))
    leader, _ = leaders(grams, grams.keys(0.8), order, 0.8)
    done((leader != order).sum())
"""
NEAR_DATASKETCH = """
from datasketch import MinHash, MinHashLSH

def shingles(text):
    words = text.lower().split()
    return {" ".join(words[i : i + 5]) for i in range(len(words) - 4)}

lsh, sets, found = MinHashLSH(params=(21, 6), num_perm=126), {}, 0
for start in range(0, len(prompts), 512):
    batch = [shingles(p) for p in prompts[start : start + 512]]
    sketches = MinHash.bulk([[g.encode() for g in mine] for mine in batch], num_perm=126)
    for number, (mine, sketch) in enumerate(zip(batch, sketches), start):
        if any(len(mine & sets[o]) / len(mine | sets[o]) >= 0.8 for o in lsh.query(sketch)):
            found += 1
            continue
        sets[number] = mine
        lsh.insert(number, sketch)
done(found)
"""
CURATE = """
import json, sys, time, echolab
began, cpu = time.monotonic(), time.process_time()
with echolab.open(sys.argv[3]) as lab:
    report = lab.curate("mined", "curated", near_dedup=0.8, against=[sys.argv[2]], validation=0.05)
print(json.dumps({"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "found": report.n_in - report.n_out}))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--prompts", type=int, default=100_000)
    options.add_argument("--problems", type=int, default=10_000)
    options.add_argument("--out", type=Path, default=RESULTS / "curation.md")
    o = options.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        prompts, benchmark, store = (Path(folder) / name for name in ("prompts.jsonl", "benchmark.jsonl", "store"))
        copied, near = write(prompts, benchmark, o.prompts, o.problems)
        mine(prompts, store)
        cases = [
            ("decontamination: echolab", START + AGAINST, copied),
            ("decontamination: a loop over a Python set of 8-grams", START + AGAINST_LOOP, copied),
            ("near dedup at 0.8: echolab", START + NEAR, near),
            ("near dedup at 0.8: datasketch, the same bands", START + NEAR_DATASKETCH, near),
            ("`echolab curate`", CURATE, "-"),
        ]
        if not find_spec("datasketch"):
            del cases[3]
        found = [(name, run(code, prompts, benchmark, store), planted) for name, code, planted in cases]
    lines = [[name, m.said["cpu"], m.said["seconds"], m.peak_mb, m.said["found"], planted] for name, m, planted in found]
    about = (
        f"{o.prompts:,} prompts of 20 to 120 words; {o.problems:,} problems in the benchmark. {copied:,} prompts hold one of"
        f" them, {near:,} others are like an earlier prompt (Jaccard of at least 0.8, counted by sets; bands miss up to 1 in"
        " 100 of the pairs at the threshold). Each program is one process, from prompts in memory; these take part in the peak."
        " `echolab curate` reads a clip set of these prompts, each with a clip of 60 to 300 words made of them, drops what is"
        " contaminated or nearly double (prompt and clip), splits the rest and writes it."
    )
    head = ["", "CPU s", "wall s", "peak MB", "found", "planted"]
    made = (
        f"{machine(('numpy', 'pyarrow', 'datasketch'))}, load {load:.1f} from elsewhere when it began: the machine was shared."
    )
    text = f"# Curation\n\n{made} Made by `python benchmarks/curation.py`.\n\n{about}\n\n{table(head, lines)}"
    o.out.parent.mkdir(exist_ok=True)
    o.out.write_text(text)
    print(text)


def write(prompts: Path, benchmark: Path, n: int, n_problems: int) -> tuple[int, int]:
    """The texts, and how many prompts hold a problem, and how many others are like an earlier one."""
    rng = random.Random(0)
    sums = list(accumulate(1 / (i + 10) for i in range(WORDS)))

    def some(least: int, most: int) -> list[str]:
        return [f"w{i:x}" for i in rng.choices(range(WORDS), cum_weights=sums, k=rng.randrange(least, most))]

    problems = [some(20, 60) for _ in range(n_problems)]
    texts, copied, near = [some(20, 120) for _ in range(n)], 0, 0
    for i in range(n // 2, n):
        draw = rng.random()
        if draw < COPIED:
            texts[i] = [*some(2, 10), *problems[copied % n_problems], *some(2, 10)]
            copied += 1
        elif draw < COPIED + DOUBLED:
            first = texts[rng.randrange(n // 2)]
            texts[i] = [w if rng.random() > 0.01 else "changed" for w in first]
            near += _alike(first, texts[i])
    for path, name, rows in ((prompts, "prompt", texts), (benchmark, "problem", problems)):
        path.write_text("".join(json.dumps({name: " ".join(words)}) + "\n" for words in rows))
    return copied, near


def _alike(a: list[str], b: list[str]) -> bool:
    one, other = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(one & other) >= 0.8 * len(one | other)


def mine(prompts: Path, store: Path) -> None:
    """A clip set of the prompts. A clip is made of its prompt's words, so that those of like prompts are alike."""
    target = Store.create(store)
    rows = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    with draft(target, "clipset", "mined") as made:
        staged = []
        for start in range(0, len(rows), 20_000):
            part = rows[start : start + 20_000]
            clips = [" ".join((p.split() * 3)[:300]) for p in part]
            tokens = pa.array([list(map(len, c.split())) for c in clips], pa.list_(pa.int32()))
            names = [f"{i:032x}" for i in range(start, start + len(part))]
            columns = {
                "clip_id": names, "rollout_id": names, "group_id": names, "problem_id": names, "prompt_id": names,
                "clipset": [made.label] * len(part), "run": ["r"] * len(part), "selector": ["peak"] * len(part),
                "step": list(range(start, start + len(part))), "prompt": part, "clip": clips, "clip_ids": tokens,
                "n_tokens": [len(t) for t in tokens], "end_token": [len(t) for t in tokens],
            }  # fmt: skip
            staged += target.stage("clips", pa.table(columns), made.folder)
        made.publish({"clips": staged}, {}, {"versions": {}})


if __name__ == "__main__":
    main()
