"""The benchmark for GPUs is ready to run: its code runs with tiny shapes, on a machine that has nothing else installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the benchmark needs torch")
pytest.importorskip("transformers", reason="the benchmark needs transformers")

ROOT = Path(__file__).parents[2]
BARE = """
import runpy, sys
sys.modules |= dict.fromkeys(["pydantic", "deltalake", "duckdb", "polars", "orjson", "pyarrow", "typer", "trl", "verl"])
sys.argv = [sys.argv[1], sys.argv[2], "--trial"]
sys.path[0] = "benchmarks"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["head", "models"])
def test_a_trial_runs_with_torch_transformers_and_psutil_alone(part):
    command = [sys.executable, "-c", BARE, "benchmarks/scoring_gpu.py", part]
    there = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    names = {row[1] for row in rows}
    assert names >= ({"floor", "ours", "naive"} if part == "head" else {"padded", "packed"})
