"""Every reader claims its own dumps and no other's."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from echolab.errors import EcholabError
from echolab.readers import READERS, choose, look

GENUINE = {
    "rollouts/reasoning_gym_llama3b_step400_amc23.json": ["reasoning_gym"],
    "rollouts/reasoning_gym_llama3b_step800_amc23.json": ["reasoning_gym"],
    "rollouts/qwen25math_rm_maj_example_math_100x8.jsonl": ["qwen_math"],
    "experts/qwen25_14b_instruct_amc23.jsonl": ["qwen_math"],
    "experts/sky_t1_correct_14b_amc23.jsonl": ["qwen_math"],
    "experts/sky_t1_reflection02_32b_amc23.jsonl": ["qwen_math"],
    "dumps/trl/completions_00001.parquet": ["trl", "plain"],
    "dumps/trl/completions_00002.parquet": ["trl", "plain"],
    "benchmarks/gsm8k_test.jsonl": [],
    "benchmarks/luffy_valid.all.parquet": [],
    "benchmarks/qwen25math_aime24_test.jsonl": [],
    "benchmarks/qwen25math_minerva_math_test.jsonl": [],
    "benchmarks/roll_math_benchmarks.jsonl": [],
}


def claims(path) -> list[str]:
    head = look(path)
    return [r.NAME for r in READERS if r.sniff(head)]


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_files_are_claimed_by_their_reader_first(data, name):
    assert claims(data / name) == GENUINE[name]
    chosen = choose(data / name)
    assert (chosen[0].NAME if chosen else None) == next(iter(GENUINE[name]), None)


@pytest.mark.parametrize(
    ("maker", "name", "expected"),
    [
        ("verl_v0", "7.jsonl", ["verl"]),
        ("verl_v1", "7.jsonl", ["verl"]),
        ("reasoning_gym", "results.json", ["reasoning_gym"]),
        ("qwen_math", "test.jsonl", ["qwen_math"]),
        ("plain", "rows.jsonl", ["plain"]),
        ("plain", "lines.json", ["plain"]),
        ("trl", "completions_00005.parquet", ["trl", "plain"]),
    ],
)
@pytest.mark.parametrize("bom", [False, True])
def test_generated_dumps_are_claimed_by_their_reader_first(tmp_path, dumps, maker, name, expected, bom):
    path = getattr(dumps, maker)(tmp_path / name)
    if bom and path.suffix != ".parquet":
        path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes())
    assert claims(path) == expected


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("results", [1, 400])
def test_results_are_known_on_one_line_and_with_categories_first(tmp_path, dumps, indent, results):
    document = dumps.gym_document(results=results)
    path = tmp_path / "r.json"
    for d in (document, dict(reversed(document.items()))):
        path.write_text(json.dumps(d, indent=indent))
        assert claims(path) == ["reasoning_gym"]
    path.write_text(json.dumps({"metadata": document["metadata"], "categories": []}))
    assert claims(path) == ["reasoning_gym"]


def test_a_plain_array_is_known_by_its_first_element_however_long(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "x" * 200_000, "completion": "a"}]))
    assert claims(path) == ["plain"]
    path.write_text(json.dumps([{"prompt": "x"}]))
    assert claims(path) == []


def test_a_row_that_speaks_of_another_format_is_still_plain(tmp_path, dumps):
    said = json.dumps(dumps.gym_document(results=1))
    path = dumps.lines(tmp_path / "a.jsonl", [{"completion": said, "categories": ["math"], "metadata": {}}])
    assert claims(path) == ["plain"]


@pytest.mark.parametrize("more", ["rollout_id", "completion_ids", "group_id"])
def test_a_table_of_rollouts_is_not_taken_for_trl(tmp_path, dumps, more):
    path = dumps.trl(tmp_path / "a.parquet", dumps.trl_table([("a", [0.0, 1.0])], **{more: ["x", "y"]}))
    assert claims(path) == ["plain"]


def test_a_parquet_without_a_reward_is_not_trl(tmp_path):
    pq.write_table(pa.table({"step": [1], "prompt": ["p"], "completion": ["c"], "advantage": [0.5]}), tmp_path / "a.parquet")
    assert claims(tmp_path / "a.parquet") == ["plain"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"hello", b"[", b"{", b"[[", b"\xff\xfe{\x00"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".txt"])
def test_what_no_reader_knows_is_claimed_by_none(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert claims(path) == []
    assert choose(path) is None


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80) | st.text('{}[]":,abc01 \n', max_size=80).map(str.encode))
def test_sniffing_random_bytes_never_raises(scratch, content):
    assume(not content.startswith(b"PAR1"))  # that is Parquet, and damaged
    for suffix in (".json", ".jsonl"):
        path = scratch / f"s{suffix}"
        path.write_bytes(content)
        claims(path)


def test_format_and_map_choose_by_name_and_an_unknown_format_is_an_error(tmp_path, dumps):
    path = dumps.verl_v0(tmp_path / "7.jsonl")
    for reader in READERS:
        chosen = choose(path, reader.NAME)
        assert chosen
        assert chosen[0] is reader
    assert (choose(path, mapped=True) or [None])[0] is READERS[-1]
    with pytest.raises(EcholabError, match="unknown format 'very'"):
        choose(path, "very")
