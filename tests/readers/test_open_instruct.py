from __future__ import annotations

import json
from collections import Counter

import pytest
from generators import open_instruct as dumps
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.readers import look, open_instruct
from echolab.schema import ROLLOUTS


def test_a_row_is_a_rollout_with_its_tokens_in_the_group_of_its_prompt(tmp_path, read):
    rows = dumps.batch(step=5, prompts=2, n=4)
    result = read(open_instruct, dumps.shard(tmp_path, rows))
    assert not result.bad
    assert Counter(r.key for r in result.rows) == {(dumps.RUN, 5, 0): 4, (dumps.RUN, 5, 1): 4}
    for r, row in zip(result.rows, rows, strict=True):
        f = r.fields
        assert (f["prompt_ids"], f["completion_ids"], f["logprobs"]) == (
            row["prompt_tokens"],
            row["response_tokens"],
            row["logprobs"],
        )
        assert (f["reward"], f["advantage"], f["step"], f["sample"]) == (row["reward"], row["advantage"], 5, row["sample_idx"])
        assert (f["finish_reason"], f["source"], f["ground_truth"]) == (row["finish_reason"], "math", row["ground_truth"])
        assert f["extra"] == {"prompt_idx": row["prompt_idx"], "request_info": row["request_info"]}
        assert f["model"] is None
        assert f.get("completion") is f.get("prompt") is None
    assert result.rows[0].fields.keys() <= {c.name for c in ROLLOUTS.columns}


def test_it_is_said_that_groups_were_dropped_before(tmp_path, read):
    result = read(open_instruct, dumps.shard(tmp_path))
    assert result.source.found["completeness"] == "filtered"
    assert ["filtered upstream" in note for note in result.source.notes] == [True]


def test_two_runs_in_one_folder_do_not_share_groups(tmp_path, read):
    keys = [{r.key for r in read(open_instruct, dumps.shard(tmp_path, run=run)).rows} for run in ("a", "b")]
    assert keys == [{("a", 5, 0), ("a", 5, 1)}, {("b", 5, 0), ("b", 5, 1)}]
    same = read(open_instruct, dumps.shard(tmp_path, run="a", number=1))
    assert {r.key for r in same.rows} == keys[0]


def test_the_metadata_beside_a_shard_name_the_model_and_are_no_dump_of_their_own(tmp_path, read):
    path, other = dumps.shard(tmp_path), dumps.shard(tmp_path, run="other")
    assert open_instruct.companions(path) == []
    metadata = dumps.metadata(tmp_path)
    assert open_instruct.companions(path) == [metadata]
    assert open_instruct.companions(other) == []
    assert "metadata of an open-instruct run" in str(open_instruct.aside(metadata))
    assert open_instruct.aside(path) is None
    assert {r.fields["model"] for r in read(open_instruct, path).rows} == {"allenai/Olmo-3-7B"}
    dumps.metadata(tmp_path, model="unknown")
    assert {r.fields["model"] for r in read(open_instruct, path).rows} == {None}


@pytest.mark.parametrize("content", [b"", b"PAR1 broken", b"[1]", b'{"run_name": "x"}', b'{"text": "a corpus"}'])
def test_files_that_only_sound_like_metadata_are_left_to_others(tmp_path, read, content):
    path = tmp_path / f"{dumps.RUN}_metadata.jsonl"
    path.write_bytes(content)
    assert open_instruct.aside(path) is None
    shard = dumps.shard(tmp_path)
    assert open_instruct.companions(shard) == []
    assert {r.fields["model"] for r in read(open_instruct, shard).rows} == {None}


def test_datasets_and_gold_answers_may_be_lists(tmp_path, read):
    row = {**dumps.batch()[0], "dataset": ["math", "ifeval"], "ground_truth": [1, 2], "logprobs": None, "request_info": None}
    fields = read(open_instruct, dumps.shard(tmp_path, [row])).rows[0].fields
    assert (fields["source"], fields["ground_truth"]) == ('["math", "ifeval"]', "[1, 2]")
    assert fields["logprobs"] is None
    assert fields["extra"] == {"prompt_idx": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_tokens": None}, "prompt_tokens is missing"),
        ({"response_tokens": "1 2"}, "response_tokens is not a list: str"),
        ({"response_tokens": [1, -1]}, "response_tokens holds a negative token id"),
        ({"prompt_idx": None}, "prompt_idx is missing"),
        ({"sample_idx": 0.5}, "sample_idx is not a whole number: '0.5'"),
        ({"logprobs": [None]}, "logprobs is not a list of numbers"),
        ({"reward": []}, "reward is not a number: list"),
    ],
)
def test_a_bad_row_says_why_and_the_others_stay(tmp_path, read, change, reason):
    rows = dumps.batch()[:3]
    rows[1] |= change
    result = read(open_instruct, dumps.shard(tmp_path, rows))
    assert [r.row for r in result.rows] == [0, 2]
    assert [(b.row, b.reason) for b in result.bad] == [(1, reason)]
    assert json.loads(result.bad[0].raw) == rows[1]


@pytest.mark.parametrize("missing", ["step", "sample_idx", "prompt_idx", "prompt_tokens", "response_tokens"])
def test_its_rows_are_known_and_likenesses_are_not(tmp_path, missing):
    assert open_instruct.sniff(look(dumps.shard(tmp_path)))
    row = {name: v for name, v in dumps.batch()[0].items() if name != missing}
    assert open_instruct.sniff(look(dumps.shard(tmp_path, [row], run="other"))) is None


VALUES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3) | st.lists(st.none(), max_size=2)
CHANGES = st.dictionaries(st.sampled_from(sorted(dumps.batch()[0])), VALUES, max_size=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(CHANGES, max_size=6), st.binary(max_size=9))
def test_mutated_lines_never_raise_and_each_is_accounted_for(scratch, read, changes, junk):
    path = scratch / "r_rollouts_000000.jsonl"
    rows = [json.dumps({**row, **change}).encode() for row, change in zip(dumps.batch(), changes, strict=False)]
    path.write_bytes(b"\n".join([b"", *rows, junk.replace(b"\n", b""), b""]))
    result = read(open_instruct, path)
    written = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    assert len(result.rows) + len(result.bad) == written == result.source.rows


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_cut_at_any_byte_and_the_continuation_equal_one_reading(scratch, read_in_two, data):
    path = scratch / "r_rollouts_000001.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in dumps.batch()))
    read_in_two(open_instruct, path, data.draw(st.integers(0, path.stat().st_size)))
