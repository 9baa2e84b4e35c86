"""The built-in task: mazes have their level, the solver is right, and the verifier is that of a written-out rule."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import echolab
from trainer import maze as m


def at(name: str) -> tuple[int, int]:
    return "abcdef".index(name[0]), int(name[1]) - 1


def is_legal(walls: set[str], a: str, b: str) -> bool:
    """In one line, and nothing in between, by geometry on names."""
    (x, y), (u, v) = at(a), at(b)
    if a == b or (x != u and y != v) or b in walls:
        return False
    columns, rows = range(min(x, u), max(x, u) + 1), range(min(y, v), max(y, v) + 1)
    return not any(f"{'abcdef'[i]}{j + 1}" in walls for i, j in itertools.product(columns, rows))


def steps_between(walls: set[str], a: str, b: str) -> int | None:
    """By flooding, with names."""
    seen, n = {a}, 0
    while b not in seen:
        more = {c for c in m.CELLS for s in seen if sum(abs(p - q) for p, q in zip(at(c), at(s), strict=True)) == 1}
        more = (more | seen) - walls
        if more == seen:
            return None
        seen, n = more, n + 1
    return n


def parts(prompt: str) -> tuple[set[str], str, str]:
    walls, ends = prompt.strip().split("|")
    return {walls[i : i + 2] for i in range(0, len(walls), 2)}, ends[:2], ends[2:]


@pytest.mark.parametrize("level", range(1, 11))
def test_a_maze_is_of_the_level_that_was_asked_for(level):
    rng = random.Random(level)
    for _ in range(5):
        walls, start, goal = parts(m.make(level, rng).prompt)
        assert len(walls) == m.WALLS and steps_between(walls, start, goal) == level


@given(st.integers(0, 10**6), st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_the_solver_is_always_right_and_within_the_length(seed, level):
    rng = random.Random(seed)
    maze = m.make(level, rng)
    answer = m.solve(maze, rng)
    walls, start, goal = parts(maze.prompt)
    path = [start, *answer.split()]
    assert path[-1] == goal and all(is_legal(walls, a, b) for a, b in itertools.pairwise(path))
    assert 2 * answer.count("\n") + 1 <= m.MAX_TOKENS
    assert m.verify(answer, goal, maze.prompt) and m.Maze.read(maze.prompt) == maze


@given(st.integers(0, 10**6), st.lists(st.sampled_from(m.CELLS), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_the_verifier_is_the_rule_written_out(seed, cells):
    maze = m.make(random.Random(seed).randint(1, 3), random.Random(seed))
    walls, start, goal = parts(maze.prompt)
    path = [start, *cells]
    right = path[-1] == goal and all(is_legal(walls, a, b) for a, b in itertools.pairwise(path))
    assert m.verify("".join(f"{c}\n" for c in cells), goal, maze.prompt) is right


@pytest.mark.parametrize("answer", ["", "\n", "a2", "a2\n\n", "a2\nzz\n", " a2\n", "a2 \n", "a2\na2\n", "b2\n"])
def test_anything_but_legal_ended_lines_is_wrong(answer):
    prompt = "c1c2c3c4c5d1d2d3d4d5|a1a2\n"
    assert m.verify("a2\n", "a2", prompt)
    assert not m.verify(answer, "a2", prompt)


def test_the_solver_wanders_and_problems_differ():
    rows = m.problems(200, m.EASY, seed=1)
    assert len({r["prompt"] for r in rows}) == 200 and {r["level"] for r in rows} == {3, 4, 5, 6}
    assert rows == m.problems(200, m.EASY, seed=1) != m.problems(200, m.EASY, seed=2)
    maze, rng = m.Maze.read(rows[0]["prompt"]), random.Random(0)
    assert len({m.solve(maze, rng) for _ in range(20)}) > 5


def test_text_and_tokens_are_the_same_thing():
    pytest.importorskip("transformers")
    tokenizer = m.tokenizer()
    [row] = m.traces(m.problems(1, m.HARD, seed=3), seed=3)
    ids = tokenizer(row["prompt"])["input_ids"]
    assert len(ids) == 14 and len(tokenizer) == 40
    whole = row["prompt"] + row["completion"]
    assert tokenizer.decode(tokenizer(whole)["input_ids"]) == whole


def test_the_store_verifies_traces_by_the_same_rule(tmp_path):
    rows = m.traces(m.problems(6, m.EASY, seed=4), seed=4)
    rows[2]["completion"] = rows[2]["completion"][:-3]
    dump = tmp_path / "traces.jsonl"
    import orjson

    dump.write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in rows))
    with echolab.open(tmp_path / "store", create=True) as lab:
        lab.ingest(dump, run="expert", role="expert")
        report = lab.verify("python:trainer.maze:verify")
        assert (report.right, report.wrong) == (5, 1)
