"""The store against its peers: ingest, bytes on disk, the degenerate-group question, memory.

    python benchmarks/store.py --folder /somewhere/with/40/GB

Every program runs in a process of its own, our turn and theirs in alternation; the table is written as it came out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import RESULTS, Measured, machine, run, table

from echolab.ledger import Reading
from echolab.schema import TABLES
from echolab.store import Store, now

SAMPLES = 8


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--ingest-rows", type=int, default=1_000_000)
    options.add_argument("--query-rows", type=int, default=10_000_000)
    options.add_argument("--list-rows", type=int, default=50_000)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--out", type=Path, default=RESULTS / "store.md")
    o = options.parse_args()
    o.folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# Store\n\n{machine()}. Made by `python benchmarks/store.py`.\n"]
    parts.append(lists(o.folder, o.list_rows))
    parts.append(query(o.folder, o.query_rows, o.repeat))
    parts.append(ingest(o.folder, o.ingest_rows))
    o.out.parent.mkdir(exist_ok=True)
    o.out.write_text("\n".join(parts))
    print("\n".join(parts))


# Ingest.

OURS = """
import sys, json, echolab
report = echolab.open(sys.argv[1], create=True).ingest(sys.argv[2], run="bench")
print(json.dumps({"rows": report.rows}))
"""
DATASETS = """
import sys, json, glob, datasets
datasets.disable_progress_bars()
files = sorted(glob.glob(sys.argv[2] + "/*.jsonl"))
data = datasets.load_dataset("json", data_files=files, cache_dir=sys.argv[1], split="train")
data.to_parquet(sys.argv[1] + "/out.parquet")
print(json.dumps({"rows": data.num_rows}))
"""
PANDAS = """
import sys, json, glob, os, pandas
os.makedirs(sys.argv[1])
rows = 0
for i, path in enumerate(sorted(glob.glob(sys.argv[2] + "/*.jsonl"))):
    for j, frame in enumerate(pandas.read_json(path, lines=True, chunksize=20_000)):
        frame.to_parquet(f"{sys.argv[1]}/{i}-{j}.parquet")
        rows += len(frame)
print(json.dumps({"rows": rows}))
"""


def ingest(folder: Path, rows: int) -> str:
    dumps, single = folder / "dumps", folder / "single"
    steps = 250 if rows >= 250_000 else 10
    size = _write_dumps(dumps, steps, rows // steps // SAMPLES)
    single.mkdir(exist_ok=True)
    with (single / "all.jsonl").open("wb") as out:
        for path in sorted(dumps.glob("*.jsonl")):
            out.write(path.read_bytes())
    found = []
    cases = (
        ("echolab", OURS, dumps),
        ("echolab, one file", OURS, single),
        ("HF datasets", DATASETS, dumps),
        ("pandas", PANDAS, dumps),
    )
    for name, code, source in cases:
        target = folder / "target"
        shutil.rmtree(target, ignore_errors=True)
        m = run(code, target, source)
        stored = sum(p.stat().st_size for p in target.rglob("*.parquet"))
        found.append((name, m, stored))
        shutil.rmtree(target, ignore_errors=True)
    ours = found[0][1].wall
    lines = [
        [
            name,
            m.said["rows"],
            m.wall,
            m.cpu,
            int(m.said["rows"] / m.wall),
            size / 2**20 / m.wall,
            m.peak_mb,
            stored / size,
            m.wall / ours,
        ]
        for name, m, stored in found
    ]
    shutil.rmtree(dumps)
    shutil.rmtree(single)
    head = ["", "rows", "wall s", "CPU s", "rows/s", "MB/s", "peak MB", "bytes / JSONL", "wall / ours"]
    about = (
        f"verl JSONL of {rows:,} rollouts in {steps} files, {size / 2**30:.2f} GiB, to Parquet."
        " Ours also makes ids and groups, sorts, and keeps a ledger. Goal: peak memory below 1,000 MB."
    )
    return f"## Ingest\n\n{about}\n\n{table(head, lines)}"


def _write_dumps(folder: Path, steps: int, groups: int) -> int:
    """Texts are slices of a long random text, so that they compress like prose and differ from each other."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 10))) for _ in range(8_000)])
    chance = 1 / np.arange(1, len(words) + 1)
    corpus = " ".join(words[rng.choice(len(words), 8_000_000, p=chance / chance.sum())])
    size = 0
    for step in range(1, steps + 1):
        lines = []
        for group in range(groups):
            skill = rng.random() * 2 - 0.5
            for sample in range(SAMPLES):
                start, length = int(rng.integers(0, len(corpus) - 40_000)), int(rng.lognormal(8.4, 0.5))
                row = {
                    "input": f"user\nProblem {step}-{group}: {corpus[group * 97 : group * 97 + 300]}\nassistant\n",
                    "output": corpus[start : start + length],
                    "gts": str(group),
                    "score": float(rng.random() < skill),
                    "step": step,
                    "uid": f"{step:06d}{group:06d}_{sample}_0",
                }
                lines.append(json.dumps(row) + "\n")
        path = folder / f"{step:06d}.jsonl"
        path.write_text("".join(lines))
        size += path.stat().st_size
    return size


# Bytes of list columns.


def lists(folder: Path, rows: int) -> str:
    """The same lists by our writer and as pyarrow, pandas and datasets write them by default."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(50, 550, rows)
    n = int(lengths.sum())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    ids = pa.array(np.minimum(rng.zipf(1.2, n), 151_000).astype(np.int32))
    logprobs = pa.array((-rng.exponential(0.4, n) * (rng.random(n) < 0.5)).astype(np.float32))
    columns = {
        "completion_ids": pa.ListArray.from_arrays(offsets, ids),
        "logprobs": pa.ListArray.from_arrays(offsets, logprobs),
    }
    facts = {
        "rollout_id": [f"{i:032x}" for i in range(rows)],
        "ingest_id": ["0" * 32] * rows,
        "run": ["bench"] * rows,
        "split": ["train"] * rows,
        "role": ["policy"] * rows,
        "group_id": [f"{i // SAMPLES:032x}" for i in range(rows)],
        "group_source": ["explicit"] * rows,
        "prompt_format": ["raw"] * rows,
        "origin": [{"file": "f", "row": i} for i in range(rows)],
    }
    store = Store.create(folder / "lists")
    with store.job("bench") as job:
        ours = store.stage("rollouts", pa.table({**facts, **columns}), job)[0].path
        theirs = folder / "snappy.parquet"
        pq.write_table(pa.table(columns), theirs, compression="snappy")
        sizes = [(_column_bytes(ours, c), _column_bytes(theirs, c)) for c in columns]
    lines = [[c, 4 * n / 2**20, b / 2**20, a / 2**20, a / b] for c, (a, b) in zip(columns, sizes, strict=True)]
    total = [sum(a for a, _ in sizes), sum(b for _, b in sizes)]
    lines.append(["both", 8 * n / 2**20, total[1] / 2**20, total[0] / 2**20, total[0] / total[1]])
    shutil.rmtree(folder / "lists")
    theirs.unlink()
    about = f"{rows:,} rollouts, {n:,} tokens, Zipf ids, half of the log-probabilities zero, exact values. Goal: <= 0.77."
    return f"## Bytes of the list columns\n\n{about}\n\n{table(['MB', 'raw', 'snappy', 'echolab', 'ratio'], lines)}"


def _column_bytes(path: Path, column: str) -> int:
    footer = pq.read_metadata(path)
    chunks = [footer.row_group(g).column(c) for g in range(footer.num_row_groups) for c in range(footer.num_columns)]
    return sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)


# The degenerate-group question.

ASK_US = """
import sys, json, time, echolab, echolab.lab
started = time.monotonic()
frame = echolab.open(sys.argv[1]).query("degenerate_by_step")
seconds = time.monotonic() - started
print(json.dumps({"seconds": seconds, "answer": frame.select("step", "all_success", "all_fail", "mixed").rows()}))
"""
ASK_POLARS = """
import sys, json, time, glob, polars as pl
started = time.monotonic()
groups = (
    pl.scan_parquet(glob.glob(sys.argv[1] + "/rollouts/*/*.parquet"), hive_partitioning=False)
    .filter(pl.col("role") == "policy")
    .group_by("run", "split", "step", "group_id")
    .agg(low=pl.col("reward").min(), high=pl.col("reward").max(), n=pl.col("reward").count())
)
same = pl.col("high") - pl.col("low") <= 1e-6
right = pl.col("high") >= 1 - 1e-6
frame = groups.group_by("run", "split", "step").agg(
    all_success=(same & right).sum(), all_fail=(same & ~right).sum(), mixed=(~same).sum()
).sort("step").collect()
seconds = time.monotonic() - started
print(json.dumps({"seconds": seconds, "answer": frame.select("step", "all_success", "all_fail", "mixed").rows()}))
"""
ASK_PANDAS = """
import sys, json, time, glob, pandas
started = time.monotonic()
columns = ["run", "split", "step", "group_id", "role", "reward"]
files = glob.glob(sys.argv[1] + "/rollouts/*/*.parquet")
frame = pandas.concat(pandas.read_parquet(f, columns=columns, partitioning=None) for f in files)
frame = frame[frame["role"] == "policy"]
groups = frame.groupby(["run", "split", "step", "group_id"], sort=False)["reward"].agg(["min", "max", "count"])
same, right = groups["max"] - groups["min"] <= 1e-6, groups["max"] >= 1 - 1e-6
kinds = pandas.DataFrame({"all_success": same & right, "all_fail": same & ~right, "mixed": ~same})
answer = kinds.groupby(level="step").sum().sort_index()
seconds = time.monotonic() - started
print(json.dumps({"seconds": seconds, "answer": [[int(v) for v in row] for row in answer.reset_index().values]}))
"""


def query(folder: Path, rows: int, repeat: int) -> str:
    lines = []
    for order in ("sorted", "shuffled"):
        root = folder / f"query-{order}"
        shutil.rmtree(root, ignore_errors=True)
        stored = _write_store(root, rows, shuffled=order == "shuffled")
        best: dict[str, Measured] = {}
        for _ in range(repeat):
            for name, code in (("echolab", ASK_US), ("Polars", ASK_POLARS), ("pandas", ASK_PANDAS)):
                m = run(code, root)
                if name not in best or m.said["seconds"] < best[name].said["seconds"]:
                    best[name] = m
        answers = {json.dumps(m.said["answer"]) for m in best.values()}
        if len(answers) != 1:
            raise SystemExit(f"{order}: the answers differ")
        ours = best["echolab"].said["seconds"]
        for name, m in best.items():
            lines.append([f"{order}, {name}", m.said["seconds"], m.said["seconds"] / ours, m.cpu, m.peak_mb])
        shutil.rmtree(root)
    about = (
        f"`degenerate_by_step` on {rows:,} rollouts with all columns, {stored / 2**30:.2f} GiB on disk, groups of {SAMPLES}:"
        f" seconds from opening the store (imports done) to the answer, best of {repeat}, warm page cache, equal answers."
        " Goal: faster than both; sorted below 2 s on 2 cores."
    )
    head = ["", "seconds", "ratio to ours", "CPU s, whole process", "peak MB"]
    return f"## Degenerate groups by step\n\n{about}\n\n{table(head, lines)}"


def _write_store(root: Path, rows: int, shuffled: bool) -> int:
    """A store of generated rollouts, by the store's own door, in files as ingest would write them."""
    store = Store.create(root)
    rng = np.random.default_rng(2)
    groups = rows // SAMPLES
    names = np.array([f"{x:016x}{y:016x}" for x, y in rng.integers(0, 2**63, (groups, 2))])
    skills = np.clip(rng.random(groups) * 3 - 1, 0, 1)
    order = rng.permutation(rows) if shuffled else np.arange(rows)
    reading = "b" * 32
    per_file = 1_000_000
    with store.job("bench") as job:
        staged = []
        for start in range(0, rows, per_file):
            index = order[start : start + per_file]
            staged += store.stage("rollouts", _rows(index, names, skills, reading, rng, len(staged)), job)
        with store.lock():
            store.commit("rollouts", staged)
            store.register("runs", "bench", "bench", {"success_threshold": 1.0})
            options = {"given": {"format": "plain"}, "found": {}, "path": "generated"}
            row = Reading(
                reading, "bench", "generated", 1, 0, 0, "", "plain", 1, options, rows, 0, 0, "explicit", "all", (), now()
            )
            store.add("ingests", pa.Table.from_pylist([row.row()], schema=TABLES["ingests"].arrow))
    return sum(p.stat().st_size for p in root.rglob("*.parquet"))


def _rows(
    index: np.ndarray, names: np.ndarray, skills: np.ndarray, reading: str, rng: np.random.Generator, file: int
) -> pa.Table:
    n, groups = len(index), len(names)
    group = index // SAMPLES
    tokens = 12
    texts = pa.array([f"{i} is what rollout number {i} says in the end" for i in index.tolist()])
    offsets = pa.array(np.arange(0, n * tokens + 1, tokens), pa.int32())

    def same(value: str | bool) -> pa.Array:
        return pa.array([value] * n)

    columns = {
        "rollout_id": pa.array([f"{file:08x}{i:024x}" for i in index.tolist()]),
        "ingest_id": same(reading), "run": same("bench"), "split": same("train"), "role": same("policy"), "model": same("m"),
        "source": same("math"), "group_source": same("explicit"), "prompt_format": same("rendered"), 
        "tokenizer": same("t"), "finish_reason": same("stop"), "policy_version": same("1"), 
        "sampling": same('{"temperature": 1.0}'), "extra": same('{"a": 1}'),
        "step": pa.array(group * 1000 // groups, pa.int64()),
        "group_id": pa.array(names[group]), "prompt_id": pa.array(names[group]), "problem_id": pa.array(names[group // 4]),
        "sample": pa.array(index % SAMPLES, pa.int32()), "part": pa.nulls(n, pa.int32()),
        "prompt": pa.array([f"user\nWhat is problem {g}?\nassistant\n" for g in group.tolist()]),
        "messages": pa.nulls(n, pa.string()), "completion": texts, "ground_truth": pa.array([str(g) for g in group.tolist()]),
        "prompt_ids": pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 150_000, n * tokens), pa.int32())),
        "completion_ids": pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 150_000, n * tokens), pa.int32())),
        "logprobs": pa.ListArray.from_arrays(offsets, pa.array(-rng.random(n * tokens, np.float32))),
        "loss_mask": pa.nulls(n, pa.list_(pa.bool_())),
        "n_prompt_tokens": pa.array(np.full(n, tokens)), "n_completion_tokens": pa.array(np.full(n, tokens)),
        "n_chars": pa.array(rng.integers(40, 60, n)), "reward": pa.array((rng.random(n) < skills[group]).astype(float)),
        "rewards": pa.nulls(n, TABLES["rollouts"].column("rewards").type), "success_recorded": same(True),
        "advantage": pa.array(rng.standard_normal(n)),
        "origin": pa.StructArray.from_arrays([same("f"), pa.array(index, pa.int64())], ["file", "row"]),
    }  # fmt: skip
    return pa.table(columns)


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"took {time.monotonic() - started:.0f} s")
