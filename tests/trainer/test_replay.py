"""The replay buffer: what it keeps, what it draws, and that both survive a checkpoint."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echolab.errors import EcholabError
from trainer.replay import Buffer, Clip, ReplayConfig, stored


def clip(number: int, **fields) -> Clip:
    return Clip(f"c{number}", [1, 2], [3, number], **fields)


def kept(buffer: Buffer) -> list[str]:
    return list(buffer.clips)


def test_the_oldest_make_room_and_a_clip_that_comes_again_is_new():
    buffer = Buffer(ReplayConfig.make(capacity=3), 0, [clip(i) for i in range(3)])
    buffer.add([clip(0), clip(3)])
    assert kept(buffer) == ["c2", "c0", "c3"]


def test_of_one_problem_only_the_newest_are_kept():
    buffer = Buffer(ReplayConfig.make(per_problem=2), 0, [clip(i, problem="p" if i != 1 else "q") for i in range(5)])
    assert kept(buffer) == ["c1", "c3", "c4"]


def test_clips_of_this_run_grow_too_old_and_stored_ones_do_not():
    buffer = Buffer(ReplayConfig.make(max_age=5), 0, [clip(0, step=1), clip(1, step=4), clip(2)])
    assert {c.clip_id for c in buffer.draw(9, step=7)} == {"c1", "c2"}
    assert {c.clip_id for c in buffer.draw(9, step=6)} == {"c0", "c1", "c2"}


@pytest.mark.parametrize(
    ("config", "clips", "shares"),
    [
        ({}, [clip(0), clip(1, weight=3.0)], [1, 3]),
        ({"priority": "entropy"}, [clip(0, entropy=2.0), clip(1, entropy=1.0, weight=4.0)], [1, 2]),
        ({"priority": "recency", "half_life": 10}, [clip(0, step=80), clip(1, step=100)], [1, 4]),
    ],
)
def test_a_clip_is_drawn_in_proportion_to_its_weight_and_priority(config, clips, shares):
    buffer = Buffer(ReplayConfig.make(**config, max_age=1000), 0, clips)
    steps = 3000
    drawn = Counter(buffer.draw(1, step)[0].clip_id for step in range(100, 100 + steps)) if "half_life" not in config else None
    if drawn is None:  # what is new at one step is old at another: only this one step counts, under many seeds
        drawn = Counter(Buffer(buffer.config, seed, clips).draw(1, 100)[0].clip_id for seed in range(steps))
    assert drawn["c0"] / steps == pytest.approx(shares[0] / sum(shares), abs=0.03)


def test_draws_differ_by_step_hold_no_clip_twice_and_are_the_same_after_a_checkpoint():
    buffer = Buffer(ReplayConfig.make(), 7, [clip(i, weight=float(i > 0)) for i in range(20)])
    other = Buffer(ReplayConfig.make(), 7)
    other.restore(buffer.state())
    draws = [buffer.draw(5, step) for step in range(10)]
    assert draws == [other.draw(5, step) for step in range(10)]
    assert len({tuple(c.clip_id for c in d) for d in draws}) > 5
    assert all(len({c.clip_id for c in d}) == 5 for d in draws)
    assert len(buffer.draw(100, 1)) == 19 and Buffer(ReplayConfig.make(), 0).draw(3, 1) == []


@pytest.mark.parametrize(
    ("schedule", "values"), [("constant", [0.4, 0.4, 0.4]), ("linear", [0.4, 0.2, 0.0]), ("cosine", [0.4, 0.2, 0.0])]
)
def test_the_coefficient_falls_to_zero_at_its_end(schedule, values):
    config = ReplayConfig.make(coefficient=0.4, schedule=schedule, until=100)
    assert [config.coefficient_at(s, 1000) for s in (1, 51, 101)] == pytest.approx(values)
    assert config.coefficient_at(500, 1000) == pytest.approx(values[-1])


def export(folder, tokenizer="t"):
    folder.mkdir()
    row = {"prompt_ids": [1], "clip_ids": [2, 3], "clip_mask": [True, False], "weight": 2.0, "problem_id": "p", "step": 4}
    rows = pa.Table.from_pylist([{**row, "tokenizer": tokenizer, "temperature": 1.0, "clip_id": "c"}])
    pq.write_table(rows, folder / "train.parquet")


def test_an_export_is_read_and_one_of_another_tokenizer_refused(tmp_path):
    export(tmp_path / "e")
    assert list(stored(f"{tmp_path}/e", "no store", "t")) == [Clip("c", [1], [2, 3], [True, False], 2.0, "p")]
    with pytest.raises(EcholabError, match="were made with tokenizer t, the model has u"):
        list(stored(f"{tmp_path}/e", "no store", "u"))
    with pytest.raises(EcholabError, match="is no replay export: make one with"):
        list(stored(f"{tmp_path}/none", "no store", "t"))
