"""`echolab verify` as a shell sees it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from test_cli import echolab, refused

from pipelines.verify_command import SIDE_BY_SIDE

SAY = "python:worker_functions:verifier"


@pytest.fixture
def ingested(tmp_path):
    """A store of completions, all recorded as wrong."""

    def make(*completions: str) -> Path:
        rows = [{"completion": c, "prompt": "Q", "ground_truth": "5", "reward": 0.0} for c in completions]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert echolab("ingest", tmp_path / "d.jsonl", "--run", "r", "--store", tmp_path / "s").returncode == 0
        return tmp_path / "s"

    return make


def test_it_says_what_was_judged_and_how(ingested):
    store = ingested(r"\boxed{5}", r"\boxed{6}", "none")
    result = echolab("verify", "--verifier", "exact", "--store", store)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "exact@1: 3 verdicts: 1 right, 1 wrong, 1 without an answer\n"
    assert (
        echolab("verify", "--verifier", "exact", store=store).stdout
        == "exact@1: 0 verdicts\n3 rollouts had a verdict already\n"
    )


def test_timeouts_and_errors_exit_with_3_until_they_are_made_anew(ingested):
    store = ingested("late x", "raise x", "say True")
    result = echolab("verify", "--verifier", SAY, "--timeout", "0.4", "--store", store)
    assert result.returncode == 3
    assert "1 right, 0 wrong, 0 without an answer, 1 timeout, 1 error" in result.stdout
    assert "1 error: ValueError: bad thing" in result.stdout and "--again timeout,error" in result.stdout
    assert echolab("verify", "--verifier", SAY, "--store", store).returncode == 0
    assert echolab("verify", "--verifier", SAY, "--again", "timeout", "--store", store).returncode == 0


def test_report_shows_agreement_and_both_sides_of_each_difference(ingested):
    store = ingested(r"\boxed{5}", r"\boxed{6}", "none")
    lines = echolab("verify", "--verifier", "exact", "--report", "--store", store).stdout.splitlines()
    agreement = lines[lines.index("Agreement with the recorded rewards:") + 2 :]
    assert dict(zip(agreement[0].split(), agreement[2].split(), strict=False))["run"] == "r"
    assert re.search(r"\b0\.666667\b", agreement[2])
    differ = lines[lines.index("Where they differ:") + 2 :]
    assert differ[0].split() == [*SIDE_BY_SIDE]
    assert len(differ) == 3 and re.search(r"Q +5 +5 +0 +ok +True", differ[2])


def test_json_is_one_document(ingested):
    result = echolab("verify", "--verifier", "exact", "--report", "--json", "--store", ingested(r"\boxed{5}", "none"))
    document = json.loads(result.stdout)
    assert result.stderr == "" and document["made"] == 2 and document["verifier"] == "exact@1"
    assert document["statuses"] == {"ok": 1, "no_answer": 1, "timeout": 0, "error": 0}
    assert [r["n_agree"] for r in document["agreement"]] == [1]
    assert [(r["ground_truth"], r["extracted"]) for r in document["disagreements"]] == [("5", "5")]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--verifier"),
        (["--verifier", "maths"], 2, "numeric"),
        (["--verifier", "exact", "--option", "strict=1"], 2, "case"),
        (["--verifier", "exact", "--option", "strict"], 2, "NAME=VALUE"),
        (["--verifier", "exact", "--timeout", "0"], 2, "timeout"),
        (["--verifier", "exact", "--workers", "0"], 2, "workers"),
        (["--verifier", "exact", "--again", "late"], 2, "timeout"),
        (["--verifier", "exact", "--run", "q"], 1, "there are: r"),
        (["--verifier", "exact", "--where", "nothing = 1"], 1, "nothing"),
        (["--verifier", "exact", "--where", "true); DROP VIEW rollouts; --"], 1, "syntax error"),
        (["--verifier", "python:no_such_module:f"], 1, "no_such_module"),
        (["--verifier", "exact", "--where", "false", "--report"], 1, "no verdict"),
    ],
)
def test_errors_are_one_line(arguments, code, says, ingested):
    assert says in refused(echolab("verify", *arguments, "--store", ingested(r"\boxed{5}")), code)


def test_ctrl_c_keeps_what_was_judged_and_leaves_nobody_behind(ingested):
    store = ingested(*(f"say {i}" for i in range(100)), "sleep x", "loop x")
    code = "import sys; sys.path.append(sys.argv.pop(1)); from pipelines.cli import main; main()"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), "verify", "--verifier", SAY, "--timeout", "600"]
    restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*command, "--store", str(store)], stderr=subprocess.PIPE, text=True, preexec_fn=restore)
    deadline = time.monotonic() + 60
    while len(children := psutil.Process(process.pid).children(recursive=True)) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)  # a server, two workers that hang, and two in their place
    time.sleep(2)  # in which these judge what is left
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60)[1].splitlines()[-1], process.returncode) == ("echolab: interrupted", 130)
    assert not [p for p in psutil.wait_procs(children, timeout=20)[1] if p.status() != psutil.STATUS_ZOMBIE]
    count = echolab("sql", "SELECT count(*) AS n FROM verdicts", "--json", "--store", store)
    assert json.loads(count.stdout)["rows"] == [{"n": 100}]
    assert echolab("store", "validate", "--store", store).returncode == 0
