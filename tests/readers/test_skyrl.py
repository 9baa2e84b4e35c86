from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
from generators import skyrl as dump
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.errors import Unreadable
from echolab.readers import look, skyrl, step_of_path


def known(path: Path) -> str | None:
    return skyrl.sniff(look(path))


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_evaluations_keep_what_was_sampled_scored_and_expected(tmp_path, read):
    path = dump.evals(tmp_path, step=10)
    assert known(path)
    assert step_of_path(str(path)) == 10
    result = read(skyrl, path)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert (len(result.rows), result.bad, result.source.notes) == (8, [], [])
    for i, (row, w) in enumerate(zip(result.rows, written, strict=True)):
        f = row.fields
        assert (row.row, row.key, f["split"], f.get("step")) == (i, None, "eval", None)
        assert (f["prompt"], f["completion"], f["reward"]) == (w["input_prompt"], w["output_response"], w["score"])
        assert (f["finish_reason"], f["source"], f["prompt_format"]) == (w["stop_reason"], "openai/gsm8k", "rendered")
        assert f["ground_truth"] == w["env_extras"]["reward_spec"]["ground_truth"]
        assert f["extra"] == {"env_class": "gsm8k", "env_extras": w["env_extras"]}


@pytest.mark.parametrize(
    ("score", "reward"),
    [([0.0, 0.25, 0.5], 0.75), ([], None), ([1, None], None), ("True", 1.0), (1, 1.0), (None, None), ([0.1] * 10, 1.0)],
)
def test_rewards_of_tokens_are_added_up_and_kept(tmp_path, read, score, reward):
    fields = read(skyrl, lines(tmp_path / "x.jsonl", [dump.evaluated(1, 0, score=score)])).rows[0].fields
    assert fields["reward"] == reward
    assert fields["extra"].get("score") == (score if isinstance(score, list | str) else None)


@pytest.mark.parametrize("extras", [None, [], {}, {"reward_spec": None}, {"reward_spec": {"method": "rule"}}])
def test_an_environment_without_a_ground_truth_has_none(tmp_path, read, extras):
    fields = (
        read(skyrl, lines(tmp_path / "x.jsonl", [dump.evaluated(1, 0, env_extras=extras, stop_reason=None)])).rows[0].fields
    )
    assert (fields["ground_truth"], fields["finish_reason"]) == (None, None)


def test_means_are_put_aside_only_where_skyrl_writes_them(tmp_path):
    means = dump.evals(tmp_path).with_name("aggregated_results.jsonl")
    assert "not rollouts" in (skyrl.aside(means) or "")
    assert known(means) is None
    assert skyrl.aside(tmp_path / "mine" / "aggregated_results.jsonl") is None
    assert skyrl.aside(means.with_name("openai_gsm8k.jsonl")) is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (dump.evaluated(1, 0, input_prompt=None), "input_prompt is missing"),
        (dump.evaluated(1, 0, output_response=[1]), "output_response is not a text: list"),
        (dump.evaluated(1, 0, score="good"), "score is not a number: 'good'"),
        (dump.evaluated(1, 0, score=[1, "x"]), "score is not a number: 'x'"),
        (["no", "object"], "expected a JSON object, got list"),
    ],
)
def test_a_bad_row_says_why_and_the_others_stay(tmp_path, read, row, reason):
    good = dump.evaluated(2, 0)
    result = read(skyrl, lines(tmp_path / "x.jsonl", [good, row, good]))
    assert [r.row for r in result.rows] == [0, 2]
    assert [(b.row, b.reason) for b in result.bad] == [(1, reason)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.binary(max_size=4))
def test_damaged_evaluations_lose_only_their_own_lines(scratch, read, at, other):
    path = dump.evals(scratch, prompts=1)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at : at + len(other)] = other
    path.write_bytes(data)
    result = read(skyrl, path)
    assert len(result.rows) + len(result.bad) == sum(bool(line.strip()) for line in bytes(data).split(b"\n"))


# Training batches

torch = pytest.importorskip("torch", reason="SkyRL's training batches are tensors: pip install 'echolab[torch]'")


def batch_at(folder: Path, *args, **options) -> Path:
    return dump.training_input(folder / "dumped_data" / "global_step_23_training_input.pkl", *args, **options)


@pytest.mark.parametrize("old", [False, True])
def test_a_training_batch_is_read_without_skyrl_and_without_its_padding(tmp_path, read, old):
    path = batch_at(tmp_path, dump.batch(), old=old)
    assert known(path)
    assert step_of_path(str(path)) == 23
    result = read(skyrl, path, allow_pickle=True)
    assert not result.bad
    assert result.source.found["whole"] is True
    assert result.source.consumed == path.stat().st_size
    assert result.source.notes == ["SkyRL's training batches hold advantages but no rewards"]
    for i, row in enumerate(result.rows):
        f, n = row.fields, len(dump.RESPONSES[i])
        assert (row.row, row.key, f["sample"], f["part"], f["split"]) == (i, None, None, None, "train")
        assert (f["prompt_ids"], f["completion_ids"]) == (dump.PROMPTS[i], dump.RESPONSES[i])
        assert (f["reward"], f["advantage"]) == (None, dump.ADVANTAGES[i])
        assert f["logprobs"] == [-0.5 * (t + 1) for t in range(n)]
        assert f["loss_mask"] == [False] + [True] * (n - 1)


def test_responses_padded_on_the_right_as_older_versions_wrote_them(tmp_path, read):
    values = {
        "sequences": torch.tensor([[0, 11, 12, 31, 32, 0], [21, 22, 23, 41, 42, 43]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 0], [1] * 6]),
        "response_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "loss_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "action_log_probs": torch.tensor([[-0.5, -0.25, 0.0], [-1.0, -2.0, -3.0]]).to(torch.bfloat16),
        "advantages": torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.5]]),
    }
    result = read(skyrl, batch_at(tmp_path, values), allow_pickle=True)
    first, second = (r.fields for r in result.rows)
    assert (first["prompt_ids"], first["completion_ids"], first["advantage"]) == ([11, 12], [31, 32], 0.5)
    assert (second["advantage"], second["extra"]["advantages"]) == (None, [0.5, 0.25, 0.5])
    assert (first["logprobs"], second["logprobs"]) == ([-0.5, -0.25], [-1.0, -2.0, -3.0])
    assert "action_log_probs" in result.source.notes[1]


def test_a_plain_dict_of_tensors_is_read_too(tmp_path, read):
    path = tmp_path / "global_step_3_training_input.pkl"
    path.write_bytes(pickle.dumps({**dump.batch(), "rewards": torch.tensor([[0.0] * 3 + [1.0]] * 4)}))
    assert known(path)
    result = read(skyrl, path, allow_pickle=True)
    assert [r.fields["completion_ids"] for r in result.rows] == dump.RESPONSES
    assert [r.fields["reward"] for r in result.rows] == [1.0] * 4
    assert result.source.notes == []
    assert known(path.rename(tmp_path / "else.pkl")) is None


def test_rows_that_only_fill_the_batch_up_are_no_rollouts(tmp_path, read):
    result = read(skyrl, batch_at(tmp_path, dump.batch(), {"pad_size": 1}), allow_pickle=True)
    assert (len(result.rows), result.source.rows) == (3, 3)
    assert result.source.notes[0].startswith("1 rows are no rollouts")


def test_turns_of_step_wise_trajectories_are_parts_of_their_sample(tmp_path, read):
    metadata = {"trajectory_ids": ["a_b_0", "a_b_0", "a_b_1", "c_0"]}
    rows = read(skyrl, batch_at(tmp_path, dump.batch(), metadata), allow_pickle=True).rows
    places = [(r.key, r.fields["sample"], r.fields["part"]) for r in rows]
    assert places == [(("a_b",), 0, 0), (("a_b",), 0, 1), (("a_b",), 1, 0), (("c",), 0, 0)]


def test_uids_are_the_groups_where_a_batch_still_has_them(tmp_path, read):
    rows = read(skyrl, batch_at(tmp_path, dump.batch(), {"uids": ["x", "x", "y", "z"]}), allow_pickle=True).rows
    assert Counter(r.key for r in rows) == {("x",): 2, ("y",): 1, ("z",): 1}


def test_no_pickle_is_opened_unless_allowed(tmp_path, read):
    trap = tmp_path / "made"

    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    path = tmp_path / "global_step_1_training_input.pkl"
    path.write_bytes(pickle.dumps({"sequences": Touch()}))
    assert known(path)
    with pytest.raises(Unreadable, match=r"can run code.*--allow-pickle"):
        read(skyrl, path)
    assert not trap.exists()
    with pytest.raises(Unreadable, match="it needs a tensor sequences"):
        read(skyrl, path, allow_pickle=True)
    assert trap.exists()


def test_classes_that_are_not_installed_are_named_in_one_line(tmp_path, read):
    path = tmp_path / "global_step_1_training_input.pkl"
    path.write_bytes(b"\x80\x04\x8c\x09sequences0cskyrl.other\nThing\n.")
    assert known(path)
    with pytest.raises(Unreadable, match=r"needs classes that are not installed here \(No module named 'skyrl'\)"):
        read(skyrl, path, allow_pickle=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"response_mask": None}, "no response_mask: where responses begin is unknown"),
        ({"attention_mask": [1]}, "attention_mask is no tensor of 4 rows"),
        ({"loss_mask": torch.zeros(3, 4)}, "loss_mask is no tensor of 4 rows"),
        ({"sequences": torch.zeros(4)}, "it needs a tensor sequences"),
    ],
)
def test_a_batch_of_another_shape_is_refused_in_one_line(tmp_path, read, change, reason):
    path = tmp_path / "global_step_1_training_input.pkl"
    path.write_bytes(pickle.dumps({**dump.batch(), **change}))
    with pytest.raises(Unreadable, match=reason):
        read(skyrl, path, allow_pickle=True)


def test_a_row_that_does_not_fit_is_bad_alone(tmp_path, read):
    values = dump.batch()
    values["attention_mask"][1, 0] = 7
    values["loss_mask"][2, -1] = 0.5
    path = tmp_path / "global_step_1_training_input.pkl"
    path.write_bytes(pickle.dumps(values))
    result = read(skyrl, path, allow_pickle=True)
    assert [r.row for r in result.rows] == [0, 3]
    assert [(b.row, b.reason) for b in result.bad] == [
        (1, "attention_mask is not a list of 0 and 1"),
        (2, "loss_mask is not a list of 0 and 1"),
    ]
    assert all(b.raw for b in result.bad)


@pytest.mark.parametrize("value", [{"model": 1}, ["sequences"], {"x": "TrainingInput"}])
def test_a_neighbours_pickle_is_not_claimed(tmp_path, value):
    path = tmp_path / "state.pkl"
    path.write_bytes(pickle.dumps(value))
    assert known(path) is None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=3), st.booleans(), st.booleans())
def test_damaged_batches_give_rows_or_one_clear_error(scratch, read, at, other, cut, old):
    """Only in the bytes of tensors and names: what else a damaged pickle runs is the user's risk."""
    path = batch_at(scratch, dump.batch(), old=old)
    data = bytearray(path.read_bytes())
    at %= len(data)
    if cut:
        del data[at:]
    else:
        places = [i for i, b in enumerate(data) if chr(b).isalpha() and chr(data[i - 1]).isalpha()]
        data[places[at % len(places)]] = other[0] % 26 + 97
    path.write_bytes(data)
    skyrl.sniff(look(path))
    try:
        result = read(skyrl, path, allow_pickle=bool(data))
    except Unreadable as e:
        assert "\n" not in str(e)
        return
    assert len(result.rows) + len(result.bad) == result.source.rows
