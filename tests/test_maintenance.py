"""Maintenance: what it says is true, what it removes nobody needs, and no crash of it changes a row."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab import compaction, maintenance, schema
from echolab.errors import EcholabError
from echolab.ledger import Ledger
from echolab.maintenance import auto, compact, history, info, leftovers, migrate, vacuum, validate
from echolab.schema import FORMAT_VERSION, TABLES
from echolab.store import Store

SOUND: Store
T0 = datetime(2026, 1, 1, tzinfo=UTC)
OLD: dict[str, Any] = {"floor_hours": 0.0, "keep_days": 0.0}

# Stores made by hand.


def rollout(i: int, **fields) -> dict[str, Any]:
    row = {
        "rollout_id": f"{i:032x}", "ingest_id": "i0", "run": "r", "split": "train", "step": i // 4, "role": "policy",
        "group_id": f"g{i // 4}", "group_source": "explicit", "sample": i % 4, "prompt_format": "raw", "completion": f"c{i}",
        "prompt_ids": [1, 2], "n_prompt_tokens": 2, "completion_ids": [3, 4, 5], "logprobs": [-1.0, -2.0, -3.0],
        "loss_mask": [True, True, False], "n_completion_tokens": 3, "reward": float(i % 2), "origin": {"file": "f", "row": i},
        "rewards": [("accuracy", 1.0)],
    }  # fmt: skip
    return {**row, **fields}


def reading(i: int, **fields) -> dict[str, Any]:
    row = {
        "ingest_id": f"i{i}",
        "run": "r",
        "source_path": f"f{i}",
        "attempt": 1,
        "start_step": 0,
        "bytes_read": 10,
        "format": "jsonl",
        "sha256": "x",
        "reader_version": 1,
        "options": "{}",
        "n_rows": 0,
        "n_shared": 0,
        "n_quarantined": 0,
        "group_source": "explicit",
        "completeness": "all",
        "supersedes": [],
        "created_at": T0 + timedelta(seconds=i),
    }
    return {**row, **fields}


def entry(id: str, name: str, parents: dict | None = None, version: int = 1) -> dict[str, Any]:
    made = {"id": id, "name": name, "version": version, "config": "{}", "parents": json.dumps(parents or {})}
    return {**made, "created_at": T0}


def content() -> dict[str, list[dict[str, Any]]]:
    """A little of everything, and all of it right."""
    a, b = f"{0:032x}", f"{1:032x}"
    score = {"scorer": "sc", "run": "r", "step": 0, "token_ids": [3, 4, 5], "loss_mask": None, "n_tokens": 2}
    floats = {"entropies": [0.1, 0.2, 0.3], "logprobs": [-1.0, -2.0, -3.0], "mean_entropy": 0.15}
    cut = {
        "scorer": "sc",
        "segmenter": "sg",
        "segment_ends": [1, 2],
        "segment_entropies": [0.1, None],
        "n_segments": 2,
        "peak_segment": 0,
    }
    clip = {
        "clip_id": "c",
        "clipset": "best@1",
        "rollout_id": a,
        "group_id": "g0",
        "scorer": "sc",
        "segmenter": "sg",
        "selector": "peak",
        "end_token": 2,
        "n_tokens": 2,
        "clip_ids": [3, 4],
        "clip_mask": [True, False],
    }
    verdict = {"verifier": "v", "input_hash": "h", "status": "ok", "created_at": T0}
    bin = {"profile": "p@1", "axis": "relative", "slice": "all", "bin": 0, "statistic": "mean", "value": 0.5, "n": 2}
    token = {"tokenizer": "t", "token_id": 3, "text": "x", "has_newline": False, "special": False}
    return {
        "rollouts": [rollout(i) for i in range(8)],
        "verdicts": [{**verdict, "rollout_id": a}, {**verdict, "rollout_id": b}],
        "scores": [{**score, **floats, "rollout_id": a}, {**score, **floats, "rollout_id": b}],
        "segmentations": [{**cut, "rollout_id": a}, {**cut, "rollout_id": b}],
        "clips": [clip],
        "profiles": [bin],
        "profile_members": [{"profile": "p@1", "rollout_id": a}],
        "vocab": [token],
        "runs": [entry("r", "r")],
        "scorers": [entry("sc", "scorer")],
        "segmenters": [entry("sg", "segmenter")],
        "verifiers": [entry("v", "math")],
        "clipsets": [entry("x", "best")],
        "cohorts": [entry("y", "p")],
        "exports": [entry("z", "out")],
        "ingests": [reading(0, n_rows=8)],
    }


def fill(store: Store, data: dict[str, list[dict[str, Any]]]) -> None:
    with store.lock():
        for name, rows in data.items():
            if rows:
                store.add(name, pa.Table.from_pylist(rows, schema=TABLES[name].arrow))


@pytest.fixture(scope="module", autouse=True)
def sound(tmp_path_factory) -> None:
    """Sixteen tables take a second to commit: they are made once, and copied."""
    global SOUND
    SOUND = Store.create(tmp_path_factory.mktemp("sound") / "store")
    fill(SOUND, content())


def build(root: Path, change: Callable[[dict], object] = lambda data: None) -> Store:
    data = content()
    change(data)
    new = {name: rows for name, rows in data.items() if rows != content()[name]}
    shutil.copytree(
        SOUND.root, root / "store", ignore=lambda folder, names: [n for n in names if Path(folder) == SOUND.root and n in new]
    )
    store = Store.open(root / "store")
    fill(store, new)
    return store


def all_rows(store: Store, table: str = "rollouts") -> list[dict]:
    key = TABLES[table].key
    return sorted(
        store.snapshot().table(table).to_pylist(),
        key=lambda r: tuple(str(r[k]) for k in (*key, *TABLES[table].arrow.names[:2])),
    )


def shown(store: Store) -> list[dict]:
    """Rows that a user sees, by brute force."""
    snapshot = store.snapshot()
    live = {r.ingest_id: r for r in snapshot.ledger.live}
    order = {r.ingest_id: i for i, r in enumerate(snapshot.ledger.readings)}
    rows = {}
    for row in sorted(snapshot.table("rollouts").to_pylist(), key=lambda r: order.get(r["ingest_id"], -1), reverse=True):
        if row["ingest_id"] in live:
            cutoff = snapshot.ledger.cutoff(live[row["ingest_id"]])
            if cutoff is None or row["step"] is None or row["step"] < cutoff:
                rows[row["rollout_id"]] = row
    return sorted(rows.values(), key=lambda r: r["rollout_id"])


# validate


def test_a_sound_store_has_no_problems_whole_or_compacted(tmp_path):
    store = build(tmp_path / "a place [1] * with 'odd' \"name\"")
    assert validate(store.snapshot()) == validate(store.snapshot(), deep=False) == leftovers(store.snapshot()) == []
    compact(store, full=True)
    assert validate(store.snapshot()) == []
    assert validate(Store.create(tmp_path / "empty").snapshot()) == []


def test_a_store_in_a_folder_that_looks_like_a_pattern_is_not_taken_for_its_neighbour(tmp_path):
    store = build(tmp_path / "st[1]")
    (tmp_path / "st1").mkdir()
    neighbour = Store(Path(shutil.copytree(store.root, tmp_path / "st1" / "store")))
    rewrite(neighbour, "rollouts", lambda t: t.slice(5))
    assert validate(store.snapshot()) == []
    rows = all_rows(store)
    compact(store, full=True)
    assert all_rows(store) == rows


def put(table: str, row: int = 0, **fields) -> Callable[[dict], object]:
    return lambda data: data[table][row].update(fields)


def again(table: str, row: int = 0, **fields) -> Callable[[dict], object]:
    return lambda data: data[table].append({**data[table][row], **fields})


DAMAGED_ROWS = {
    "logprobs shorter than ids": (put("rollouts", logprobs=[-1.0]), "rollouts: logprobs and completion_ids differ"),
    "loss mask longer than ids": (put("rollouts", loss_mask=[True] * 9), "rollouts: loss_mask and completion_ids differ"),
    "completion tokens miscounted": (put("rollouts", n_completion_tokens=7), "n_completion_tokens is not"),
    "logprobs without ids": (put("rollouts", completion_ids=None, n_completion_tokens=4), "not the length of logprobs"),
    "prompt tokens miscounted": (put("rollouts", n_prompt_tokens=7), "rollouts: n_prompt_tokens is not"),
    "negative count": (put("rollouts", n_chars=-1), "rollouts: a count is negative"),
    "rollout twice in a reading": (lambda d: (again("rollouts")(d), put("ingests", n_rows=9)(d)), "stand twice"),
    "entropies too few": (put("scores", entropies=[0.1]), "scores: entropies and token_ids differ"),
    "score logprobs too few": (put("scores", logprobs=[0.1]), "scores: logprobs and token_ids differ"),
    "score mask too long": (put("scores", loss_mask=[True] * 4), "scores: loss_mask and token_ids differ"),
    "score tokens miscounted": (put("scores", n_tokens=1), "scores: n_tokens is not the number of tokens"),
    "segments miscounted": (put("segmentations", n_segments=3), "segmentations: n_segments is not"),
    "segment entropies too few": (put("segmentations", segment_entropies=[0.1]), "segment_entropies"),
    "ends stand still": (put("segmentations", segment_ends=[2, 2]), "segment_ends do not increase"),
    "ends fall": (put("segmentations", segment_ends=[2, 1]), "segment_ends do not increase"),
    "first segment empty": (put("segmentations", segment_ends=[0, 2]), "segment_ends do not increase"),
    "ends pass the tokens": (put("segmentations", segment_ends=[1, 4]), "segment_ends pass the last token"),
    "peak is no segment": (put("segmentations", peak_segment=2), "peak_segment is no segment"),
    "clip tokens miscounted": (put("clips", n_tokens=3), "clips: n_tokens is not"),
    "clip mask too long": (put("clips", clip_mask=[True] * 3), "clip_mask"),
    "verdict twice": (again("verdicts"), "verdicts: 1 keys"),
    "score twice": (again("scores"), "scores: 1 keys"),
    "segmentation twice": (again("segmentations"), "segmentations: 1 keys"),
    "clip twice": (again("clips"), "clips: 1 keys"),
    "token twice": (again("vocab"), "vocab: 1 keys"),
    "reading twice": (again("ingests"), "ingests: 1 keys"),
    "verdict of nothing": (put("verdicts", rollout_id="gone"), "verdicts: 1 rows have no rollout"),
    "score of nothing": (again("scores", rollout_id="gone"), "scores: 1 rows have no rollout"),
    "segmentation of nothing": (again("segmentations", rollout_id="gone"), "segmentations: 1 rows have no rollout"),
    "segmentation without score": (again("segmentations", rollout_id=f"{2:032x}"), "segmentations: 1 rows have no score"),
    "clip of nothing": (put("clips", rollout_id="gone"), "clips: 1 rows have no rollout"),
    "member that is nothing": (put("profile_members", rollout_id="gone"), "profile_members: 1 rows have no rollout"),
    "unknown verifier": (put("verdicts", verifier="who"), "verdicts: verifier who is not in verifiers"),
    "unknown scorer": (put("scores", scorer="who"), "scores: scorer who is not in scorers"),
    "unknown segmenter": (put("segmentations", segmenter="who"), "segmentations: segmenter who is not in segmenters"),
    "unknown clip set": (put("clips", clipset="best@2"), "clips: clipset best@2 is not in clipsets"),
    "unknown cohort": (put("profiles", profile="who@1"), "profiles: profile who@1 is not in cohorts"),
    "rows lost": (put("ingests", n_rows=9), "has 8 rows, not 9"),
    "all rows lost": (lambda d: d["ingests"].append(reading(1, n_rows=3)), "has 0 rows, not 3"),
    "wrong start": (put("ingests", start_step=1), "starts at step 0, not 1"),
    "rows of another run": (put("ingests", run="other"), "has rows of run r, not other"),
    "replaces a stranger": (put("ingests", supersedes=["nobody"]), "replaces nobody"),
    "chain goes back": (
        lambda d: d["ingests"].append(reading(1, source_path="f0", bytes_read=9, options='{"continues": "i0"}')),
        "does not continue the one before",
    ),
    "quarantine lost": (put("ingests", n_quarantined=2), "quarantine file i0.jsonl is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), DAMAGED_ROWS.values(), ids=list(DAMAGED_ROWS))
def test_validate_finds_damaged_rows(tmp_path, change, expected):
    problems = validate(build(tmp_path, change).snapshot())
    assert any(expected in p for p in problems), problems
    assert all(p.count("\n") == 0 and p.count(": ") >= 2 for p in problems), "a table, what, and what to do"


def newest(store: Store, table: str) -> Path:
    return store.snapshot().files(table)[0].path


def rewrite(store: Store, table: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a file, and let the log know its new size: only its content is wrong."""
    path = newest(store, table)
    pq.write_table(change(pq.ParquetFile(path).read()), path)
    log = sorted((store.folder(table) / "_delta_log").glob("*.json"))[-1]
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for a in actions:
        if "add" in a:
            a["add"]["size"] = path.stat().st_size
    log.write_text("\n".join(map(json.dumps, actions)) + "\n")


def replace(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), name, values)


def quarantine(store: Store, lines: int) -> None:
    store.quarantine.mkdir()
    (store.quarantine / "i0.jsonl").write_text("{}\n" * lines)


DAMAGED_FILES: dict[str, tuple[Callable[[Store], object], str]] = {
    "file missing": (lambda s: newest(s, "rollouts").unlink(), "is missing"),
    "ledger file missing": (lambda s: newest(s, "ingests").unlink(), "ingests: file"),
    "file cut": (lambda s: os.truncate(newest(s, "scores"), 100), "has 100 bytes"),
    "file unreadable": (lambda s: newest(s, "scores").write_bytes(b"x" * newest(s, "scores").stat().st_size), "cannot be read"),
    "file with fewer rows": (lambda s: rewrite(s, "rollouts", lambda t: t.slice(1)), "has 7 rows, not 8"),
    "column of another type": (
        lambda s: rewrite(s, "rollouts", lambda t: replace(t, "step", t["step"].cast(pa.string()))),
        "step is VARCHAR, not BIGINT",
    ),
    "required column NULL": (
        lambda s: rewrite(s, "rollouts", lambda t: replace(t, "split", pa.nulls(t.num_rows, pa.string()))),
        "split is NULL in 8 rows",
    ),
    "rows of another partition": (
        lambda s: rewrite(s, "rollouts", lambda t: replace(t, "run", pa.array(["q"] * t.num_rows))),
        "holds 'q'",
    ),
    "quarantine too short": (lambda s: quarantine(s, 3), "has 3 lines, not 0"),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGED_FILES.values(), ids=list(DAMAGED_FILES))
def test_validate_finds_damaged_files_and_checks_the_rest_all_the_same(tmp_path, damage, expected):
    store = build(tmp_path, put("clips", n_tokens=3))
    damage(store)
    problems = validate(store.snapshot())
    assert any(expected in p for p in problems), problems
    assert any(p.startswith("clips: n_tokens") for p in problems), "one broken file hides nothing else"


def test_validate_finds_a_table_with_columns_that_the_schema_does_not_know(tmp_path, monkeypatch):
    store = build(tmp_path)
    table = TABLES["clips"]
    columns = tuple(c for c in table.columns if c.name != "distance")
    monkeypatch.setitem(TABLES, "clips", schema.Table(table.name, table.doc, columns, table.key, table.partition, table.sort))
    assert any("column distance is unknown" in p for p in validate(store.snapshot()))
    changed = tuple(schema.Column(c.name, pa.int64() if c.name == "weight" else c.type, c.doc) for c in table.columns)
    monkeypatch.setitem(TABLES, "clips", schema.Table(table.name, table.doc, changed, table.key, table.partition, table.sort))
    problems = validate(store.snapshot())
    assert any("column weight is DOUBLE, not BIGINT" in p for p in problems)
    assert any("column clip_id may not be NULL" in p for p in problems)


def test_a_shared_hidden_or_replaced_row_is_no_problem(tmp_path):
    def change(data):
        data["rollouts"] += [rollout(i, ingest_id="i1") for i in range(2)]  # shared with i0
        data["rollouts"] += [rollout(i, ingest_id="i2") for i in range(8, 12)]  # replaced by i3
        data["rollouts"] += [rollout(4, ingest_id="i3")]  # attempt 2, hides step 1 of i0
        data["ingests"] += [
            reading(1, n_rows=2, n_shared=2),
            reading(2, n_rows=4, start_step=2),
            reading(3, n_rows=1, start_step=1, attempt=2, supersedes=["i2"], source_path="f2"),
        ]
        data["verdicts"].append({**data["verdicts"][0], "rollout_id": f"{9:032x}"})

    store = build(tmp_path, change)
    before = shown(store)
    assert validate(store.snapshot()) == []
    assert leftovers(store.snapshot())[0].startswith("rollouts: 4 rows of replaced readings")
    compact(store)
    assert validate(store.snapshot()) == []
    assert [n for n in leftovers(store.snapshot()) if "rollouts:" not in n[:9]] == [
        "verdicts: 1 rows belong to rollouts that were replaced: they stay, and are not counted"
    ]
    assert shown(store) == before


def test_rows_of_an_unfinished_reading_are_told_and_are_no_problem(tmp_path):
    store = build(tmp_path, again("rollouts", ingest_id="crashed"))
    assert validate(store.snapshot()) == []
    assert leftovers(store.snapshot()) == [
        "rollouts: 1 rows of unfinished readings, never shown: `echolab store compact` drops them"
    ]


# info and history


def test_info_counts_what_is_shown(tmp_path):
    def change(data):
        data["rollouts"] += [rollout(i, ingest_id="i1") for i in range(2)] + [rollout(4, ingest_id="i3")]
        data["rollouts"] += [rollout(i, ingest_id="i4", run="other") for i in range(20, 23)]
        data["rollouts"] += [rollout(99, ingest_id="crashed")]
        data["ingests"] += [
            reading(1, n_rows=2, n_shared=2),
            reading(3, n_rows=1, start_step=1, attempt=2),
            reading(4, n_rows=3, run="other", start_step=5, n_quarantined=2),
            reading(5, supersedes=["i4"], run="other", source_path="f4", n_rows=0),
        ]
        data["ingests"].append(reading(6, run="third", n_rows=3, start_step=5, n_quarantined=1))
        data["rollouts"] += [rollout(i, ingest_id="i6", run="third") for i in range(20, 23)]
        data["clipsets"][0]["parents"] = json.dumps({"versions": {"rollouts": 1}})

    store = build(tmp_path, change)
    facts = info(store.snapshot())
    assert facts["rollouts"] == len(shown(store)) == 4 + 1 + 3
    assert {run: (f["attempts"], f["rollouts"]) for run, f in facts["runs"].items()} == {
        "r": ([1, 2], 5), "other": ([1], 0), "third": ([1], 3),
    }  # fmt: skip
    assert facts["readings"] == {"live": 5, "superseded": 1}
    assert facts["quarantined"] == 1
    assert facts["tables"]["rollouts"]["rows"] == store.snapshot().table("rollouts").num_rows
    assert facts["tables"]["rollouts"]["files"] == 3
    assert facts["tables"]["scores"]["bytes"] == newest(store, "scores").stat().st_size
    assert [(p["kind"], p["name"], p["tables"]) for p in facts["pins"]] == [("clipsets", "best", {"rollouts": 1})]
    json.dumps(facts)
    assert info(Store.create(tmp_path / "empty").snapshot())["rollouts"] == 0


def test_history_tells_what_each_commit_did_oldest_first(tmp_path):
    store = build(tmp_path)
    fill(store, {"rollouts": [rollout(8, ingest_id="crashed")]})
    compact(store, "rollouts")
    commits = history(store)
    assert [c["time"] for c in commits] == sorted(c["time"] for c in commits)
    of_rollouts = [
        tuple(c[k] for k in ("table_version", "operation", "files_added", "files_removed", "rows_added", "rows_removed"))
        for c in commits
        if c["table"] == "rollouts"
    ]
    assert of_rollouts == [
        (0, "create", None, None, None, None),
        (1, "append", 1, 0, 8, 0),
        (2, "append", 1, 0, 1, 0),
        (3, "compact", 1, 2, 8, 9),  # the row of no reading went
    ]
    assert [c["version"] for c in history(store, "ingests")] == [0, 1]
    assert {c["table"] for c in commits} == set(TABLES)
    with pytest.raises(EcholabError, match="no table"):
        history(store, "nothing")


# compact


def many(store: Store, n: int, **fields) -> None:
    for i in range(n):
        fill(store, {"rollouts": [rollout(3 * i + k, **fields) for k in range(3)]})


def test_compact_merges_small_files_into_one_sorted_well_encoded_file_for_each_run(tmp_path):
    store = Store.create(tmp_path / "s")
    for run in ("a", "b/c"):
        for i in (3, 1, 2, 0):
            rows = [rollout(i + 4 * k, run=run, reward=[None, float("nan"), 1.0][k]) for k in range(3)]
            fill(store, {"rollouts": rows})  # every file has a row of every group
    fill(store, {"ingests": [reading(0, n_rows=12, run="a")]})
    rows, old = all_rows(store), store.snapshot()
    done = compact(store, "rollouts")
    files = store.snapshot().files("rollouts")
    assert (done["files_before"], done["files_after"], len(files), done["rows_dropped"]) == (8, 2, 2, 0)
    assert str(all_rows(store)) == str(rows)  # as text: NaN is not equal to itself
    for f in files:
        numbers = pq.ParquetFile(f.path).read()["rollout_id"].to_pylist()
        assert numbers == [f"{i:032x}" for i in range(12)] and (f.low["step"], f.high["step"]) == (0, 2)
        group = pq.read_metadata(f.path).row_group(0)
        encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
        assert "BYTE_STREAM_SPLIT" in encodings["completion_ids.list.element"]
    assert old.table("rollouts").num_rows == 24, "old versions stay readable"
    assert compact(store)["files_before"] == 0, "nothing is left to do"
    assert compact(store, full=True)["files_after"] == 3


def test_compact_drops_rows_of_dead_and_replaced_readings_and_keeps_rows_hidden_by_an_attempt(tmp_path):
    def change(data):
        data["rollouts"] += [rollout(i, ingest_id=who) for i, who in ((20, "i1"), (21, "crashed"), (22, "i2"))]
        data["ingests"] += [reading(1, n_rows=1), reading(2, n_rows=1, attempt=2, supersedes=["i1"])]

    store = build(tmp_path, change)
    before = shown(store)
    done = compact(store)
    assert done["rows_dropped"] == 2
    assert {r["ingest_id"] for r in all_rows(store)} == {"i0", "i2"}
    assert len(all_rows(store)) == 9 and shown(store) == before and len(before) == 1


def test_compact_removes_a_file_that_holds_dead_rows_only(tmp_path):
    store = Store.create(tmp_path / "s")
    many(store, 2, ingest_id="crashed")
    assert compact(store)["rows_dropped"] == 6
    assert store.snapshot().files("rollouts") == [] and all_rows(store) == []


def test_compact_works_in_many_merges_and_files_when_memory_and_targets_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "MERGE_FILES", 3)
    monkeypatch.setattr(compaction, "TARGET_BYTES", 1)
    monkeypatch.setattr(compaction, "BLOCK_BYTES", 1)
    monkeypatch.setattr(compaction, "ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(compaction, "ROW_GROUP_ROWS", (2, 4))
    store = Store.create(tmp_path / "s")
    many(store, 7)
    fill(store, {"ingests": [reading(0, n_rows=21, start_step=0)]})
    rows = all_rows(store)
    compact(store, "rollouts", full=True)
    files = store.snapshot().files("rollouts")
    assert all_rows(store) == rows
    assert max(f.rows for f in files) <= 4 and len(files) > 5
    assert validate(store.snapshot()) == []


def test_compact_keeps_all_rows_of_registries_and_the_ledger(tmp_path):
    store = build(tmp_path)
    for i in range(3):
        with store.lock():
            store.register("runs", "r", "r", {"n": i})
        fill(store, {"ingests": [reading(i + 1, supersedes=["i0"] if i == 2 else [])]})
    ledger = Ledger.of(store.snapshot().table("ingests").to_pylist())
    compact(store)
    assert store.snapshot().ledger == ledger
    assert store.snapshot().registry("runs")["r"]["config"] == {"n": 2}
    assert store.snapshot().table("runs").num_rows == 4
    assert all(len(store.snapshot().files(t)) == 1 for t in ("runs", "ingests"))


def test_auto_compacts_only_where_files_pile_up_and_nobody_is_at_it(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "MANY_SMALL_FILES", 4)
    store = Store.create(tmp_path / "s")
    many(store, 4)
    assert auto(store, "rollouts") is None
    many(store, 1, run="other")
    assert auto(store, "rollouts") is None
    many(store, 1)
    with store.lock(name="compact"):
        assert auto(store, "rollouts") is None
    done = auto(store, "rollouts")
    assert done is not None and done["files_before"] == 6 and auto(store, "rollouts") is None
    assert auto(store, "verdicts") is None


def test_compact_changes_nothing_when_rows_do_not_add_up(tmp_path, monkeypatch):
    store = build(tmp_path)
    fill(store, {"rollouts": [rollout(8)], "ingests": [reading(1, n_rows=1)]})
    rows, real = all_rows(store), compaction._merged
    monkeypatch.setattr(compaction, "_merged", lambda *a: (block.slice(1) for block in real(*a)))
    with pytest.raises(EcholabError, match="nothing was changed"):
        compact(store, "rollouts", full=True)
    assert all_rows(store) == rows


def test_compact_refuses_an_unknown_table(tmp_path):
    with pytest.raises(EcholabError, match="no table"):
        compact(build(tmp_path), "nothing")


def test_compact_sorts_a_file_that_other_software_left_out_of_order(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "BLOCK_BYTES", 1)
    store = build(tmp_path)
    rewrite(store, "rollouts", lambda t: t.take(pa.array([3, 1, 7, 0, 2, 6, 5, 4])))
    rows = all_rows(store)
    compact(store, "rollouts", full=True)
    assert all_rows(store) == rows
    ids = pq.ParquetFile(newest(store, "rollouts")).read()["rollout_id"].to_pylist()
    assert ids == sorted(ids)


def test_files_that_another_process_adds_during_a_compaction_are_kept(tmp_path, monkeypatch):
    store = build(tmp_path)
    fill(store, {"rollouts": [rollout(8)], "ingests": [reading(1, n_rows=1)]})
    real = compaction._merged

    def merged(*a):
        fill(store, {"rollouts": [rollout(30, ingest_id="i2", step=7)], "ingests": [reading(2, n_rows=1, start_step=7)]})
        yield from real(*a)

    monkeypatch.setattr(compaction, "_merged", merged)
    before = [r["rollout_id"] for r in shown(store)]
    compact(store, "rollouts", full=True)
    assert [r["rollout_id"] for r in shown(store)] == [*before, f"{30:032x}"]


class Killed(BaseException):
    """Not an Exception: nothing may catch it and tidy up the store."""


STEPS_OF_COMPACT = {
    "before planning": (compaction, "_plan"),
    "while rewriting": (compaction, "_row_groups"),
    "before a file is finished": (compaction, "finish_file"),
    "before the commit": (Store, "commit"),
    "after the renames": ("echolab.store", "RemoveAction"),
    "while the log is written": ("echolab.store", "CommitProperties"),
}


@pytest.mark.parametrize(("owner", "name"), STEPS_OF_COMPACT.values(), ids=list(STEPS_OF_COMPACT))
def test_a_compaction_killed_at_any_step_leaves_the_same_rows_and_can_be_repeated(tmp_path, monkeypatch, owner, name):
    store = build(tmp_path)
    fill(
        store,
        {
            "rollouts": [rollout(8, ingest_id="i1"), rollout(9, ingest_id="crashed")],
            "ingests": [reading(1, n_rows=1, start_step=2)],
        },
    )
    before, everything = shown(store), all_rows(store)

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            f"{owner}.{name}" if isinstance(owner, str) else owner, *((die,) if isinstance(owner, str) else (name, die))
        )
        compact(store, "rollouts")
    store = Store.open(store.root)
    assert all_rows(store) == everything and shown(store) == before and validate(store.snapshot()) == []
    compact(store, "rollouts")
    assert shown(store) == before and len(store.snapshot().files("rollouts")) == 1
    vacuum(store, **OLD)
    assert shown(store) == before
    assert len(list(store.folder("rollouts").rglob("run=*/*.parquet"))) == 1, "what the killed one left is gone"


operations = st.lists(
    st.tuples(st.sampled_from(["add", "crash", "replace", "attempt", "compact", "full", "vacuum"]), st.integers(0, 5)),
    max_size=7,
)


@given(operations)
@settings(max_examples=10, deadline=None)
def test_any_sequence_of_commits_and_maintenance_shows_the_rows_of_a_model(tmp_path_factory, steps):
    store = Store.create(tmp_path_factory.mktemp("s") / "s")
    model: list[tuple[dict, list[dict]]] = []  # readings and their rows
    for n, (what, at) in enumerate(steps):
        if what in ("compact", "full"):
            compact(store, full=what == "full")
        elif what == "vacuum":
            vacuum(store, **OLD)
        else:
            live = {r["ingest_id"] for r, _ in model} - {i for r, _ in model for i in r["supersedes"]}
            attempt = max((r["attempt"] for r, _ in model), default=1) + (what == "attempt")
            rows = [rollout(10 * n + k, step=at + k, ingest_id=f"i{n}", run="r") for k in range(3)]
            fill(store, {"rollouts": rows})
            if what != "crash":
                ledger = reading(
                    n, n_rows=3, start_step=at, attempt=attempt, supersedes=sorted(live)[:2] if what == "replace" else []
                )
                fill(store, {"ingests": [ledger]})
                model.append((ledger, rows))
    dead = {i for r, _ in model for i in r["supersedes"]}
    alive = [(r, rows) for r, rows in model if r["ingest_id"] not in dead]
    expected = set()
    for r, rows in alive:
        cutoff = min((o["start_step"] for o, _ in alive if o["attempt"] > r["attempt"]), default=10**9)
        expected |= {row["rollout_id"] for row in rows if row["step"] < cutoff}
    assert {r["rollout_id"] for r in shown(store)} == expected
    assert info(store.snapshot())["rollouts"] == len(expected)
    assert validate(store.snapshot()) == []


# vacuum


def parquet_files(store: Store) -> set[str]:
    return {
        str(p.relative_to(store.root)) for t in TABLES for p in store.folder(t).rglob("*.parquet") if "_delta_log" not in str(p)
    }


def current_files(store: Store) -> set[str]:
    return {str(f.path.relative_to(store.root)) for t in store.snapshot().versions for f in store.snapshot().files(t)}


def test_vacuum_removes_what_no_version_needs_and_a_dry_run_only_says_so(tmp_path):
    store = build(tmp_path)
    fill(
        store, {"rollouts": [rollout(8, run="a/b", ingest_id="i1")], "ingests": [reading(1, n_rows=1, run="a/b", start_step=2)]}
    )
    compact(store, full=True)
    orphan = store.folder("rollouts") / "run=a%2Fb" / "orphan.parquet"
    orphan.write_bytes(b"12345")
    rows, garbage = all_rows(store), parquet_files(store) - current_files(store)
    sizes = sum((store.root / g).stat().st_size for g in garbage)
    told = vacuum(store, dry_run=True, **OLD)
    assert set(told["files"]) == garbage and told["bytes"] == sizes and orphan.exists()
    assert vacuum(store, **OLD) == told
    assert parquet_files(store) == current_files(store)
    assert all_rows(store) == rows and validate(store.snapshot()) == []
    assert vacuum(store, **OLD)["files"] == []


def test_vacuum_keeps_what_was_current_within_the_days_to_keep(tmp_path):
    store = build(tmp_path)
    old = store.snapshot()
    compact(store, full=True)
    for f in old.files("rollouts"):
        os.utime(f.path, (0, 0))  # the age of the file is not what counts
    assert vacuum(store)["files"] == []
    assert old.table("rollouts").num_rows == 8


def test_vacuum_is_never_younger_than_the_longest_writer(tmp_path):
    store = build(tmp_path)
    for days in (0, 0.01, -1, float("nan")):
        with pytest.raises(EcholabError, match="a writer may need 1 hours"):
            vacuum(store, keep_days=days)
    assert vacuum(store, keep_days=1 / 24)["files"] == []


def pin(store: Store, kind: str, name: str, version: int = 1) -> dict[str, int]:
    versions = dict(store.snapshot().versions)
    with store.lock():
        store.register(kind, f"{kind}-{name}-{version}", name, {}, {"versions": versions}, version)
    return versions


@pytest.mark.parametrize("kind", ["clipsets", "cohorts", "exports"])
def test_vacuum_keeps_pinned_versions_readable_until_they_are_unpinned(tmp_path, kind):
    store = build(tmp_path)
    versions = pin(store, kind, "mine")
    fill(store, {"rollouts": [rollout(8)]})
    compact(store, full=True)
    vacuum(store, **OLD)
    pinned = type(store.snapshot())(store, versions)
    assert pinned.table("rollouts").num_rows == 8 and len(pinned.ledger.readings) == 1
    with pytest.raises(EcholabError, match=r"nothing named other is pinned \(pinned: mine@1\)"):
        vacuum(store, unpin=["other"], **OLD)
    told = vacuum(store, unpin=["mine"], dry_run=True, **OLD)
    assert told["released"] == ["mine@1"] and [p["name"] for p in info(store.snapshot())["pins"]] == ["mine"]
    done = vacuum(store, unpin=["mine"], **OLD)
    assert set(told["files"]) <= set(done["files"]) and info(store.snapshot())["pins"] == []
    assert parquet_files(store) == current_files(store)
    assert store.snapshot().registry(kind)[f"{kind}-mine-1"]["version"] == 1


def test_unpinning_a_name_releases_all_its_versions_and_name_at_version_one(tmp_path):
    store = build(tmp_path)
    for version in (1, 2, 3):
        pin(store, "clipsets", "mine", version)
    pin(store, "exports", "other")
    assert vacuum(store, unpin=["mine@2"], **OLD)["released"] == ["mine@2"]
    assert vacuum(store, unpin=["mine"], **OLD)["released"] == ["mine@1", "mine@3"]
    assert [p["name"] for p in maintenance.pins(store.snapshot())] == ["other"]


def test_vacuum_removes_job_folders_of_the_dead_and_leaves_the_living_the_young_and_the_plans(tmp_path):
    store = build(tmp_path)
    long_ago = (time.time() - 9e4, time.time() - 9e4)
    for name in ("ingest-dead", "add-dead", "compact-dead", "ingest-young", "score-plan"):
        store.job_folder(name).mkdir(parents=True)
        (store.job_folder(name) / "staged.tmp").write_text("half")
        if name != "ingest-young":
            os.utime(store.job_folder(name), long_ago)
    with store.job("ingest") as alive:
        os.utime(alive, long_ago)
        removed = vacuum(store, keep_days=1)
        assert alive.exists()
    left = {f.name for f in store.job_folder("").iterdir()}
    assert left == {"ingest-young", "score-plan"}
    assert "_jobs/ingest-dead/staged.tmp" in removed["files"] and removed["bytes"] >= 12


def test_vacuum_removes_quarantine_files_that_no_reading_needs(tmp_path):
    store = build(tmp_path)
    fill(store, {"ingests": [reading(1), reading(2, supersedes=["i1"], source_path="f1", created_at=datetime.now(UTC))]})
    store.quarantine.mkdir()
    for name in ("i0", "i1", "never"):
        (store.quarantine / f"{name}.jsonl").write_text("")
    assert vacuum(store)["files"] == ["_quarantine/never.jsonl"]
    assert vacuum(store, **OLD)["files"] == ["_quarantine/i1.jsonl"]
    assert [f.name for f in store.quarantine.iterdir()] == ["i0.jsonl"]


@pytest.mark.parametrize("step", ["_vacuum_table", "_dead_jobs", "_old_quarantine", "release"])
def test_a_vacuum_killed_at_any_step_leaves_the_same_rows(tmp_path, monkeypatch, step):
    store = build(tmp_path)
    pin(store, "clipsets", "mine")
    compact(store, full=True)
    rows = {t: all_rows(store, t) for t in TABLES if t != "clipsets"}

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(maintenance, step, die)
        vacuum(store, unpin=["mine"], **OLD)
    assert {t: all_rows(store, t) for t in rows} == rows and validate(store.snapshot()) == []


# migrate


def without(table: str, *columns: str) -> schema.Table:
    """The table as an older echolab had it."""
    t = TABLES[table]
    kept = tuple(c for c in t.columns if c.name not in columns)
    return schema.Table(t.name, t.doc, kept, t.key, t.partition, t.sort)


@pytest.fixture
def older(tmp_path, monkeypatch) -> Store:
    """A store in which two columns do not exist yet."""
    with monkeypatch.context() as patch:
        patch.setitem(TABLES, "rollouts", without("rollouts", "policy_version", "rewards"))
        store = Store.create(tmp_path / "store")
        data = content()
        for row in data["rollouts"]:
            del row["rewards"]
        fill(store, data)
    return store


def test_an_older_store_reads_with_typed_nulls_refuses_writes_and_migrates(older):
    rows = older.snapshot().table("rollouts")
    assert rows.schema == TABLES["rollouts"].arrow and rows["rewards"].null_count == 8
    with pytest.raises(EcholabError, match="run `echolab store migrate`"):
        fill(older, {"rollouts": [rollout(8)]})
    assert any("rewards is missing" in p for p in validate(older.snapshot()))
    assert migrate(older) == ["rollouts: added rewards, policy_version"]
    assert migrate(older) == []
    assert validate(older.snapshot()) == []
    fill(older, {"rollouts": [rollout(8, ingest_id="i1", policy_version="7")], "ingests": [reading(1, n_rows=1, start_step=2)]})
    assert [r["policy_version"] for r in shown(older)] == [None] * 8 + ["7"]
    compact(older, full=True)
    assert validate(older.snapshot()) == [] and len(shown(older)) == 9
    assert shown(older)[8]["rewards"] == [("accuracy", 1.0)]


def test_migrate_brings_the_format_up_step_by_step_and_survives_a_kill(older, monkeypatch):
    older.mark(FORMAT_VERSION - 2)

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Store, "mark", die)
        migrate(older)
    assert Store.open(older.root).format == FORMAT_VERSION - 2 and len(shown(older)) == 8
    monkeypatch.setitem(maintenance.STEPS, FORMAT_VERSION - 1, lambda store: "did something")
    assert migrate(older) == [f"store format {FORMAT_VERSION - 1}", "did something", f"store format {FORMAT_VERSION}"]
    assert Store.open(older.root).format == FORMAT_VERSION and len(shown(older)) == 8


def test_migrate_refuses_a_table_of_a_newer_echolab_before_it_changes_anything(tmp_path, monkeypatch):
    store = build(tmp_path)
    monkeypatch.setitem(TABLES, "scores", without("scores", "mean_entropy"))
    extra = schema.Column("brand_new", pa.string(), "x")
    t = TABLES["rollouts"]
    monkeypatch.setitem(TABLES, "rollouts", schema.Table(t.name, t.doc, (*t.columns, extra), t.key, t.partition, t.sort))
    with pytest.raises(EcholabError, match="columns of a newer echolab"):
        migrate(store)
    assert "brand_new" not in pa.schema(store.delta("rollouts").schema().to_arrow()).names


def test_migrate_refuses_a_column_that_may_not_be_null(tmp_path, monkeypatch):
    store = build(tmp_path)
    t = TABLES["scores"]
    extra = schema.Column("must", pa.string(), "x", required=True)
    monkeypatch.setitem(TABLES, "scores", schema.Table(t.name, t.doc, (*t.columns, extra), t.key, t.partition, t.sort))
    with pytest.raises(EcholabError, match="lacks must"):
        migrate(store)


def test_the_rows_that_compaction_writes_read_alike_in_duckdb(tmp_path):
    store = build(tmp_path)
    fill(store, {"rollouts": [rollout(8)]})

    def read() -> list:
        files = [str(f.path) for f in store.snapshot().files("rollouts")]
        return duckdb.connect().execute(f"SELECT * FROM read_parquet({files}) ORDER BY rollout_id").fetchall()

    before = read()
    compact(store, "rollouts", full=True)
    assert read() == before
