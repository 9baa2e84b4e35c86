"""The demo as a newcomer meets it: stopped and gone on with, its store sound, its page in a browser, the README's jobs on it.
`make test-slow`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import echolab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).resolve().parents[1]
ECHOLAB = Path(sys.executable).with_name("echolab")
BLOCK = re.compile(r"^<!-- of one demo -->\n```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A fast demo that was stopped by Ctrl-C while it trained, and then finished."""
    pytest.importorskip("torch")
    work = tmp_path_factory.mktemp("demo")
    process = subprocess.Popen([ECHOLAB, "demo", "--fast"], cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = work / "echolab-demo" / "runs" / "pool-0" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, process.stderr and process.stderr.read()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    result = subprocess.run([ECHOLAB, "demo", "--fast"], cwd=work, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-2000:]
    (work / "said.txt").write_text(result.stdout)
    after = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert after[: len(steps)] == steps and len(after) == len(set(after)) > len(steps)  # it went on where it was
    return work


def test_the_store_is_sound_and_holds_what_the_story_needs(folder):
    with echolab.open(folder / "echolab-demo" / "store") as lab:
        assert lab.validate() == []
        kinds = set(lab.sql("SELECT DISTINCT kind FROM groups WHERE role = 'policy'")["kind"])
        assert kinds >= {"all_success", "all_fail", "mixed"}
        assert set(lab.query("clip_stats")["selector"]) == {"peak", "random"}
        arms = lab.query("arms")
        assert set(arms["arm"]) == {"grpo", "peak", "random", "fresh"} and set(arms["source"]) == {None, "easy", "hard"}
        rates = lab.sql("SELECT step, run, rate FROM (SELECT step, run, avg(n_success / n_rewarded) AS rate FROM groups"
                        " WHERE split = 'eval' AND step = 0 AND run LIKE '%-s0' GROUP BY step, run)")["rate"]  # fmt: skip
        assert len(rates) == 4 and rates.n_unique() == 1  # the arms begin with the same policy and the same random numbers
        (left,) = lab.sql("SELECT count(*) AS n FROM rollouts WHERE run LIKE 'pool-%' AND split = 'train'")["n"]
        steps = lab.sql("SELECT count(DISTINCT step) AS n FROM rollouts WHERE run = 'pool-0' AND split = 'train'")["n"][0]
        assert left == 128 * steps  # what the stopped attempt sampled beyond its checkpoint does not count twice


def test_a_finished_demo_prints_its_page_and_one_seed_calls_itself_an_anecdote(folder):
    again = subprocess.run([ECHOLAB, "demo", "--fast"], cwd=folder, capture_output=True, text=True, timeout=120)
    page = folder / "echolab-demo" / "report.html"
    assert again.returncode == 0 and f"The page: {page}" in again.stdout and again.stdout.startswith("An anecdote of one seed")
    assert "<h1>An anecdote of one seed" in page.read_text()
    other = subprocess.run([ECHOLAB, "demo"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert other.returncode == 1 and "holds a fast demo" in other.stderr


def test_the_page_draws_everything_and_asks_nobody(folder):
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    wrong: list[str] = []
    with api.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        except api.Error:
            pytest.skip("no Chromium")
        page = browser.new_page()
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith("file:") else wrong.append(r.url))
        page.goto((folder / "echolab-demo" / "report.html").as_uri())
        charts = page.locator(".chart")
        for place in range(charts.count()):
            charts.nth(place).scroll_into_view_if_needed()
            charts.nth(place).locator("svg").wait_for()
        assert charts.count() > 10 and page.locator("#arms .chart").count() == 6
        browser.close()
    assert wrong == []


def shape(text: str) -> str:
    """What does not depend on the machine: words and columns, without figures, ids, lists, and the bars of a curve."""
    text = re.sub(r"\[[^]]*\]|\b[0-9a-f]{32}\b", "#", text)
    text = re.sub(r"[-+]?\d[\d,.]*(e[-+]\d+)?[kM]?|…", "#", text)
    return re.sub(r"#( #)+", "#", re.sub(r"[\s\-▁-█]+", " ", text)).strip()


def test_the_readmes_jobs_do_on_a_demo_what_the_readme_shows(folder):
    environment = {**os.environ, "PATH": f"{ECHOLAB.parent}:{os.environ['PATH']}", "ECHOLAB_STORE": "echolab-demo/store"}
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert len(blocks) >= 4
    for block in blocks:
        for command, expected in COMMAND.findall(block):
            result = subprocess.run(
                ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
            )
            assert result.returncode == 0, f"$ {command}\n{result.stderr}"
            assert shape(result.stdout) == shape(expected), f"$ {command}\n{result.stdout}"
