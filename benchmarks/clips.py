"""Choosing clips, against loops over rollouts; distances to an expert's curve, against dtaidistance and numpy; and mining a
whole store.

    pip install dtaidistance
    python benchmarks/clips.py

Every program runs in a process of its own on the same Parquet file, in turn with the others; the answers must be equal. The
time is that from columns in memory to clips or distances. The tables are written as they came out.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import RESULTS, machine, run, table

from echolab import ids
from echolab.schema import TABLES
from echolab.segment import Segmenter, segmentations
from echolab.store import Store, now
from echolab.vocab import Vocab

SAMPLES, TOKENS, NEWLINE_EVERY = 8, (50, 530), 9
POINTS, SEGMENTS = 48, (5, 61)  # of the profile, and of the sequences that are compared with it
PEER = "dtaidistance"

MEASURE = """
import sys, json, time, numpy as np, pyarrow as pa, pyarrow.parquet as pq
rows = pq.read_table(sys.argv[1])

def measure(work):
    best = []
    for _ in range(int(sys.argv[2])):
        started = time.monotonic(), time.process_time()
        found = work()
        best.append((time.monotonic() - started[0], time.process_time() - started[1]))
    print(json.dumps({"seconds": min(w for w, _ in best), "cpu": min(c for _, c in best), "found": found}))
"""

# From token ids and entropies to clips. The answer: a sum over all clips of group number times end.
FROM_TOKENS = """
from echolab.clips.selectors import select
from echolab.segment import Segmenter, segment, segment_means
from echolab.vocab import Vocab
vocab = Vocab("bench", {0: b".\\n", **{i: b"x" for i in range(1, 1000)}})
vocab.newline, vocab.blank
config = Segmenter(merge_blank=False)
number = rows["number"].to_numpy()
others = rows.select(["group_id", "rollout_id", "sample", "success", "truncated"])

def work():
    ends = segment(rows["token_ids"], vocab, config)
    means = segment_means(rows["entropies"], ends)
    found = select(others.append_column("segment_ends", ends).append_column("segment_entropies", means))
    return int((number[found.row] * found.end_token).sum())

measure(work)
"""
LOOP_START = """
groups = {}
for i, g in enumerate(rows["group_id"].to_pylist()):
    groups.setdefault(g, []).append(i)
success, number = rows["success"].to_pylist(), rows["number"].to_pylist()
"""
LOOP_TOKENS = """
tokens, entropies = ([x.values.to_numpy() for x in rows[c]] for c in ("token_ids", "entropies"))

def work():
    total = 0
    for members in groups.values():
        best = None
        for i in members:
            if not success[i]:
                continue
            start = 0
            for t, token in enumerate(tokens[i].tolist()):
                if token == 0 or t == len(tokens[i]) - 1:
                    mean = np.mean(entropies[i][start : t + 1])
                    start = t + 1
                    if best is None or mean > best[0]:
                        best = mean, i, t + 1
        if best:
            total += number[best[1]] * best[2]
    return total

measure(work)
"""
LOOP_ROLLOUTS = """
tokens, entropies = ([x.values.to_numpy() for x in rows[c]] for c in ("token_ids", "entropies"))

def work():
    total = 0
    for members in groups.values():
        best = None
        for i in members:
            if not success[i]:
                continue
            cuts = np.flatnonzero(tokens[i] == 0) + 1
            ends = cuts if len(cuts) and cuts[-1] == len(tokens[i]) else np.append(cuts, len(tokens[i]))
            starts = np.append(0, ends[:-1])
            means = np.add.reduceat(entropies[i], starts) / (ends - starts)
            at = means.argmax()
            if best is None or means[at] > best[0]:
                best = means[at], i, int(ends[at])
        if best:
            total += number[best[1]] * best[2]
    return total

measure(work)
"""

# From segment entropies to clips.
FROM_SEGMENTS = """
from echolab.clips.selectors import select
number = rows["number"].to_numpy()

def work():
    found = select(rows)
    return int((number[found.row] * found.end_token).sum())

measure(work)
"""
LOOP_LISTS = """
ends, means = rows["segment_ends"].to_pylist(), rows["segment_entropies"].to_pylist()

def work():
    total = 0
    for members in groups.values():
        best = None
        for i in members:
            if not success[i]:
                continue
            for end, mean in zip(ends[i], means[i]):
                if best is None or mean > best[0]:
                    best = mean, i, end
        if best:
            total += number[best[1]] * best[2]
    return total

measure(work)
"""
LOOP_ARRAYS = """
ends, means = ([x.values.to_numpy() for x in rows[c]] for c in ("segment_ends", "segment_entropies"))

def work():
    total = 0
    for members in groups.values():
        best = None
        for i in members:
            if not success[i]:
                continue
            at = means[i].argmax()
            if best is None or means[i][at] > best[0]:
                best = means[i][at], i, int(ends[i][at])
        if best:
            total += number[best[1]] * best[2]
    return total

measure(work)
"""

# Distances of sequences to one of POINTS. The answer: mean and greatest distance.
SEQUENCES = """
values, lengths = rows["values"].combine_chunks(), rows["values"].combine_chunks().value_lengths().to_numpy().astype(np.int64)
flat, start = values.values.to_numpy(), np.cumsum(lengths) - lengths
profile = np.load(sys.argv[3])
said = lambda d: [float(np.mean(d)), float(np.max(d))]
"""
NEAREST = """
from echolab.clips.match import Experts, nearest
bins = int(sys.argv[4])
experts = Experts.profile(profile.tolist(), bins)
column, number = np.zeros(len(lengths), np.int64), np.ones(len(lengths), np.int64)
measure(lambda: said(nearest(flat, start, lengths, experts, column, number, "DISTANCE", False)))
"""
OWN_DTW = """
from echolab.clips.match import PIECE, dtw
against = profile.astype(np.float32)[:, None]

def work():
    found = np.empty(len(lengths), np.float32)
    for n in np.unique(lengths):
        same = np.flatnonzero(lengths == n)
        for at in range(0, len(same), PIECE):
            some = same[at : at + PIECE]
            found[some] = dtw(flat[start[some] + np.arange(n)[:, None]], against)
    return said(found * np.maximum(lengths, len(profile)))

measure(work)
"""
CURVES = """
edges = np.arange(int(sys.argv[4]) + 1) / int(sys.argv[4])

def curve(v):
    sums = np.append(0.0, np.cumsum(v))
    return np.diff(np.interp(edges, np.arange(len(v) + 1) / len(v), sums)) * (len(edges) - 1) / len(v)

sequences = [x.values.to_numpy().astype(np.float64) for x in rows["values"]]
"""
CORRELATION_LOOP = """
against = curve(profile)
measure(lambda: said([1 - np.corrcoef(curve(v), against)[0, 1] for v in sequences]))
"""
DTAI_CURVES = """
from dtaidistance import dtw
against, n = curve(profile), len(edges) - 1
curves = [curve(v) for v in sequences]
measure(lambda: said([dtw.distance_fast(v, against, use_pruning=False) ** 2 / n for v in curves]))
"""
DTAI = """
from dtaidistance import dtw
sequences = [x.values.to_numpy().astype(np.float64) for x in rows["values"]]
measure(lambda: said([dtw.distance_fast(v, profile, use_pruning=False) ** 2 for v in sequences]))
"""
DTAI_BLOCK = """
from dtaidistance import dtw
sequences = [x.values.to_numpy().astype(np.float64) for x in rows["values"]]
block = ((0, 1), (1, len(sequences) + 1))
options = {"block": block, "compact": True, "parallel": False, "use_pruning": False}
measure(lambda: said(np.asarray(dtw.distance_matrix_fast([profile, *sequences], **options)) ** 2))
"""

MINE = """
import sys, json, time, echolab
lab = echolab.open(sys.argv[1])
started = time.monotonic(), time.process_time()
mined = lab.mine("bench", selector=sys.argv[2])
print(json.dumps({"seconds": time.monotonic() - started[0], "cpu": time.process_time() - started[1],
    "clips": mined.statistics["n_clips"], "tokens": mined.statistics["n_tokens"]}))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rollouts", type=int, default=100_000)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--note", help="A sentence for the head of the page, such as what else the machine did.")
    options.add_argument("--out", type=Path, default=RESULTS / "clips.md")
    o = options.parse_args()
    if find_spec(PEER) is None:
        raise SystemExit(f"the rival is missing: pip install {PEER}")
    made = f"{machine(('numpy', 'pyarrow', 'duckdb', PEER))}. Made by `python benchmarks/clips.py`."
    parts = ["# Clips", " ".join([made, o.note or ""]).strip()]
    with tempfile.TemporaryDirectory() as folder:
        for part in (selection, distances, mining):
            parts += part(Path(folder), o)
    text = "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
    o.out.parent.mkdir(exist_ok=True)
    o.out.write_text(text)
    print(text)


def selection(folder: Path, o: argparse.Namespace) -> list[str]:
    file = folder / "rollouts.parquet"
    rows = rollouts(o.rollouts)
    pq.write_table(rows, file)
    of_tokens = {
        "echolab: segments, means, choice": FROM_TOKENS,
        "loop over rollouts, numpy within each": LOOP_START + LOOP_ROLLOUTS,
        "loop over tokens, np.mean of each segment": LOOP_START + LOOP_TOKENS,
    }
    of_segments = {
        "echolab": FROM_SEGMENTS,
        "loop over rollouts, argmax of an array": LOOP_START + LOOP_ARRAYS,
        "loop over segments of lists": LOOP_START + LOOP_LISTS,
    }
    n_tokens, n_segments = (len(rows[c].combine_chunks().values) for c in ("token_ids", "segment_ends"))
    return [
        "## Selection",
        f"`peak` over {o.rollouts:,} rollouts in groups of {SAMPLES}, all successes as in a saturated run, {n_tokens:,} tokens,"
        f" {n_segments:,} segments. Best of {o.turns} processes of {o.repeat} calls. Goal: 40 times less than the loop over"
        " tokens. Ours orders the rows and counts why groups have no clip; the loops get their groups in order.",
        "From tokens and entropies to clips:",
        compared(of_tokens, [file, o.repeat], o.turns),
        "From segment entropies to clips; half of ours is the copying of the candidates into their order:",
        compared(of_segments, [file, o.repeat], o.turns),
    ]


def distances(folder: Path, o: argparse.Namespace) -> list[str]:
    rng = np.random.default_rng(4)
    lengths = rng.integers(*SEGMENTS, o.rollouts)
    values = pa.array(rng.gamma(0.3, 1.5, lengths.sum()).astype(np.float32))
    file, profile = folder / "sequences.parquet", folder / "profile.npy"
    pq.write_table(pa.table({"values": pa.ListArray.from_arrays(offsets(lengths), values)}), file)
    np.save(profile, rng.gamma(2.0, 0.3, POINTS))
    arguments = [file, o.repeat, profile, 16]
    warping = {
        "echolab: curves and distances": SEQUENCES + NEAREST.replace("DISTANCE", "dtw"),
        f"{PEER}: `distance_fast` of curves that are there": SEQUENCES + CURVES + DTAI_CURVES,
    }
    raw = {
        "echolab: `dtw`": SEQUENCES + OWN_DTW,
        f"{PEER}: `distance_fast`": SEQUENCES + DTAI,
        f"{PEER}: `distance_matrix_fast`, one row": SEQUENCES + DTAI_BLOCK,
    }
    correlation = {
        "echolab: curves and distances": SEQUENCES + NEAREST.replace("DISTANCE", "pearson"),
        "np.interp and np.corrcoef": SEQUENCES + CURVES + CORRELATION_LOOP,
    }
    low, high = SEGMENTS
    return [
        "## Matching",
        f"{o.rollouts:,} sequences of {low} to {high - 1} segments against a profile of {POINTS} points, on one core. Best of"
        f" {o.turns} processes of {o.repeat} calls. {PEER} goes without its pruning: with it, it is no faster, and gives"
        " infinity for some curves.",
        f"Warping of curves of 16 bins, as `match` does it (goal: 5 times less than {PEER}):",
        compared(warping, arguments, o.turns, o.rollouts),
        f"Warping of the sequences as they are, {POINTS} points wide:",
        compared(raw, arguments, o.turns, o.rollouts),
        "Correlation of curves of 16 bins (goal: 50 times less than the loop):",
        compared(correlation, arguments, o.turns, o.rollouts),
    ]


def mining(folder: Path, o: argparse.Namespace) -> list[str]:
    rows = []
    for n in (o.rollouts // 4, o.rollouts):
        store(folder / f"store-{n}", n)
        for selector in ("peak", "full"):
            found = run(MINE, folder / f"store-{n}", selector)
            rows.append([f"{n:,} rollouts, `{selector}`", found.said["clips"], found.said["tokens"], found.said["cpu"],
                         found.said["seconds"], round(found.peak_mb)])  # fmt: skip
    return [
        "## Mining",
        "`echolab mine` of a store of rollouts of 50 to 530 tokens, from the command to the committed clip set; peak memory of"
        " the process, libraries included.",
        table(["", "clips", "tokens of clips", "CPU s", "wall s", "peak MB"], rows),
    ]


def compared(programs: dict[str, str], arguments: list[Any], turns: int, items: int | None = None) -> str:
    """A table of programs, of which the first is ours; they must agree."""
    said = [{name: run(MEASURE + code, *arguments).said for name, code in programs.items()} for _ in range(turns)]
    first = next(iter(programs))
    for name in programs:
        if not np.allclose(said[0][name]["found"], said[0][first]["found"], rtol=1e-4):
            raise SystemExit(f"{name} finds {said[0][name]['found']}, {first} {said[0][first]['found']}")
    best = {name: {k: min(turn[name][k] for turn in said) for k in ("cpu", "seconds")} for name in programs}
    rows = [
        [
            name,
            b["cpu"] * 1000,
            b["cpu"] / best[first]["cpu"],
            b["seconds"] * 1000,
            *([round(items / b["cpu"])] if items else []),
        ]
        for name, b in best.items()
    ]
    return table(["", "CPU ms", "ratio to ours", "wall ms", *(["a second of CPU"] if items else [])], rows)


def offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.append(0, np.cumsum(lengths)), pa.int32())


def rollouts(n: int) -> pa.Table:
    """Rollouts of whole groups, cut into segments at token 0."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(*TOKENS, n)
    tokens = rng.integers(1, 1000, lengths.sum()).astype(np.int32)
    tokens[rng.random(len(tokens)) < 1 / NEWLINE_EVERY] = 0
    entropies = rng.gamma(0.3, 1.5, len(tokens)).astype(np.float32)
    lists = {k: pa.ListArray.from_arrays(offsets(lengths), pa.array(v)) for k, v in (("t", tokens), ("e", entropies))}
    groups = [ids.group_id("bench", "train", 1, (i // SAMPLES,)) for i in range(0, n, SAMPLES)]
    rows = pa.table(
        {
            "group_id": [groups[i // SAMPLES] for i in range(n)],
            "rollout_id": [ids.rollout_id(groups[i // SAMPLES], None, None, None, i % SAMPLES) for i in range(n)],
            "sample": pa.array(np.arange(n) % SAMPLES, pa.int32()),
            "number": np.arange(n) // SAMPLES,
            "success": np.ones(n, bool),
            "truncated": np.zeros(n, bool),
            "token_ids": lists["t"],
            "entropies": lists["e"],
        }
    )
    cut = segmentations(rows.append_column("scorer", pa.repeat("bench", n)), VOCAB, Segmenter(merge_blank=False))
    return rows.append_column("segment_ends", cut["segment_ends"]).append_column("segment_entropies", cut["segment_entropies"])


VOCAB = Vocab("bench", {0: b".\n", **{i: f" w{i}".encode() for i in range(1, 1000)}})


def store(root: Path, n: int) -> None:
    """A store with these rollouts, their scores and segments, as ingest and scoring would have left it."""
    rows = rollouts(n)
    made, config = Store.create(root), Segmenter(merge_blank=False)
    tokens = rows["token_ids"].combine_chunks()
    _, ends, data = VOCAB.dense.take(tokens.values).buffers()
    ends = np.frombuffer(ends, np.int64)[tokens.offsets.to_numpy()]
    texts = [bytes(data[a:b]).decode() for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    number = rows["number"].to_pylist()
    fixed = {
        "ingest_id": "bench", "run": "bench", "split": "train", "step": 1, "role": "policy", "group_source": "explicit",
        "prompt_format": "raw", "origin": {"file": "bench.jsonl", "row": 0},
    }  # fmt: skip
    columns = {
        **{k: pa.array([v] * n, TABLES["rollouts"].column(k).type) for k, v in fixed.items()},
        **{k: rows[k] for k in ("rollout_id", "group_id", "sample")},
        "prompt": [f"Problem {i}" for i in number],
        "problem_id": [ids.problem_id(f"Problem {i}") for i in number],
        "prompt_ids": [[1, 2, 3]] * n,
        "completion_ids": rows["token_ids"],
        "completion": texts,
        "reward": [float(s) for s in rows["success"].to_pylist()],
    }
    scores = pa.table({"rollout_id": rows["rollout_id"], "scorer": ["bench"] * n, "token_ids": rows["token_ids"],
                       "entropies": rows["entropies"], "n_tokens": [0] * n})  # fmt: skip
    entry = {
        "ingest_id": "bench", "run": "bench", "source_path": "bench.jsonl", "attempt": 1, "bytes_read": 1, "sha256": "0",
        "format": "generic", "reader_version": 1, "options": "{}", "n_rows": n, "n_shared": 0, "n_quarantined": 0,
        "completeness": "all", "created_at": now(),
    }  # fmt: skip
    with made.lock():
        made.add("vocab", VOCAB.table())
        made.register("scorers", "bench", "bench", {"kind": "sampling", "tokenizer": "bench", "temperature": 1.0})
        made.register("segmenters", config.id("bench"), "newline", config.resolved("bench"))
        made.add("rollouts", pa.table(columns))
        made.add("scores", scores)
        made.add("segmentations", segmentations(scores, VOCAB, config))
        made.add("ingests", pa.Table.from_pylist([entry], schema=TABLES["ingests"].arrow))


if __name__ == "__main__":
    main()
