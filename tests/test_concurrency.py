"""Processes that die and processes that race: the store shows whole readings only, and every rollout once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import echolab

KILLS = 5
FILES, ROWS = 6, 600


def dump(folder: Path, step: int, rows: int = ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (
        {"input": f"p{i // 8}", "output": f"{step} {i} " + "word " * 60, "gts": "1", "score": float(i % 3 == 0), "step": step}
        for i in range(rows)
    )
    path = folder / f"{step}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def start(store: Path, source: Path, staged_bytes: int = 100_000) -> subprocess.Popen[bytes]:
    """Ingest in a process of its own, in small pieces so that there are many moments to die in."""
    code = (
        "import sys, echolab, echolab.ingest as i; i.STAGE_BYTES = int(sys.argv[3]);"
        "echolab.open(sys.argv[1], create=True).ingest(sys.argv[2], run='r')"
    )
    arguments = [sys.executable, "-c", code, str(store), str(source), str(staged_bytes)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def whole_readings_only(store: Path) -> int:
    """Rollouts shown, after checking that each file shows all of its rows or none."""
    if not (store / "echolab.json").exists():
        return 0
    with echolab.open(store) as lab:
        shown = dict(lab.sql("SELECT step, count(*) FROM rollouts GROUP BY step").rows())
        assert all(n == ROWS for n in shown.values()), shown
        assert not lab.validate()
        return sum(shown.values())


def test_sigkill_at_any_moment_leaves_whole_readings_and_a_rerun_completes_them(tmp_path):
    for step in range(FILES):
        dump(tmp_path / "dumps", step)
    rng = random.Random(3)
    started = time.monotonic()
    start(tmp_path / "unharmed", tmp_path / "dumps").communicate()
    usual = time.monotonic() - started
    store = tmp_path / "store"
    for _ in range(KILLS):
        process = start(store, tmp_path / "dumps")
        time.sleep(rng.uniform(0.2, 1.0) * usual)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole_readings_only(store)
    process = start(store, tmp_path / "dumps")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert whole_readings_only(store) == FILES * ROWS
    with echolab.open(store) as lab:
        assert lab.sql("SELECT count(DISTINCT rollout_id) FROM rollouts").item() == FILES * ROWS


@pytest.mark.parametrize("same", [True, False], ids=["the same file", "different files"])
def test_eight_processes_at_once_store_every_rollout_once(tmp_path, same):
    paths = [dump(tmp_path / "dumps", 0 if same else step) for step in range(8)]
    processes = [start(tmp_path / "store", path) for path in paths]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()
    expected = ROWS * (1 if same else 8)
    assert whole_readings_only(tmp_path / "store") == expected
    with echolab.open(tmp_path / "store") as lab:
        assert lab.sql("SELECT count(DISTINCT rollout_id) FROM rollouts").item() == expected
        assert lab.sql("SELECT count(*) FROM ingests WHERE live").item() == len(set(paths))


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    echolab.open(tmp_path / "store", create=True)
    hold = "with Store.open(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    code = f"import sys, time; from echolab.store import Store\n{hold}"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "store")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with echolab.open(tmp_path / "store") as lab:
        assert lab.ingest(dump(tmp_path / "dumps", 1), run="r").rows == ROWS
