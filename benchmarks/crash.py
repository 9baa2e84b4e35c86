"""Kill a process that ingests, thirty times, or one that scores, ten times, at random moments. After each kill the store must
be sound: it shows whole readings only, and in the end the scores that an undisturbed job stores, bit for bit.

    python benchmarks/crash.py ingest --folder /somewhere
    python benchmarks/crash.py score --folder /somewhere
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from measure import RESULTS, machine, table

import echolab
from echolab import jobs

STEPS, ROWS, GROUPS = 40, 2_000, 32
INGEST = """
import sys, echolab, echolab.ingest
echolab.ingest.STAGE_BYTES = 2 << 20  # many small commits: many moments to die in
echolab.ingest.COMMIT_SECONDS = 0.2
echolab.open(sys.argv[1], create=True).ingest(sys.argv[2], run="r")
"""


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SCORE = """
from echolab import jobs
items = jobs.items
jobs.items = lambda groups, tokens: items(groups, tokens, 1)  # an item for each group: many moments to die in
jobs.COMMIT_ITEMS = 4
from pipelines.cli import main
main()
"""


def main() -> None:
    parts = {"ingest": (crash_of_ingest, 30, "crash"), "score": (crash_of_score, 10, "crash_score")}
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=parts)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--kills", type=int, default=None)
    o = options.parse_args()
    part, kills, name = parts[o.part]
    shutil.rmtree(o.folder, ignore_errors=True)
    o.folder.mkdir(parents=True)
    text = f"# Crash: {o.part}\n\n{part(o.folder, o.kills or kills)}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


# Reading.


def crash_of_ingest(folder: Path, kills: int) -> str:
    dumps, rng = folder / "dumps", random.Random(0)
    write_dumps(dumps)
    usual = ingest(folder / "unharmed", dumps) or 0.0
    lines, store = [], folder / "store"
    while len(lines) < kills:
        after = rng.uniform(0.2, 1.0) * usual
        if ingest(store, dumps, kill_after=after) is not None:  # it was faster: no kill, and nothing left to do
            look(store)
            shutil.rmtree(store)
            continue
        readings, rows, problems = look(store)
        lines.append([str(len(lines) + 1), after, readings, rows, problems])
    ingest(store, dumps)
    readings, rows, problems = look(store)
    lines.append(["none: the rerun", usual, readings, rows, problems])
    if rows != STEPS * ROWS or problems:
        raise SystemExit(f"the rerun did not complete the store: {rows} rollouts, {problems} problems")
    head = ["kill", "after s", "live readings", "rollouts shown", "problems found"]
    about = (
        f"`validate` after each kill. {STEPS} files of {ROWS:,} rollouts; a killed reading is begun again on the same store,"
        " a finished store is begun anew."
    )
    return f"{machine()}. Made by `python benchmarks/crash.py ingest`.\n\n{about}\n\n{table(head, lines)}"


def write_dumps(folder: Path) -> None:
    folder.mkdir(parents=True)
    for step in range(1, STEPS + 1):
        rows = (
            {
                "input": f"p{i // 8}",
                "output": f"{step} {i} " + "word " * 80,
                "gts": "1",
                "score": float(i % 3 == 0),
                "step": step,
            }
            for i in range(ROWS)
        )
        (folder / f"{step}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def ingest(store: Path, dumps: Path, kill_after: float | None = None) -> float | None:
    return killed(INGEST, store, dumps, kill_after=kill_after)


def killed(code: str, *arguments: object, kill_after: float | None = None) -> float | None:
    """Seconds that it took, or None if it was killed."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL)
    try:
        if process.wait(timeout=kill_after):
            raise SystemExit("it failed by itself")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return None
    return time.monotonic() - started


def look(store: Path) -> tuple[int, int, int]:
    """Live readings, rollouts shown and problems; exits if a reading shows in part."""
    if not (store / "echolab.json").exists():
        return 0, 0, 0
    with echolab.open(store) as lab:
        shown = lab.sql("SELECT step, count(*) AS n, count(DISTINCT rollout_id) AS ids FROM rollouts GROUP BY step").rows()
        if any(n != ROWS or ids != ROWS for _, n, ids in shown):
            raise SystemExit(f"part of a reading shows: {shown}")
        return len(lab.snapshot.ledger.live), sum(n for _, n, _ in shown), len(lab.validate())


# Scoring.


def crash_of_score(folder: Path, kills: int) -> str:
    """Real rollouts under a random model with the real vocabulary, one thread."""
    dump, tokenizer = DATA / "rollouts/qwen25math_rm_maj_example_math_100x8.jsonl", DATA / "tokenizers/qwen2.5"
    _model(folder / "model")
    stores = {name: folder / name for name in ("empty", "unharmed", "store")}
    with echolab.open(stores["empty"], create=True) as lab:
        lab.ingest(dump, run="math")
    shutil.copytree(stores["empty"], stores["unharmed"])
    shutil.copytree(stores["empty"], stores["store"])
    score = ["score", "--model", folder / "model", "--tokenizer", tokenizer, "--where", f"origin.row < {GROUPS}"]
    score += ["--threads", 1, "--json", "--store"]
    usual = killed(SCORE, *score, stores["unharmed"]) or 0.0
    start = killed(SCORE, *score, stores["unharmed"]) or 0.0  # there is nothing left to do
    expected, lines, rng = numbers(stores["unharmed"]), [], random.Random(0)
    wholes = 0  # stores that were completed, and compared, before all kills were done
    while len(lines) < kills:
        after = start + rng.uniform(0.0, 0.3) * (usual - start)
        if killed(SCORE, *score, stores["store"], kill_after=after) is not None:
            check(stores["store"], expected)
            wholes += 1
            shutil.rmtree(stores["store"])
            shutil.copytree(stores["empty"], stores["store"])
            continue
        lines.append([str(len(lines) + 1), after, *progress(stores["store"])])
    killed(SCORE, *score, stores["store"])
    check(stores["store"], expected)
    lines.append(["none: the rerun", usual, *progress(stores["store"])])
    about = (
        f"{len(expected)} real rollouts, an item for each of their groups, a commit for every four; a random Qwen2 of width"
        f" 16 with the real tokenizer. A killed job goes on in the same store; a completed one is compared and begun anew."
        f" {wholes + 1} stores that were completed after kills hold the scores and segmentations of the undisturbed job, bit"
        " for bit: checked. The last line gives the seconds of an undisturbed job."
    )
    head = ["kill", "after s", "items finished", "rollouts scored", "problems found"]
    where = machine(("torch", "transformers", "deltalake", "duckdb"))
    return f"{where}. Made by `python benchmarks/crash.py score`.\n\n{about}\n\n{table(head, lines)}"


def _model(folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def numbers(store: Path) -> list[tuple]:
    with echolab.open(store) as lab:
        return lab.sql(
            """SELECT s.*, c.* EXCLUDE (rollout_id, scorer) FROM scores s JOIN segmentations c USING (rollout_id, scorer)
            ORDER BY rollout_id"""
        ).rows()


def check(store: Path, expected: list[tuple]) -> None:
    if numbers(store) != expected:
        raise SystemExit(f"{store} does not hold what an undisturbed job stores")


def progress(store: Path) -> tuple[int, int, int]:
    """Items finished, rollouts scored and problems; exits if something is there twice."""
    with echolab.open(store) as lab:
        n, ids = lab.sql("SELECT count(*), count(DISTINCT rollout_id) FROM scores").row(0)
        if n != ids:
            raise SystemExit(f"{n} scores of {ids} rollouts")
        finished = sum(job.n_items - len(job.pending()) for job in jobs.jobs(lab.store, "score"))
        return finished, n, len(lab.validate())


if __name__ == "__main__":
    main()
