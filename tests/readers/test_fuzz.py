"""Every reader on what is left of its dumps after an accident: rows and quarantined rows, or one clear error, never more.

`ECHOLAB_FUZZ=5000 pytest tests/readers/test_fuzz.py` looks for longer and elsewhere."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import echolab
from echolab.errors import EcholabError
from echolab.ingest import _NO_ROW
from echolab.readers import COMPANIONS, READERS, Bad, Reader, Row, ScoresOf, Source, aside, choose, look
from echolab.readers.base import is_compressed
from echolab.recorded import Scorer, score_row
from echolab.recorded import to_table as score_table
from echolab.rows import Identify, Overrides, to_table, with_ids

EXAMPLES = int(os.environ.get("ECHOLAB_FUZZ", "0"))
GENERATORS = sorted(p.stem for p in (Path(__file__).parents[1] / "generators").glob("*.py"))
by_reader = pytest.mark.parametrize("reader", READERS, ids=lambda r: r.NAME)


def examples(n: int) -> settings:
    return settings(
        max_examples=EXAMPLES or n,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        phases=[Phase.generate, Phase.shrink],
    )


class Dumps(dict):
    """Of each reader the files that are its own, below the folders of the dumps they belong to."""

    def __repr__(self) -> str:
        return "dumps"


@pytest.fixture(scope="session")
def dumps_of(tmp_path_factory) -> Dumps:
    found = Dumps()
    for name in GENERATORS:
        module = importlib.import_module(f"generators.{name}")
        if not hasattr(module, "fixture"):
            continue
        folder = tmp_path_factory.mktemp(name)
        module.fixture(folder)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            chosen = None if aside(path) else choose(path)
            if chosen:
                found.setdefault(chosen[0].NAME, []).append((folder, path.relative_to(folder)))
    return found


@by_reader
def test_every_reader_has_dumps_that_it_reads(reader, dumps_of):
    for folder, below in dumps_of[reader.NAME]:
        rows, bad = read_all(reader, folder / below)
        assert rows and not bad, below


# What may happen to a file

TOKENS = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"null", b"NaN", b"Infinity", b"-1e999", b"true", b'"\\ud800"',
    b"\xff", b"\x00", b"\xef\xbb\xbf", b"9" * 30, b"[" * 2000, b'{"a":' * 50, b"1e400", b"\xf0\x9f\x98\x80", b"PAR1",
]  # fmt: skip
PLACE = st.integers(0, 1 << 20)
HARM = st.tuples(st.sampled_from(["flip", "cut", "twice", "splice", "insert", "end"]), PLACE, PLACE, st.sampled_from(TOKENS))


def harmed(content: bytes, harms: list[tuple[str, int, int, bytes]]) -> bytes:
    for how, a, b, token in harms:
        at, length = a % (len(content) + 1), b % 64
        part = content[at : at + length]
        if how == "flip":
            content = content[:at] + bytes(c ^ (1 << b % 8) for c in content[at : at + 1]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at] + content[at + length :]
        elif how == "twice":
            content = content[:at] + part + content[at:]
        elif how == "splice":
            to = b % (len(content) + 1)
            content = content[:to] + part + content[to:]
        elif how == "insert":
            content = content[:at] + token + content[at:]
        else:
            content = content[:at]
    return content


SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**30, -1, 0, "", "\x00", "True", "nan", "1e999", "0_1_2", "a" * 300, "../../x"])
)  # fmt: skip
VALUE = st.recursive(
    SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=5
)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The paths of all that stands in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for k, v in inner for p in places(v, (*at, k)))]


def changed(document: Any, data: st.DataObject) -> Any:
    """The document with a value replaced, left out, or under another name."""
    at = data.draw(st.sampled_from(places(document)))
    how = data.draw(st.sampled_from(["replace", "replace", "replace", "leave out", "rename"]))
    if not at:
        return data.draw(VALUE)
    parent = document
    for step in at[:-1]:
        parent = parent[step]
    if how == "replace":
        parent[at[-1]] = data.draw(VALUE)
    else:
        old = parent.pop(at[-1])
        if how == "rename" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=4) | st.sampled_from([str(k) for k in parent] or ["x"]))] = old
    return document


def rewritten(content: bytes, data: st.DataObject) -> bytes:
    """A file with other values in it, still of its container."""
    if content[:4] == b"PAR1":
        return rewritten_table(content, data)
    if content[:2] == b"PK":
        torch, out = pytest.importorskip("torch"), io.BytesIO()
        torch.save(changed(torch.load(io.BytesIO(content), weights_only=True), data), out)
        return out.getvalue()
    whole = content.lstrip()[:1] == b"[" or b"\n" not in content.strip() or content.lstrip()[:2] == b"{\n"
    parts = [content] if whole else content.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(parts) - 1))
        parts[i] = json.dumps(changed(json.loads(parts[i]), data)).encode()
    return b"\n".join(parts) + b"\n"


COLUMNS = [
    pa.array(["x"]), pa.array([None], pa.null()), pa.array([float("inf")]), pa.array([float("nan")]), pa.array([-1]),
    pa.array([True]), pa.array([[1, 2]]), pa.array([{"a": "b"}]), pa.array([b"\xff"]), pa.array(["x"]).dictionary_encode(),
    pa.array([b"\xff"], pa.binary()).view(pa.string()), pa.array([2**63 - 1]), pa.array([None], pa.string()),
    pa.array([253402300800 * 10**6], pa.timestamp("us")), pa.array([["a", None]]), pa.array([], pa.int64()).cast(pa.float32()),
]  # fmt: skip


def rewritten_table(content: bytes, data: st.DataObject) -> bytes:
    table = pq.read_table(io.BytesIO(content))
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, table.num_columns - 1))
        new = data.draw(st.sampled_from(COLUMNS))
        values = new.take(pa.array([0] * table.num_rows)) if len(new) else pa.nulls(table.num_rows, new.type)
        cells = [j if data.draw(st.booleans()) else None for j in range(table.num_rows)]
        table = table.set_column(i, table.column_names[i], values.take(pa.array(cells, pa.int64())))
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


# What must hold then


def read_all(reader: Reader, path: Path) -> tuple[int, list[Bad]]:
    """All that a file gives, through all that ingest does with it but for the store; how many rows fit."""
    source = Source(path, path.name, str(path))
    identify = Identify("0" * 32, source.rel, Overrides("r"), None)
    items = list(reader.read(source))
    bad = [i for i in items if isinstance(i, Bad)]
    rows: list[Row] = []
    for row in (i for i in items if isinstance(i, Row)):
        try:
            identify.prepare(row)
            rows.append(row)
        except _NO_ROW as e:
            bad.append(Bad(row.row, str(e), row.raw))
    unfit: dict[int, str] = {}
    table = to_table([r.fields for r in rows], unfit.__setitem__)
    made = []
    for i, row in enumerate(rows):
        try:
            made += [] if i in unfit else [identify(row)]
            if row.scores and i not in unfit:
                score_table([score_row(Scorer("r", None, None, None).id, str(made[-1]["rollout_id"]), row.fields, row.scores)])
        except _NO_ROW as e:
            made.append(None)
            unfit[i] = str(e)
    with_ids(table, made)
    bad += [Bad(rows[i].row, reason, b"") for i, reason in unfit.items()]
    assert all(reason.reason and "\n" not in reason.reason for reason in bad)
    stored = len(rows) - len(unfit) + sum(isinstance(i, ScoresOf) for i in items)
    assert stored + len(bad) == len(items)
    if reader.CONTINUES and not is_compressed(path):
        accounted = {i.row for i in items}
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        lines = sum(1 for line in content.split(b"\n") if line.strip(b" \t\r\v\f"))
        assert accounted == set(range(lines)) or source.notes or source.found, "a line that nobody speaks of"
    return stored, bad


def survives(reader: Reader, path: Path) -> None:
    """Known or not, put aside or read: no exception but the clear ones."""
    try:
        head = look(path)
        assert all(isinstance(other.sniff(head), str | None) for other in READERS)
    except EcholabError as e:
        assert str(e)
    aside(path)
    for companions in COMPANIONS.values():
        companions(path)
    try:
        read_all(reader, path)
    except (EcholabError, OSError) as e:
        assert str(e)


def fuzzed(reader: Reader, dumps: list[tuple[Path, Path]], scratch: Path, data: st.DataObject, structured: bool) -> Path:
    """A copy of one of the reader's dumps in which one file, or one that is read along with it, is harmed."""
    folder, below = data.draw(st.sampled_from(dumps))
    copy = scratch / reader.NAME
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    beside = sorted(p for f in COMPANIONS.values() for p in f(copy / below))
    target = data.draw(st.sampled_from([copy / below] * 3 + beside))
    content = target.read_bytes()
    if structured and content.lstrip()[:1] in (b"{", b"[", b"P"):
        target.write_bytes(rewritten(content, data))
    else:
        target.write_bytes(harmed(content, data.draw(st.lists(HARM, min_size=1, max_size=4))))
    return copy / below


@by_reader
@examples(40)
@given(data=st.data())
def test_harmed_bytes_are_rows_quarantined_rows_or_one_clear_error(reader, dumps_of, scratch, data):
    survives(reader, fuzzed(reader, dumps_of[reader.NAME], scratch, data, structured=False))


@by_reader
@examples(60)
@given(data=st.data())
def test_other_values_anywhere_are_rows_quarantined_rows_or_one_clear_error(reader, dumps_of, scratch, data):
    survives(reader, fuzzed(reader, dumps_of[reader.NAME], scratch, data, structured=True))


@by_reader
@examples(3)
@given(data=st.data(), structured=st.booleans())
def test_a_store_takes_what_is_left_and_accounts_for_it(reader, dumps_of, scratch, data, structured):
    path = fuzzed(reader, dumps_of[reader.NAME], scratch, data, structured)
    shutil.rmtree(scratch / "store", ignore_errors=True)
    with echolab.open(scratch / "store", create=True) as lab:
        try:
            report = lab.ingest(path, run="r", format=reader.NAME)
        except EcholabError as e:
            assert "\n" not in str(e)
            return
        kept = [json.loads(line) for f in report.quarantine for line in Path(f).read_bytes().splitlines()]
        assert len(kept) == report.quarantined
        assert lab.sql("SELECT count(*) FROM rollouts").item() == report.rows
        assert lab.sql("SELECT sum(n_rows), sum(n_quarantined) FROM ingests").rows() == [(report.rows, report.quarantined)]
        assert lab.validate() == []


def test_fuzzing_by_coverage_runs_where_atheris_is_installed(tmp_path):
    """The script of benchmarks/fuzz.py, for a moment."""
    pytest.importorskip("atheris")
    script = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
    result = subprocess.run([sys.executable, script, "verl", "-runs=200"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
