"""One folder with a dump of every format: each is known by its own reader, and all go in with no option but --run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import echolab
from echolab.readers import ONLY_SCORES, READERS, aside, choose, look

FORMATS = [r.NAME for r in READERS]
GENERATORS = sorted(
    p.stem for p in (Path(__file__).parents[1] / "generators").glob("*.py") if "def fixture(" in p.read_text("utf-8")
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[Path, dict[Path, str]]:
    """The folder, and of every file with rollouts the generator that wrote it."""
    pytest.importorskip("torch", reason="slime's dumps are torch files")
    folder = tmp_path_factory.mktemp("everything")
    files = {f: name for name in GENERATORS for f in importlib.import_module(f"generators.{name}").fixture(folder / name)}
    return folder, files


def readers_of(generator: str) -> set[str]:
    return {"own": {"echolab"}, "prime_rl": {"prime_rl", "prime_rl_tokens"}}.get(generator, {generator})


def test_every_format_has_a_generator():
    assert {name for g in GENERATORS for name in readers_of(g)} == set(FORMATS)


def test_no_reader_claims_the_dump_of_another_before_its_own(everything):
    _, files = everything
    for file, generator in files.items():
        chosen = choose(file)
        assert chosen, file
        assert chosen[0].NAME in readers_of(generator), file
        head = look(file)
        claims = {r.NAME for r in READERS if r.sniff(head)}
        assert claims - readers_of(generator) <= {"plain"}, file  # which takes what nobody else does


def test_a_folder_with_one_dump_of_each_format_goes_in_with_no_option_but_run(everything, tmp_path):
    folder, files = everything
    with echolab.open(tmp_path / "store", create=True) as lab:
        report = lab.ingest(folder, run="r")
        found = {f.file: f for f in report.files}
        for file, generator in files.items():
            said = found[file.relative_to(folder).as_posix()]
            assert (said.status, said.quarantined) == ("ingested", 0), said
            assert said.format in readers_of(generator)
            assert said.known_by
            assert said.rows + said.scores, said
        assert {f.format for f in report.files if f.status == "ingested"} == set(FORMATS)
        assert {f.status for f in report.files} <= {"ingested", "skipped"}
        assert lab.validate() == []
        assert report.rows == lab.sql("SELECT count(*) FROM base.stored").item()
        assert [f.status for f in lab.ingest(folder, run="r").files if f.status not in ("unchanged", "skipped")] == []


def test_what_is_put_aside_is_said_and_holds_no_rollouts_of_its_own(everything):
    folder, files = everything
    reasons = {f: aside(f) for f in folder.rglob("*") if f.is_file()}
    assert not [f for f in files if reasons[f]]
    assert all("\n" not in reason for reason in reasons.values() if reason)


def test_rows_of_every_format_are_all_stored_or_in_quarantine(everything, tmp_path):
    """Each line of a line format is spoilt in turn: the others are stored, and it is in quarantine with its bytes."""
    _, files = everything
    for file, generator in files.items():
        reader = choose(file)
        assert reader
        if file.suffix != ".jsonl" or reader[0].NAME in ONLY_SCORES:
            continue
        lines = file.read_bytes().splitlines(keepends=True)
        broken = tmp_path / generator / file.name
        broken.parent.mkdir(exist_ok=True)
        broken.write_bytes(b"".join([lines[0], b'{"half": \n', *lines[1:]]))
        with echolab.open(tmp_path / f"store-{generator}-{file.stem}", create=True) as lab:
            whole = lab.ingest(file, run="whole").rows
            report = lab.ingest(broken, run="r", format=reader[0].NAME)
            assert (report.rows, report.quarantined) == (whole, 1), file
            [kept] = [json.loads(line) for q in report.quarantine for line in Path(q).read_text().splitlines()]
            assert kept["raw"] == '{"half": \n'
