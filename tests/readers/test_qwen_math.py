from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.readers import qwen_math


def test_the_genuine_100_x_8_file_has_the_facts_of_the_data_page(data, read):
    path = data / "rollouts" / "qwen25math_rm_maj_example_math_100x8.jsonl"
    result = read(qwen_math, path)
    assert (len(result.rows), result.bad) == (800, [])
    assert sum(r.fields["reward"] for r in result.rows) / 800 == 0.91
    scores = defaultdict(list)
    for r in result.rows:
        scores[r.key].append(r.fields["success_recorded"])
    assert set(scores) == {(path.name, None, i) for i in range(100)}
    assert sum(all(s) for s in scores.values()) == 86
    assert [key[2] for key, s in scores.items() if not any(s)] == [3, 72, 84, 85]
    assert [key[2] for key, s in scores.items() if any(s) and not all(s)] == [6, 17, 28, 37, 54, 58, 70, 81, 92, 98]
    assert len({r.fields["completion"] for r in result.rows}) == 724
    best = [max((r for r in result.rows if r.key[2] == i), key=lambda r: r.fields["rewards"]["pred_score"]) for i in range(100)]
    assert sum(r.fields["reward"] for r in best) == 94
    assert [r.fields["sample"] for r in result.rows] == [*range(8)] * 100
    extra = result.rows[0].fields["extra"]
    assert extra["level"] == "Level 3"
    assert extra["pred"] == "420"
    assert not extra.keys() & {"solution", "gt_cot", "history", "response", "query", "report"}


@pytest.mark.parametrize(
    ("name", "right", "longest"),
    [("qwen25_14b_instruct", 26, 3261), ("sky_t1_correct_14b", 22, 133055), ("sky_t1_reflection02_32b", 29, 130046)],
)
def test_genuine_expert_files_have_one_sample_of_each_of_40_problems(data, read, name, right, longest):
    result = read(qwen_math, data / "experts" / f"{name}_amc23.jsonl")
    assert (len(result.rows), result.bad, result.source.rows) == (40, [], 40)
    assert sum(r.fields["success_recorded"] for r in result.rows) == right
    assert max(len(r.fields["completion"]) for r in result.rows) == longest
    assert all(r.fields["sample"] == 0 and r.fields["split"] == "eval" and r.fields["rewards"] is None for r in result.rows)
    assert result.rows[0].fields["ground_truth"] == "27"
    assert result.rows[0].fields["extra"]["answer"] == 27.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"score": [True]}, "score has 1 entries, code 2"),
        ({"pred": ["1", "2", "3"]}, "pred has 3 entries, code 2"),
        ({"pred_score": [[0.5]]}, "pred_score has 1 entries, code 2"),
        ({"score": True}, "score is not a list: bool"),
        ({"code": None}, "code, the list of completions, is missing"),
        ({"code": [], "pred": [], "report": [], "score": [], "pred_score": []}, "code, the list of completions, is empty"),
    ],
)
def test_a_problem_whose_lists_do_not_fit_is_one_bad_row(tmp_path, read, dumps, change, reason):
    rows = [json.loads(line) for line in dumps.qwen_math(tmp_path / "a.jsonl").read_text().splitlines()]
    rows[1] |= change
    result = read(qwen_math, dumps.lines(tmp_path / "a.jsonl", rows))
    assert [r.row for r in result.rows] == [0, 0, 2, 2]
    assert [(b.row, b.reason) for b in result.bad] == [(1, reason)]
    assert json.loads(result.bad[0].raw) == rows[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"code": ["x", None]}, "sample 1: code is not a text: NoneType"),
        ({"score": [True, "?"]}, "sample 1: score is not a number: '?'"),
    ],
)
def test_one_bad_sample_leaves_the_other_with_its_number(tmp_path, read, dumps, change, reason):
    rows = [json.loads(line) for line in dumps.qwen_math(tmp_path / "a.jsonl", problems=1).read_text().splitlines()]
    result = read(qwen_math, dumps.lines(tmp_path / "a.jsonl", [rows[0] | change]))
    assert [(r.row, r.key, r.fields["sample"]) for r in result.rows] == [(0, ("a.jsonl", None, 10), 0)]
    assert [(b.row, b.reason) for b in result.bad] == [(0, reason)]


def test_what_is_unknown_stays_unknown(tmp_path, read, dumps):
    row = {"idx": None, "question": "q", "gt": None, "code": ["a", "b"], "score": [None, 0.5], "response": ["a", "other"]}
    rows = read(qwen_math, dumps.lines(tmp_path / "a.jsonl", [row])).rows
    assert [(r.key, r.fields["reward"], r.fields["success_recorded"]) for r in rows] == [
        (("a.jsonl", None, 0), None, None),
        (("a.jsonl", None, 0), 0.5, None),
    ]
    assert rows[0].fields["ground_truth"] is None
    assert [r.fields["extra"] for r in rows] == [{}, {"response": "other"}]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.binary(max_size=30) | st.sampled_from([b'{"code": [1]}', b'{"code": 1}', b'{"idx": {}, "code": ["a"]}']), max_size=6
    )
)
def test_random_lines_never_raise(scratch, read, content):
    path = scratch / "q.jsonl"
    path.write_bytes(b"\n".join(content))
    read(qwen_math, path)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5))
def test_a_cut_at_any_line_and_the_continuation_equal_one_reading(scratch, read, dumps, cut):
    path = dumps.qwen_math(scratch / "w.jsonl", problems=5)
    whole, all_lines = read(qwen_math, path), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(all_lines[:cut]))
    first = read(qwen_math, path)
    path.write_bytes(b"".join(all_lines))
    rest = read(qwen_math, path, start=first.source.consumed, start_row=first.source.rows)
    assert first.said + rest.said == whole.said
