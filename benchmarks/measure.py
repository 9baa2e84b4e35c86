"""What every benchmark needs: a measured child process, the machine, a table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
if str(FOLDER) in sys.path:  # looked at last: trainer.py here is not the package of that name
    sys.path.remove(str(FOLDER))
    sys.path.append(str(FOLDER))


@dataclass
class Measured:
    """One run of one program: wall and CPU seconds, peak memory, and what it printed as its last line of JSON."""

    wall: float
    cpu: float
    peak_mb: float
    said: dict[str, Any] = field(default_factory=dict)


def run(code: str, *arguments: object) -> Measured:
    """Run Python code in a process of its own. Peak memory is the highest resident set of it and its children."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0.0]
    watch = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watch.start()
    before = os.times()
    out, errors = process.communicate()
    after = os.times()
    if process.returncode:
        raise SystemExit(f"a measured program failed:\n{code}\n{errors[-3000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    last = out.strip().splitlines()[-1] if out.strip() else "{}"
    return Measured(time.monotonic() - started, cpu, peak[0], json.loads(last))


def _watch(pid: int, peak: list[float]) -> None:
    try:
        process = psutil.Process(pid)
        while True:
            family = [process, *process.children(recursive=True)]
            peak[0] = max(peak[0], sum(p.memory_info().rss for p in family) / 2**20)
            time.sleep(0.02)
    except psutil.Error:
        return


def machine(names: tuple[str, ...] = ("duckdb", "polars", "pyarrow", "deltalake", "pandas", "datasets")) -> str:
    packages = ", ".join(f"{p} {version(p)}" for p in names if find_spec(p))
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GB, Python {platform.python_version()}, {packages}, {time.strftime('%Y-%m-%d')}"
    )


def table(head: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *[[cell(v) for v in row] for row in rows]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def paragraph(text: str) -> str:
    """One of Markdown, from a text that is broken into lines."""
    return " ".join(text.split()) + "\n\n"
