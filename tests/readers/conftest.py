"""One way to read a file in a test, and the dumps of the formats that are as old as the project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from generators import plain, qwen_math, reasoning_gym, trl, verl

from echolab.readers.base import Bad, ReadOptions, Row, Source

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip("../shared/data not found: real-data test skipped")
    return DATA


@dataclass
class Result:
    rows: list[Row]
    bad: list[Bad]
    source: Source

    @property
    def said(self) -> list[tuple]:
        """All that a reading brought, comparable."""
        return [(r.row, r.key, r.fields) for r in self.rows] + [(b.row, b.reason, b.raw) for b in self.bad]


def read_file(
    reader: ModuleType,
    path: Path,
    typed: str = "",
    start: int = 0,
    start_row: int = 0,
    found: dict | None = None,
    **options: Any,
) -> Result:
    typed, options_of = typed or path.name, ReadOptions(**options)
    source = Source(path, path.name, typed, options_of, start=start, start_row=start_row, found=found or {})
    items = list(reader.read(source))
    return Result([i for i in items if isinstance(i, Row)], [i for i in items if isinstance(i, Bad)], source)


@pytest.fixture(scope="session")
def read() -> Callable[..., Result]:
    return read_file


def _read_in_two(reader: ModuleType, path: Path, cut: int, typed: str = "") -> None:
    whole, content = read_file(reader, path, typed), path.read_bytes()
    path.write_bytes(content[:cut])
    first = read_file(reader, path, typed)
    path.write_bytes(content)
    done = first.source
    rest = read_file(reader, path, typed, done.consumed, done.rows, done.found)
    rows = [[repr((r.row, r.key, r.fields)) for r in part] for part in (first.rows, rest.rows, whole.rows)]  # NaN != NaN
    bad = [
        [(b.row, b.reason, b.raw.strip()) for b in part.bad if not (b.tail and part is first)] for part in (first, rest, whole)
    ]
    assert rows[0] + rows[1] == rows[2]
    assert bad[0] + bad[1] == bad[2]
    assert (rest.source.consumed, rest.source.rows) == (whole.source.consumed, whole.source.rows)


@pytest.fixture(scope="session")
def read_in_two() -> Callable[..., None]:
    """`read_in_two(reader, path, cut)`: a file cut at a byte, read, completed and read on gives what it gives at once."""
    return _read_in_two


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for property tests, which write the same file again and again."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="session")
def dumps() -> SimpleNamespace:
    return SimpleNamespace(
        lines=plain.lines, plain=plain.dump, verl_v0=verl.v0, verl_v1=verl.v1, trl=trl.dump, trl_table=trl.table,
        standardised=trl.standardised, reasoning_gym=reasoning_gym.dump, gym_document=reasoning_gym.document,
        qwen_math=qwen_math.dump,
    )  # fmt: skip
