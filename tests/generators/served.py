"""A store served by `echolab view`, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def start(root: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """The process, and the address that it has printed."""
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "view", "--json", "--store", str(root), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]
