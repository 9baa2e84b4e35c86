"""The store itself: files, commits, snapshots, locks."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab import files, ids
from echolab.errors import EcholabError
from echolab.schema import FORMAT_VERSION, TABLES
from echolab.store import Store, partition_folder

ROLLOUTS = TABLES["rollouts"]
ODD_RUNS = [
    "a/b",
    "%2F",
    "x=y",
    "..",
    ".",
    " a b ",
    "é🎉",
    "a%b#?&+",
    "'\"",
    "..\\..",
    "a:b*[1]",
    "run=x/../..",
    "new\nline",
    "NULL",
]


def rollout(i: int, **fields) -> dict:
    row = {
        "rollout_id": f"{i:032x}",
        "ingest_id": "i",
        "run": "r",
        "split": "train",
        "step": i,
        "role": "policy",
        "group_id": f"g{i}",
        "group_source": "explicit",
        "prompt_format": "raw",
        "origin": {"file": "f", "row": i},
    }
    return {**row, **fields}


def table(rows: list[dict], name: str = "rollouts") -> pa.Table:
    return pa.Table.from_pylist(rows, schema=TABLES[name].arrow)


def add(store: Store, rows: list[dict]) -> int:
    with store.lock():
        return store.add("rollouts", table(rows))


def shown(store: Store, **at) -> list[str]:
    return sorted(store.snapshot(**at).table("rollouts")["rollout_id"].to_pylist())


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.create(tmp_path / "store")


# Opening.


def test_a_new_store_is_empty_and_created_only_once(tmp_path):
    store = Store.create(tmp_path / "s")
    add(store, [rollout(1)])
    assert shown(Store.create(tmp_path / "s")) == shown(store)
    assert store.format == FORMAT_VERSION
    assert Store.create(tmp_path / "other").snapshot().versions == {}


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(EcholabError, match="not an echolab store"):
        Store.open(tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(EcholabError, match="not empty"):
        Store.create(tmp_path)


def test_a_creation_that_was_killed_can_be_repeated(tmp_path):
    (tmp_path / "echolab.json.abc").write_text("")
    assert Store.create(tmp_path).format == FORMAT_VERSION


def test_a_newer_or_damaged_format_is_refused(store):
    store.mark(FORMAT_VERSION + 1)
    with pytest.raises(EcholabError, match="update echolab"):
        Store.open(store.root)
    (store.root / "echolab.json").write_text("{}")
    with pytest.raises(EcholabError, match="damaged"):
        Store.open(store.root)


def change_protocol(store: Store, **protocol) -> None:
    """Commit a protocol action by hand, as other software would."""
    log = store.folder("rollouts") / "_delta_log"
    newest = max(int(f.stem) for f in log.glob("*.json"))
    (log / f"{newest + 1:020d}.json").write_text(json.dumps({"protocol": protocol}) + "\n")


NEW = {"minReaderVersion": 3, "minWriterVersion": 7}


@pytest.mark.parametrize(
    "protocol",
    [
        {**NEW, "readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]},
        {"minReaderVersion": 2, "minWriterVersion": 5},
        {**NEW, "readerFeatures": ["madeUp"], "writerFeatures": ["madeUp"]},
        {"minReaderVersion": 99, "minWriterVersion": 99},
    ],
    ids=["deletion vectors", "column mapping", "unknown feature", "unknown version"],
)
def test_a_table_whose_files_alone_do_not_tell_its_rows_is_refused(store, protocol):
    add(store, [rollout(1)])
    change_protocol(store, **protocol)
    with pytest.raises(EcholabError, match="rollouts"):
        store.snapshot().files("rollouts")


# Paths.


@pytest.mark.parametrize("name", ["with space", "quo'te\"s", "ünïcode 🎉", "100% %zz", "a=b", "st[1]*"])
def test_any_store_path_and_run_name_round_trips_through_commit_and_replacement(tmp_path, name):
    store = Store.create(tmp_path / name)
    for sample in range(2):
        add(store, [rollout(i, run=run, sample=sample) for i, run in enumerate(ODD_RUNS)])
    found = store.snapshot().files("rollouts")
    assert all(f.path.exists() and f.path.resolve().is_relative_to(store.folder("rollouts").resolve()) for f in found)
    assert {f.partition["run"] for f in found} == set(ODD_RUNS)
    with store.lock(), store.job("test") as folder:
        rows = store.snapshot().table("rollouts")
        store.commit("rollouts", store.stage("rollouts", rows, folder), replaces=found)
    after = store.snapshot()
    assert len(after.files("rollouts")) == len(ODD_RUNS)
    assert sorted(after.table("rollouts")["run"].to_pylist()) == sorted(2 * ODD_RUNS)


def test_a_store_path_that_deltalake_would_misread_is_refused(tmp_path):
    for make in (Store.create, Store.open):
        with pytest.raises(EcholabError, match="choose another folder"):
            make(tmp_path / "per%20cent")


def test_two_runs_never_share_a_folder():
    folders = [partition_folder("run", run) for run in ODD_RUNS]
    assert len(set(folders)) == len(folders)
    assert not any("/" in f for f in folders)


def test_a_run_name_too_long_for_a_folder_is_a_clear_error(store):
    with pytest.raises(EcholabError, match="cannot write"):
        add(store, [rollout(1, run="é" * 200)])
    assert shown(store) == []


# Files.


def test_numbers_are_byte_stream_split_and_what_repeats_has_a_dictionary(store):
    n = 64
    rows = [
        rollout(i, completion_ids=list(range(n)), logprobs=[i / 7] * n, reward=i / 3, prompt="p" * 40, completion=f"c{i}")
        for i in range(9)
    ]
    add(store, rows)
    group = pq.read_metadata(store.snapshot().files("rollouts")[0].path).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    for name in ("completion_ids.list.element", "logprobs.list.element", "reward"):
        assert "BYTE_STREAM_SPLIT" in columns[name].encodings, name
        assert "RLE_DICTIONARY" not in columns[name].encodings, name
    for name in ("prompt", "split", "group_id", "origin.file"):
        assert "RLE_DICTIONARY" in columns[name].encodings, name
    assert "RLE_DICTIONARY" not in columns["completion"].encodings
    assert {c.compression for c in columns.values()} == {"ZSTD"}


sort_keys = st.tuples(
    st.sampled_from(["train", "eval"]), st.none() | st.integers(-1, 3), st.sampled_from("ab"), st.none() | st.integers(0, 2)
)


@given(st.lists(sort_keys, max_size=12))
@settings(deadline=None)
def test_rows_are_sorted_by_split_step_group_and_sample_with_null_last(keys):
    rows = [
        rollout(i, split=split, step=step, group_id=group, sample=sample) for i, (split, step, group, sample) in enumerate(keys)
    ]
    done = files.sort_rows(ROLLOUTS, table(rows)).to_pylist()

    def key(r: dict) -> tuple:
        return tuple(
            (r[c] is None, r[c] if r[c] is not None else 0) for c in ("split", "step", "group_id", "sample", "rollout_id")
        )

    assert [r["rollout_id"] for r in done] == [r["rollout_id"] for r in sorted(rows, key=key)]


def big(rows: int, row_bytes: int) -> pa.Table:
    return pa.table({"text": pa.array(["x" * row_bytes] * rows, pa.string())})


@pytest.mark.parametrize(
    ("rows", "row_bytes", "expected"),
    [
        (0, 10, []),
        (5, 10, [5]),
        (100, 1_000, [16, 16, 16, 16, 16, 16, 4]),  # the fewest rows fit into four times the bytes
        (20, 50_000, [1] * 20),  # one row is more than a row group
        (7, 3_000, [3, 3, 1]),
    ],
)
def test_a_row_group_keeps_its_bytes_and_its_fewest_rows_where_they_fit(monkeypatch, rows, row_bytes, expected):
    monkeypatch.setattr(files, "ROW_GROUP_BYTES", 10_000)
    monkeypatch.setattr(files, "ROW_GROUP_ROWS", (16, 1 << 20))
    pieces = list(files.row_groups(big(rows, row_bytes)))
    assert [p.num_rows for p in pieces] == expected


@given(st.lists(st.integers(0, 60_000), min_size=1, max_size=30))
@settings(deadline=None)
def test_row_groups_hold_all_rows_in_order_and_long_rows_that_stand_together_are_split(sizes):
    rows = pa.table({"text": pa.array(["x" * n for n in sizes]), "i": pa.array(range(len(sizes)))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "ROW_GROUP_BYTES", 10_000)
        pieces = list(files.row_groups(rows))
    assert pa.concat_tables(pieces).equals(rows)
    assert all(p.num_rows == 1 or p.nbytes <= 40_000 for p in pieces)


def test_rows_of_50_mb_are_written_a_few_to_a_row_group(store):
    text = "x" * (50 << 20)
    with store.lock(), store.job("test") as folder:
        rows = table([rollout(i) for i in range(4)])
        place = rows.schema.get_field_index("completion")
        rows = rows.set_column(place, rows.schema.field(place), pa.chunked_array([pa.array([text])] * 4))
        store.commit("rollouts", store.stage("rollouts", rows, folder))
    footer = pq.read_metadata(store.snapshot().files("rollouts")[0].path)
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [3, 1]


def test_a_required_column_with_null_is_not_written(store):
    with pytest.raises((EcholabError, pa.ArrowException)):
        add(store, [rollout(1, split=None)])
    assert shown(store) == []


def test_absent_columns_are_null_and_foreign_ones_are_dropped_not_stored(store):
    with store.lock():
        store.add("rollouts", table([rollout(1)]).drop_columns(["reward", "prompt"]))
    row = store.snapshot().table("rollouts").to_pylist()[0]
    assert row["reward"] is None and row["prompt"] is None and row["rollout_id"] == f"{1:032x}"


# Statistics.

numbers = st.none() | st.floats(width=64) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])


@given(
    st.lists(st.tuples(numbers, st.none() | st.integers(-5, 2**40), st.none() | st.text(max_size=3)), max_size=8),
    st.integers(0, 8),
)
@settings(deadline=None)
def test_statistics_equal_brute_force_whole_and_merged(values, cut):
    rows = [rollout(i, reward=r, step=s, model=m) for i, (r, s, m) in enumerate(values)]
    stats = files.statistics(ROLLOUTS, table(rows))
    merged = files.merge_statistics([files.statistics(ROLLOUTS, table(part)) for part in (rows[:cut], rows[cut:])])
    for name in ("reward", "step", "model", "rollout_id"):
        column = [r.get(name) for r in rows]
        known = [v for v in column if v is not None and v == v]
        for found in (stats, merged):
            assert found["numRecords"] == len(rows)
            assert found["nullCount"][name] == column.count(None)
            assert (name in found["minValues"]) == bool(known)
            if known:
                assert (found["minValues"][name], found["maxValues"][name]) == (min(known), max(known))


def test_statistics_stand_in_the_log_and_survive_its_checkpoint_also_with_infinity_and_nan(store):
    for i in range(6):
        add(store, [rollout(i, reward=[math.nan, math.inf, -math.inf, 0.5][i % 4])])
        if i == 4:
            store.delta("rollouts").create_checkpoint()
    found = {f.low["step"]: f for f in store.snapshot().files("rollouts")}
    assert sorted(found) == list(range(6))
    assert all(f.high["step"] == step and f.rows == 1 for step, f in found.items())
    assert found[3].low["reward"] == found[3].high["reward"] == 0.5
    assert found[1].low.get("reward") is None and found[2].high.get("reward") is None
    assert shown(store) == [f"{i:032x}" for i in range(6)]


# Commits.


def test_staged_files_do_not_show_before_their_commit(store):
    add(store, [rollout(1)])
    with store.job("test") as folder:
        store.stage("rollouts", table([rollout(2)]), folder)
        assert shown(store) == [f"{1:032x}"]
    assert not folder.exists()


def test_a_staged_file_that_is_not_what_was_written_is_not_committed(store):
    with store.lock(), store.job("test") as folder:
        (staged,) = store.stage("rollouts", table([rollout(1)]), folder)
        pq.write_table(pa.table({"x": [1]}), staged.path)
        with pytest.raises(EcholabError, match="not what was written"):
            store.commit("rollouts", [staged])
    assert shown(store) == []


def test_files_that_were_replaced_already_cannot_be_replaced_again(store):
    add(store, [rollout(1)])
    old = store.snapshot()
    for attempt in range(2):
        with store.lock(), store.job("test") as folder:
            staged = store.stage("rollouts", old.table("rollouts"), folder)
            if attempt == 0:
                store.commit("rollouts", staged, replaces=old.files("rollouts"))
                continue
            with pytest.raises(EcholabError, match="replaced the same files"):
                store.commit("rollouts", staged, replaces=old.files("rollouts"))
    assert shown(store) == [f"{1:032x}"]


def test_a_work_item_can_be_seen_committed(store):
    with store.lock(), store.job("test") as folder:
        staged = store.stage("rollouts", table([rollout(1)]), folder)
        store.commit("rollouts", staged, transactions={"plan/item-1": 3})
    assert store.delta("rollouts").transaction_version("plan/item-1") == 3
    assert store.delta("rollouts").transaction_version("plan/item-2") is None


def test_the_newest_entry_of_a_registry_counts(store):
    with store.lock():
        store.register("runs", "r1", "one", {"threshold": 1})
        store.register("runs", "r2", "two", {"threshold": 5})
        store.register("runs", "r1", "one", {"threshold": 2}, {"versions": {"rollouts": 3}})
    entries = store.snapshot().registry("runs")
    assert {k: v["config"] for k, v in entries.items()} == {"r1": {"threshold": 2}, "r2": {"threshold": 5}}
    assert entries["r1"]["parents"] == {"versions": {"rollouts": 3}}


# Snapshots.


def ledger_row(store: Store, i: int, **fields) -> None:
    row = {
        "ingest_id": f"i{i}",
        "run": "r",
        "source_path": f"f{i}",
        "attempt": 1,
        "start_step": i,
        "bytes_read": 10,
        "sha256": "x",
        "format": "jsonl",
        "reader_version": 1,
        "options": "{}",
        "n_rows": 1,
        "n_shared": 0,
        "n_quarantined": 0,
        "group_source": "explicit",
        "completeness": "all",
        "supersedes": [],
        "created_at": datetime.now(UTC),
    }
    with store.lock():
        store.add("ingests", table([{**row, **fields}], "ingests"))


def test_a_snapshot_does_not_see_what_is_committed_later(store):
    add(store, [rollout(1)])
    before = store.snapshot()
    add(store, [rollout(2)])
    ledger_row(store, 1)
    assert before.table("rollouts").num_rows == 1 and not before.ledger.readings
    assert store.snapshot().table("rollouts").num_rows == 2


def test_a_snapshot_by_version_or_time_shows_the_store_as_it_stood(store):
    marks = []
    for i in range(3):
        add(store, [rollout(i)])
        ledger_row(store, i)
        time.sleep(0.005)
        marks.append((store.snapshot().versions["ingests"], datetime.now(UTC)))
        time.sleep(0.005)
    for n, (version, at) in enumerate(marks, start=1):
        for past in (store.snapshot(version=version), store.snapshot(at=at)):
            assert past.table("rollouts").num_rows == n
            assert len(past.ledger.live) == n
    assert store.snapshot(at=datetime.now(UTC) - timedelta(days=1)).versions == {}
    with pytest.raises(EcholabError, match="no version 99"):
        store.snapshot(version=99)


def test_a_snapshot_is_taken_again_when_the_ledger_moves_meanwhile(store, monkeypatch):
    ledger_row(store, 0)
    real, moved = Store._version, []

    def version(self, table, at=None):
        found = real(self, table, at)
        if table == "rollouts" and not moved:  # between the ledger and the other tables
            moved.append(1)
            ledger_row(self, 1)
        return found

    monkeypatch.setattr(Store, "_version", version)
    assert len(store.snapshot().ledger.readings) == 2


def test_an_older_version_whose_files_are_gone_is_a_clear_error(store):
    add(store, [rollout(1)])
    ledger_row(store, 1)
    version = store.snapshot().versions["ingests"]
    for f in store.snapshot().files("rollouts"):
        f.path.unlink()
    with pytest.raises(EcholabError, match="vacuum"):
        store.snapshot(version=version)


# Locks and processes.


def test_only_one_holds_the_lock_and_a_waiter_is_told(store):
    with store.lock(), pytest.raises(EcholabError, match="another process"), Store(store.root).lock(seconds=0.05):
        pass
    with store.lock(seconds=0):
        pass


def write_many(root: Path, worker: int, n: int) -> None:
    store = Store.open(root)
    for i in range(n):
        with store.lock():
            store.add("rollouts", table([rollout(worker * 1000 + i, run=f"w{worker}")]))


def test_two_processes_lose_nothing(store):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(store.root, w, 8)) for w in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    assert shown(store) == sorted(f"{w * 1000 + i:032x}" for w in range(2) for i in range(8))


def test_a_job_folder_goes_also_when_the_job_fails(store):
    with pytest.raises(RuntimeError), store.job("test") as folder:
        (folder / "half.tmp").write_text(ids.random_id())
        raise RuntimeError
    assert not folder.exists()
