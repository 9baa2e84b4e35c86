from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.readers import reasoning_gym

FACTS = {
    400: (288, [3, 5, 7, 11, 12, 15, 19, 20, 25, 31, 32, 37, 39], 8165, 87),
    800: (283, [3, 6, 7, 12, 14, 15, 18, 20, 25, 27, 29, 31, 32, 37], 7303, 24),
}


@pytest.mark.parametrize("step", FACTS)
def test_genuine_results_have_the_facts_of_the_data_page(data, read, step):
    path = data / "rollouts" / f"reasoning_gym_llama3b_step{step}_amc23.json"
    result = read(reasoning_gym, path)
    right, all_wrong, longest, unparsed = FACTS[step]
    assert (len(result.rows), result.bad, result.source.notes) == (2000, [], [])
    assert sum(r.fields["reward"] for r in result.rows) == right
    rewards = defaultdict(list)
    for r in result.rows:
        rewards[r.key].append(r.fields["reward"])
    assert len(rewards) == 40
    assert {len(v) for v in rewards.values()} == {50}
    assert sorted(key[2] for key, v in rewards.items() if not any(v)) == all_wrong
    assert {key[:2] for key in rewards} == {(path.name, "hf://datasets/math-ai/amc23/test-00000-of-00001.parquet")}
    assert max(len(r.fields["completion"]) for r in result.rows) == longest
    assert sum("model_answer" not in r.fields["extra"] for r in result.rows) == unparsed
    assert [r.fields["sample"] for r in result.rows] == [*range(50)] * 40
    assert [r.row for r in result.rows] == [i // 50 for i in range(2000)]
    shared = {"sampling": {"temperature": 0.6, "top_p": 0.9, "max_tokens": 2048}, "split": "eval", "prompt_format": "unknown"}
    assert all(r.fields.items() >= shared.items() for r in result.rows)
    assert result.rows[0].fields["model"] == f"../utils/llama_external_{'maths' if step == 400 else step}"
    assert result.source.consumed == path.stat().st_size


def test_the_rows_equal_a_reading_of_the_whole_document(data, read):
    path = data / "rollouts" / "reasoning_gym_llama3b_step400_amc23.json"
    results = json.loads(path.read_bytes())["categories"][0]["datasets"][0]["results"]
    expected = [
        (r["question"], r["expected_answer"], c["full_model_response"], float(c["score"]))
        for r in results
        for c in r["completions"]
    ]
    names = ("prompt", "ground_truth", "completion", "reward")
    assert [tuple(r.fields[n] for n in names) for r in read(reasoning_gym, path).rows] == expected


def reversed_keys(value):
    if isinstance(value, dict):
        return {k: reversed_keys(v) for k, v in reversed(value.items())}
    return [reversed_keys(v) for v in value] if isinstance(value, list) else value


def test_names_and_metadata_that_stand_behind_the_results_are_found(tmp_path, read, dumps):
    path = dumps.reasoning_gym(tmp_path / "results.json")
    usual = read(reasoning_gym, path)
    path.write_text(json.dumps(reversed_keys(json.loads(path.read_text()))))
    assert read(reasoning_gym, path).said == usual.said
    assert usual.rows[0].fields["model"] == "m"
    assert usual.rows[0].key == ("results.json", "set0", 0)
    assert {r.fields["source"] for r in usual.rows} == {"set0", "set1"}


def test_datasets_of_one_name_are_kept_apart_by_category_or_number(tmp_path, read, dumps):
    document = dumps.gym_document(name=lambda d: "same")
    document["categories"].append(dumps.gym_document(name=lambda d: "same", datasets=1)["categories"][0])
    document["categories"][1]["datasets"][0]["category"] = "logic"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    rows = read(reasoning_gym, path).rows
    assert list(dict.fromkeys(r.key[1] for r in rows)) == ["algebra/same#1", "algebra/same#2", "logic/same"]
    assert {r.fields["source"] for r in rows} == {"same"}
    assert len({(r.key, r.fields["sample"]) for r in rows}) == len(rows)


def test_a_wrong_summary_is_a_note_with_a_count(tmp_path, read, dumps):
    document = dumps.gym_document()
    document["categories"][0]["datasets"][0]["results"][0]["mean_score"] = 0.9
    document["categories"][0]["datasets"][1]["results"][1]["best_score"] = "high"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    result = read(reasoning_gym, path)
    assert len(result.rows) == 12
    assert result.source.notes == ["mean_score or best_score does not agree with the scores in 2 results"]


def test_errors_and_other_fields_of_a_completion_are_kept(tmp_path, read, dumps):
    document = dumps.gym_document(results=1, samples=2, datasets=1)
    result = document["categories"][0]["datasets"][0]["results"][0]
    result["difficulty"] = 3
    result["completions"][0] |= {"error": "timeout", "tokens": 12, "score": 0.25}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    rows = read(reasoning_gym, path).rows
    assert rows[0].fields["extra"] == {"difficulty": 3, "model_answer": "0", "error": "timeout", "tokens": 12}
    assert rows[0].fields["reward"] == 0.25
    assert rows[1].fields["extra"] == {"difficulty": 3}


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ({"score": 1}, "sample 1: full_model_response is missing"),
        ({"full_model_response": 3, "score": 1}, "sample 1: full_model_response is not a text: int"),
        ({"full_model_response": "x", "score": "high"}, "sample 1: score is not a number: 'high'"),
        ("text", "sample 1: expected a completion object, got str"),
    ],
)
def test_one_bad_completion_leaves_the_others_with_their_numbers(tmp_path, read, dumps, completion, reason):
    document = dumps.gym_document(results=2, samples=3, datasets=1)
    document["categories"][0]["datasets"][0]["results"][1]["completions"][1] = completion
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    result = read(reasoning_gym, path)
    assert [(r.row, r.fields["sample"]) for r in result.rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)]
    assert [(b.row, b.reason) for b in result.bad] == [(1, reason)]
    assert json.loads(result.bad[0].raw)["completion"] == completion


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"question": "q"}, "completions is missing"),
        ({"question": "q", "completions": {}}, "completions is not a list"),
        ({"question": "q", "completions": []}, "completions is empty"),
        (7, "expected a result object, got int"),
    ],
)
def test_a_bad_result_is_one_bad_row(tmp_path, read, dumps, result, reason):
    document = dumps.gym_document(results=2, samples=3, datasets=1)
    document["categories"][0]["datasets"][0]["results"].insert(1, result)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    read_back = read(reasoning_gym, path)
    assert {r.row for r in read_back.rows} == {0, 2}
    assert [(b.row, b.reason, json.loads(b.raw)) for b in read_back.bad] == [(1, reason, result)]


def test_results_of_the_wrong_kind_are_not_lost(tmp_path, read):
    path = tmp_path / "results.json"
    path.write_text('{"categories": [{"datasets": [{"name": "d", "results": {"0": "x"}}]}]}')
    result = read(reasoning_gym, path)
    assert [(b.reason, b.raw) for b in result.bad] == [("expected a list at categories[0].datasets[0].results", b'{"0": "x"}')]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_truncation_keeps_every_complete_result(scratch, read, dumps, data):
    whole = dumps.reasoning_gym(scratch / "results.json").read_bytes()
    complete = read(reasoning_gym, scratch / "results.json").rows
    cut = data.draw(st.integers(1, len(whole) - 1))
    path = scratch / "results.json"
    path.write_bytes(whole[:cut])
    result = read(reasoning_gym, path)
    ends = whole[:cut].count(b"\n            }")  # of results, by their indentation
    assert len(result.rows) == 3 * ends
    assert [r.fields["completion"] for r in result.rows] == [r.fields["completion"] for r in complete[: len(result.rows)]]
    assert len(result.bad) == 1
    assert "the file ends in the middle of" in result.bad[0].reason
    assert result.source.consumed == cut


def test_memory_stays_small_whatever_the_size_of_the_file(tmp_path, dumps):
    import tracemalloc

    from echolab.readers.base import Source

    document = dumps.gym_document(results=400, samples=8, datasets=1)
    for result in document["categories"][0]["datasets"][0]["results"]:
        for completion in result["completions"]:
            completion["full_model_response"] *= 2000
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in reasoning_gym.read(Source(path, "r", "r"))) == 3200
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
