"""What the workers of tests/test_workers.py and tests/test_verify.py run: they import it by its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def doubling() -> Callable[[Any], Any]:
    """Numbers are doubled; words are harm."""
    return lambda item: harm(item) if isinstance(item, str) else item * 2


def harm(what: str) -> Any:
    if what == "sleep":
        time.sleep(1000)
    if what == "loop":
        while True:
            pass
    if what == "power":  # in C, where no signal handler of Python's gets a turn
        return 9**9**9
    if what == "memory":
        return len(b"x" * (8 << 30))
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "leave":
        os._exit(3)
    if what == "exit":
        sys.exit("enough")
    if what == "raise":
        raise ValueError("bad\n  thing")
    if what == "late":
        time.sleep(0.8)
    if what == "lambda":
        return lambda: None
    if what == "child":
        subprocess.run(["sleep", "1000"])
    if what == "print":
        print("noise on stdout")
    return what


def nothing_to_run() -> Callable[[Any], Any]:
    raise ImportError("no such library")


def slow_to_load() -> Callable[[Any], Any]:
    time.sleep(60)
    raise AssertionError


def process_id() -> Callable[[Any], Any]:
    return lambda item: (time.sleep(item), os.getpid())[1]


def verifier(completion: str, ground_truth: str) -> Any:
    """A verifier of a user: the completion says what it returns, or which harm it does."""
    word, _, value = completion.partition(" ")
    if word == "say":
        return eval(value)
    return harm(word) == ground_truth


def with_prompt(completion: str, ground_truth: str | None, prompt: str | None = None) -> bool:
    return completion == f"{prompt} {ground_truth}"
