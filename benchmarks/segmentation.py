"""Cutting completions and averaging entropies over the segments, against Polars and a loop over tokens.

    python benchmarks/segmentation.py

Every program runs in a process of its own on the same Parquet file; the answers must be equal. The time is that from
columns in memory to columns in memory. The table is written as it came out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import RESULTS, machine, run, table

VOCABULARY, NEWLINES = 151_646, 2_178  # as Qwen2.5's

START = """
import sys, json, time, hashlib, numpy as np, pyarrow as pa, pyarrow.parquet as pq
rows = pq.read_table(sys.argv[1])
newlines = np.load(sys.argv[2])

def measure(work):
    best = []
    for _ in range(int(sys.argv[3])):
        started = time.monotonic(), time.process_time()
        ends, means = work()
        best.append((time.monotonic() - started[0], time.process_time() - started[1]))
    ends, means = (x.combine_chunks() if isinstance(x, pa.ChunkedArray) else x for x in (ends, means))
    numbers = means.values.to_numpy().astype(np.float64)
    cuts = [hashlib.sha256(x.to_numpy().astype(np.int64).tobytes()).hexdigest() for x in (ends.values, ends.offsets)]
    print(json.dumps({"seconds": min(w for w, _ in best), "cpu": min(c for _, c in best), "segments": len(numbers),
        "cuts": cuts, "sum": float(numbers.sum()), "squares": float((numbers**2).sum())}))
"""
OURS = """
from echolab.segment import Segmenter, segment, segment_means
from echolab.vocab import Vocab
bearing = set(newlines.tolist())
vocab = Vocab("bench", {i: b".\\n" if i in bearing else b"x" for i in range(int(sys.argv[4]))})
vocab.newline, vocab.blank
config = Segmenter(merge_blank=MERGE)

def work():
    ends = segment(rows["token_ids"], vocab, config)
    return ends, segment_means(rows["entropies"], ends)

measure(work)
"""
POLARS = """
import polars as pl
frame = pl.DataFrame({"token_ids": pl.from_arrow(rows["token_ids"]), "entropies": pl.from_arrow(rows["entropies"])})

def work():
    tokens = frame.lazy().with_row_index("row").explode("token_ids", "entropies")
    ends_here = pl.col("token_ids").is_in(pl.Series(newlines).implode())
    segments = (
        tokens.with_columns(segment=ends_here.shift(1, fill_value=False).cum_sum().over("row"))
        .group_by("row", "segment", maintain_order=True)
        .agg(n=pl.len(), entropy=pl.col("entropies").mean())
    )
    lists = segments.group_by("row", maintain_order=True).agg(
        ends=pl.col("n").cum_sum().cast(pl.Int32), means=pl.col("entropy").cast(pl.Float32)
    ).collect()
    return lists["ends"].to_arrow(), lists["means"].to_arrow()

measure(work)
"""
POLARS_SLICE = """
import polars as pl
frame = pl.DataFrame({"token_ids": pl.from_arrow(rows["token_ids"]), "entropies": pl.from_arrow(rows["entropies"])})

def work():
    here = pl.element().is_in(pl.Series(newlines).implode()).arg_true() + 1
    last = pl.col("token_ids").list.len().cast(pl.UInt32)
    cuts = frame.lazy().with_row_index("row").with_columns(ends=pl.col("token_ids").list.eval(here))
    cuts = cuts.with_columns(ends=pl.col("ends").list.concat(pl.concat_list(last)).list.unique(maintain_order=True))
    cuts = cuts.with_columns(starts=pl.concat_list(pl.lit(0, pl.UInt32), pl.col("ends")).list.head(pl.col("ends").list.len()))
    segments = cuts.select("row", "entropies", "ends", "starts").explode("ends", "starts").select(
        "row", "ends", means=pl.col("entropies").list.slice("starts", pl.col("ends") - pl.col("starts")).list.mean()
    )
    lists = segments.group_by("row", maintain_order=True).agg(
        ends=pl.col("ends").cast(pl.Int32), means=pl.col("means").cast(pl.Float32)
    ).collect()
    return lists["ends"].to_arrow(), lists["means"].to_arrow()

measure(work)
"""
POLARS_FLAT = """
import polars as pl
frame = pl.DataFrame({"token_ids": pl.from_arrow(rows["token_ids"]), "entropies": pl.from_arrow(rows["entropies"])})

def work():
    tokens = frame.lazy().with_row_index("row").explode("token_ids", "entropies")
    ends_here = pl.col("token_ids").is_in(pl.Series(newlines).implode()) | (pl.col("row") != pl.col("row").shift(-1))
    segments = (
        tokens.with_columns(segment=ends_here.shift(1, fill_value=False).cum_sum())  # one count over all rows
        .group_by("segment", maintain_order=True)
        .agg(row=pl.col("row").first(), n=pl.len(), entropy=pl.col("entropies").mean())
    )
    lists = segments.group_by("row", maintain_order=True).agg(
        ends=pl.col("n").cum_sum().cast(pl.Int32), means=pl.col("entropy").cast(pl.Float32)
    ).collect()
    return lists["ends"].to_arrow(), lists["means"].to_arrow()

measure(work)
"""
LOOP = """
bearing = set(newlines.tolist())
token_ids, entropies = rows["token_ids"].to_pylist(), [LIST for x in rows["entropies"]]

def work():
    all_ends, all_means = [], []
    for tokens, numbers in zip(token_ids, entropies):
        ends, means, start = [], [], 0
        for i, token in enumerate(tokens):
            if token in bearing or i == len(tokens) - 1:
                ends.append(i + 1)
                means.append(MEAN)
                start = i + 1
        all_ends.append(ends)
        all_means.append(means)
    return pa.array(all_ends, pa.list_(pa.int32())), pa.array(all_means, pa.list_(pa.float32()))

measure(work)
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rollouts", type=int, default=100_000)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--out", type=Path, default=RESULTS / "segmentation.md")
    o = options.parse_args()
    cases = [
        ("echolab", OURS.replace("MERGE", "False")),
        ("echolab, blank lines merged (default)", OURS.replace("MERGE", "True")),
        ("Polars: tokens exploded, segments counted over all rows", POLARS_FLAT),
        ("Polars: tokens exploded, segments counted over each row", POLARS),
        ("Polars: segments exploded, list.slice, list.mean", POLARS_SLICE),
        ("Python loop over tokens, sum of a list", loop("x.as_py()", "sum(numbers[start : i + 1]) / (i + 1 - start)")),
        ("Python loop over tokens, np.mean of an array", loop("x.values.to_numpy()", "np.mean(numbers[start : i + 1])")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows, newlines = Path(folder) / "rows.parquet", Path(folder) / "newlines.npy"
        n_tokens = write(rows, newlines, o.rollouts)
        turns = [
            {name: run(START + code, rows, newlines, o.repeat, VOCABULARY).said for name, code in cases} for _ in range(o.turns)
        ]
    check([said for turn in turns for said in turn.values()])
    found = {name: {k: min(turn[name][k] for turn in turns) for k in ("cpu", "seconds")} for name, _ in cases}
    ours = found["echolab"]
    lines = [
        [name, m["cpu"] * 1000, m["cpu"] / ours["cpu"], m["seconds"] * 1000, m["seconds"] / ours["seconds"]]
        for name, m in found.items()
    ]
    size = f"{o.rollouts:,} rollouts, {n_tokens:,} tokens, {turns[0]['echolab']['segments']:,} segments"
    about = (
        f"{size}, from token ids and entropies in memory to segment ends and segment means. Best of {o.turns} processes"
        f" of {o.repeat} calls, in turn with the others. Equal cuts, equal means. Goal: 40 times less than Polars and than a"
        " loop. Ours and the loops use one core, Polars all."
    )
    head = ["", "CPU ms", "ratio to ours", "wall ms", "ratio to ours"]
    made = f"{machine(('numpy', 'polars', 'pyarrow'))}. Made by `python benchmarks/segmentation.py`."
    text = f"# Segmentation\n\n{made}\n\n{about}\n\n{table(head, lines)}"
    o.out.parent.mkdir(exist_ok=True)
    o.out.write_text(text)
    print(text)


def loop(kind: str, mean: str) -> str:
    return LOOP.replace("LIST", kind).replace("MEAN", mean)


def write(rows: Path, newlines: Path, rollouts: int) -> int:
    """Completions of 50 to 550 tokens, one in nine of which ends a line."""
    rng = np.random.default_rng(3)
    bearing = rng.choice(VOCABULARY, NEWLINES, replace=False)
    np.save(newlines, bearing.astype(np.int32))
    lengths = rng.integers(50, 530, rollouts)
    n = int(lengths.sum())
    ids = np.minimum(rng.zipf(1.2, n), VOCABULARY - 1).astype(np.int32)
    others = np.setdiff1d(np.arange(VOCABULARY), bearing)
    ids = np.where(rng.random(n) < 1 / 9, rng.choice(bearing, n), others[ids % len(others)]).astype(np.int32)
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
    entropies = rng.gamma(0.3, 1.5, n).astype(np.float32)
    columns = {
        "token_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
        "entropies": pa.ListArray.from_arrays(offsets, pa.array(entropies)),
    }
    pq.write_table(pa.table(columns), rows)
    return n


def check(facts: list[dict[str, Any]]) -> None:
    """All programs must have cut at the same places and found the same means, up to the rounding of float32."""
    if any(f["cuts"] != facts[0]["cuts"] for f in facts):
        raise SystemExit("the cuts differ")
    if any(abs(f[k] / facts[0][k] - 1) > 1e-6 for f in facts for k in ("sum", "squares")):
        raise SystemExit("the means differ")


if __name__ == "__main__":
    main()
