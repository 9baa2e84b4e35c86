from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from echolab.errors import EcholabError
from echolab.readers import Row, Source, plain
from echolab.schema import ROLLOUTS

FULL = {
    "prompt": "Q",
    "completion": "A",
    "completion_ids": [1, 2, 3],
    "prompt_ids": [7],
    "logprobs": [-0.5, -1, -2.5],
    "loss_mask": [1, 0, True],
    "reward": "True",
    "rewards": {"format": 1, "style": None},
    "success_recorded": 1,
    "advantage": 0.5,
    "step": 4.0,
    "sample": "2",
    "part": 0,
    "finish_reason": "length",
    "ground_truth": 42,
    "model": "m",
    "source": "",
    "policy_version": 12,
    "sampling": '{"temperature": 0.7}',
    "prompt_format": "raw",
    "split": "train",
    "group": "g1",
    "group_id": "theirs",
    "note": {"a": [1]},
    "nothing": None,
}
EXPECTED = {
    "reward": 1.0,
    "rewards": {"format": 1.0},
    "success_recorded": True,
    "loss_mask": [True, False, True],
    "step": 4,
    "sample": 2,
    "ground_truth": "42",
    "policy_version": "12",
    "source": None,
    "sampling": {"temperature": 0.7},
    "extra": {"group_id": "theirs", "note": {"a": [1]}},
}


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "lines.json"])
def test_fields_named_like_our_columns_need_no_map_in_any_container(tmp_path, read, name):
    path = tmp_path / name
    row = dict(FULL)
    if name == "a.parquet":
        row["loss_mask"] = [1, 0, 1]
    write(path, [row, row]) if name != "lines.json" else path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    result = read(plain, path)
    assert not result.bad
    for i, r in enumerate(result.rows):
        assert (r.row, r.key) == (i, ("g1",))
        expected = {k: v for k, v in FULL.items() if k not in ("group", "group_id", "note", "nothing")} | EXPECTED
        assert r.fields == expected
    assert len(result.rows) == result.source.rows == 2
    assert result.source.consumed == path.stat().st_size
    assert bool(result.source.found.get("whole")) is (name in ("a.json", "a.parquet"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_compressed_file_is_read_as_what_is_in_it(tmp_path, read, name):
    path = write(tmp_path / name, [FULL, FULL])
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [(r.row, r.key, r.fields) for r in read(plain, packed).rows] == [
        (r.row, r.key, r.fields) for r in read(plain, path).rows
    ]
    assert len(read(plain, packed).rows) == 2


def test_fields_are_columns_of_the_rollouts_table(tmp_path, read):
    row = read(plain, write(tmp_path / "a.jsonl", [FULL])).rows[0]
    assert row.fields.keys() <= {c.name for c in ROLLOUTS.columns}


def test_without_a_group_the_key_is_left_to_the_prompt_and_a_row_is_no_sample_number(tmp_path, read, dumps):
    rows = read(plain, dumps.plain(tmp_path / "a.jsonl")).rows
    assert [(r.key, r.fields.get("sample"), r.fields["reward"]) for r in rows] == [(None, None, i % 2) for i in range(4)]
    assert rows[0].fields["prompt_format"] == "unknown"


def test_a_map_walks_objects_and_lists_and_what_it_leaves_is_kept(tmp_path, read):
    row = {
        "meta": {"q": "Q", "id": 3, "deep": {"gold": "G", "by": "me"}},
        "samples": [{"out": {"text": "a", "n": 1}, "r": 1}, {"out": {"text": "b", "n": 2}, "r": "0.5"}],
        "lp": [0.1, 0.2],
        "style": 0.25,
    }
    paths = {"prompt": "meta.q", "ground_truth": "meta.deep.gold", "completion": "samples[].out.text", "reward": "samples[].r"}
    paths |= {"rewards.style": "style", "rewards.lp": "lp[]", "model": "nowhere.to.find", "finish_reason": "samples[].why"}
    result = read(plain, write(tmp_path / "a.jsonl", [row]), map=paths)
    assert not result.bad
    assert [(r.row, r.key, r.fields["sample"]) for r in result.rows] == [(0, ("a.jsonl", None, 0), i) for i in (0, 1)]
    f = [r.fields for r in result.rows]
    assert [(x["prompt"], x["ground_truth"], x["completion"], x["reward"]) for x in f] == [
        ("Q", "G", "a", 1.0),
        ("Q", "G", "b", 0.5),
    ]
    assert [x["rewards"] for x in f] == [{"style": 0.25, "lp": 0.1}, {"style": 0.25, "lp": 0.2}]
    assert all(x.get("model") is None and x.get("finish_reason") is None for x in f)
    assert [x["extra"] for x in f] == [{"meta": {"id": 3, "deep": {"by": "me"}}, "samples": {"out": {"n": n}}} for n in (1, 2)]


def test_a_mapped_group_wins_over_the_row_of_a_list(tmp_path, read):
    path = write(tmp_path / "a.json", [{"id": 5, "ys": ["a", "b"]}])
    assert [r.key for r in read(plain, path, map={"completion": "ys[]", "group": "id"}).rows] == [(5,), (5,)]


def test_a_field_that_the_map_uses_is_not_taken_a_second_time(tmp_path, read):
    path = write(tmp_path / "a.jsonl", [{"prompt": "the answer", "completion": "the question"}])
    fields = read(plain, path, map={"completion": "prompt", "prompt": "completion"}).rows[0].fields
    assert (fields["prompt"], fields["completion"], fields["extra"]) == ("the question", "the answer", {})
    fields = read(plain, path, map={"completion": "prompt"}).rows[0].fields
    assert fields.get("prompt") is None


MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "Q"}]


@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"prompt": MESSAGES}, {"messages": json.dumps(MESSAGES)}])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chat_prompts_are_messages(tmp_path, read, row, suffix):
    fields = read(plain, write(tmp_path / f"a.{suffix}", [{**row, "completion": "A"}])).rows[0].fields
    assert fields["messages"] == MESSAGES
    assert fields["prompt_format"] == "chat"
    assert fields.get("prompt") is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q"}, "completion is missing"),
        ({"completion": None}, "completion is missing"),
        ({"completion": 3}, "completion is not a text: int"),
        ({"completion": "a", "prompt": 3}, "prompt is not a text: int"),
        ({"completion": "a", "prompt": [{"text": "q"}]}, "messages is not a list of {role, content}"),
        ({"completion": "a", "messages": "no json"}, "not JSON"),
        ({"completion": "a", "reward": "good"}, "reward is not a number: 'good'"),
        ({"completion": "a", "reward": [1]}, "reward is not a number: list"),
        ({"completion": "a", "rewards": 1}, "rewards is not an object: int"),
        ({"completion": "a", "rewards": {"x": "y"}}, "rewards.x is not a number: 'y'"),
        ({"completion": "a", "step": "four"}, "step is not a whole number: 'four'"),
        ({"completion": "a", "sample": True}, "sample is not a whole number: 'True'"),
        ({"completion": "a", "success_recorded": 0.5}, "success_recorded is neither true nor false: '0.5'"),
        ({"completion": "a", "model": {"x": 1}}, "model is not a single value: dict"),
        ({"completion": "a", "group": [1]}, "group is not a single value: list"),
        ({"completion": "a", "prompt_format": "html"}, "prompt_format is none of raw, chat, rendered, unknown: 'html'"),
        ({"completion": "a", "sampling": [1]}, "sampling is not an object: list"),
        ({"completion_ids": "1 2"}, "completion_ids is not a list: str"),
        ({"completion_ids": [1.5]}, "completion_ids is not a list of token ids"),
        ({"completion_ids": [1 << 40]}, "completion_ids is not a list of token ids"),
        ({"completion_ids": [-1]}, "completion_ids holds a negative token id"),
        ({"completion_ids": [1, 2], "logprobs": [0.5]}, "lists of different length: completion_ids 2, logprobs 1"),
        ({"completion_ids": [1, 2], "logprobs": [None, 0.5]}, "logprobs is not a list of numbers"),
        ({"completion_ids": [1, 2], "loss_mask": [1, 2]}, "loss_mask is not a list of 0 and 1"),
        ("text", "expected a JSON object, got str"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_bad_row_says_why_keeps_its_bytes_and_leaves_the_others(tmp_path, read, row, reason, suffix):
    good = {"completion": "a"}
    result = read(plain, write(tmp_path / f"a.{suffix}", [good, row, good]))
    assert [r.row for r in result.rows] == [0, 2]
    assert [b.row for b in result.bad] == [1]
    assert result.bad[0].reason.startswith(reason)
    assert json.loads(result.bad[0].raw) == row


@pytest.mark.parametrize(
    ("row", "row_reasons"),
    [
        ({"ys": ["a", "b"], "rs": [1]}, ["lists of different length: ys 2, rs 1"]),
        ({"ys": "a", "rs": [1]}, ["ys is not a list: str"]),
        ({"ys": [], "rs": []}, ["the mapped lists hold nothing: no completions"]),
        ({"other": 1}, ["the mapped lists hold nothing: no completions"]),
        ({"rs": [1, 0]}, ["sample 0: completion is missing", "sample 1: completion is missing"]),
        ({"ys": ["a", None], "rs": [1, 0]}, ["sample 1: completion is missing"]),
        ({"ys": ["a", "b"], "rs": [1, "x"]}, ["sample 1: reward is not a number: 'x'"]),
    ],
)
def test_bad_lists_are_one_bad_row_and_bad_elements_one_each(tmp_path, read, row, row_reasons):
    path = write(tmp_path / "a.jsonl", [{"ys": ["x"]}, row])
    result = read(plain, path, map={"completion": "ys[]", "reward": "rs[]"})
    assert [(b.row, b.reason) for b in result.bad] == [(1, reason) for reason in row_reasons]
    assert len(result.rows) + len(result.bad) >= 2


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"complation": "x"}, "there is no column 'complation'; the nearest is 'completion'"),
        ({"rollout_id": "x"}, "there is no column 'rollout_id'"),
        ({"rewards.": "x"}, "there is no column 'rewards.'"),
        ({"completion": "a[].b[]"}, "one \\[\\] at most"),
        ({"completion": "a..b"}, "empty name"),
        ({"completion": "[].b"}, "empty name"),
    ],
)
def test_a_wrong_map_is_an_error_that_helps(tmp_path, read, dumps, paths, message):
    with pytest.raises(EcholabError, match=message):
        read(plain, dumps.plain(tmp_path / "a.jsonl"), map=paths)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_file_without_completions_is_an_error_that_names_its_fields_and_an_example(tmp_path, read, name):
    path = write(tmp_path / name, [{"question": "q", "responses": ["a"]}])
    with pytest.raises(EcholabError, match=r"fields question, responses; .* completion=responses\[\]"):
        read(plain, path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_no_rows_and_is_no_error(tmp_path, read, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert read(plain, path).said == []


def test_a_file_that_grows_while_it_is_read_ends_where_it_ended_at_the_start(tmp_path):
    path = write(tmp_path / "a.json", [{"completion": "x"}])
    size = path.stat().st_size
    source = Source(path, "a.json", "a.json")
    path.write_bytes(path.read_bytes() + b"[]")
    assert [type(r) for r in plain.read(source)] == [Row]
    assert source.consumed == size


def test_a_truncated_array_keeps_its_complete_rows(tmp_path, read):
    path = write(tmp_path / "a.json", [{"completion": f"{i}"} for i in range(5)])
    path.write_bytes(path.read_bytes()[:-8])
    result = read(plain, path)
    assert [r.fields["completion"] for r in result.rows] == ["0", "1", "2", "3"]
    assert [(b.row, b.reason) for b in result.bad] == [(4, "the file ends in the middle of [4]")]


def test_invalid_utf8_in_parquet_is_a_bad_row(tmp_path, read):
    column = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"completion": column}), tmp_path / "a.parquet")
    result = read(plain, tmp_path / "a.parquet")
    assert [r.row for r in result.rows] == [0]
    assert [(b.row, b.reason) for b in result.bad] == [(1, "invalid UTF-8")]


def test_a_parquet_map_column_of_rewards_is_read(tmp_path, read):
    rewards = pa.array([[("a", 1.0), ("b", None)]], pa.map_(pa.string(), pa.float64()))
    pq.write_table(pa.table({"completion": ["x"], "rewards": rewards}), tmp_path / "a.parquet")
    assert read(plain, tmp_path / "a.parquet").rows[0].fields["rewards"] == {"a": 1.0}


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from([*plain.COLUMNS, "other"]), JSONS, max_size=5), max_size=4))
def test_any_value_in_any_column_is_a_row_or_a_bad_row(scratch, read, rows):
    path = write(scratch / "p.jsonl", [{"completion": "first"}, *rows])
    result = read(plain, path, map={"completion": "completion"})
    assert len(result.rows) + len(result.bad) == len(rows) + 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.binary(max_size=30) | st.sampled_from([b'{"ys": [1, "a"]}', b'{"ys": {}}', b'{"ys": [{"y": "a"}]}']), max_size=6
    )
)
def test_random_bytes_never_raise(scratch, read, content):
    assume(not b"\n".join(content).startswith(b"PAR1"))  # that is Parquet, and damaged
    for name in ("r.jsonl", "r.json"):
        path = scratch / name
        path.write_bytes(b"\n".join(content))
        read(plain, path, map={"completion": "ys[]"})
        path.write_bytes(b"[" + b",".join(content))
        read(plain, path, map={"completion": "ys[].y"})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6))
def test_a_cut_at_any_line_and_the_continuation_equal_one_reading(scratch, read, dumps, cut):
    path = dumps.plain(scratch / "w.jsonl", n=5)
    path.write_bytes(path.read_bytes() + b'{"no": "completion"}\n')
    whole, all_lines = read(plain, path), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(all_lines[:cut]))
    first = read(plain, path)
    path.write_bytes(b"".join(all_lines))
    rest = read(plain, path, start=first.source.consumed, start_row=first.source.rows)
    assert sorted(map(repr, first.said + rest.said)) == sorted(map(repr, whole.said))
