from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from echolab.readers import verl
from echolab.readers.base import is_compressed


def test_v0_rows_have_no_key_and_their_texts_become_numbers(tmp_path, read, dumps):
    path = dumps.verl_v0(tmp_path / "7.jsonl", prompts=3, n=4)
    result = read(verl, path)
    assert len(result.rows) == 12
    assert not result.bad
    assert result.source.found["version"] == "v0"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    for i, (row, w) in enumerate(zip(result.rows, written, strict=True)):
        assert (row.row, row.key) == (i, None)
        f = row.fields
        assert (f["prompt"], f["completion"], f["reward"], f["ground_truth"]) == (w["input"], w["output"], w["score"], w["gts"])
        assert f["success_recorded"] is (w["acc"] == "True")
        assert f["extra"] == {"acc": w["acc"], "pred": w["pred"]}  # raw values of what was text are kept
        assert (f["step"], f["split"], f["prompt_format"], f.get("sample")) == (7, "train", "rendered", None)


def test_v1_groups_sessions_and_outputs_come_from_the_uid(tmp_path, read, dumps):
    result = read(verl, dumps.verl_v1(tmp_path / "7.jsonl", prompts=3, n=4, parts=2))
    assert result.source.found["version"] == "v1"
    assert Counter(r.key for r in result.rows) == {("6b_0",): 8, ("6b_1",): 8, ("6b_2",): 8}
    for r in result.rows:
        answer = f"A{r.key[0][3:]}.{r.fields['sample']}.{r.fields['part']}"
        assert r.fields["completion"] == answer


@pytest.mark.parametrize("uid", ["a1b2c3", "a_b_c", "x_1", "_1_2", "a_1_-2", "a_1_99999999999"])
def test_a_uid_of_another_shape_is_the_group_and_numbers_no_sample(tmp_path, read, dumps, uid):
    path = dumps.lines(tmp_path / "1.jsonl", [{"input": "q", "output": "a", "score": 1, "uid": uid}])
    row = read(verl, path).rows[0]
    assert row.key == (uid,)
    assert "sample" not in row.fields
    assert "part" not in row.fields


@pytest.mark.parametrize(
    ("score", "reward"), [("True", 1.0), ("0.5", 0.5), ("False", 0.0), (True, 1.0), (1, 1.0), (None, None), ("None", None)]
)
def test_scores_are_coerced_and_texts_kept_as_they_stood(tmp_path, read, dumps, score, reward):
    path = dumps.lines(tmp_path / "1.jsonl", [{"input": "q", "output": "a", "score": score, "step": "12", "gts": [1, "x"]}])
    fields = read(verl, path).rows[0].fields
    assert fields["reward"] == reward
    assert fields["extra"] == ({"score": score} if isinstance(score, str) else {})
    assert fields["step"] == 12
    assert fields["ground_truth"] == '[1, "x"]'
    assert fields["success_recorded"] is None


@pytest.mark.parametrize(
    ("acc", "success"), [(True, True), ("False", False), (1.0, True), ("0", False), (0.5, None), ("maybe", None), ([1], None)]
)
def test_acc_is_the_recorded_verdict_where_it_is_one(tmp_path, read, dumps, acc, success):
    path = dumps.lines(tmp_path / "1.jsonl", [{"input": "q", "output": "a", "score": 1, "acc": acc}])
    fields = read(verl, path).rows[0].fields
    assert fields["success_recorded"] is success
    assert fields["extra"] == ({} if acc is True else {"acc": acc})


@pytest.mark.parametrize(
    ("typed", "split"),
    [
        ("val/3.jsonl", "eval"),
        ("runs/validation_data/3.jsonl", "eval"),
        ("rollouts-eval/3.jsonl", "eval"),
        ("Val_dump/3.jsonl", "eval"),
        ("evaluate_values/3.jsonl", "train"),
        ("valley/medieval/3.jsonl", "train"),
        ("train/3.jsonl", "train"),
    ],
)
def test_the_typed_path_tells_validation(tmp_path, read, dumps, typed, split):
    result = read(verl, dumps.verl_v1(tmp_path / "3.jsonl"), typed=typed)
    assert {r.fields["split"] for r in result.rows} == {split}
    assert [("eval" in note and "path" in note) for note in result.source.notes] == [True] * (split == "eval")


def test_a_reward_equal_to_the_score_without_a_uid_is_taken_as_validation_and_said(tmp_path, read, dumps):
    row = {"input": "q", "output": "a", "score": 1.0, "reward": "1.0"}
    result = read(verl, dumps.lines(tmp_path / "3.jsonl", [row, row]))
    assert [r.fields["split"] for r in result.rows] == ["eval", "eval"]
    assert "a guess" in result.source.notes[0]
    result = read(verl, dumps.lines(tmp_path / "3.jsonl", [{**row, "uid": "a_0_0"}]))
    assert result.rows[0].fields["split"] == "train"


def test_the_first_row_decides_for_a_file_that_is_read_on(tmp_path, read, dumps):
    rows = [{"input": "q", "output": "a", "score": 1.0, "reward": 1.0}, {"input": "q", "output": "b", "score": 0.0}]
    path = dumps.lines(tmp_path / "3.jsonl", rows)
    start = path.read_bytes().index(b"\n") + 1
    rest = read(verl, path, start=start, start_row=1)
    assert [(r.row, r.fields["split"]) for r in rest.rows] == [(1, "eval")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input": "q", "score": 1}, "output is missing"),
        ({"input": "q", "output": ["a"], "score": 1}, "output is not a text: list"),
        ({"input": {}, "output": "a", "score": 1}, "input is not a text: dict"),
        ({"input": "q", "output": "a", "score": "good"}, "score is not a number: 'good'"),
        ({"input": "q", "output": "a", "score": {}}, "score is not a number: dict"),
        ({"input": "q", "output": "a", "score": 1, "step": 1.5}, "step is not a whole number: '1.5'"),
        (["no", "object"], "expected a JSON object, got list"),
    ],
)
def test_a_bad_row_says_why_and_the_others_stay(tmp_path, read, dumps, row, reason):
    good = {"input": "q", "output": "a", "score": 1}
    result = read(verl, dumps.lines(tmp_path / "1.jsonl", [good, row, good]))
    assert [r.row for r in result.rows] == [0, 2]
    assert [(b.row, b.reason, b.raw, b.tail) for b in result.bad] == [(1, reason, json.dumps(row).encode() + b"\n", False)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (rb'{"input": "q", "output": "\ud800", "score": 1}', "a string holds a lone surrogate"),
        (b'{"input": "q", "output": "\xff", "score": 1}', "invalid UTF-8"),
        (b'{"input": "q", "output": "\xed\xa0\x80", "score": 1}', "invalid UTF-8"),
        (b'{"input": "q", "output": "a", "score": 1' + b"0" * 400 + b"}", "score is"),
        (b'{"input": "q", "output": "a", "score": NaN, "step": 1' + b"0" * 400 + b"}", "step is too large"),
        (b'{"input": "q", "output": "a", "gts": NaN, "score": 1' + b"0" * 400 + b"}", "score is too large"),
        (b'{"input": "q", "output": "a", "score": 1e400}', "score is infinite"),
        (b'{"input": "q", "output": "a", "gts": ' + b"[" * 5000 + b"]" * 5000 + b"}", "JSON nested too deeply"),
        (b'{"input": "q", "output"', "not JSON"),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_broken_text_is_one_bad_row_and_no_traceback(tmp_path, read, line, reason, end):
    good = rb'{"input": "q", "output": "\ud83d\ude00", "score": NaN}'
    path = tmp_path / "1.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + end.join([good, line, b"", good, b""]))
    result = read(verl, path)
    assert [(r.row, r.fields["completion"]) for r in result.rows] == [(0, "😀"), (2, "😀")]
    assert [b.row for b in result.bad] == [1]
    assert result.bad[0].reason.startswith(reason)
    assert result.bad[0].raw == line + end


def test_an_unfinished_last_line_waits_for_the_next_reading(tmp_path, read, dumps):
    path = dumps.verl_v1(tmp_path / "1.jsonl", prompts=1, n=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    result = read(verl, path)
    assert (len(result.rows), result.source.rows, result.source.consumed) == (1, 1, whole.index(b"\n") + 1)
    assert [(b.row, b.tail) for b in result.bad] == [(1, True)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.binary(max_size=30) | st.sampled_from([b'{"output": 1}', b'{"output": "a", "uid": []}', b"[]", b"{}"]), max_size=6
    )
)
def test_random_lines_never_raise_and_every_one_is_accounted_for(scratch, read, content):
    path = scratch / "r.jsonl"
    path.write_bytes(b"\n".join(content))
    assume(not is_compressed(path))
    result = read(verl, path)
    written = sum(1 for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip())
    assert len(result.rows) + len(result.bad) == written


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.booleans())
def test_a_cut_at_any_line_and_the_continuation_equal_one_reading(scratch, read, dumps, cut, v1):
    path = (dumps.verl_v1 if v1 else dumps.verl_v0)(scratch / "w.jsonl", prompts=3, n=4)
    whole, all_lines = read(verl, path), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(all_lines[:cut]))
    first = read(verl, path)
    path.write_bytes(b"".join(all_lines))
    rest = read(verl, path, start=first.source.consumed, start_row=first.source.rows)
    assert first.said + rest.said == whole.said
    assert rest.source.consumed == whole.source.consumed
    assert rest.source.rows == whole.source.rows
