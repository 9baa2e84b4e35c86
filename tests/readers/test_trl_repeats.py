"""TRL logs its buffer again and again: each rollout counts once, whatever is ingested when."""

from __future__ import annotations

import shutil
from itertools import permutations
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from generators import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import echolab
from echolab.readers import trl as reader

MIXED, ALL = [0.0, 1.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0]
SHOWN = "SELECT rollout_id, group_id, step, prompt, completion, reward, advantage FROM rollouts ORDER BY ALL"


@pytest.fixture
def lab(tmp_path):
    with echolab.open(tmp_path / "store", create=True) as lab:
        yield lab


def three_logs_of_a_generation(folder: Path) -> list[Path]:
    """logging_steps=1, a generation every third step: the files 1, 2, 3 hold the same rows, 4 holds others."""
    trainer = trl.Trainer(folder)
    trainer.generate("first", [("a", MIXED), ("b", ALL)])
    paths = [trainer.log(step) for step in (1, 2, 3)]
    trainer.generate("second", [("a", MIXED), ("c", MIXED)])
    return [*paths, trainer.log(4)]


def test_rows_that_are_logged_again_are_the_same_rollouts_of_the_first_file(lab, tmp_path):
    paths = three_logs_of_a_generation(tmp_path / "run")
    report = lab.ingest(tmp_path / "run", run="r")
    assert [(f.rows, f.shared, f.quarantined) for f in report.files] == [(8, 0, 0), (8, 8, 0), (8, 8, 0), (8, 0, 0)]
    assert (
        "8 of its 8 rows are those of completions_00001.parquet again (step 1): TRL logs its buffer" in report.files[2].notes[1]
    )
    once = pq.read_table(paths[0]).to_pylist() + pq.read_table(paths[3]).to_pylist()
    shown = lab.sql("SELECT step, prompt, completion, reward AS accuracy, advantage FROM rollouts").to_dicts()
    assert sorted(shown, key=repr) == sorted(once, key=repr)
    degenerate = lab.query("degenerate_by_step", run="r").select("step", "n_groups", "all_success").rows()
    assert degenerate == [(1, 2, 1), (4, 2, 0)]
    assert lab.validate() == []


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_the_order_of_commands_does_not_matter(lab, tmp_path, order):
    paths = three_logs_of_a_generation(tmp_path / "run" / "completions")
    for i in order:
        lab.ingest(paths[i], run="apart")
    lab.ingest(paths[:3], run="together")
    apart, together = (
        lab.sql(
            f"SELECT step, origin.row, count(*) OVER (PARTITION BY group_id) FROM rollouts WHERE run = '{run}' ORDER BY ALL"
        )
        for run in ("apart", "together")
    )
    assert apart.rows() == together.rows() == [(1, i, 4) for i in range(8)]


def test_a_file_alone_gets_the_ids_of_the_file_before_it_on_disk(lab, tmp_path):
    paths = three_logs_of_a_generation(tmp_path / "run")
    assert lab.ingest(paths[2], run="r").files[0].shared == 0
    before = lab.sql(SHOWN).rows()
    assert {row[2] for row in before} == {1}
    assert lab.ingest(paths[0], run="r").files[0].shared == 8
    assert lab.sql(SHOWN).rows() == before


def test_without_the_earlier_file_there_is_nothing_to_compare_and_nothing_said(lab, tmp_path):
    paths = three_logs_of_a_generation(tmp_path / "run")
    paths[0].unlink()
    paths[1].unlink()
    report = lab.ingest(paths[2], run="r")
    assert len(report.files[0].notes) == 1 and "again" not in report.files[0].notes[0]
    assert lab.sql("SELECT DISTINCT step FROM rollouts").item() == 3


def test_a_part_of_the_buffer_that_stayed_is_known_again_and_what_came_is_new(lab, tmp_path):
    """An evaluation pushes rows out from the front: what stays moves there, over three files at that."""
    trainer = trl.Trainer(tmp_path / "run", generation_batch_size=12)
    trainer.generate("x", [("a", MIXED), ("b", MIXED), ("c", MIXED)])
    trainer.log(1)
    trainer.generate("y", [("d", ALL)])
    trainer.log(2)
    trainer.generate("z", [("e", MIXED)])
    trainer.log(3)
    report = lab.ingest(tmp_path / "run", run="r")
    assert [f.shared for f in report.files] == [0, 8, 8]
    assert (
        report.files[2]
        .notes[1]
        .startswith(
            "4 of its 12 rows are those of completions_00001.parquet again (step 1);"
            " 4 of its 12 rows are those of completions_00002.parquet again (step 2): TRL"
        )
    )
    shown = lab.sql("SELECT step, problem_id IS NOT NULL, prompt, count(*) FROM rollouts GROUP BY ALL ORDER BY prompt").rows()
    assert shown == [(s, True, p, 4) for s, p in [(1, "a"), (1, "b"), (1, "c"), (2, "d"), (3, "e")]]
    assert lab.sql("SELECT n, count(*) FROM groups GROUP BY ALL").rows() == [(4, 5)]


def test_equal_rows_within_a_file_stay_and_are_as_many_when_logged_again(lab, tmp_path):
    table = trl.table([("a", ALL), ("a", ALL), ("b", MIXED)], step=1, kind=["x"] * 12)
    table = table.set_column(2, "completion", [["same"] * 12])
    paths = [trl.dump(tmp_path / f"completions_0000{s}.parquet", table) for s in (1, 2)]
    lab.ingest(paths[0], run="r", group_size=4)
    assert lab.ingest(paths[1], run="r", group_size=4).files[0].shared == 12
    assert lab.sql("SELECT n, kind FROM groups ORDER BY ALL").rows() == [(4, "all_success"), (4, "all_success"), (4, "mixed")]


def test_an_equal_group_that_the_buffer_cannot_have_kept_is_a_new_visit(lab, tmp_path):
    """A policy that always says the same: what is logged again stands at the beginning, as it stood at the end."""
    for step, prompts in ((1, "ab"), (2, "cb"), (3, "ca")):
        table = trl.table([(p, ALL) for p in prompts], step=step)
        trl.dump(tmp_path / f"completions_{step:05d}.parquet", table.set_column(2, "completion", [["4"] * 8]))
    assert sum(f.shared for f in lab.ingest(tmp_path, run="r", group_size=4).files) == 0
    assert lab.query("degenerate_by_step").select("step", "all_success").rows() == [(1, 2), (2, 2), (3, 2)]


@pytest.mark.parametrize("change", ["completion", "accuracy", "advantage", "prompt"])
def test_rows_that_differ_in_anything_are_others(tmp_path, read, change):
    table = trl.table([("a", MIXED), ("b", MIXED)], step=1)
    path = trl.dump(tmp_path / "completions_00002.parquet", table)
    values = table[change].to_pylist()
    values[7] = "other" if isinstance(values[7], str) else 0.25
    names = table.column_names
    trl.dump(tmp_path / "completions_00001.parquet", table.set_column(names.index(change), change, [values]))
    assert {r.key for r in read(reader, path, group_size=4).rows} == {(path.name, 0), (path.name, 1)}
    trl.dump(tmp_path / "completions_00001.parquet", table)
    assert {r.key[0] for r in read(reader, path, group_size=4).rows} == {"completions_00001.parquet"}


def test_without_a_group_size_rows_are_known_again_one_by_one(lab, tmp_path):
    table = trl.table([("a", [0.0, 1.0]), ("b", [0.5]), ("a", [1.0, 1.0])], advantages=None, step=1)
    trl.dump(tmp_path / "completions_00001.parquet", table)
    later = trl.table([("b", [0.5]), ("a", [1.0, 1.0]), ("c", [0.0])], advantages=None, step=2)
    later = later.set_column(2, "completion", [["c2", "c3", "c4", "new"]])
    trl.dump(tmp_path / "completions_00002.parquet", later)
    report = lab.ingest(tmp_path, run="r", format="trl")
    assert [f.shared for f in report.files] == [0, 3]
    assert "3 of its 4 rows are those of completions_00001.parquet again (step 1)" in report.files[1].notes[1]
    groups = lab.sql("SELECT prompt, count(*), step FROM rollouts GROUP BY group_id, prompt, step ORDER BY prompt").rows()
    assert groups == [("a", 4, 1), ("b", 1, 1), ("c", 1, 2)]


def test_an_earlier_file_that_cannot_be_read_is_named(lab, tmp_path):
    paths = three_logs_of_a_generation(tmp_path / "run")
    paths[0].write_bytes(paths[0].read_bytes()[:-20])
    report = lab.ingest(paths[1], run="r")
    assert report.rows == 8 and report.files[0].notes[1].startswith("completions_00001.parquet before it cannot be read")


def test_a_file_of_another_group_size_may_be_an_evaluations_and_that_is_said(lab, tmp_path):
    trainer = trl.Trainer(tmp_path / "run")
    trainer.generate("train", [("a", MIXED), ("b", MIXED)])
    trainer.log(1)
    trainer.generate("eval", [("c", [0.0, 1.0]), ("d", [1.0, 0.0]), ("e", [0.5, 0.0]), ("f", [0.5, 0.25])])
    trainer.log(2)
    first, second = (f.notes for f in lab.ingest(tmp_path / "run", run="r").files)
    assert "evaluation" not in str(first)
    assert "blocks of 2" in second[0] and "the run's other dumps have groups of 4: it may be an evaluation's" in second[0]
    assert lab.sql("SELECT n, count(*) FROM groups GROUP BY ALL ORDER BY n").rows() == [(2, 4), (4, 2)]


def test_genuine_files_do_not_repeat(lab, data):
    report = lab.ingest(data / "dumps" / "trl", run="r")
    assert [(f.rows, f.shared, len(f.notes)) for f in report.files] == [(8, 0, 1), (8, 0, 1)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_any_run_of_a_trainer_shows_each_row_once_at_the_step_that_logged_it_first(scratch, read, actions):
    """0 logs; n > 0 generates n groups, of which the buffer of 3 groups keeps the last ones."""
    folder = scratch / "run"
    shutil.rmtree(folder, ignore_errors=True)
    trainer, first, seen = trl.Trainer(folder, 12), {}, {}
    for step, action in enumerate([3, *actions, 0]):
        if action:
            trainer.generate(f"step {step}", [(f"p{i}", [float(i == j) for j in range(4)]) for i in range(action)])
            continue
        for i, row in enumerate(trainer.logs):
            first.setdefault(row["completion"], (step, i // 4))
        trainer.log(step)
    for path in sorted((folder / "completions").iterdir()):
        for row in read(reader, path, group_size=4).rows:
            at = (row.fields["step"], row.key[1])
            assert row.key[0] == f"completions_{at[0]:05d}.parquet"
            assert seen.setdefault(row.fields["completion"], at) == at
    assert seen == first
