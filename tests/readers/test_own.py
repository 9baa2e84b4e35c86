from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from generators import own as dumps
from hypothesis import given, settings
from hypothesis import strategies as st

import echolab
from echolab.readers import choose, look, own
from echolab.schema import ROLLOUTS
from pipelines.render import write

MADE_ANEW = {"rollout_id", "ingest_id", "group_id", "origin"}
CONTENT = [c.name for c in ROLLOUTS.columns if c.name not in MADE_ANEW]
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "Qé"}]

# Every column, and what is hard to keep: equal texts without a number, parts, NaN, nulls, empty texts, big numbers.
HARD = [
    *({"prompt": "same", "completion": "twice", "group": "g", "reward": r} for r in (0.0, 1.0, 1.0)),
    *({"prompt": "p", "completion": "part", "group": 7, "sample": s, "part": i, "reward": s} for s in (0, 1) for i in (0, 1)),
    {"messages": MESSAGES, "completion": "", "reward": math.nan, "rewards": {"a": 1.0, "b": -0.5}, "success_recorded": True},
    {"prompt_ids": [1, 2], "completion_ids": [3, 2**31 - 1], "logprobs": [-0.1, -1e-8], "loss_mask": [1, 0], "step": 2**60},
    {"prompt": "p", "completion": "\u2028\U0001f600\n", "sampling": {"temperature": 0.7, "top_k": -1}, "model": "m"},
    {"prompt": "p", "completion": "x", "source": "math", "ground_truth": "[1, 2]", "finish_reason": "length", "split": "eval"},
    {"prompt": "p", "completion": "y", "policy_version": "5", "advantage": -0.1, "tokenizer": "t", "n_prompt_tokens": 9},
    {"prompt": "p", "completion": "z", "prompt_format": "raw", "nested": {"b": [1, None], "a": 2**70}, "level": 3},
]


@pytest.fixture
def exported(tmp_path):
    """A store with hard rows, as a frame."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in HARD))
    with echolab.open(tmp_path / "first", create=True) as lab:
        report = lab.ingest(tmp_path / "rows.jsonl", run="r")
        assert (report.rows, report.quarantined) == (len(HARD), 0)
        yield lab.sql("SELECT * FROM rollouts")


def groups_of(frame, nan_lost=False) -> Counter:
    """All that the rows say, put together as the groups are."""
    groups: dict[str, list[str]] = {}
    for row in frame.iter_rows(named=True):
        reward = None if nan_lost and row["reward"] is not None and math.isnan(row["reward"]) else row["reward"]
        groups.setdefault(row["group_id"], []).append(repr([{**row, "reward": reward}[c] for c in CONTENT]))
    return Counter(tuple(sorted(rows)) for rows in groups.values())


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
def test_exported_rollouts_come_back_as_they_were_in_the_groups_that_they_had(tmp_path, exported, suffix):
    path = tmp_path / f"out.{suffix}"
    if suffix == "jsonl":
        exported.write_ndjson(path)
    else:
        write(exported, None, path)
    with echolab.open(tmp_path / "second", create=True) as lab:
        report = lab.ingest(path, run="r")
        assert (report.files[0].format, report.rows, report.quarantined) == ("echolab", len(HARD), 0)
        again = lab.sql("SELECT * FROM rollouts")
    nan_lost = suffix != "parquet"  # JSON has null in its place
    assert groups_of(again) == groups_of(exported, nan_lost)
    assert Counter(again["kind"]) == Counter(exported["kind"])
    assert sorted(again["rollout_id"].unique()) == sorted(again["rollout_id"]), "no two rollouts have become one"


def test_an_export_of_the_export_is_the_same_again(tmp_path, exported):
    frames = [exported]
    for name in ("a", "b"):
        write(frames[-1], None, tmp_path / f"{name}.parquet")
        with echolab.open(tmp_path / name, create=True) as lab:
            lab.ingest(tmp_path / f"{name}.parquet", run="another run")
            frames.append(lab.sql("SELECT * REPLACE ('r' AS run) FROM rollouts"))
    assert groups_of(frames[2]) == groups_of(frames[1]) == groups_of(exported)


@pytest.mark.parametrize("container", [dumps.jsonl, dumps.document, dumps.parquet])
def test_all_containers_say_the_same(tmp_path, read, container):
    data = dumps.rows(groups=2, n=2)
    path = container(tmp_path / f"x.{container.__name__}", data)
    assert (choose(path) or [None])[0] is own
    result = read(own, path)
    assert not result.bad
    assert [(r.row, r.key) for r in result.rows] == [(i, (d["group_id"],)) for i, d in enumerate(data)]
    for r, d in zip(result.rows, data, strict=True):
        kept = {
            c: d[c]
            for c in ("split", "role", "step", "group_source", "sample", "prompt", "prompt_format", "completion", "reward")
        }
        kept |= {c: d[c] for c in ("completion_ids", "logprobs", "extra")}
        assert r.fields == {**kept, "rewards": {"right": d["reward"], "style": 0.5}}
    assert result.source.consumed == path.stat().st_size
    assert bool(result.source.found.get("whole")) is (container is not dumps.jsonl), "a longer document is another one"
    assert result.source.notes == []


def test_null_among_logprobs_stays_for_it_may_have_been_nan(tmp_path, read):
    data = [dumps.row(0, 0, 0, logprobs=[None, -0.25])]
    assert read(own, dumps.jsonl(tmp_path / "a.jsonl", data)).rows[0].fields["logprobs"] == [None, -0.25]


def test_the_worst_completeness_of_the_rows_is_that_of_the_reading(tmp_path, read):
    def found(*words):
        data = [dumps.row(0, i, i, completeness=word) for i, word in enumerate(words)]
        return read(own, dumps.jsonl(tmp_path / "a.jsonl", data)).source.found.get("completeness")

    assert found("all", "filtered", "effective") == "filtered"
    assert found("effective", "all") == "effective"
    assert found("all", "odd", None) == "all"
    assert found(None) is None


def test_columns_of_the_users_own_go_to_extra_and_experts_stay_experts(tmp_path, read):
    data = [dumps.row(0, 0, 0, mine=[1], role="expert"), dumps.row(0, 1, 1, mine=None), dumps.row(0, 2, 2, mine=2, extra=None)]
    result = read(own, dumps.jsonl(tmp_path / "a.jsonl", data))
    assert [r.fields.get("extra") for r in result.rows] == [{"level": 3, "mine": [1]}, '{"level": 3}', {"mine": 2}]
    assert [r.fields["role"] for r in result.rows] == ["expert", "policy", "policy"]


def test_entropies_of_its_tokens_become_scores_and_no_extra(tmp_path):
    data = [dumps.row(0, i, i, entropies=[0.5, 1.5 + i]) for i in range(2)] + [dumps.row(0, 2, 2, entropies=[1.0])]
    with echolab.open(tmp_path / "store", create=True) as lab:
        report = lab.ingest(dumps.jsonl(tmp_path / "a.jsonl", data), run="r", tokenizer="t", temperature=1.0)
        assert (report.rows, report.quarantined) == (2, 1)
        assert lab.sql("SELECT entropies, logprobs FROM scores ORDER BY entropies").rows() == [
            ([0.5, 1.5], [-0.5, -0.25]),
            ([0.5, 2.5], [-0.5, -0.25]),
        ]
        assert lab.sql("SELECT count(*) FROM rollouts WHERE extra LIKE '%entropies%'").item() == 0
        assert lab.validate() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"entropies": [0.5, "x"]}, "entropies is not a list of numbers"),
        ({"group_id": None}, "group_id is missing"),
        ({"group_id": 3}, "group_id is not a text: int"),
        ({"messages": "no json"}, "not JSON"),
        ({"messages": '[{"text": "q"}]'}, "messages is not a list of {role, content}"),
        ({"sampling": "[1]"}, "sampling is not an object: list"),
        ({"extra": "{"}, "not JSON"),
        ({"rewards": [1]}, "rewards is not an object: list"),
        ({"rewards": [{"key": "a", "value": 1.0}, {"key": [], "value": 1.0}]}, "rewards is not an object: list"),
        ({"logprobs": ["a", "b"]}, "logprobs is not a list of numbers"),
        ({"group_source": "luck"}, "group_source is no rule by which groups are found: 'luck'"),
        ({"sample": 0.5}, "sample is not a whole number: '0.5'"),
        ({"completion_ids": [-1, 2]}, "completion_ids holds a negative token id"),
    ],
)
def test_a_bad_row_says_why_and_the_others_stay(tmp_path, read, change, reason):
    data = dumps.rows(groups=1, n=3)
    data[1] |= change
    for path in (dumps.jsonl(tmp_path / "a.jsonl", data), dumps.document(tmp_path / "a.json", data)):
        result = read(own, path)
        assert [r.row for r in result.rows] == [0, 2]
        assert [b.row for b in result.bad] == [1]
        assert result.bad[0].reason.startswith(reason)
        assert json.loads(result.bad[0].raw) == data[1]


def test_only_rows_with_our_ids_are_known(tmp_path):
    good = dumps.row(0, 0, 0)
    for change in ({"rollout_id": 5}, {"group_id": "g3"}, {"rollout_id": "x" * 32}):
        assert own.sniff(look(dumps.jsonl(tmp_path / "a.jsonl", [{**good, **change}]))) is None
    for missing in ({"rollout_id"}, {"group_id"}, {"completion", "completion_ids"}):
        data = [{name: v for name, v in good.items() if name not in missing}]
        for path in (dumps.jsonl(tmp_path / "b.jsonl", data), dumps.parquet(tmp_path / "b.parquet", data)):
            assert own.sniff(look(path)) is None
        assert own.sniff(look(dumps.document(tmp_path / "b.json", data))) is None
    array = tmp_path / "array.json"
    array.write_text(json.dumps([good]))
    assert own.sniff(look(array))


VALUES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3) | st.lists(st.none(), max_size=2)
CHANGES = st.dictionaries(st.sampled_from([*dumps.row(0, 0, 0), "messages", "sampling", "loss_mask"]), VALUES, max_size=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(CHANGES, max_size=6), st.binary(max_size=9))
def test_mutated_lines_never_raise_and_each_is_accounted_for(scratch, read, changes, junk):
    path = scratch / "own.jsonl"
    rows = [json.dumps({**dumps.row(0, i, i), **change}).encode() for i, change in enumerate(changes)]
    path.write_bytes(b"\n".join([b"", *rows, junk.replace(b"\n", b""), b""]))
    result = read(own, path)
    written = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    assert len(result.rows) + len(result.bad) == written == result.source.rows


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_cut_at_any_byte_and_the_continuation_equal_one_reading(scratch, read_in_two, data):
    path = dumps.jsonl(scratch / "own.jsonl")
    read_in_two(own, path, data.draw(st.integers(0, path.stat().st_size)))
