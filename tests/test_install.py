"""An installed wheel works without the checkout; a checkout sets itself up with one command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def test_an_installed_wheel_answers_named_queries_from_anywhere(tmp_path):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--quiet", "--no-deps", "-w", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    site = {"PYTHONPATH": str(tmp_path / "site")}
    where = run(sys.executable, "-c", "import echolab; print(echolab.__file__)", cwd=tmp_path, **site)
    assert where.startswith(str(tmp_path / "site"))
    command = (sys.executable, "-c", "from pipelines.cli import main; main()")
    run(*command, "demo", "--simulated", cwd=tmp_path, **site)
    asked = ("query", "degenerate_by_step", "--store", "echolab-simulated/store", "--format", "csv")
    answer = run(*command, *asked, cwd=tmp_path, **site)
    assert len(answer.splitlines()) == 61


def test_a_fresh_clone_makes_its_demo_and_installs_nothing_the_second_time(tmp_path):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    run("git", "clone", "--quiet", ROOT, tmp_path / "clone", cwd=tmp_path)
    first = run("make", "demo", "DEMO=--fast", cwd=tmp_path / "clone")
    assert "DEGENERACY APPEARS" in first and "All of it as a page" in first
    second = run("make", "demo", "DEMO=--fast", cwd=tmp_path / "clone")
    assert "pip" not in second and "The page: " in second and "DEGENERACY" not in second
