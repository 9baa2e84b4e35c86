from __future__ import annotations

import json
from collections import Counter

import pytest
from generators import roll as dumps
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.readers import look, roll
from echolab.schema import ROLLOUTS


def test_one_line_of_columns_is_many_rollouts_grouped_by_their_id(tmp_path, read):
    data = dumps.columns(prompts=3, n=4)
    result = read(roll, dumps.dump(tmp_path, data))
    assert not result.bad
    assert [r.key for r in result.rows] == [("math_rule", id) for id in data["id"]]
    assert set(Counter(r.key for r in result.rows).values()) == {4}
    assert [r.fields["completion"] for r in result.rows] == data["responses"]
    assert [r.fields["reward"] for r in result.rows] == data["scores"]
    assert [r.fields["ground_truth"] for r in result.rows] == data["ground_truth"]
    assert {(r.row, r.fields["step"]) for r in result.rows} == {(0, 3)}
    assert all(r.fields.get("sample") is None for r in result.rows)
    first = result.rows[0].fields
    assert (first["source"], first["prompt_format"]) == ("deepmath", "chat")
    assert first["messages"] == [{"role": "user", "content": first["prompt"]}]
    assert first["sampling"] == {"temperature": 0.99, "top_p": 0.99, "top_k": 100}
    rest = {"sampling_params": {"global_step": 3, "is_offload_states": False}}
    assert first["extra"] == {"difficulty": 0.5, "tag": "math", "domain": "math_rule", **rest}
    assert first.keys() <= {c.name for c in ROLLOUTS.columns}


def test_without_ids_the_prompt_decides(tmp_path, read):
    data = dumps.columns()
    del data["id"]
    assert {r.key for r in read(roll, dumps.dump(tmp_path, data)).rows} == {None}


def test_equal_ids_of_two_domains_are_two_groups(tmp_path, read):
    data = dumps.columns(prompts=1, n=4)
    data["domain"] = ["math", "code", "math", "code"]
    assert Counter(r.key for r in read(roll, dumps.dump(tmp_path, data)).rows) == {("math", "q0"): 2, ("code", "q0"): 2}


@pytest.mark.parametrize(("given", "kept"), [("no json", "no json"), ("[1]", "[1]"), ([], []), ('[{"role": "user"}]',) * 2])
def test_messages_that_are_no_chat_stay_as_they_are(tmp_path, read, given, kept):
    data = dumps.columns(prompts=1, n=1)
    data["messages"] = [given]
    fields = read(roll, dumps.dump(tmp_path, data)).rows[0].fields
    assert (fields["messages"], fields["extra"]["messages"]) == (None, kept)
    assert fields["prompt_format"] == "unknown"


@pytest.mark.parametrize(
    ("given", "sampling", "kept"),
    [
        ('{"temperature": 0.7}', {"temperature": 0.7}, None),
        ({"temperature": 0.7}, {"temperature": 0.7}, None),
        ('{"generation_config": {"top_k": 1}}', {"top_k": 1}, None),
        ("hot", None, "hot"),
    ],
)
def test_how_it_was_sampled_is_read_from_its_json(tmp_path, read, given, sampling, kept):
    data = dumps.columns(prompts=1, n=1)
    data["sampling_params"] = [given]
    fields = read(roll, dumps.dump(tmp_path, data)).rows[0].fields
    assert (fields["sampling"], fields["extra"].get("sampling_params")) == (sampling, kept)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": [1.0]}, "scores has 1 entries, responses 8"),
        ({"scores": 1.0}, "scores is not a list: float"),
        ({"responses": None}, "responses, the list of completions, is missing"),
        ({"responses": False}, "responses is not a list: bool"),
    ],
)
def test_a_line_whose_columns_do_not_fit_together_is_one_bad_row(tmp_path, read, change, reason):
    path = dumps.dump(tmp_path, {**dumps.columns(), **change})
    result = read(roll, path)
    assert not result.rows
    assert [(b.row, b.reason, b.raw) for b in result.bad] == [(0, reason, path.read_bytes())]


def test_a_line_without_rollouts_is_said(tmp_path, read):
    path = tmp_path / "rollout_dump_data.step_0.jsonl"
    path.write_text(json.dumps({name: [] for name in dumps.columns()}))
    assert [b.reason for b in read(roll, path).bad] == ["responses, the list of completions, is empty"]


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("responses", None, "entry 1: responses is missing"),
        ("responses", 3, "entry 1: responses is not a text: int"),
        ("prompt", [1], "entry 1: prompt is not a text: list"),
        ("scores", "good", "entry 1: scores is not a number: 'good'"),
        ("global_step", 1.5, "entry 1: global_step is not a whole number: '1.5'"),
        ("id", ["a"], "entry 1: id is no number and no text: list"),
    ],
)
def test_a_bad_entry_is_bad_alone_and_keeps_no_more_than_itself(tmp_path, read, column, value, reason):
    data = dumps.columns()
    data[column][1] = value
    result = read(roll, dumps.dump(tmp_path, data))
    assert [r.fields["completion"] for r in result.rows] == [r for i, r in enumerate(data["responses"]) if i != 1]
    assert [(b.row, b.reason) for b in result.bad] == [(0, reason)]
    assert json.loads(result.bad[0].raw) == {name: items[1] for name, items in data.items() if items[1] is not None}
    assert all(len(r.raw) < 1_000 for r in result.rows)


def test_its_line_is_known_and_an_agents_dump_is_not(tmp_path, monkeypatch):
    path = dumps.dump(tmp_path)
    agent = tmp_path / "rollout_dump_data.step_9.jsonl"
    agent.write_text(json.dumps({"trajectory_data": ["{}" * 99], "messages": ["[]"], "tools": ["[]"], "exp_name": ["e"]}))
    plain = tmp_path / "rows.jsonl"
    plain.write_text('{"responses": ["a"], "scores": [1.0], "prompt": "q"}')
    assert [bool(roll.sniff(look(p))) for p in (path, agent, plain)] == [True, False, False]
    monkeypatch.setattr("echolab.readers.base.FIRST_LINE_BYTES", 100)
    monkeypatch.setattr("echolab.readers.base.HEAD_BYTES", 60)
    assert [bool(roll.sniff(look(p))) for p in (path, agent, plain)] == [True, False, False]
    assert "by its name" in str(roll.sniff(look(path)))


VALUES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3) | st.lists(st.none(), max_size=2)


CHANGES = st.lists(st.tuples(st.sampled_from(sorted(dumps.columns())), st.integers(0, 7), VALUES), max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(dumps.columns())), st.integers(0, 7), VALUES), max_size=6), st.binary(max_size=9)
)
def test_mutated_entries_never_raise_and_each_is_accounted_for(scratch, read, changes, junk):
    data = dumps.columns()
    for column, i, value in changes:
        data[column][i] = value
    path = scratch / "rollout_dump_data.step_3.jsonl"
    path.write_bytes(json.dumps(data).encode() + b"\n" + junk.replace(b"\n", b"") + b"\n")
    result = read(roll, path)
    assert len(result.rows) + sum(b.row == 0 for b in result.bad) == 8
    assert sum(b.row == 1 for b in result.bad) == bool(junk.replace(b"\n", b"").strip())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_cut_at_any_byte_and_the_continuation_equal_one_reading(scratch, read_in_two, data):
    path = scratch / "rollout_dump_data.step_3.jsonl"
    path.write_text("".join(json.dumps(dumps.columns(n=2, seed=i)) + "\n" for i in range(3)))
    read_in_two(roll, path, data.draw(st.integers(0, path.stat().st_size)))
