"""The dumps of a live run, followed: what is whole is read, once, and the end is what one ingest gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from generators import plain, prime_rl, trl, verl

import echolab
from echolab import watch as watching
from echolab.lab import Lab

IDS = "SELECT rollout_id, step, reward, origin.file FROM rollouts ORDER BY ALL"


@pytest.fixture
def lab(tmp_path) -> Iterator[Lab]:
    with echolab.open(tmp_path / "store", create=True) as lab:
        yield lab


class Watcher:
    """`echolab ingest DIR --watch --every 0.2 --json` in a process of its own."""

    def __init__(self, folder: Path, store: Path):
        code = "import sys; from pipelines.cli import main; main()"
        command = [sys.executable, "-c", code, "ingest", folder, "--run", "r", "--store", store, "--watch", "--every", "0.2"]
        self.out = (store.parent / "out").open("w+")
        self.process = subprocess.Popen(
            [str(c) for c in [*command, "--json"]], stdout=self.out, stderr=subprocess.PIPE, text=True
        )

    def files(self) -> list[dict]:
        """All files of all reports so far."""
        text, files, decoder = Path(self.out.name).read_text(), [], json.JSONDecoder()
        while text := text.strip():
            try:
                report, end = decoder.raw_decode(text)
            except ValueError:  # not yet whole
                break
            files += report["files"]
            text = text[end:]
        return files

    def until(self, there: Callable[[list[dict]], object]) -> list[dict]:
        end = time.monotonic() + 60
        while not there(files := self.files()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, files
            time.sleep(0.05)
        return files

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 130, errors
        return errors


@pytest.fixture
def watcher(tmp_path) -> Iterator[Watcher]:
    (tmp_path / "dumps").mkdir()
    watcher = Watcher(tmp_path / "dumps", tmp_path / "store")
    yield watcher
    watcher.process.kill()
    watcher.process.wait()
    watcher.out.close()


def rows_of(files: list[dict], name: str) -> int:
    return sum(f["rows"] for f in files if f["file"] == name)


def test_a_run_is_followed_step_by_step_and_ends_as_one_ingest_does(watcher, tmp_path):
    folder = tmp_path / "dumps"
    first, second = verl.v0(tmp_path / "1", step=1).read_bytes(), verl.v0(tmp_path / "2", step=2).read_bytes()
    array = json.dumps([{"prompt": f"q{i // 2}", "completion": f"a{i}", "reward": i % 2} for i in range(6)]).encode()
    parquet = trl.dump(tmp_path / "p.parquet", trl.table([("a", [0.0, 1.0]), ("b", [1.0, 1.0])], step=3)).read_bytes()

    with (folder / "1.jsonl").open("ab", buffering=0) as f:
        f.write(first[:-30])  # half a line at the end
        watcher.until(lambda files: rows_of(files, "1.jsonl") == 11)
        f.write(first[-30:-10])
        time.sleep(0.5)
        assert rows_of(watcher.files(), "1.jsonl") == 11
        f.write(first[-10:])
        watcher.until(lambda files: rows_of(files, "1.jsonl") == 12)
    for name, content in (("a.json", array), ("completions_00003.parquet", parquet)):
        with (folder / name).open("ab", buffering=0) as f:
            for part in range(4):  # a second and a half, never a second without a change
                f.write(content[part * len(content) // 4 : (part + 1) * len(content) // 4])
                time.sleep(0.4)
                assert not [x for x in watcher.files() if x["file"] == name]
    (folder / "2.jsonl").write_bytes(second)
    files = watcher.until(lambda files: sum(f["rows"] for f in files) == 12 + 12 + 6 + 4)
    assert {f["status"] for f in files} == {"ingested", "continued"}
    assert watcher.stop() == "echolab: interrupted\n"

    with echolab.open(tmp_path / "store") as lab, echolab.open(tmp_path / "once", create=True) as once:
        once.ingest(folder, run="r")
        assert lab.sql(IDS).rows() == once.sql(IDS).rows() and lab.sql(IDS).height == 34
        assert lab.snapshot.ledger.n_quarantined() == 0
        assert lab.validate() == []
        assert {f.status for f in lab.ingest(folder, run="r").files} == {"unchanged"}


def test_nothing_new_is_nothing_said_and_a_file_that_changed_otherwise_is_said_once(watcher, tmp_path):
    folder = tmp_path / "dumps"
    verl.v0(folder / "1.jsonl", step=1)
    watcher.until(lambda files: rows_of(files, "1.jsonl") == 12)
    time.sleep(0.7)
    assert len(watcher.files()) == 1
    verl.v0(folder / "1.jsonl", step=1, seed=5)
    files = watcher.until(lambda files: len(files) == 2)
    assert files[1]["status"] == "failed" and "--replace" in files[1]["notes"][0]
    time.sleep(0.7)
    assert len(watcher.files()) == 2
    verl.v0(folder / "2.jsonl", step=2)
    watcher.until(lambda files: rows_of(files, "2.jsonl") == 12)
    watcher.stop()


def test_a_folder_that_is_not_there_yet_is_waited_for(tmp_path):
    watcher = Watcher(tmp_path / "later", tmp_path / "store")
    time.sleep(0.5)
    verl.v0(tmp_path / "later" / "1.jsonl")
    watcher.until(lambda files: rows_of(files, "1.jsonl") == 12)
    watcher.stop()
    watcher.out.close()


def looks(lab: Lab, folder: Path, steps: Sequence[Callable[[], object]], monkeypatch: pytest.MonkeyPatch) -> list:
    """The reports of a watch in this process, with one thing done between two looks, and time that passes at once."""
    clock = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    left, reports = iter([*steps, lambda: None, lambda: None]), []

    class Done(Exception):
        pass

    def wait(seconds: float) -> None:
        clock[0] += seconds
        step = next(left, None)
        if step is None:
            raise Done
        step()

    config = watching.IngestConfig.make(run="r")
    with pytest.raises(Done):
        for report in watching.watch(lab.store, [folder], config, 10.0, wait):
            reports.append(report)
    return reports


def test_numbers_whose_rollouts_come_later_are_matched_when_these_are_there(lab, tmp_path, monkeypatch):
    episodes = prime_rl.episodes({"apples": [1.0, 0.0]}, step=3)
    folder = tmp_path / "run"
    reports = looks(
        lab,
        folder,
        [lambda: prime_rl.token_export(folder, episodes, step=3), lambda: prime_rl.dump(folder, episodes, step=3)],
        monkeypatch,
    )
    assert [(r.rows, r.scores, r.quarantined) for r in reports] == [(0, 0, 2), (2, 0, 0), (0, 2, 0)]
    assert lab.sql("SELECT count(*) FROM scores").item() == 2
    assert lab.snapshot.ledger.n_quarantined() == 0


def test_a_file_that_was_not_readable_is_read_when_it_is_whole(lab, tmp_path, monkeypatch):
    path = tmp_path / "run" / "completions_00001.parquet"
    content = trl.dump(tmp_path / "x.parquet").read_bytes()

    def write(data: bytes) -> Callable[[], object]:
        path.parent.mkdir(exist_ok=True)
        return lambda: path.write_bytes(data)

    wait = [lambda: None] * 3
    reports = looks(lab, path.parent, [write(content[:500]), *wait, write(content), *wait], monkeypatch)
    assert [[f.status for f in r.files] for r in reports] == [["failed"], ["ingested"]]
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 12


def test_rows_that_trl_logs_again_count_once_while_they_come(lab, tmp_path, monkeypatch):
    trainer = trl.Trainer(tmp_path / "run")
    trainer.generate("x", [("a", [0.0, 1.0, 1.0, 0.5]), ("b", [0.0, 0.0, 0.0, 0.0])])
    later = [step for n in (1, 2, 3) for step in (lambda n=n: trainer.log(n), lambda: None, lambda: None)]
    reports = looks(lab, tmp_path / "run", later, monkeypatch)
    assert [(f.rows, f.shared) for r in reports for f in r.files] == [(8, 0), (8, 8), (8, 8)]
    assert lab.query("degenerate_by_step").select("step", "n_groups").rows() == [(1, 2)]


def test_a_file_that_vanishes_between_looks_is_no_end(lab, tmp_path, monkeypatch):
    path = plain.dump(tmp_path / "run" / "a.json")
    gone = [path.unlink, lambda: plain.dump(tmp_path / "run" / "b.jsonl"), lambda: os.mkfifo(tmp_path / "run" / "pipe")]
    reports = looks(lab, tmp_path / "run", gone, monkeypatch)
    assert [[(f.file, f.rows) for f in r.files] for r in reports if r.rows] == [[("b.jsonl", 4)]]
