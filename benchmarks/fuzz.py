"""Harm done to dumps as coverage of the readers leads: `python benchmarks/fuzz.py verl -max_total_time=300`, run by hand.

Needs atheris (pip install atheris) and the options of libFuzzer. The seeds are the files of tests/generators; what must hold is
what tests/readers/test_fuzz.py says: rows and quarantined rows, or one clear error."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"


def main(name: str, arguments: list[str]) -> None:
    """Fuzz one reader. Each input takes the place of the reader's first file, amid its dump."""
    atheris: Any = importlib.import_module("atheris")
    sys.path[:0] = [str(TESTS), str(TESTS / "readers")]
    with atheris.instrument_imports(include=["echolab.readers", "echolab.rows"]):
        readers: Any = importlib.import_module("echolab.readers")
    checks: Any = importlib.import_module("test_fuzz")
    reader = next(r for r in readers.READERS if name == r.NAME)

    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    for generator in checks.GENERATORS:
        module = importlib.import_module(f"generators.{generator}")
        try:
            getattr(module, "fixture", Path)(folder / "dumps" / generator)
        except ImportError as e:
            print(f"{generator}: left out, {e}")
    files = [p for p in sorted((folder / "dumps").rglob("*")) if p.is_file() and not readers.aside(p)]
    own = [p for p in files if (chosen := readers.choose(p)) and chosen[0] is reader]
    (folder / "seeds").mkdir()
    for i, path in enumerate(own):
        (folder / "seeds" / str(i)).write_bytes(path.read_bytes())

    def one(data: bytes) -> None:
        own[0].write_bytes(data)
        checks.survives(reader, own[0])

    atheris.Setup([sys.argv[0], *arguments, str(folder / "seeds")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("give the name of a format, e.g. verl")
    main(sys.argv[1], sys.argv[2:])
