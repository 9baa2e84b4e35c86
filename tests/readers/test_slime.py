from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from generators import slime as dump
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.errors import Unreadable
from echolab.readers import look, slime

torch = pytest.importorskip("torch", reason="slime writes torch files: pip install 'echolab[torch]'")

LEGACY = {"_use_new_zipfile_serialization": False}


class Touch:
    """A pickle that creates a file as it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def known(path: Path) -> str | None:
    return slime.sniff(look(path))


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_every_sample_becomes_a_rollout_with_its_own_tokens(tmp_path, read, options):
    written = dump.samples(groups=2, n=4)
    path = dump.rollouts(tmp_path / "rollout_data" / "3.pt", written, **options)
    assert known(path)
    result = read(slime, path)
    assert (len(result.rows), result.bad, result.source.notes) == (8, [], [])
    assert (result.source.consumed, result.source.rows) == (path.stat().st_size, 8)
    for i, (row, s) in enumerate(zip(result.rows, written, strict=True)):
        f = row.fields
        assert (row.row, row.key, row.scores) == (i, (s["group_index"],), None)
        assert (f["step"], f["split"], f["sample"], f["part"]) == (3, "train", i % 4, None)
        assert f["prompt_ids"] == s["tokens"][:5]
        assert f["completion_ids"] == s["tokens"][5:]
        assert f["logprobs"] == s["rollout_log_probs"]
        assert f["loss_mask"] == [False] + [True] * (s["response_length"] - 1)
        assert (f["prompt"], f["completion"], f["ground_truth"]) == (s["prompt"], s["response"], s["label"])
        assert (f["reward"], f["rewards"], f["policy_version"]) == (s["reward"], None, "3")
        assert f["finish_reason"] == ("length" if i % 4 == 3 else "stop")
        assert f["extra"] == {k: s[k] for k in ("index", "metadata", "non_generation_time")}


def test_tensors_are_read_as_lists_are(tmp_path, read):
    lists = dump.samples()
    tensors = [{**s, **{k: torch.tensor(s[k]) for k in ("tokens", "loss_mask", "rollout_log_probs", "reward")}} for s in lists]
    as_lists = read(slime, dump.rollouts(tmp_path / "a" / "3.pt", lists)).said
    assert read(slime, dump.rollouts(tmp_path / "b" / "3.pt", tensors)).said == as_lists


def test_evaluations_are_a_split_of_their_own_and_their_prompts_are_their_groups(tmp_path, read):
    path = dump.rollouts(tmp_path / "rollout_data" / "eval_3.pt", [{**s, "group_index": None} for s in dump.samples()])
    rows = read(slime, path).rows
    assert {(r.fields["split"], r.fields["step"], r.key, r.fields["sample"]) for r in rows} == {("eval", 3, None, None)}


def test_rows_of_one_rollout_are_its_parts(tmp_path, read):
    first, second, third = dump.samples(groups=1, n=3)
    of = [{**first, "rollout_id": 1 << 40}, {**first, "index": 9, "rollout_id": 1 << 40}, {**second, "rollout_id": 5}]
    rows = read(slime, dump.rollouts(tmp_path / "3.pt", of)).rows
    assert [(r.fields["sample"], r.fields["part"]) for r in rows] == [(0, 0), (0, 1), (1, None)]
    same = [{**s, "rollout_id": 3} for s in (first, second, third, third)]  # of the training step: says nothing
    rows = read(slime, dump.rollouts(tmp_path / "4.pt", same)).rows
    assert [(r.fields["sample"], r.fields["part"]) for r in rows] == [(0, None), (1, None), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("reward", "total", "rewards", "extra"),
    [
        ({"math": 0.5}, 0.5, {"math": 0.5}, None),
        ({"format": 1, "score": 0.25, "pred": "4"}, 0.25, {"format": 1.0, "score": 0.25}, {"pred": "4"}),
        ({"acc": True, "format": 0.5}, 1.0, {"acc": 1.0, "format": 0.5}, None),
        ({"a": 1.0, "b": 2.0}, None, {"a": 1.0, "b": 2.0}, None),
        ({}, None, None, None),
    ],
)
def test_a_dict_of_rewards_keeps_all_and_the_note_says_which_is_the_total(tmp_path, read, reward, total, rewards, extra):
    result = read(slime, dump.rollouts(tmp_path / "3.pt", dump.samples(reward=reward)))
    for row in result.rows:
        assert (row.fields["reward"], row.fields["rewards"], row.fields["extra"].get("reward")) == (total, rewards, extra)
    (note,) = result.source.notes
    assert ("is unknown" in note) == (total is None)
    assert note.startswith("the reward of 8 rollouts is a dict")


def test_messages_aborted_samples_and_changing_versions(tmp_path, read):
    messages = [{"role": "user", "content": "1+1?"}]
    of = [
        dump.sample(1, 0, prompt=messages, weight_versions=["3", "4"]),
        dump.sample(1, 1, tokens=[], response="", response_length=0, rollout_log_probs=None, loss_mask=None, status="aborted")
        | {"reward": None},
        dump.sample(1, 2, response_length=0, response="", rollout_log_probs=[], loss_mask=[], status="failed"),
    ]
    first, aborted, failed = (r.fields for r in read(slime, dump.rollouts(tmp_path / "3.pt", of)).rows)
    assert (first["messages"], first["prompt"], first["prompt_format"]) == (messages, None, "chat")
    assert (first["policy_version"], first["extra"]["weight_versions"]) == ("4", ["3", "4"])
    assert (aborted["finish_reason"], aborted["reward"], aborted["completion"]) == ("aborted", None, "")
    assert "completion_ids" not in aborted
    assert (failed["finish_reason"], failed["completion_ids"], failed["prompt_ids"]) == ("failed", [], dump.tokens_of(1, 2))


def test_numbers_for_each_token_that_have_no_column_are_left_out_and_named(tmp_path, read):
    of = dump.samples(rollout_routed_experts=torch.zeros(3, 4), teacher_log_probs=[0.0] * 100)
    result = read(slime, dump.rollouts(tmp_path / "3.pt", of))
    assert result.source.notes == ["left out, as no column holds them: rollout_routed_experts, teacher_log_probs"]
    assert result.rows[0].fields["extra"].keys() == {"index", "metadata", "non_generation_time"}


def test_train_data_bring_advantages_and_entropies_by_position(tmp_path, read):
    of = dump.samples()
    path = dump.rollouts(tmp_path / "rollout_data" / "3.pt", of)
    assert slime.companions(path) == []
    train = dump.train(tmp_path / "train_data" / "3.pt", of, order=[5, 0, 2, 1])  # not all, not in order
    assert slime.companions(path) == [train]
    result = read(slime, path)
    assert result.source.notes == ["train_data is joined: 4 of 8 rollouts"]
    for i, row in enumerate(result.rows):
        n = of[i]["response_length"]
        if i not in (5, 0, 2, 1):
            assert row.scores is None
            assert "advantage" not in row.fields
            continue
        assert row.fields["advantage"] == 0.5 - i % 2
        assert row.scores.entropies == [0.25 * i + 0.5 * t for t in range(n)]
        assert row.scores.logprobs == [-0.5 * (t + 1) for t in range(n)]
    assert dump.rollouts(tmp_path / "rollout_data" / "eval_3.pt") and slime.companions(path.with_name("eval_3.pt")) == []


def test_an_advantage_of_each_token_goes_to_extra_but_masked_tokens_do_not_count(tmp_path, read):
    of = dump.samples(groups=1, n=2)
    path = dump.rollouts(tmp_path / "rollout_data" / "3.pt", of)
    n = of[0]["response_length"]
    dump.train(tmp_path / "train_data" / "3.pt", of, order=[0], advantages=torch.tensor([9.0] + [0.5] * (n - 1)))
    assert read(slime, path).rows[0].fields["advantage"] == 0.5  # its first token is masked
    values = [0.5 * t for t in range(n)]
    dump.train(tmp_path / "train_data" / "3.pt", of, order=[0], advantages=torch.tensor(values))
    fields = read(slime, path).rows[0].fields
    assert (fields["advantage"], fields["extra"]["advantages"]) == (None, values)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"tokens": torch.tensor([1, 2, 3])}, "its tokens are not those of the rollout"),
        ({"entropy": torch.tensor([0.5])}, "1 entropy for 7 tokens"),
        ({"entropy": torch.tensor([float("nan")] * 7)}, "an entropy is not finite"),
        ({"entropy": torch.tensor([-3.0] * 7)}, "an entropy is negative: -3"),
    ],
)
def test_train_data_that_do_not_fit_a_rollout_are_left_and_it_is_said(tmp_path, read, wrong, reason):
    of = dump.samples()
    path = dump.rollouts(tmp_path / "rollout_data" / "3.pt", of)
    dump.train(tmp_path / "train_data" / "3.pt", of, order=[0], **wrong)
    result = read(slime, path)
    assert len(result.rows) == 8
    assert result.rows[0].scores is None
    assert result.source.notes == [f"1 samples of train_data are not joined, the first because: {reason}"]


def test_what_rounding_made_of_an_entropy_of_zero_is_zero_and_said(tmp_path, read):
    of = dump.samples()
    path = dump.rollouts(tmp_path / "rollout_data" / "3.pt", of)
    dump.train(tmp_path / "train_data" / "3.pt", of, order=[0], entropy=torch.tensor([-0.125, 0.5, 0, 0, 0, 0, 0]))
    result = read(slime, path)
    assert result.rows[0].scores.entropies == [0, 0.5, 0, 0, 0, 0, 0]
    assert "entropies that rounding made negative are read as 0, in 1 rollouts" in result.source.notes


def test_shards_of_version_1_are_not_joined_and_it_is_said(tmp_path, read):
    path = dump.rollouts(tmp_path / "rollout_data" / "3.pt")
    shards = [dump.shard(tmp_path / "train_data" / f"3_{rank}.pt") for rank in (0, 1)]
    dump.shard(tmp_path / "train_data" / "31_0.pt")
    assert slime.companions(path) == shards
    result = read(slime, path)
    assert len(result.rows) == 8
    (note,) = result.source.notes
    assert note.startswith("train_data/3_0.pt is not joined: in shards of version 1")
    for s in shards:
        assert known(s) is None
        assert "shards of version 1" in (slime.aside(s) or "")


def test_train_data_are_put_aside_with_and_without_their_rollouts(tmp_path):
    rollouts = dump.rollouts(tmp_path / "rollout_data" / "3.pt")
    train, alone = (dump.train(tmp_path / "train_data" / name) for name in ("3.pt", "4.pt"))
    assert (known(train), known(alone), slime.aside(rollouts)) == (None, None, None)
    assert slime.aside(train) == "slime train data: read with its rollouts"
    assert "not in rollout_data" in (slime.aside(alone) or "")
    with pytest.raises(Unreadable, match="no rollout dump"):
        list(slime.read(slime_source(train)))


def slime_source(path: Path, **options):
    from echolab.readers.base import ReadOptions, Source

    return Source(path, path.name, path.name, ReadOptions(**options))


@pytest.mark.parametrize("payload", [{"model": {"w": [1.0]}}, [1, 2], {"rollout_id": 3}, {"samples": [1]}, "rollout_id"])
@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_neighbours_torch_file_is_not_claimed(tmp_path, payload, options):
    path = dump.save(tmp_path / "3.pt", payload, **options)
    assert known(path) is None
    assert slime.aside(path) is None


def test_a_dump_without_samples_is_known_and_empty(tmp_path, read):
    path = dump.rollouts(tmp_path / "3.pt", [])
    assert known(path)
    assert read(slime, path).rows == []


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_file_that_would_run_code_is_refused_unless_allowed(tmp_path, read, options):
    trap = tmp_path / "made"
    path = dump.rollouts(tmp_path / "3.pt", [dump.sample(1, 0, metadata={"x": Touch(trap)})], **options)
    assert known(path)
    assert slime.aside(path) is None
    with pytest.raises(Unreadable, match=r"could run code.*--allow-pickle") as refused:
        read(slime, path)
    assert "\n" not in str(refused.value)
    assert not trap.exists()
    assert len(read(slime, path, allow_pickle=True).rows) == 1
    assert trap.exists()


def test_train_data_that_would_run_code_leave_the_rollouts_readable(tmp_path, read):
    path = dump.rollouts(tmp_path / "rollout_data" / "3.pt")
    dump.train(tmp_path / "train_data" / "3.pt", dump.samples(), extra=Touch(tmp_path / "made"))
    result = read(slime, path)
    assert len(result.rows) == 8
    assert "train_data/3.pt is not joined: holds more than plain values" in result.source.notes[0]
    assert not (tmp_path / "made").exists()


def test_without_torch_one_line_says_what_to_install(tmp_path, read, monkeypatch):
    path = dump.rollouts(tmp_path / "3.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert known(path)
    with pytest.raises(Unreadable, match=r"slime dumps need torch: pip install 'echolab\[torch\]'"):
        read(slime, path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (5, "expected a sample as a dict, got int"),
        (dump.sample(1, 0, response=5), "response is not a text: int"),
        (dump.sample(1, 0, prompt=5), "prompt is neither a text nor messages: int"),
        (dump.sample(1, 0, tokens="abc"), "tokens is not a list: str"),
        (dump.sample(1, 0, tokens=["a"]), "tokens is not a list of token ids"),
        (dump.sample(1, 0, response_length=99), "response_length is 99, of 12 tokens"),
        (dump.sample(1, 0, response_length=None), "response_length is None, of 12 tokens"),
        (dump.sample(1, 0, loss_mask=[2]), "loss_mask is not a list of 0 and 1"),
        (dump.sample(1, 0, rollout_log_probs=[None]), "rollout_log_probs is not a list of numbers"),
        (dump.sample(1, 0, reward="good"), "reward is not a number: 'good'"),
        (dump.sample(1, 0, group_index=[1]), "group_index is not a whole number: '[1]'"),
    ],
)
def test_a_bad_sample_says_why_and_the_others_stay(tmp_path, read, value, reason):
    good = dump.sample(2, 0)
    result = read(slime, dump.rollouts(tmp_path / "3.pt", [good, value, good]))
    assert [r.row for r in result.rows] == [0, 2]
    assert [(b.row, b.reason) for b in result.bad] == [(1, reason)]
    assert result.bad[0].raw


def test_names_that_are_no_texts_and_circles_end_as_rows_or_in_quarantine(tmp_path, read):
    circle: list = []
    circle.append(circle)
    of = [
        dump.sample(1, 0, metadata={(1, 2): {3: "x"}}),
        dump.sample(1, 1, metadata=circle),
        dump.sample(1, 2, label={(1,): 2}),
    ]
    result = read(slime, dump.rollouts(tmp_path / "3.pt", of))
    assert result.rows[0].fields["extra"]["metadata"] == {"(1, 2)": {"3": "x"}}
    assert [(r.row) for r in result.rows] == [0, 2]
    assert [b.row for b in result.bad] == [1]
    assert result.bad[0].raw


_FILES = SimpleNamespace(whole={})


@settings(max_examples=120, deadline=None)
@given(st.booleans(), st.integers(0, 1 << 16), st.integers(0, 255), st.booleans())
def test_damaged_files_give_rows_or_one_clear_error(scratch, read, zipped, at, byte, cut):
    if not _FILES.whole:
        of = [dump.sample(1, i, loss_mask=None, metadata={"x": [1.5, None, "é"]}) for i in range(2)]
        for name, options in ((True, {}), (False, LEGACY)):
            _FILES.whole[name] = dump.rollouts(scratch / "3.pt", of, **options).read_bytes()
    data = bytearray(_FILES.whole[zipped])
    at %= len(data)
    data[at] = byte
    path = scratch / "3.pt"
    path.write_bytes(data[:at] if cut else data)
    slime.sniff(look(path))
    slime.aside(path)
    try:
        result = read(slime, path)
    except Unreadable as e:
        assert "\n" not in str(e)
        return
    assert len(result.rows) + len(result.bad) == result.source.rows


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(torch.tensor([1, 2]))
_NAMES = st.text(max_size=2) | st.integers()
_VALUES = st.recursive(_SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(_NAMES, v, max_size=2), max_leaves=5)
_CHANGES = st.dictionaries(st.sampled_from([*dump.sample(1, 0), "x"]), _VALUES)


@settings(max_examples=60, deadline=None)
@given(st.lists(_CHANGES.map(lambda other: {**dump.sample(1, 0), **other}), max_size=3))
def test_samples_of_any_content_are_all_accounted_for(scratch, read, of):
    result = read(slime, dump.rollouts(scratch / "5.pt", of))
    assert len(result.rows) + len(result.bad) == len(of)


def test_nothing_is_run_to_know_a_format(tmp_path):
    trap = tmp_path / "made"
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"rollout_id": 1, "samples": Touch(trap)}))
    assert known(path) is None
    assert slime.aside(path) is None
    assert not trap.exists()
