"""Kill a process that ingests, thirty times, at random moments; after each the store must show whole readings only.

python benchmarks/crash.py --folder /somewhere
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

STEPS, ROWS = 40, 2_000
INGEST = """
import sys, echolab, echolab.ingest
echolab.ingest.STAGE_BYTES = 2 << 20  # many small commits: many moments to die in
echolab.ingest.COMMIT_SECONDS = 0.2
echolab.open(sys.argv[1], create=True).ingest(sys.argv[2], run="r")
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--kills", type=int, default=30)
    o = options.parse_args()
    shutil.rmtree(o.folder, ignore_errors=True)
    dumps, rng = o.folder / "dumps", random.Random(0)
    write_dumps(dumps)
    usual = ingest(o.folder / "unharmed", dumps) or 0.0
    lines, store = [], o.folder / "store"
    while len(lines) < o.kills:
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
    text = f"# Crash\n\n{machine()}. Made by `python benchmarks/crash.py`.\n\n{about}\n\n{table(head, lines)}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "crash.md").write_text(text)
    print(text)


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
    """Seconds that it took, or None if it was killed."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", INGEST, str(store), str(dumps)])
    try:
        if process.wait(timeout=kill_after):
            raise SystemExit("ingest failed by itself")
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


if __name__ == "__main__":
    main()
