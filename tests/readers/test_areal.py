from __future__ import annotations

import json

import pytest
from generators import areal as dumps
from hypothesis import given, settings
from hypothesis import strategies as st

import echolab
from echolab.readers import areal, look
from echolab.schema import ROLLOUTS


def test_a_task_in_a_version_folder_is_one_group_at_one_step(tmp_path, read):
    result = read(areal, dumps.task(tmp_path, 88))
    assert not result.bad
    assert [(r.row, r.key, r.fields["sample"], r.fields["step"]) for r in result.rows] == [(i, (5, 88), i, 5) for i in range(4)]
    assert {r.fields["split"] for r in result.rows} == {"train"}
    first = result.rows[0].fields
    assert first["policy_version"] == "5"
    assert first["extra"] == {"head_version": 4, "version_rle": [[4, 300], [5, 280]]}
    assert (first["n_prompt_tokens"], first["n_completion_tokens"]) == (120, sum(n for _, n in [[4, 300], [5, 280]]))
    assert first["prompt"].startswith("<|im_start|>user")
    assert [r.fields["reward"] for r in result.rows] == [0.0, 1.0, 0.0, 1.0]
    assert result.source.notes == []
    assert first.keys() <= {c.name for c in ROLLOUTS.columns}


def test_one_step_for_a_group_whose_samples_ended_under_different_versions(tmp_path, read):
    rows = [dumps.sample(7, i, version) for i, version in enumerate((3, 5, 4))]
    result = read(areal, dumps.append(tmp_path, rows, version=5))
    assert {(r.key, r.fields["step"]) for r in result.rows} == {((5, 7), 5)}
    assert [r.fields["policy_version"] for r in result.rows] == ["3", "5", "4"]


def test_without_a_version_folder_the_first_row_gives_the_step_and_it_is_said(tmp_path, read):
    path = dumps.append(tmp_path, [dumps.sample(7, i, version) for i, version in enumerate((3, 5, 4))])
    moved = path.rename(tmp_path / "7.jsonl")
    result = read(areal, moved)
    assert {(r.key, r.fields["step"], r.fields["split"]) for r in result.rows} == {((3, 7), 3, None)}
    assert "tail_version" in result.source.notes[0]


def test_the_folder_tells_evaluation(tmp_path, read):
    result = read(areal, dumps.task(tmp_path, 1, n=2, kind="eval-rollout"))
    assert {(r.fields["split"], r.fields["step"]) for r in result.rows} == {("eval", 5)}


def test_an_agents_segments_and_its_unshaped_reward_are_kept(tmp_path, read):
    row = dumps.turns(dumps.sample(7, 1))
    fields = read(areal, dumps.append(tmp_path, [row])).rows[0].fields
    assert fields["extra"]["segments"] == row["segments"]
    assert (fields["reward"], fields["rewards"]) == (1.0, {"original_reward": 2.0})


def test_rows_that_a_resumed_run_repeats_word_for_word_are_quarantined(tmp_path, read):
    dumps.task(tmp_path, 88)
    path = dumps.task(tmp_path, 88)
    result = read(areal, path)
    assert [r.fields["sample"] for r in result.rows] == [0, 1, 2, 3]
    assert [b.row for b in result.bad] == [4, 5, 6, 7]
    assert all(b.reason.startswith("written again by a resumed run") and not b.tail for b in result.bad)
    assert result.bad[0].raw == path.read_bytes().splitlines(keepends=True)[4]


def test_what_a_resumed_run_sampled_anew_is_a_group_of_its_own(tmp_path, read):
    dumps.task(tmp_path, 88)
    dumps.append(tmp_path, [dumps.sample(88, i, said="anew ") for i in range(4)])
    path = dumps.append(tmp_path, [dumps.sample(88, i, said="once more ") for i in (1, 3)])  # samples may be skipped
    result = read(areal, path)
    assert not result.bad
    keys = [(5, 88)] * 4 + [(5, 88, 1)] * 4 + [(5, 88, 2)] * 2
    assert [(r.key, r.fields["sample"]) for r in result.rows] == list(zip(keys, [0, 1, 2, 3, 0, 1, 2, 3, 1, 3], strict=True))
    assert result.source.notes == ["a resumed run sampled its task again (6 rows): each sampling is a group of its own"]


def test_a_task_of_one_sample_that_is_sampled_anew_is_two_groups(tmp_path, read):
    path = dumps.append(tmp_path, [dumps.sample(3, 0), dumps.sample(3, 0, said="anew ")], kind="eval-rollout")
    assert [r.key for r in read(areal, path).rows] == [(5, 3), (5, 3, 1)]


def test_tasks_that_somebody_put_into_one_file_are_told_apart(tmp_path, read):
    rows = [{**dumps.sample(1, i), "task_id": task} for task in (1, "2") for i in range(2)]
    result = read(areal, dumps.append(tmp_path, rows))
    assert [r.key for r in result.rows] == [(5, 1), (5, 1), (5, "2"), (5, "2")]
    assert result.source.notes == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task_id": None}, "task_id is missing"),
        ({"task_id": [1]}, "task_id is no number and no text: list"),
        ({"sample_idx": "x"}, "sample_idx is not a whole number: 'x'"),
        ({"prompt": None}, "prompt is missing"),
        ({"completion": 3}, "completion is not a text"),
        ({"reward": "good"}, "reward is not a number: 'good'"),
        ({"prompt_len": 701}, "prompt_len is 701, of 700 tokens in all"),
        ({"seqlen": 1.5}, "seqlen is not a whole number: '1.5'"),
    ],
)
def test_a_bad_row_says_why_and_the_others_stay(tmp_path, read, change, reason):
    rows = [dumps.sample(88, i) for i in range(3)]
    rows[1] |= change
    result = read(areal, dumps.append(tmp_path, rows))
    assert [r.row for r in result.rows] == [0, 2]
    assert [(b.row, b.reason) for b in result.bad] == [(1, reason)]
    assert json.loads(result.bad[0].raw) == rows[1]


def test_its_rows_are_known_and_likenesses_are_not(tmp_path):
    assert areal.sniff(look(dumps.task(tmp_path)))
    for missing in ("task_id", "sample_idx", "tail_version", "completion"):
        row = dumps.sample(1, 0)
        del row[missing]
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps(row))
        assert areal.sniff(look(path)) is None


def test_a_resumed_run_makes_no_group_of_double_size(tmp_path):
    for version in (4, 5):
        dumps.task(tmp_path / "dump", 88, version=version)
    with echolab.open(tmp_path / "store", create=True) as lab:
        lab.ingest(tmp_path / "dump", run="r")
        dumps.append(tmp_path / "dump", [dumps.sample(88, i, said="anew ") for i in range(4)])
        dumps.task(tmp_path / "dump", 88, version=4)
        report = lab.ingest(tmp_path / "dump", run="r")
        assert {(f.status, f.rows, f.quarantined) for f in report.files} == {("continued", 4, 0), ("continued", 0, 4)}
        assert lab.sql("SELECT step, n FROM groups ORDER BY step").rows() == [(4, 4), (5, 4), (5, 4)]


VALUES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3) | st.lists(st.none(), max_size=2)
CHANGES = st.dictionaries(st.sampled_from(sorted(dumps.sample(1, 0))), VALUES, max_size=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(CHANGES, max_size=6), st.binary(max_size=9))
def test_mutated_lines_never_raise_and_each_is_accounted_for(scratch, read, changes, junk):
    path = scratch / "rollout" / "5" / "1.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({**dumps.sample(1, i % 3), **change}).encode() for i, change in enumerate(changes)]
    path.write_bytes(b"\n".join([b"", *rows, junk.replace(b"\n", b""), b""]))
    result = read(areal, path)
    written = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    assert len(result.rows) + len(result.bad) == written == result.source.rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "anew "])), max_size=8), st.data())
def test_a_cut_at_any_byte_and_the_continuation_equal_one_reading(scratch, read_in_two, samples, data):
    path = scratch / "rollout" / "5" / "1.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dumps.sample(1, i, said=said)) + "\n" for i, said in samples))
    read_in_two(areal, path, data.draw(st.integers(0, path.stat().st_size)))
