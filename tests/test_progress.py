"""What a long command says of itself."""

from __future__ import annotations

import io
import time

import pytest

from pipelines.options import Progress


@pytest.fixture
def at(monkeypatch):
    """`at(7.5)`: so many seconds have passed."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 1000.0 + seconds)


def test_lines_come_when_it_takes_long_and_tell_the_time_that_is_left(at, capsys):
    with Progress("scoring", enabled=True, unit="tokens") as show:
        for seconds, done in ((0, 400), (4, 450), (10, 500), (12, 520), (100, 1400)):  # it went on from 400
            at(seconds)
            show("", done, 2400)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 500 of 2,400 tokens, 0:03:10 left",
        "scoring: 1,400 of 2,400 tokens, 0:01:40 left",
    ]


def test_a_second_count_begins_anew(at, capsys):
    with Progress("scoring", enabled=True, unit="tokens") as show:
        for seconds, done, total in ((0, 0, 100), (9, 100, 100), (10, 0, 50), (20, 10, 50)):
            at(seconds)
            show("", done, total)
    assert capsys.readouterr().err.splitlines()[-1] == "scoring: 10 of 50 tokens, 0:00:40 left"


def test_a_bar_knows_the_time_that_is_left_however_long_a_step_takes(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress("scoring", enabled=True, unit="tokens")
    with progress as show:
        show("", 0, 1000)
        assert progress.bar
        task = progress.bar.tasks[0]
        now = [1000.0]
        progress.bar.get_time = task._get_time = lambda: now[0]
        for seconds, done in ((200, 250), (400, 500), (600, 750)):
            now[0] = 1000.0 + seconds
            show("(1 tokens/s)", done, 1000)
        assert task.time_remaining == 200
        assert not task.finished
        show("", 1000, 1000)
        assert task.finished
