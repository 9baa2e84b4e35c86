"""Whatever lies in a folder: one clear line each, nothing lost, nothing executed, and a store that stays sound."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generators import plain, qwen_math, reasoning_gym, trl, verl

import echolab
from echolab import EcholabError, ingest
from echolab.lab import Lab
from echolab.readers import base
from echolab.readers import verl as verl_reader

ROWS = 24


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as f:
        f.write(data)
    return out.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".zst": zstd}
both = pytest.mark.parametrize("suffix", PACK)


@pytest.fixture
def lab(tmp_path) -> Iterator[Lab]:
    with echolab.open(tmp_path / "store", create=True) as lab:
        yield lab


@pytest.fixture
def dump(tmp_path) -> bytes:
    """A verl dump of 24 rows."""
    return verl.v0(tmp_path / "made" / "7.jsonl", prompts=6).read_bytes()


def accounted(lab: Lab, path: Path, rows: int, bad: int = 0, says: str = "", **options) -> str:
    """Ingest: so many rows are stored and so many in quarantine, by report, ledger, view and quarantine files."""
    report = lab.ingest(path, run="r", **options)
    assert (report.rows, report.quarantined) == (rows, bad), report.files
    assert lab.sql("SELECT count(*) FROM rollouts").item() == rows
    kept = [json.loads(line) for file in report.quarantine for line in Path(file).read_bytes().splitlines()]
    assert len(kept) == bad
    notes = " | ".join(note for f in report.files for note in f.notes)
    assert says in notes and "\n" not in notes and "Traceback" not in notes
    assert lab.validate() == []
    return notes


def refused(lab: Lab, path: Path, says: str, **options) -> None:
    with pytest.raises(EcholabError) as e:
        lab.ingest(path, run="r", **options)
    assert says in str(e.value) and "\n" not in str(e.value)
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 0
    assert lab.validate() == []


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    code = "import sys; from pipelines.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# Compressed files


@both
def test_a_compressed_dump_is_read_as_what_is_in_it(lab, tmp_path, dump, suffix):
    accounted(lab, put(tmp_path / f"7.jsonl{suffix}", PACK[suffix](b"\xef\xbb\xbf" + dump)), ROWS)


@both
@pytest.mark.parametrize("end", [b"", b"\0" * 100, b"trash"])
def test_concatenated_compressed_files_are_one_file_and_what_follows_them_is_said(lab, tmp_path, dump, suffix, end):
    pack = PACK[suffix]
    path = put(tmp_path / f"7.jsonl{suffix}", pack(dump[:101]) + pack(dump[101:]) + end)
    accounted(lab, path, ROWS, bool(end), "are damaged" if end else "")


@both
def test_a_cut_compressed_dump_gives_all_that_can_be_unpacked(lab, tmp_path, suffix):
    whole = verl.v0(tmp_path / "big.jsonl", prompts=6000).read_bytes()
    packed = PACK[suffix](whole)
    path = put(tmp_path / f"7.jsonl{suffix}", packed[: len(packed) // 2])
    with base.open_bytes(path) as f:
        there = f.read()
    assert whole.startswith(there) and len(there) > len(whole) / 3
    accounted(lab, path, there.count(b"\n"), 1, "data end early or are damaged")


def test_a_cut_gzip_dump_loses_no_byte_that_zlib_can_give(tmp_path, dump):
    import zlib

    packed = gzip.compress(dump)
    for cut in range(20, len(packed), 7):
        with base.open_bytes(put(tmp_path / "x.gz", packed[:cut])) as f:
            assert f.read() == zlib.decompressobj(31).decompress(packed[:cut])


def test_a_gzip_dump_whose_check_sum_is_wrong_keeps_its_rows_and_says_so(lab, tmp_path, dump):
    packed = bytearray(gzip.compress(dump))
    packed[-6] ^= 255
    accounted(lab, put(tmp_path / "7.jsonl.gz", bytes(packed)), ROWS, 1, "incorrect data check")


@both
@pytest.mark.parametrize("keep", [4, 40])
def test_a_compressed_file_of_which_nothing_can_be_unpacked_fails(lab, tmp_path, dump, suffix, keep):
    refused(lab, put(tmp_path / f"7.jsonl{suffix}", PACK[suffix](dump)[:keep]), "end early or are damaged")


@both
def test_a_compressed_document_that_is_cut_keeps_its_complete_elements(lab, tmp_path, suffix):
    rows = [{"prompt": f"Q{i // 4}", "completion": f"A{i}" + os.urandom(2000).hex(), "reward": i % 2} for i in range(400)]
    packed = PACK[suffix](json.dumps(rows).encode())
    report = lab.ingest(put(tmp_path / f"a.json{suffix}", packed[: len(packed) * 2 // 3]), run="r")
    assert 200 < report.rows < 300 and report.quarantined == 1
    assert "the file ends in the middle of [" in report.files[0].notes[-1]


def test_a_compressed_results_document_that_is_cut_keeps_its_complete_elements(lab, tmp_path):
    packed = gzip.compress(reasoning_gym.dump(tmp_path / "whole" / "results.json", results=40).read_bytes())
    report = lab.ingest(put(tmp_path / "results.json.gz", packed[:-50]), run="r")
    assert report.rows > 180 and report.rows % 3 == 0 and report.quarantined == 1


def test_parquet_in_a_compressed_file_is_told_to_be_unpacked(lab, tmp_path):
    packed = gzip.compress(trl.dump(tmp_path / "x" / "c.parquet").read_bytes())
    refused(lab, put(tmp_path / "c.parquet.gz", packed), "unpack it first")


# Text


def test_a_truncated_document_and_a_truncated_line(lab, tmp_path, dump):
    document = reasoning_gym.dump(tmp_path / "x.json").read_bytes()
    report = lab.ingest(put(tmp_path / "results.json", document[:-300]), run="gym")
    assert report.rows == 9 and report.quarantined == 1 and "ends in the middle of" in report.files[0].notes[0]
    accounted_rows = lab.ingest(put(tmp_path / "7.jsonl", dump[:-9]), run="lines")
    assert (accounted_rows.rows, accounted_rows.quarantined) == (ROWS - 1, 1)


def test_a_byte_order_mark_is_no_part_of_the_first_row(lab, tmp_path, dump):
    accounted(lab, put(tmp_path / "7.jsonl", b"\xef\xbb\xbf" + dump.replace(b"\n", b"\r\n")), ROWS)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_utf_16_is_named(lab, tmp_path, dump, encoding):
    refused(lab, put(tmp_path / "7.jsonl", dump.decode().encode(encoding)), "convert it to UTF-8")


def test_utf_16_that_is_insisted_on_is_in_quarantine(lab, tmp_path, dump):
    path = put(tmp_path / "7.jsonl", dump.decode().encode("utf-16"))
    accounted(lab, path, 0, ROWS + 1, "invalid UTF-8", format="verl")


HOSTILE_VALUES = [
    "NaN", "Infinity", "-Infinity", "1e999", '"inf"', "1e400000", "9" * 400, "-" + "9" * 5000, "null", "[]", "{}", "[1, [2]]",
    "true", '"\\ud800"', '"\\u0000"', '"\\udc00\\ud800"', "[" * 900 + "]" * 900, "[" * 100_000 + "]" * 100_000, '{"a": ' * 5000,
    "\x00", "'", "undefined",
]  # fmt: skip


@pytest.mark.parametrize("field", ["input", "output", "score", "step", "gts", "acc", "uid", "other"])
def test_any_value_in_any_field_spoils_at_most_its_row(lab, tmp_path, field):
    """Every second row is good; the bad ones come first."""
    lines = []
    for i, value in enumerate(HOSTILE_VALUES):
        row = {"input": f"p{i}", "output": "a", "gts": "4", "score": 1.0, "step": 1, "acc": True}
        lines += [json.dumps(row)[:-1] + f', "{field}": {value}}}', json.dumps(row)]  # the second of equal keys counts
    path = put(tmp_path / "1.jsonl", "\n".join(lines).encode() + b"\n")
    report = lab.ingest(path, run="r")
    assert report.rows + report.quarantined == len(lines)
    assert report.rows >= len(HOSTILE_VALUES)
    assert lab.sql("SELECT count(*) FROM rollouts WHERE completion = 'a' AND origin.row % 2 = 1").item() == len(HOSTILE_VALUES)
    assert lab.validate() == []
    kept = [json.loads(line) for line in Path(report.quarantine[0]).read_bytes().splitlines()] if report.quarantine else []
    assert [k["raw"] for k in kept] == [lines[k["row"]] + "\n" for k in kept]


@pytest.mark.parametrize(("dump_of", "name"), [(qwen_math.dump, "m.jsonl"), (reasoning_gym.dump, "results.json")])
@pytest.mark.parametrize("value", [v for v in HOSTILE_VALUES if v[-1] != " "])  # an open bracket swallows the document
def test_any_score_in_a_list_of_samples_spoils_at_most_its_entry(lab, tmp_path, dump_of, name, value):
    path = dump_of(tmp_path / name)
    content = path.read_bytes()
    old = b"[true" if b"[true" in content else b'"score": 1'
    put(path, content.replace(old, old[: -len(b"true") if old[-1:] == b"e" else -1] + value.encode(), 1))
    report = lab.ingest(path, run="r")
    assert report.rows + report.quarantined >= 4 and report.quarantined <= 3
    assert lab.validate() == []


def test_invalid_utf_8_anywhere_spoils_its_row_only(lab, tmp_path, dump):
    lines = dump.splitlines(keepends=True)
    bad = [line.replace(b"sample", b"s\xff\xfe", 1) if i % 3 == 0 else line for i, line in enumerate(lines)]
    bad[1] = bad[1].replace(b'"pred"', b'"pr\xc3"')
    accounted(lab, put(tmp_path / "7.jsonl", b"".join(bad)), 15, 9, "invalid UTF-8")


def test_equal_keys_in_one_object_count_once(lab, tmp_path):
    path = put(tmp_path / "1.jsonl", b'{"input": "p", "output": "a", "score": 0, "step": 1, "gts": "1", "score": 1}\n')
    accounted(lab, path, 1)
    assert lab.sql("SELECT reward FROM rollouts").item() == 1


def test_a_prompt_of_a_million_characters_and_a_line_of_50_mb_are_rows(lab, tmp_path, dump):
    million = {"input": "p" * 1_000_000, "output": "\U0001f600" * 1000, "score": 1, "step": 7, "gts": "1"}
    large = {**million, "output": "x" * 50_000_000}
    path = put(tmp_path / "7.jsonl", dump + b"".join(json.dumps(r).encode() + b"\n" for r in (million, large)))
    accounted(lab, path, ROWS + 2)
    assert lab.sql("SELECT max(n_chars) FROM rollouts").item() == 50_000_000


@both
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_above_the_limit_is_in_quarantine_by_its_beginning(lab, tmp_path, dump, monkeypatch, suffix, end):
    monkeypatch.setattr(base, "LINE_BYTES", 1000)
    monkeypatch.setattr(base, "KEPT_BYTES", 100)
    content = dump + b'{"input": "' + b"x" * 10_000 + b'"}\n' + dump + b'{"input": "' + b"y" * 5000 + end
    for path in (put(tmp_path / "7.jsonl", content), put(tmp_path / f"8.jsonl{suffix}", PACK[suffix](content))):
        report = lab.ingest(path, run=path.name)
        assert (report.rows, report.quarantined) == (2 * ROWS, 2)
        assert "a line of 10,014 bytes: too long to be a row" in report.files[0].notes[0]
        assert max(map(len, Path(report.quarantine[0]).read_bytes().splitlines())) < 400


def test_ten_million_brackets_are_no_row(lab, tmp_path):
    refused(lab, put(tmp_path / "deep.json", b"[" * 10_000_000), "no reader knows this file")


# Parquet


@pytest.mark.parametrize("harm", ["cut", "holed", "magic only", "twice"])
def test_a_damaged_parquet_file_fails_alone(lab, tmp_path, harm):
    good, other = trl.fixture(tmp_path / "dumps")[0], tmp_path / "dumps" / "x" / "c.parquet"
    content = trl.dump(other).read_bytes()
    table = pq.read_table(other)
    twice = pa.Table.from_arrays([*table.columns, table["prompt"]], names=[*table.column_names, "prompt"])
    if harm == "twice":
        pq.write_table(twice, other)
    else:
        put(other, {"cut": content[:-9], "holed": content[:90] + content[200:], "magic only": b"PAR1"}[harm])
    report = lab.ingest(tmp_path / "dumps", run="r")
    failed = [f for f in report.files if f.status == "failed"]
    assert [f.file for f in failed] == ["x/c.parquet"] and str(other) in failed[0].notes[0]
    assert report.rows == 16 and good.exists() and lab.validate() == []


def test_a_parquet_value_that_python_cannot_hold_spoils_its_row_only(lab, tmp_path):
    times = pa.array([0, 253402300800 * 10**6, 1], pa.timestamp("us"))
    table = pa.table({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], "reward": [1.0, 0.0, 1.0], "at": times})
    pq.write_table(table, tmp_path / "p.parquet")
    accounted(lab, tmp_path / "p.parquet", 2, 1, "out of range")
    assert lab.sql("SELECT completion FROM rollouts ORDER BY ALL").to_series().to_list() == ["x", "z"]


def test_a_parquet_column_whose_name_is_no_utf_8_is_one_clear_error(lab, tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["x"], "reward": [1.0], "zzzz": [1]}), tmp_path / "p.parquet")
    content = (tmp_path / "p.parquet").read_bytes()
    refused(lab, put(tmp_path / "p.parquet", content.replace(b"zzzz", b"\xf2zzz")), "not a readable Parquet file")


def test_a_trl_dump_whose_columns_are_of_other_types_is_rows_and_bad_rows(lab, tmp_path):
    table = trl.table([("a", [1.0, 0.0]), ("b", [0.0, 1.0])])
    table = table.set_column(table.column_names.index("advantage"), "advantage", [["x", "0.5", None, "nan"]])
    accounted(lab, trl.dump(tmp_path / "completions_00001.parquet", table), 3, 1, "advantage is not a number: 'x'")


# Folders


def test_a_folder_of_nothing_but_empty_files_says_so(lab, tmp_path):
    for name in ("1.jsonl", "2.parquet", "3.json"):
        put(tmp_path / "d" / name, b"" if name != "3.json" else b" \n\n")
    put(tmp_path / "d" / "4.jsonl.gz", gzip.compress(b""))
    refused(lab, tmp_path / "d", "the file is empty")


ODD_NAMES = [
    "with space", "quote'\"`", "new\nline", "\U0001f600", "-leading", "--run", "%2F", "$(touch pwned)", "semi;colon", "a*?[",
]  # fmt: skip


def test_files_with_any_name_are_read(lab, tmp_path, dump, monkeypatch):
    folder = tmp_path / "d"
    for i, name in enumerate(ODD_NAMES):
        put(folder / name / f"{name}.jsonl", dump.replace(b'"step": 7', b'"step": %d' % i))
    put(folder / os.fsdecode(b"bad\xff.jsonl"), dump)
    monkeypatch.chdir(tmp_path)
    report = lab.ingest("d", run="r")
    assert report.rows == ROWS * len(ODD_NAMES)
    assert [f.notes for f in report.files if f.status == "failed"] == [["its name is not Unicode: rename it"]]
    assert lab.sql("SELECT count(DISTINCT origin.file) FROM rollouts").item() == len(ODD_NAMES)
    assert not list(tmp_path.rglob("pwned"))
    assert lab.validate() == []
    result = run("ingest", "--run", "s", "--store", tmp_path / "store", "--", "-leading.jsonl", cwd=folder / "-leading")
    assert result.returncode == 0, result.stderr


def test_a_folder_of_many_formats_reads_each_by_its_own_reader(lab, tmp_path, dump):
    makers = {"verl": verl, "trl": trl, "reasoning_gym": reasoning_gym, "qwen_math": qwen_math, "plain": plain}
    files = {p.relative_to(tmp_path / "d").as_posix(): n for n, m in makers.items() for p in m.fixture(tmp_path / "d" / n)}
    put(tmp_path / "d" / "notes.txt", b"nothing")
    put(tmp_path / "d" / "x.jsonl", b"\x80\x04]q\x00.")
    put(tmp_path / "d" / "v.jsonl.zst", zstd(dump))
    report = lab.ingest(tmp_path / "d", run="r")
    assert {f.file: f.format for f in report.files if f.format} == {**files, "v.jsonl.zst": "verl"}
    assert sorted(f.file for f in report.files if f.status == "skipped") == ["notes.txt", "x.jsonl"]
    assert report.rows == lab.sql("SELECT sum(n_rows) FROM ingests").item() == 16 + 16 + 8 + 8 + 8 + ROWS
    assert lab.validate() == []


def test_pipes_links_and_loops_do_not_hang(lab, tmp_path, dump):
    folder = tmp_path / "d"
    put(folder / "a" / "7.jsonl", dump)
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "a" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    report = lab.ingest(folder, run="r")
    said = {f.file: f.notes[0] for f in report.files if f.status == "skipped"}
    assert set(said) == {"pipe.jsonl", "a/loop", "gone.jsonl"}
    assert "a pipe" in said["pipe.jsonl"] and "links are not followed" in said["a/loop"]
    assert report.rows == ROWS
    with pytest.raises(EcholabError, match="neither a file nor a folder"):
        lab.ingest(folder / "pipe.jsonl", run="r")


def test_a_file_that_may_not_be_read_fails_alone(lab, tmp_path, dump, monkeypatch):
    put(tmp_path / "d" / "7.jsonl", dump)
    shut = put(tmp_path / "d" / "8.jsonl", dump)
    opened = Path.open

    def refuse(self: Path, *args, **options):
        if self.name == shut.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    report = lab.ingest(tmp_path / "d", run="r")
    assert [(f.file, f.rows, f.notes) for f in report.files if f.status == "failed"] == [
        ("8.jsonl", 0, [f"{shut}: Permission denied"])
    ]
    assert report.rows == ROWS


# Files that change while they are read


def changing(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object], after: int) -> None:
    """Change something after so many rows of a file were read, once."""
    read, done = verl_reader.read, []

    def changed(source):
        for i, row in enumerate(read(source)):
            if i == after and not done:
                done.append(change())
            yield row

    monkeypatch.setattr(verl_reader, "read", changed)


@pytest.mark.parametrize("how", ["grows", "shrinks", "is replaced", "vanishes", "is touched"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_changes_while_it_is_read_ends_as_if_undisturbed(lab, tmp_path, dump, monkeypatch, how, suffix):
    pack = PACK.get(suffix, bytes)
    path = put(tmp_path / "d" / f"7.jsonl{suffix}", pack(dump))
    put(tmp_path / "d" / "8.jsonl", dump.replace(b'"step": 7', b'"step": 8'))
    other = pack(dump.replace(b"sample", b"other"))
    after = {
        "grows": pack(dump) + pack(dump.replace(b"sample", b"later")),
        "shrinks": pack(dump[: dump.index(b"\n", len(dump) // 2) + 1]),
        "is replaced": other,
        "vanishes": None,
        "is touched": pack(dump),
    }[how]

    def change() -> None:
        if after is None:
            path.unlink()
        elif how == "is replaced":
            os.replace(put(tmp_path / "new", after), path)
        elif how == "is touched":
            os.utime(path, (1, 1))
        else:
            path.write_bytes(after)

    changing(monkeypatch, change, after=3)
    report = lab.ingest(tmp_path / "d", run="r")
    mine = report.files[0]
    if how == "grows" and not suffix:
        assert mine.status == "ingested", "lines may be added meanwhile"
    else:
        assert (mine.status, mine.rows) == ("failed", 0)
        assert "changed while it was read: run the command again" in mine.notes[0] or "No such file" in mine.notes[0]
    assert report.files[1].rows == ROWS and lab.validate() == []
    lab.ingest(tmp_path / "d", run="r")
    with echolab.open(tmp_path / "fresh", create=True) as undisturbed:
        undisturbed.ingest(tmp_path / "d", run="r")
        ids = "SELECT rollout_id FROM rollouts ORDER BY ALL"
        assert lab.sql(ids).rows() == undisturbed.sql(ids).rows()
    assert lab.validate() == []


# No space left


def big_dump(folder: Path) -> Path:
    """Eight files whose content does not compress."""
    for step in range(8):
        rows = [{"input": f"p{i // 4}", "output": os.urandom(3000).hex(), "score": i % 2, "step": step} for i in range(80)]
        plain.lines(folder / f"{step}.jsonl", rows)
    return folder


def repeatable(root: Path, dumps: Path) -> None:
    """The store is sound and shows whole files only; the command again completes it."""
    with echolab.open(root) as lab:
        assert lab.validate() == []
        assert set(lab.sql("SELECT count(*) FROM rollouts GROUP BY step").to_series()) <= {80}
        assert lab.ingest(dumps, run="r").quarantined == 0
        assert lab.sql("SELECT count(*), count(DISTINCT rollout_id) FROM rollouts").rows() == [(640, 640)]
        assert lab.validate() == []


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from pipelines.cli import main
main()
"""


@pytest.mark.parametrize("limit", [300, 20_000, 500_000])
def test_a_file_that_may_not_grow_is_one_line_and_the_store_stays_sound(tmp_path, limit):
    dumps, root = big_dump(tmp_path / "d"), tmp_path / "store"
    echolab.open(root, create=True).close()
    command = [sys.executable, "-c", LIMITED, limit, "ingest", dumps, "--run", "r", "--store", root]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("echolab: ") and result.stderr.count("\n") == 1
    assert "File too large" in result.stderr
    repeatable(root, dumps)


def test_a_full_disk_is_one_line_and_the_store_stays_sound(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        dumps, root = big_dump(tmp_path / "d"), disk / "store"
        result = run("ingest", dumps, "--run", "r", "--store", root)
        assert result.returncode == 1, result.stderr
        assert result.stderr.startswith("echolab: ") and result.stderr.count("\n") == 1
        assert "No space left" in result.stderr
        shutil.copytree(root, tmp_path / "copy")
    finally:
        subprocess.run(["umount", disk], check=True)
    repeatable(tmp_path / "copy", dumps)


def test_a_quarantine_that_cannot_be_written_is_one_line(lab, tmp_path, dump, monkeypatch):
    path = put(tmp_path / "7.jsonl", dump + b"broken\n")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_quarantined", full)
        refused(lab, path, "No space left on device")
    accounted(lab, path, ROWS, 1)


# The command


def test_the_command_says_each_in_one_line_and_exits_as_promised(tmp_path, dump):
    put(tmp_path / "good" / "7.jsonl", dump)
    put(tmp_path / "mixed" / "7.jsonl", dump + b"[]\n")
    put(tmp_path / "failing" / "7.jsonl", dump)
    put(tmp_path / "failing" / "8.jsonl.gz", gzip.compress(dump)[:40])
    put(tmp_path / "bad" / "8.jsonl.gz", gzip.compress(dump)[:40])
    for folder, code in (("good", 0), ("mixed", 3), ("failing", 3), ("bad", 1)):
        result = run("ingest", tmp_path / folder, "--run", folder, "--store", tmp_path / "s")
        assert result.returncode == code, (folder, result.stderr)
        assert "Traceback" not in result.stderr + result.stdout
        assert result.stderr.count("\n") == (code == 1)
        if folder in ("failing", "bad"):
            assert "the gzip data end early or are damaged" in result.stdout + result.stderr
