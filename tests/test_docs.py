"""What README and docs/ show is what happens: every console block is run, its output compared."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from generators import cookbook, models

from echolab.queries import list_queries
from echolab.schema import render
from echolab.sql import views_markdown
from pipelines.cli import app

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*(?:\\\n.*)*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """Without those whose figures are of one demo: test_demo.py runs them."""
    text = page.read_text().replace("<!-- of one demo -->\n```console", "```demo")
    return [body for found, body in FENCE.findall(text) if found == language]


def matches(expected: str, found: str) -> bool:
    """Equal line by line; a line `...` stands for any lines, and `…` within a line for anything."""
    pattern = "".join(
        r"(?:.*\n)*" if line == "..." else r"[^\n]*".join(map(re.escape, line.split("…"))) + r"[ ]*\n"
        for line in expected.rstrip("\n").split("\n")
        if expected.strip()
    )
    return re.fullmatch(pattern, found) is not None


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=lambda p: p.name)
def test_console_blocks_print_what_the_page_shows(page, tmp_path):
    work = tmp_path / "checkout"
    work.mkdir()
    if "--model model" in page.read_text():
        pytest.importorskip("torch", reason="scoring needs torch")
        models.model(work / "model")
    if SHARED.is_dir():
        (tmp_path / "shared").symlink_to(SHARED)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "ECHOLAB_STORE"} | {"PATH": path}
    exported: dict[str, str] = {}
    for block in blocks(page, "console"):
        if "../shared/data" in block and not SHARED.is_dir():
            continue
        for command, expected in COMMAND.findall(block):
            if found := re.fullmatch(r"export (\w+)=(\S+)", command):
                exported[found[1]] = found[2]
                continue
            result = subprocess.run(
                ["bash", "-c", command], cwd=work, env=environment | exported, capture_output=True, text=True, timeout=200
            )
            assert matches(expected, result.stdout + result.stderr), f"$ {command}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.name)
def test_commands_that_are_only_shown_have_the_options_that_they_are_shown_with(page):
    commands: Any = typer.main.get_command(app)
    for line in "".join(blocks(page, "sh")).splitlines():
        command, words = commands, shlex.split(line, comments=True)
        if not words or words[0] != "echolab":
            continue
        while hasattr(command, "commands") and words[1] in command.commands:
            command, words = command.commands[words[1]], words[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        assert command is not commands and {w for w in words if w.startswith("-")} <= known, line


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    from pipelines.simulated import simulated

    monkeypatch.chdir(tmp_path)
    simulated(Path("echolab-simulated"), fresh=False, say=lambda _: None)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize(("page", "generated"), [("tables.md", lambda: render("md")), ("views.md", views_markdown)])
def test_generated_pages_are_up_to_date(page, generated):
    assert (ROOT / "docs" / page).read_text() == generated(), (
        f"run `echolab store schema --format md` and write docs/{page} anew"
    )


def test_the_cookbook_shows_what_every_query_answers():
    assert cookbook.PAGE.read_text() == cookbook.write(), "run `PYTHONPATH=tests python tests/generators/cookbook.py`"
    shown = cookbook.PAGE.read_text().split("\n## ")[1:]
    assert [s.split("\n")[0] for s in shown] == [q.name for q in list_queries()]
    assert [s.split("\n")[0] for s in shown if s.count("\n| ") < 3] == []  # a head, a rule and a row at least


def test_every_link_between_pages_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_names_every_query():
    text = (ROOT / "README.md").read_text()
    assert [q.name for q in list_queries() if f"`{q.name}`" not in text] == []
