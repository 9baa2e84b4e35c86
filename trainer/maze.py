"""The built-in task: slide mazes. Tiny, verifiable, with levels of difficulty and many right answers.

A maze is a grid of 6 x 6 cells with 10 walls. Its prompt is 14 tokens, the walls, `|`, start, goal and a newline:

    a2a5b1c4d2d3e6f1f2f4|a1d4

An answer is a path, one cell a line. A line may slide over any number of free cells in a straight line. It is right if each
line is a legal move and the last one is the goal. The level of a maze is the number of single steps from start to goal."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

SIZE, WALLS, MOST_MOVES = 6, 10, 14
MAX_TOKENS = 2 * MOST_MOVES + 1  # a cell and a newline each, and the end
CELLS = tuple(f"{column}{row}" for column in "abcdef" for row in range(1, SIZE + 1))
EOS, PAD = "<end>", "<pad>"
WEIGHTS = Path(__file__).parent / "weights"  # of a policy: `python -m trainer.pretrain --out trainer/weights --half`
EASY, HARD = (3, 6), (8, 10)  # levels of RL, and of what it never sees
STRAY, SLIDE, LONGEST_SLIDE = 0.3, 0.35, 3  # of the solver: it wanders, so that there is something to learn

_PROMPT = re.compile(rf"((?:[a-f][1-6]){{{WALLS}}})\|([a-f][1-6])([a-f][1-6])\n")
_NUMBER = {cell: i for i, cell in enumerate(CELLS)}
_DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def _step(cell: int, direction: tuple[int, int]) -> int | None:
    column, row = cell // SIZE + direction[0], cell % SIZE + direction[1]
    return column * SIZE + row if 0 <= column < SIZE and 0 <= row < SIZE else None


_NEIGHBOURS = [[n for d in _DIRECTIONS if (n := _step(cell, d)) is not None] for cell in range(SIZE**2)]


@dataclass(frozen=True)
class Maze:
    """Cells are numbers; `CELLS[i]` is the name of one."""

    walls: frozenset[int]
    start: int
    goal: int

    @classmethod
    def read(cls, prompt: str) -> Maze:
        match = _PROMPT.search(prompt)
        if match is None:
            raise ValueError(f"not a maze: {prompt[:60]!r}")
        walls, start, goal = match.groups()
        return cls(frozenset(_NUMBER[w] for w in re.findall("..", walls)), _NUMBER[start], _NUMBER[goal])

    @property
    def prompt(self) -> str:
        return f"{''.join(CELLS[w] for w in sorted(self.walls))}|{CELLS[self.start]}{CELLS[self.goal]}\n"

    @cached_property
    def distances(self) -> dict[int, int]:
        """Single steps to the goal, of each cell from which it can be reached."""
        return _distances(self.walls, self.goal)

    def slides(self, cell: int) -> Iterator[int]:
        """Where one line may lead to."""
        for direction in _DIRECTIONS:
            at = _step(cell, direction)
            while at is not None and at not in self.walls:
                yield at
                at = _step(at, direction)


def _distances(walls: frozenset[int], goal: int) -> dict[int, int]:
    found, edge = {goal: 0}, [goal]
    while edge:
        cell = edge.pop(0)
        for n in _NEIGHBOURS[cell]:
            if n not in walls and n not in found:
                found[n] = found[cell] + 1
                edge.append(n)
    return found


def make(level: int, rng: random.Random) -> Maze:
    """A random maze of a level, 1 to 10 (beyond it they become rare)."""
    while True:
        chosen = rng.sample(range(SIZE**2), WALLS + 1)
        walls, goal = frozenset(chosen[:WALLS]), chosen[WALLS]
        starts = [cell for cell, d in _distances(walls, goal).items() if d == level]
        if starts:
            return Maze(walls, rng.choice(starts), goal)


def solve(maze: Maze, rng: random.Random) -> str:
    """A right answer by a solver that wanders: an expert trace, another one each time."""
    while True:
        path = _wander(maze, rng)
        if path is not None:
            return "".join(f"{CELLS[cell]}\n" for cell in _merged(path, rng))


def _wander(maze: Maze, rng: random.Random) -> list[int] | None:
    path = [maze.start]
    while path[-1] != maze.goal:
        free = [n for n in _NEIGHBOURS[path[-1]] if n not in maze.walls and n not in path]
        nearer = [n for n in free if maze.distances[n] < maze.distances[path[-1]]]
        options = nearer if nearer and rng.random() >= STRAY else free
        if not options or len(path) > MOST_MOVES:
            return None
        path.append(rng.choice(options))
    return path


def _merged(path: list[int], rng: random.Random) -> list[int]:
    """The path without its start; some steps in one direction become one slide."""
    lines, length = [path[1]], 1
    for before, cell in zip(path[1:], path[2:], strict=False):
        last = lines[-2] if len(lines) > 1 else path[0]
        straight = (before - last) == length * (cell - before)
        if straight and length < LONGEST_SLIDE and rng.random() < SLIDE:
            lines[-1], length = cell, length + 1
        else:
            lines.append(cell)
            length = 1
    return lines


def verify(completion: str, ground_truth: str, prompt: str) -> bool:
    """`echolab verify --verifier python:trainer.maze:verify`. The gold is the goal, which stands in the prompt too."""
    maze = Maze.read(prompt)
    lines = completion.split("\n")
    if lines.pop() or not lines:  # every line is ended
        return False
    at = maze.start
    for line in lines:
        cell = _NUMBER.get(line)
        if cell is None or cell not in maze.slides(at):
            return False
        at = cell
    return at == maze.goal and CELLS[at] == ground_truth


def problems(n: int, levels: tuple[int, int], seed: int | str) -> list[dict[str, Any]]:
    """`n` different mazes, as rows of a prompts file."""
    rng = random.Random(f"mazes {seed}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < n:
        level = rng.randint(*levels)
        maze = make(level, rng)
        found.setdefault(
            maze.prompt, {"prompt": maze.prompt, "ground_truth": CELLS[maze.goal], "level": level, "source": "slide maze"}
        )
    return list(found.values())


def traces(rows: list[dict[str, Any]], seed: int | str) -> list[dict[str, Any]]:
    """An expert's answer to each problem, as rows of a dump."""
    rng = random.Random(f"traces {seed}")
    return [{**row, "completion": solve(Maze.read(row["prompt"]), rng), "reward": 1.0} for row in rows]


def tokenizer() -> Any:
    """One token for each cell, `|`, the newline, the end and padding: 40 in all."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*CELLS, "|", "\n", EOS, PAD))}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-f][1-6]|\||\n"), "isolated")
    bare.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=EOS, pad_token=PAD)
