from __future__ import annotations

import math
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echolab.errors import EcholabError
from echolab.readers import trl


def blocks(result) -> list[list[int]]:
    """Rows of each group, in the order of the file."""
    return [[r.row for r in rows] for _, rows in groupby(result.rows, key=lambda r: r.key)]


@pytest.mark.parametrize(("name", "step", "first"), [("completions_00001", 1, 0.25999999046), ("completions_00002", 2, 1.25)])
def test_genuine_dumps_are_two_groups_of_four_consecutive_rows(data, read, name, step, first):
    path = data / "dumps" / "trl" / f"{name}.parquet"
    result = read(trl, path)
    assert not result.bad
    assert blocks(result) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert {r.key for r in result.rows} == {(f"{name}.parquet", 0), (f"{name}.parquet", 1)}
    table = pq.read_table(path).to_pylist()
    assert [r.fields["reward"] for r in result.rows] == [t["rew"] for t in table]  # float32 widened to double stays as it is
    assert result.rows[0].fields["reward"] == pytest.approx(first, abs=1e-11)
    assert [r.fields["advantage"] for r in result.rows] == [t["advantage"] for t in table]
    assert [r.fields["completion"] for r in result.rows] == [t["completion"] for t in table]
    same = {"step": step, "split": "train", "prompt_format": "rendered", "group_source": "contiguous"}
    assert all(r.fields.items() >= same.items() and "sample" not in r.fields for r in result.rows)
    assert result.source.found == {"group_size": 4}
    assert "blocks of 4 consecutive rows" in result.source.notes[0]
    assert "confirm it: they are (reward - mean) / (std + 1e-4)" in result.source.notes[0]
    assert result.source.consumed == path.stat().st_size


def test_the_formula_tells_apart_two_consecutive_visits_of_one_prompt(tmp_path, read, dumps):
    table = dumps.trl_table([("a", [0.0, 1.0]), ("a", [1.0, 0.2]), ("b", [0.0, 3.0]), ("b", [1.0, 1.0])])
    result = read(trl, dumps.trl(tmp_path / "c.parquet", table))
    assert blocks(result) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_unscaled_advantages_confirm_the_size(tmp_path, read, dumps):
    def centred(rewards):
        return [r - sum(rewards) / len(rewards) for r in rewards]

    table = dumps.trl_table([("a", [0.0, 1.0]), ("a", [2.0, 0.2])], advantages=centred)
    result = read(trl, dumps.trl(tmp_path / "c.parquet", table))
    assert result.source.found["group_size"] == 2
    assert "reward - mean of each block" in result.source.notes[0]


def test_advantages_of_another_scale_only_agree(tmp_path, read, dumps):
    def of_batch(rewards):
        return [(r - sum(rewards) / len(rewards)) / 0.123 for r in rewards]

    table = dumps.trl_table([("a", [0.0, 1.0, 1.0]), ("b", [2.0, 0.2, 0.2])], advantages=of_batch)
    result = read(trl, dumps.trl(tmp_path / "c.parquet", table))
    assert result.source.found["group_size"] == 3
    assert "add up to 0" in result.source.notes[0]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_of_several_sizes_that_fit_the_largest_is_taken(tmp_path, read, dumps, scale):
    table = dumps.trl_table([("a", [0.0, 1.0, 0.0, 1.0])], advantages=lambda rs: [scale * (r - 0.5) for r in rs])
    assert read(trl, dumps.trl(tmp_path / "c.parquet", table)).source.found["group_size"] == 4


def test_advantages_that_contradict_are_said_and_the_prompts_decide(tmp_path, read, dumps):
    table = dumps.trl_table([("a", [0.0, 1.0]), ("b", [2.0, 0.2])], advantages=lambda rs: [5.0 for _ in rs])
    result = read(trl, dumps.trl(tmp_path / "c.parquet", table))
    assert result.source.found["group_size"] == 2
    assert "do not confirm it" in result.source.notes[0]


@pytest.mark.parametrize(
    ("advantages", "said"), [(None, "no advantages are recorded"), (lambda rs: [0.0] * len(rs), "all zero")]
)
def test_without_telling_advantages_the_prompts_decide_or_the_runs_other_dumps(tmp_path, read, dumps, advantages, said):
    path = dumps.trl(tmp_path / "c.parquet", dumps.trl_table([("a", [1.0] * 4), ("b", [0.0] * 4)], advantages=advantages))
    result = read(trl, path)
    assert result.source.found["group_size"] == 4
    assert said in result.source.notes[0]
    result = read(trl, path, found={"group_size": 2})
    assert blocks(result) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert "as in the run's other dumps" in result.source.notes[0]
    assert read(trl, path, found={"group_size": 3}).source.found["group_size"] == 4


def test_prompts_that_differ_from_row_to_row_leave_the_grouping_to_the_prompt(tmp_path, read, dumps):
    path = dumps.trl(tmp_path / "c.parquet", dumps.trl_table([("a", [1.0, 0.0]), ("b", [0.0]), ("a", [0.5])], advantages=None))
    result = read(trl, path)
    assert {r.key for r in result.rows} == {None}
    assert all("group_source" not in r.fields for r in result.rows)
    assert result.source.found["group_size"] is None
    assert "grouped by their prompt" in result.source.notes[0]


def test_a_given_group_size_counts_bad_rows_and_may_leave_a_short_block(tmp_path, read, dumps):
    table = dumps.trl_table([("a", [1.0, 0.0, 1.0]), ("b", [0.0, 1.0])])
    table = table.set_column(2, "completion", pa.array(["x", None, "y", "z", "w"]))
    result = read(trl, dumps.trl(tmp_path / "c.parquet", table), group_size=3)
    assert [(r.row, r.key) for r in result.rows] == [(i, ("c.parquet", i // 3)) for i in (0, 2, 3, 4)]
    assert [(b.row, b.reason) for b in result.bad] == [(1, "completion is missing")]
    assert b'"prompt": "a"' in result.bad[0].raw
    assert "the last block has only 2" in result.source.notes[0]
    assert result.source.rows == 5
    with pytest.raises(EcholabError, match="at least 1"):
        read(trl, tmp_path / "c.parquet", group_size=0)


def test_a_given_group_size_that_mixes_prompts_is_said(tmp_path, read, dumps):
    result = read(trl, dumps.trl(tmp_path / "c.parquet"), group_size=3)
    assert "some blocks hold different prompts" in result.source.notes[0]


def test_rewards_are_weighted_and_a_function_that_returned_none_is_left_out(tmp_path, read, dumps):
    table = dumps.trl_table(
        [("a", [1.0, 0.0, math.nan, 1.0])],
        advantages=None,
        style=[0.5, math.nan, None, 0.25],
        note=["n", None, "m", "o"],
        k=[1, 2, 3, 4],
    )
    path = dumps.trl(tmp_path / "c.parquet", table)
    rows = read(trl, path).rows
    assert [r.fields["reward"] for r in rows] == [1.5, 0.0, None, 1.25]
    assert [r.fields["rewards"] for r in rows] == [
        {"accuracy": 1.0, "style": 0.5},
        {"accuracy": 0.0},
        None,
        {"accuracy": 1.0, "style": 0.25},
    ]
    assert [r.fields["extra"] for r in rows] == [{"note": "n", "k": 1}, {"k": 2}, {"note": "m", "k": 3}, {"note": "o", "k": 4}]
    rows = read(trl, path, reward_weights={"style": 2.0, "k": 1.0}).rows
    assert [r.fields["reward"] for r in rows] == [2.0, 2.0, 3.0, 4.5]
    assert rows[0].fields["extra"] == {"note": "n", "accuracy": 1.0}


def test_an_unknown_reward_weight_is_an_error_that_names_the_columns(tmp_path, read, dumps):
    with pytest.raises(EcholabError, match="no reward column acuracy; there are: accuracy"):
        read(trl, dumps.trl(tmp_path / "c.parquet"), reward_weights={"acuracy": 1.0})


def test_weights_enter_the_formula_that_confirms_the_size(tmp_path, read, dumps):
    style = [0.5, 0.0, 0.25, 1.0]
    weighted = dumps.standardised([1.0 + 2 * 0.5, 0.0]) + dumps.standardised([0.0 + 2 * 0.25, 1.0 + 2 * 1.0])
    table = dumps.trl_table([("a", [1.0, 0.0]), ("a", [0.0, 1.0])], advantages=None, style=style, advantage=weighted)
    path = dumps.trl(tmp_path / "c.parquet", table)
    assert read(trl, path, reward_weights={"accuracy": 1.0, "style": 2.0}).source.found["group_size"] == 2


def test_what_is_no_trl_dump_is_one_clear_error_and_an_empty_file_is_none(tmp_path, read):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(EcholabError, match="not a readable Parquet file"):
        read(trl, tmp_path / "a.parquet")
    pq.write_table(pa.table({"completion": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(EcholabError, match="no column step, prompt"):
        read(trl, tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"")
    assert read(trl, tmp_path / "c.parquet").said == []


def test_invalid_utf8_and_an_infinite_reward_are_bad_rows_of_their_own(tmp_path, read, dumps):
    table = dumps.trl_table([("a", [1.0, 0.0, math.inf])], advantages=None)
    broken = pa.array([b"ok", b"\xff\xfe", b"ok"], pa.binary()).view(pa.string())
    result = read(trl, dumps.trl(tmp_path / "c.parquet", table.set_column(2, "completion", broken)))
    assert [(b.row, b.reason) for b in result.bad] == [(1, "invalid UTF-8"), (2, "accuracy is infinite")]
    assert b"\\xff\\xfe" in result.bad[0].raw
    assert [r.row for r in result.rows] == [0]
