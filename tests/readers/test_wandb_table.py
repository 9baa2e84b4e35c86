from __future__ import annotations

import json
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generators import wandb_table as dumps
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.errors import EcholabError
from echolab.readers import look, trl, wandb_table
from echolab.schema import ROLLOUTS

NAME = "completions_5_0a.table.json"


def blocks(result) -> list[list[int]]:
    return [[r.row for r in rows] for _, rows in groupby(result.rows, key=lambda r: r.key)]


@pytest.mark.parametrize("artifact", [False, True])
def test_a_table_of_completions_reads_as_the_same_table_in_parquet(tmp_path, read, artifact):
    rows = dumps.completions([("a", [0.0, 1.0]), ("a", [1.0, 0.2]), ("b", [0.0, 3.0])])
    result = read(wandb_table, dumps.table(tmp_path / NAME, rows, artifact=artifact))
    assert not result.bad
    assert blocks(result) == [[0, 1], [2, 3], [4, 5]]
    parquet = tmp_path / "completions_00005.parquet"
    pq.write_table(pa.Table.from_pylist([dict(zip(dumps.TRL, row, strict=True)) for row in rows]), parquet)
    same = read(trl, parquet)
    assert [r.fields for r in result.rows] == [r.fields for r in same.rows]
    assert result.source.notes == same.source.notes
    assert result.source.found["group_size"] == 2
    assert "confirm it: they are (reward - mean) / (std + 1e-4)" in result.source.notes[0]
    assert [r.fields["reward"] for r in result.rows] == [0.5, 1.5, 1.5, 0.7, 0.5, 3.5]
    assert result.rows[0].fields["rewards"] == {"accuracy_reward": 0.0, "format_reward": 0.5}
    assert result.rows[0].fields.keys() <= {c.name for c in ROLLOUTS.columns}
    assert result.source.consumed == (tmp_path / NAME).stat().st_size


def test_columns_may_stand_behind_the_data(tmp_path, read):
    path = tmp_path / NAME
    path.write_text(json.dumps({"data": dumps.completions(), "columns": dumps.TRL}))
    assert blocks(read(wandb_table, path)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_an_older_table_has_one_reward_and_no_advantage(tmp_path, read):
    rows = [[1, p, f"c{i}", float(i % 2)] for p in "ab" for i in range(3)]
    result = read(wandb_table, dumps.table(tmp_path / NAME, rows, ["step", "prompt", "completion", "reward"]))
    assert blocks(result) == [[0, 1, 2], [3, 4, 5]]
    assert [(r.fields["reward"], r.fields["advantage"]) for r in result.rows[:2]] == [(0.0, None), (1.0, None)]


def test_a_reward_that_is_no_number_is_bad_alone_and_its_place_counts(tmp_path, read):
    rows = dumps.completions()
    rows[1][3] = "good"
    rows[2] = rows[2][:-1]
    rows[5][3] = None
    rows[0][3] = rows[6][3] = "NaN"
    path = dumps.table(tmp_path / NAME, rows)
    result = read(wandb_table, path)
    assert [(b.row, b.reason) for b in result.bad] == [
        (1, "accuracy_reward is not a number: 'good'"),
        (2, "5 values for 6 columns"),
    ]
    assert [json.loads(b.raw) for b in result.bad] == [rows[1], rows[2]]
    assert blocks(result) == [[0, 3], [4, 5, 6, 7]]
    assert [r.fields["rewards"] for r in result.rows if r.row in (0, 5, 6)] == [{"format_reward": 0.5}] * 3


def test_whole_numbers_are_rewards_where_there_are_no_others(tmp_path, read):
    columns = ["step", "prompt", "completion", "right"]
    result = read(wandb_table, dumps.table(tmp_path / NAME, [[1, "a", "x", 1], [1, "a", "y", 0]], columns))
    assert [r.fields["reward"] for r in result.rows] == [1.0, 0.0]
    rows = [[1, "a", "x", 1, 0.5, 3], [1, "a", "y", 0, 0.5, 4]]
    result = read(wandb_table, dumps.table(tmp_path / NAME, rows, [*columns, "style", "length"]))
    assert [(r.fields["rewards"], r.fields["extra"]) for r in result.rows] == [
        ({"style": 0.5}, {"right": right, "length": length}) for right, length in ((1, 3), (0, 4))
    ]


def test_group_size_and_weights_may_be_given(tmp_path, read):
    path = dumps.table(tmp_path / NAME)
    assert blocks(read(wandb_table, path, group_size=2)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    result = read(wandb_table, path, reward_weights={"accuracy_reward": 2.0})
    assert [r.fields["reward"] for r in result.rows[:2]] == [0.0, 2.0]
    with pytest.raises(EcholabError, match="no reward column accuracy; there are: accuracy_reward, format_reward"):
        read(wandb_table, path, reward_weights={"accuracy": 1.0})


def test_a_sample_of_openrlhf_is_a_group_of_its_own_wherever_it_is_repeated(tmp_path, read):
    later = read(wandb_table, dumps.samples(tmp_path / "s_3.table.json", steps=3))
    assert [(r.key, r.fields["step"], r.fields["reward"]) for r in later.rows] == [
        (("Q1\nA1",), 1, 1.0),
        (("Q2\nA2",), 2, 0.0),
        (("Q3\nA3",), 3, 1.0),
    ]
    assert all(r.fields["completion"] == r.key[0] and r.fields.get("prompt") is None for r in later.rows if r.key)
    assert "prompt and response together" in later.source.notes[0]
    earlier = read(wandb_table, dumps.samples(tmp_path / "s_2.table.json", steps=2))
    assert [(r.key, r.fields) for r in earlier.rows] == [(r.key, r.fields) for r in later.rows[:2]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1, None, 1.0], "text is missing"),
        ([1, 3, 1.0], "text is not a text: int"),
        ([1.5, "a", 1.0], "global_step is not a whole number: '1.5'"),
        ([1, "a"], "2 values for 3 columns"),
        ({"text": "a"}, "expected a list of values, got dict"),
    ],
)
def test_a_bad_sample_says_why(tmp_path, read, row, reason):
    path = dumps.table(tmp_path / NAME, [[1, "a", 1.0], row], dumps.OPENRLHF)
    result = read(wandb_table, path)
    assert [r.row for r in result.rows] == [0]
    assert [(b.row, b.reason, json.loads(b.raw)) for b in result.bad] == [(1, reason, row)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"columns": ["loss"], "data": []}', "its columns are loss"),
        ('{"data": [[1]]}', "it has no columns"),
        ('{"columns": 3, "data": []}', "neither TRL nor OpenRLHF"),
        ("[1]", "it has no columns"),
    ],
)
def test_what_is_no_table_of_rollouts_is_one_clear_error(tmp_path, read, content, said):
    path = tmp_path / NAME
    path.write_text(content)
    assert wandb_table.sniff(look(path)) is None
    with pytest.raises(EcholabError, match=said):
        read(wandb_table, path)


def test_tables_of_trl_and_openrlhf_are_known_and_others_are_not(tmp_path):
    known = dumps.fixture(tmp_path)
    assert all(wandb_table.sniff(look(path)) for path in known)
    long = dumps.table(tmp_path / "long.table.json", dumps.completions([("x" * 200_000, [0.0, 1.0])]))
    assert wandb_table.sniff(look(long))
    row = {"completion": json.dumps({"columns": dumps.TRL, "data": []}), "prompt": "q"}
    for other in (row, {"columns": [{"name": "step"}], "rows": []}, {"columns": [*dumps.OPENRLHF, "x"], "data": []}):
        path = tmp_path / "other.json"
        path.write_text(json.dumps(other))
        assert wandb_table.sniff(look(path)) is None


def test_an_empty_file_is_none(tmp_path, read):
    (tmp_path / NAME).write_bytes(b"")
    assert read(wandb_table, tmp_path / NAME).said == []


VALUES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3) | st.lists(st.none(), max_size=2)
CELLS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5), VALUES), max_size=6)


@settings(max_examples=100, deadline=None)
@given(CELLS, st.integers(0, 5000))
def test_mutated_tables_never_raise_and_every_row_is_accounted_for(scratch, read, changes, cut):
    rows = dumps.completions()
    for row, column, value in changes:
        rows[row][column] = value
    path = dumps.table(scratch / NAME, rows)
    result = read(wandb_table, path)
    assert len(result.rows) + len(result.bad) == 8 == result.source.rows
    content = path.read_bytes()
    begun = content.index(b'"data": [') + len(b'"data": [')
    path.write_bytes(content[: begun + cut])
    result = read(wandb_table, path)
    assert len(result.rows) + len(result.bad) == result.source.rows
    assert bool(result.bad) or begun + cut >= len(content) or len(result.rows) == 8
