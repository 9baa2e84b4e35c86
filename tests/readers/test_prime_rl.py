from __future__ import annotations

import copy
import gzip
import json
from collections import Counter
from typing import Any

import pytest
from generators import prime_rl as dumps
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.readers import aside, look, prime_rl, prime_rl_tokens
from echolab.readers.base import ScoresOf, Source, parse_json
from echolab.schema import ROLLOUTS

COLUMNS = {c.name for c in ROLLOUTS.columns}


def one(tmp_path, read, *rows: Any, typed: str = "") -> Any:
    return read(prime_rl, dumps.dump(tmp_path, list(rows)), typed=typed)


def of_node(**changes: Any) -> dict[str, Any]:
    """An episode whose answer is changed."""
    e = dumps.episode("e", "g", [dumps.single("t", "Q", "A", 1.0)])
    e["traces"][0]["nodes"][2] |= changes
    return e


def test_a_one_turn_episode_is_one_rollout_with_its_tokens(tmp_path, read):
    result = one(tmp_path, read, *dumps.episodes({"apples": [1.0, 0.0], "pears": [0.0, 0.0]}, advantages=True))
    assert not result.bad
    assert [(r.row, r.key) for r in result.rows] == [(i, (g, "agent")) for i, g in enumerate(["apples"] * 2 + ["pears"] * 2)]
    r = result.rows[0].fields
    assert set(r) <= COLUMNS
    assert r["completion"] == "apples.0: \\boxed{1}"
    assert bytes(r["completion_ids"][:-1]).decode() == r["completion"]
    assert r["completion_ids"][-1] == dumps.END
    system, question = [300, *b"Think.", dumps.END], [301, *b"How many apples?", dumps.END]
    assert r["prompt_ids"] == [*system, *question, dumps.ROLES["assistant"]]  # what opens the answer was not sampled
    assert r["messages"] == [{"role": "system", "content": "Think."}, {"role": "user", "content": "How many apples?"}]
    assert r["prompt_format"] == "chat"
    assert r["logprobs"] == dumps.logprobs(len(r["completion_ids"]))
    assert r["loss_mask"] is None
    assert (r["step"], r["split"], r["source"], r["policy_version"]) == (4, "train", "maths", "3-4")
    assert (r["reward"], r["rewards"], r["ground_truth"]) == (1.0, {"correct": 1.0}, "42")
    assert (r["model"], r["sampling"]) == ("Qwen3-4B", {"temperature": 1.0, "max_tokens": 64})
    assert r["finish_reason"] == "agent_completed"
    assert [x.fields["advantage"] for x in result.rows] == [0.5, -0.5, 0.0, 0.0]  # zeros: of a degenerate group
    assert "sample" not in r and "part" not in r
    assert r["extra"]["task"] == {"key": "gsm8k-7", "hash": "ab", "idx": 7, "question": "Q"}
    assert (r["extra"]["trace"], r["extra"]["episode"]) == ("t-4-apples-0", "e-4-apples-0")
    assert "completion_messages" not in r["extra"]


def test_the_episode_of_the_description(tmp_path, read):
    text = """{"id":"e1","env":{"id":"gsm8k"},"task":{"data":{"idx":7}},"group":{"id":"g3"},
     "run":{"work":{"type":"train","step":4}},"ok":true,"traces":[{"agent":{"trainable":true},"rewards":{"correct":{"score":1.0,"weight":1.0}},"nodes":[
     {"message":{"role":"user"},"token_ids":[1,2],"mask":[false,false]},
     {"parent":0,"sampled":true,"message":{"role":"assistant","content":"x"},"token_ids":[9,5],"mask":[false,true],
      "logprobs":[-0.1],"advantages":[0.5]}]}]}"""
    r = one(tmp_path, read, json.loads(text)).rows[0]
    f = r.fields
    assert (r.key, f["step"], f["reward"], f["advantage"]) == (("g3",), 4, 1.0, 0.5)
    assert (f["prompt_ids"], f["completion_ids"], f["logprobs"]) == ([1, 2, 9], [5], [-0.1])


def test_reward_is_the_weighted_sum_and_none_without_rewards(tmp_path, read):
    def reward(rewards: Any) -> Any:
        e = dumps.episode("e", "g", [dumps.trace("t", dumps.single("t", "Q", "A", None)["nodes"], rewards=rewards)])
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        result = read(prime_rl, dumps.dump(path, [e]))
        return result.bad[0].reason if result.bad else tuple(result.rows[0].fields[k] for k in ("reward", "rewards"))

    assert reward({"a": {"score": 1.0, "weight": 0.5}, "b": {"score": -2.0, "weight": 2.0}}) == (-3.5, {"a": 1.0, "b": -2.0})
    assert reward({"a": {"score": 1.0}, "b": None}) == (1.0, {"a": 1.0})  # b was not computed
    assert reward({"a": {"score": 1.0, "weight": 1.0}, "b": {"score": None, "weight": 1.0}}) == (None, {"a": 1.0})  # b: NaN
    assert reward({}) == reward(None) == reward({"a": None}) == (None, None)
    assert reward({"a": 0.25, "b": True}) == (1.25, {"a": 0.25, "b": 1.0})
    assert reward({"a": {"score": "good"}}) == "rewards.a is not a number: 'good'"
    assert reward([1]) == "rewards is not an object: list"
    assert reward({"a": [1]}) == "rewards.a is not a number: list"


def test_a_tree_gives_a_part_for_each_leaf_under_one_sample(tmp_path, read):
    t = dumps.branching()
    result = one(tmp_path, read, dumps.episode("e", "g", [t]))
    assert not result.bad
    assert [r.fields["part"] for r in result.rows] == [0, 1]
    assert len({r.fields["sample"] for r in result.rows}) == 1
    assert 0 <= result.rows[0].fields["sample"] < 1 << 31
    assert {r.fields["reward"] for r in result.rows} == {1.0}
    assert {r.fields["advantage"] for r in result.rows} == {0.5}
    paths = [[0, 1, 2, 3], [0, 4, 5]]
    for r, path in zip(result.rows, paths, strict=True):
        f = r.fields
        tokens, mask = dumps.sequence(t, path)
        n = mask.index(True)
        assert f["prompt_ids"] == tokens[:n]
        assert f["completion_ids"] == tokens[n:]
        assert (f["loss_mask"] or [True] * len(mask[n:])) == mask[n:]
        assert [x is not None for x in f["logprobs"]] == mask[n:]
    long, short = (r.fields for r in result.rows)
    assert long["completion"] == "Let me see.\n\nIt is 42."  # not what the tool said
    assert [m["role"] for m in long["extra"]["completion_messages"]] == ["assistant", "tool", "assistant"]
    assert long["extra"]["completion_messages"][0]["tool_calls"] == [{"name": "calc"}]
    assert short["completion"] == "So 42."
    assert [m["content"] for m in short["messages"]] == ["What is 6*7?", "You found 42."]
    assert short["loss_mask"] is None


def test_the_sample_number_is_the_traces_own_wherever_it_stands(tmp_path, read):
    rows = [dumps.episode(f"e{i}", "g", [dumps.branching(f"t{i}")]) for i in range(3)]

    def numbers(order: list[int], name: str) -> dict[str, int]:
        result = read(prime_rl, dumps.dump(tmp_path / name, [rows[i] for i in order]))
        return {r.fields["extra"]["trace"]: r.fields["sample"] for r in result.rows}

    assert numbers([0, 1, 2], "a") == numbers([2, 0, 1], "b")
    assert len(set(numbers([0, 1, 2], "c").values())) == 3


def test_advantages_that_differ_and_those_never_assigned(tmp_path, read):
    t = dumps.branching(advantage=0.5)
    t["nodes"][3]["advantages"] = [0.25] * len(t["nodes"][3]["advantages"])
    differ, same = one(tmp_path / "a", read, dumps.episode("e", "g", [t])).rows
    n = [len(t["nodes"][i]["advantages"]) for i in (1, 3)]
    assert differ.fields["advantage"] is None
    assert differ.fields["extra"]["advantages"] == [0.5] * n[0] + [0.25] * n[1]
    assert same.fields["advantage"] == 0.5
    t = dumps.branching(advantage=None)
    assert [r.fields["advantage"] for r in one(tmp_path / "b", read, dumps.episode("e", "g", [t])).rows] == [None, None]
    t["nodes"][1]["advantages"] = [0.5] * n[0]  # one node of two
    assert (
        one(tmp_path / "c", read, dumps.episode("e", "g", [t])).rows[0].fields["extra"]["advantages"]
        == [0.5] * n[0] + [None] * n[1]
    )


def test_agents_that_are_not_trained_are_no_rollouts_and_are_counted(tmp_path, read):
    solver = {**dumps.single("s", "Q", "A", 1.0), "agent": {"name": "solver", "trainable": True}}
    writer = {**dumps.single("w", "Write Q", "Q", 0.5), "agent": {"name": "writer"}}
    judge = {**dumps.single("j", "Is A right?", "yes", 0.75), "agent": {"name": "judge", "trainable": False}}
    result = one(tmp_path, read, dumps.episode("e", "g", [solver, judge, writer]), dumps.episode("f", "g", [judge]))
    assert [r.key for r in result.rows] == [("g", "solver"), ("g", "writer")]  # other prompts, other rewards: other groups
    assert [r.fields["extra"]["other_agents"] for r in result.rows] == [[{"agent": "judge", "reward": 0.75}]] * 2
    assert [(b.row, b.reason) for b in result.bad] == [(1, "the episode has no trace of a trained agent")]
    assert len(result.source.notes) == 1
    assert result.source.notes[0].startswith("1 traces of agents that are not trained (judge)")


def test_what_failed_is_stored_with_what_was_sampled_and_else_says_why(tmp_path, read):
    error = {"type": "SandboxError", "message": "gone", "traceback": "long"}
    cut = {**dumps.single("t", "Q", "A", None), "ok": False, "errors": [error], "stop_condition": "error"}
    empty = {**cut, "nodes": cut["nodes"][:2]}
    none = dumps.episode("e", "g", [], ok=False, errors=[error])
    failed = dumps.episode("e", "g", [cut], ok=False, errors=[error])
    result = one(tmp_path, read, failed, dumps.episode("e", "g", [empty]), none)
    (row,) = result.rows
    assert (row.fields["reward"], row.fields["finish_reason"]) == (None, "error")
    assert row.fields["extra"]["errors"] == row.fields["extra"]["episode_errors"] == ["SandboxError: gone"]
    assert row.fields["extra"]["ok"] is row.fields["extra"]["episode_ok"] is False
    assert [(b.row, b.reason) for b in result.bad] == [
        (1, "nothing was sampled (SandboxError: gone)"),
        (2, "the episode has no trace of a trained agent (SandboxError: gone)"),
    ]


@pytest.mark.parametrize(
    ("stop", "call", "finish", "kept"),
    [
        ("agent_completed", "stop", "agent_completed", None),
        ("max_total_tokens", "stop", "length", "max_total_tokens"),
        ("max_output_tokens", None, "length", "max_output_tokens"),
        ("prompt_too_long", None, "length", "prompt_too_long"),
        ("length", None, "length", None),
        ("max_turns", "stop", "max_turns", None),
        ("agent_completed", "length", "length", "agent_completed"),
        (None, "tool_calls", "tool_calls", None),
        (None, None, None, None),
    ],
)
def test_finish_reason(tmp_path, read, stop, call, finish, kept):
    e = of_node(finish_reason=call)
    e["traces"][0] |= {"stop_condition": stop, "calls": []}
    fields = one(tmp_path, read, e).rows[0].fields
    assert (fields["finish_reason"], fields["extra"].get("stop_condition")) == (finish, kept)


@pytest.mark.parametrize(
    ("message", "completion", "kept"),
    [
        ({"content": "x"}, "x", False),
        ({"content": ""}, "", False),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab", False),
        ({"content": None, "tool_calls": [{"name": "f"}]}, None, True),
        ({"content": "So 2.", "reasoning_content": "1+1"}, "1+1\n\nSo 2.", True),
        ({"content": [{"type": "image_url", "image_url": {"url": "u"}}]}, None, True),
    ],
)
def test_the_text_of_one_answer_is_its_content(tmp_path, read, message, completion, kept):
    fields = one(tmp_path, read, of_node(message={"role": "assistant", **message})).rows[0].fields
    assert fields["completion"] == completion
    assert ("completion_messages" in fields["extra"]) is kept


def test_without_tokens_the_words_remain(tmp_path, read):
    e = dumps.episode("e", "g", [dumps.single("t", "Q", "A", 1.0)])
    for n in e["traces"][0]["nodes"]:
        n |= {"token_ids": [], "mask": [], "logprobs": []}
    fields = one(tmp_path / "a", read, e).rows[0].fields
    assert (fields["completion"], fields["completion_ids"], fields["prompt_ids"], fields.get("logprobs")) == (
        "A",
        None,
        None,
        None,
    )
    e["traces"][0]["nodes"][2]["message"] = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert one(tmp_path / "b", read, e).rows[0].fields["completion"] == ""


def test_a_prompt_whose_tokens_all_stand_at_the_answer(tmp_path, read):
    """The chat client gives no spans: the nodes before the answer have no tokens, and it has those of the whole prompt."""
    e = of_node(token_ids=[1, 2, 3, 9, 8], mask=[False, False, False, True, True], logprobs=[-1.0, None])
    for n in e["traces"][0]["nodes"][:2]:
        n |= {"token_ids": [], "mask": []}
    fields = one(tmp_path / "a", read, e).rows[0].fields
    assert (fields["prompt_ids"], fields["completion_ids"], fields["logprobs"]) == ([1, 2, 3], [9, 8], [-1.0, None])
    e["traces"][0]["nodes"][2] |= {"token_ids": [9, 8], "mask": [True, True]}
    fields = one(tmp_path / "b", read, e).rows[0].fields
    assert (fields["prompt_ids"], fields["completion_ids"]) == (None, [9, 8])
    e["traces"][0]["nodes"][0] |= {"token_ids": [1, 2], "mask": [False, False]}  # and of the question there are none
    assert one(tmp_path / "c", read, e).rows[0].fields["prompt_ids"] is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parent": 2}, "node 2: its parent 2 does not stand before it"),
        ({"parent": -1}, "node 2: its parent -1 does not stand before it"),
        ({"parent": "x"}, "node 2: parent is not a whole number: 'x'"),
        ({"sampled": "perhaps"}, "node 2: sampled is not a number: 'perhaps'"),
        ({"message": None}, "node 2: message is not an object: NoneType"),
        ({"message": {"content": 5}}, "a message's content is neither a text nor a list of parts: int"),
        ({"token_ids": [1, "2"]}, "node 2: token_ids is not a list of token ids"),
        ({"token_ids": {"a": 1}}, "node 2: token_ids is not a list: dict"),
        ({"token_ids": [-1, 2, 3]}, "node 2: token_ids holds a negative token id"),
        ({"token_ids": [1 << 40]}, "node 2: token_ids is not a list of token ids"),
        ({"mask": [True]}, "node 2: mask has 1 entries for 3 tokens"),
        ({"mask": [True, 2, False]}, "node 2: mask is not a list of true and false"),
        ({"logprobs": [-0.5]}, "node 2: logprobs has 1 entries for 2 sampled tokens"),
        ({"logprobs": ["a", -1]}, "node 2: logprobs is not a list of numbers"),
        ({"advantages": [1.0] * 3}, "node 2: advantages has 3 entries for 2 sampled tokens"),
        ({"advantages": True}, "node 2: advantages is not a list: bool"),
    ],
)
def test_a_malformed_node_is_a_bad_row_and_the_other_traces_stay(tmp_path, read, changes, reason):
    e = of_node(**changes)
    e["traces"].append(dumps.single("good", "Q", "B", 0.0))
    result = one(tmp_path, read, e, dumps.episode("f", "g", [dumps.single("u", "Q", "C", 0.0)]))
    assert [r.fields["completion"] for r in result.rows] == ["B", "C"]
    (bad,) = result.bad
    assert (bad.row, bad.reason) == (0, f"trace 0: {reason}")
    assert json.loads(bad.raw)["id"] == "t"


def test_a_malformed_branch_leaves_the_other_one(tmp_path, read):
    t = dumps.branching()
    t["nodes"][3]["logprobs"] = [0.0]
    result = one(tmp_path, read, dumps.episode("e", "g", [t]))
    assert [(r.fields["part"], r.fields["completion"]) for r in result.rows] == [(1, "So 42.")]
    assert result.bad[0].reason.startswith("part 0: node 3: logprobs has 1 entries")
    assert [n["message"]["role"] for n in json.loads(result.bad[0].raw)["nodes"]] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"traces": {}}, "traces is not a list: dict"),
        ({"traces": [None]}, "not an object: NoneType"),
        ({"traces": [{"nodes": []}]}, "the trace has no nodes"),
        ({"run": [1]}, "run is not an object: list"),
        ({"run": {"work": {"step": True}}}, "run.work.step is not a whole number: 'True'"),
        ({"group": {"id": 1.5}}, "group.id is not a single word: float"),
        ({"env": {"name": ["x"]}}, "env.name is not a single word: list"),
        ({"errors": "x"}, "errors is not a list: str"),
    ],
)
def test_a_malformed_episode_is_one_bad_row(tmp_path, read, changes, reason):
    result = one(tmp_path, read, {**dumps.episode("e", "g", [dumps.single("t", "Q", "A", 1.0)]), **changes})
    assert not result.rows
    assert [b.reason for b in result.bad] == [reason]
    assert result.bad[0].raw


def test_a_line_of_another_kind_and_broken_text(tmp_path, read):
    path = dumps.dump(tmp_path, [{"metrics": 1}, *dumps.episodes({"a": [1.0]})])
    with path.open("ab") as f:
        f.write(b'{"traces": [\xff]}\n{"traces":' + b"[" * 900 + b"]" * 900 + b'}\n{"id"')
    result = read(prime_rl, path)
    assert [r.row for r in result.rows] == [1]
    assert [(b.row, b.reason, b.tail) for b in result.bad if b.row != 3] == [
        (0, "neither an episode (traces) nor a trace (nodes) nor a rollout (prompt, completion)", False),
        (2, "invalid UTF-8", False),
        (4, result.bad[-1].reason, True),
    ]
    assert result.bad[2].reason == "not an object: list"


def test_deep_nesting_is_a_row_or_a_bad_row(tmp_path, read):
    path = dumps.dump(tmp_path, dumps.episodes({"a": [1.0]}))
    deep = "[" * 1010 + "]" * 1010  # as deep as the parser goes
    path.write_text(path.read_text().replace('"42"', deep) + path.read_text())
    result = read(prime_rl, path)
    assert [r.row for r in result.rows][-1] == 1
    assert len(result.rows) + len(result.bad) == 2
    assert all("nested too deeply" in b.reason for b in result.bad)


def test_without_a_group_the_prompt_decides_and_without_a_step_the_path(tmp_path, read):
    e = dumps.episode("e", "g", [dumps.single("t", "Q", "A", 1.0)])
    del e["group"], e["run"]  # exclude_none
    row = one(tmp_path, read, e, typed="rollouts/step_9/eval/all/traces.jsonl").rows[0]
    assert (row.key, row.fields["step"], row.fields["split"], row.fields["policy_version"]) == (None, None, "eval", None)


@pytest.mark.parametrize(
    ("typed", "split", "completeness"),
    [
        ("rollouts/step_4/train/all/traces.jsonl", "train", "all"),
        ("rollouts/step_4/eval/effective/traces.jsonl", "eval", "effective"),
        ("eval/run/rollouts/step_4/train/effective/traces.jsonl", "train", "effective"),
        ("effective/run/rollouts/step_4/train/all/traces.jsonl", "train", "all"),
    ],
)
def test_the_path_says_split_and_completeness(tmp_path, read, typed, split, completeness):
    path = tmp_path / typed
    dumps.lines(path, [dumps.bare("t", "g", 1.0, kind=None)])
    result = read(prime_rl, path)
    assert result.rows[0].fields["split"] == split
    assert result.source.found["completeness"] == completeness
    path = path.rename(tmp_path / "x.jsonl")
    found = read(prime_rl, path, found=dict(result.source.found))  # it is read on elsewhere
    assert found.rows[0].fields["split"] == split


def test_bare_traces_of_v07(tmp_path, read):
    rows = [dumps.bare("a", "g1", 1.0), dumps.bare("b", "g1", 0.0, kind="eval", eval_step=40, advantage=-0.5)]
    a, b = one(tmp_path, read, *rows).rows
    assert a.key == b.key == ("g1", "agent")
    assert (a.fields["step"], a.fields["split"], a.fields["source"], a.fields["policy_version"]) == (
        None,
        "train",
        "gsm8k",
        "3",
    )
    assert (b.fields["step"], b.fields["split"], b.fields["advantage"]) == (40, "eval", -0.5)
    assert (a.fields["reward"], a.fields["rewards"], a.fields["ground_truth"]) == (1.0, {"correct": 1.0}, "42")
    assert a.fields["completion"] == "a says"
    assert a.fields["extra"]["filters"] == {"gibberish": False}


def test_rollouts_of_v06(tmp_path, read):
    result = read(prime_rl, dumps.v0_dump(tmp_path, prompts=2, n=4))
    assert not result.bad
    assert Counter(r.key for r in result.rows) == {("g0",): 4, ("g1",): 4}
    f = result.rows[5].fields
    assert set(f) <= COLUMNS
    assert (f["completion"], f["reward"], f["advantage"], f["ground_truth"]) == ("A1.1", 1.0, 0.5, "1")
    assert f["messages"] == [{"role": "system", "content": "Think."}, {"role": "user", "content": "Q1"}]
    assert (f["step"], f["split"], f["source"]) == (None, "train", "gsm8k")
    assert f["finish_reason"] == "has_final_env_response"
    assert f["extra"]["is_filtered"] is False
    assert "num_turns" not in f["extra"] and f["extra"]["metrics"] == {"num_turns": 1.0}
    assert result.source.found["completeness"] == "all"


@pytest.mark.parametrize(
    ("changes", "completion", "finish"),
    [
        ({"completion": "text", "prompt": "Q"}, "text", "has_final_env_response"),
        ({"is_truncated": True}, "A1.0", "length"),
        ({"stop_condition": "max_tokens"}, "A1.0", "length"),
        ({"stop_condition": None}, "A1.0", None),
        ({"prompt": None}, "A1.0", "has_final_env_response"),
    ],
)
def test_forms_of_v06(tmp_path, read, changes, completion, finish):
    fields = one(tmp_path, read, dumps.v0(1, 0, **changes)).rows[0].fields
    assert (fields["completion"], fields["finish_reason"]) == (completion, finish)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"completion": None}, "completion is neither a text nor a list of messages: NoneType"),
        ({"completion": [], "error": {"error": "Timeout"}}, "nothing was sampled (Timeout)"),
        ({"completion": [1]}, "completion is not a list of messages"),
        ({"prompt": 5}, "prompt is neither a text nor a list of messages: int"),
        ({"prompt": [5]}, "prompt is not a list of messages"),
        ({"reward": "good"}, "reward is not a number: 'good'"),
        ({"metrics": [1]}, "metrics is not an object: list"),
    ],
)
def test_malformed_rollouts_of_v06(tmp_path, read, changes, reason):
    result = one(tmp_path, read, dumps.v0(1, 0, **changes))
    assert [b.reason for b in result.bad] == [reason]


def test_eval_rollouts_of_v06_are_known_by_their_name_and_grouped_by_the_prompt(tmp_path, read):
    path = dumps.v0_dump(tmp_path, name="eval_rollouts.jsonl")
    rows = [{k: v for k, v in r.items() if k not in ("group_id", "is_filtered", "filters", "advantage")} for r in loads(path)]
    dumps.lines(path, rows)
    assert prime_rl.sniff(look(path))
    result = read(prime_rl, path)
    assert {(r.key, r.fields["split"]) for r in result.rows} == {(None, "eval")}


def loads(path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_takes_the_advantages_that_effective_has(tmp_path, read):
    rewards = {"apples": [1.0, 0.0], "pears": [0.0, 0.0]}
    path = dumps.dump(tmp_path, [*dumps.episodes(rewards), dumps.episode("e", "plums", [dumps.branching(advantage=None)])])
    before = read(prime_rl, path)
    assert [r.fields["advantage"] for r in before.rows] == [None] * 6
    assert prime_rl.companions(path) == []
    shipped = [
        *dumps.episodes({"apples": rewards["apples"]}, advantages=True),
        dumps.episode("e", "plums", [dumps.branching(advantage=0.5)]),
    ]
    effective = dumps.dump(tmp_path, shipped, subset="effective")
    with effective.open("a") as f:
        f.write('[1]\n{"traces": 3}\n{"traces": [null, {"nodes": 3}]}\n{"tra')
    assert prime_rl.companions(path) == [effective]
    after = read(prime_rl, path)
    assert [r.fields["advantage"] for r in after.rows] == [0.5, -0.5, None, None, 0.5, 0.5]
    assert [r.fields["extra"].get("effective") for r in after.rows] == [True, True, None, None, True, True]
    for old, new in zip(before.rows, after.rows, strict=True):  # nothing else, least of all what makes the ids
        changed = {k for k in new.fields if new.fields[k] != old.fields[k]}
        assert changed <= {"advantage", "extra"}


def test_effective_and_stable_are_set_aside(tmp_path):
    effective = dumps.dump(tmp_path, dumps.episodes({"a": [1.0]}), subset="effective")
    assert aside(effective) is None  # there is no other
    path = dumps.dump(tmp_path, dumps.episodes({"a": [1.0]}))
    assert "all" in (aside(effective) or "")
    assert aside(path) is None
    with gzip.open(path.with_name("traces.jsonl.gz"), "wb") as f:
        f.write(path.read_bytes())
    path.unlink()
    assert aside(effective)
    export = dumps.token_export(tmp_path, dumps.episodes({"a": [1.0]}))
    assert aside(export) is None
    assert "complete" in (aside(export.with_name("STABLE")) or "")
    (tmp_path / "STABLE").touch()
    assert aside(tmp_path / "STABLE") is None


def test_compressed_companions_are_read(tmp_path, read):
    path = dumps.dump(tmp_path, dumps.episodes({"a": [1.0, 0.0]}))
    effective = dumps.dump(tmp_path, dumps.episodes({"a": [1.0, 0.0]}, advantages=True), subset="effective")
    effective.with_name("traces.jsonl.gz").write_bytes(gzip.compress(effective.read_bytes()))
    effective.unlink()
    assert [r.fields["advantage"] for r in read(prime_rl, path).rows] == [0.5, -0.5]


@pytest.mark.parametrize(
    ("row", "known"),
    [
        (dumps.episode("e", "g", [dumps.single("t", "Q", "A", 1.0)]), True),
        (dumps.episode("e", "g", []), True),
        (dumps.bare("t", "g", 1.0), True),
        ({**dumps.bare("t", "g", 1.0), "nodes": []}, True),
        (dumps.v0(1, 0), True),
        (dumps.v0(1, 0, completion=None), True),
        ({"traces": [], "id": 1}, False),
        ({"traces": [{"spans": []}], "env": {}, "run": {}}, False),
        ({"nodes": [], "edges": [], "group_id": 1}, False),
        ({"nodes": [{"id": 1}], "group_id": "g", "rewards": {}}, False),
        ({"prompt": "Q", "completion": "A", "reward": 1.0, "step": 1, "group_id": "g", "advantage": 0.5}, False),
        ({"group_index": 3, "index": 27, "prompt": "..", "tokens": [1, 2], "response": "..", "response_length": 1}, False),
        ({"step": 5, "sample_idx": 9, "prompt_idx": 1, "prompt_tokens": [1], "response_tokens": [2], "reward": 1.0}, False),
        ({"prompt_ids": [1], "completion_ids": [2], "token_ids": [1, 2], "loss_mask": [0, 1], "entropy": [0, 1]}, False),
    ],
)
def test_sniffing(tmp_path, row, known):
    path = dumps.lines(tmp_path / "a.jsonl", [row])
    assert bool(prime_rl.sniff(look(path))) is known
    assert prime_rl_tokens.sniff(look(path)) is None


def test_a_token_export_is_known_by_none_but_its_reader(tmp_path):
    path = dumps.token_export(tmp_path, dumps.episodes({"a": [1.0]}))
    assert prime_rl_tokens.sniff(look(path))
    assert prime_rl.sniff(look(path)) is None


@st.composite
def trees(draw) -> dict[str, Any]:
    """A trace whose nodes hang anywhere, some of them sampled, with random tokens."""
    nodes = []
    for i in range(draw(st.integers(1, 12))):
        parent = draw(st.none() | st.integers(0, i - 1)) if i else None
        sampled, n = draw(st.booleans()), draw(st.integers(0, 4))
        mask = [sampled and draw(st.booleans()) for _ in range(n)]
        node = {"message": {"role": "user", "content": f"m{i}"}, "sampled": sampled}
        node |= {"token_ids": [100 * i + k for k in range(n)], "mask": mask}
        node["logprobs"] = [-(100 * i + k) / 4.0 for k in range(n) if mask[k]]
        nodes.append(node if parent is None else {"parent": parent, **node})
    return dumps.trace("tree", nodes, 1.0)


@settings(max_examples=150, deadline=None)
@given(trees())
def test_parts_are_the_leaves_of_any_tree(scratch, read, t):
    path = scratch / "tree.jsonl"
    dumps.lines(path, [dumps.episode("e", "g", [t])])
    result = read(prime_rl, path)
    nodes = t["nodes"]

    def routes(at: int) -> list[list[int]]:  # top-down, unlike the reader
        below = [i for i, n in enumerate(nodes) if n.get("parent") == at and "parent" in n]
        return [[at, *r] for b in below for r in routes(b)] if below else [[at]]

    expected = sorted((r for i, n in enumerate(nodes) if "parent" not in n for r in routes(i)), key=lambda r: r[-1])
    assert len(result.rows) + len(result.bad) == len(expected)
    parts = {r.fields.get("part", 0): r.fields for r in result.rows}
    for part, route in enumerate(expected):
        walked = [nodes[i] for i in route]
        first = next((i for i, n in enumerate(walked) if n["sampled"]), None)
        assert (part in parts) is (first is not None)
        if first is None:
            continue
        fields = parts[part]
        assert fields["completion"] == "\n\n".join(n["message"]["content"] for n in walked[first:] if n["sampled"])
        assert [m["content"] for m in fields["messages"] or []] == [n["message"]["content"] for n in walked[:first]]
        if fields["completion_ids"] is None:
            assert not all(n["token_ids"] for n in walked[first:] if n["sampled"])
            continue
        tokens = [x for n in walked for x in n["token_ids"]]
        mask = [m for n in walked for m in n["mask"]]
        start = len(tokens) - len(fields["completion_ids"])
        assert fields["completion_ids"] == tokens[start:]
        assert fields["prompt_ids"] in (None, tokens[:start])
        assert not any(mask[:start])
        assert (fields["loss_mask"] or [True] * len(mask[start:])) == mask[start:]
        for token, sampled, logprob in zip(tokens[start:], mask[start:], fields.get("logprobs") or (), strict=False):
            assert logprob == (-token / 4.0 if sampled else None)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] + [p for k, v in below for p in places(v, (*at, k))]


ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e308,
        float("nan"),
        float("inf"),
        1 << 70,
        "",
        "x",
        "1",
        [],
        [[]],
        {},
        {"a": 1},
        [None],
        [1.5],
    ]
)
GOOD = [
    dumps.episode("e", "g", [dumps.branching(), dumps.single("t", "Q", "A", 1.0, 0.5)]),
    dumps.bare("t", "g", 1.0, eval_step=3),
    dumps.v0(1, 0),
]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_odd_values_anywhere_never_raise_and_every_line_is_accounted_for(scratch, read, data):
    row = copy.deepcopy(data.draw(st.sampled_from(GOOD)))
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(row)[1:]))
        at = row
        for step in way:
            at = at[step]
        if data.draw(st.booleans()) and isinstance(at, dict):
            del at[last]
        else:
            at[last] = copy.deepcopy(data.draw(ODD))
    path = dumps.lines(scratch / "odd.jsonl", [row, GOOD[0]])
    look_at = look(path)
    prime_rl.sniff(look_at)
    prime_rl_tokens.sniff(look_at)
    result = read(prime_rl, path)
    assert {r.row for r in result.rows} | {b.row for b in result.bad} == {0, 1}
    assert sum(r.row == 1 for r in result.rows) == 3
    assert all(b.reason and b.raw for b in result.bad)


WHOLE = [*dumps.episodes({"a": [1.0, 0.0]}), GOOD[0], GOOD[1], {"no": 1}, GOOD[2]]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_cut_at_any_byte_and_the_continuation_equal_one_reading(scratch, read, data):
    path = dumps.lines(scratch / "cut.jsonl", WHOLE)
    whole, content = read(prime_rl, path), path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    first = read(prime_rl, path)
    path.write_bytes(content)
    rest = read(prime_rl, path, start=first.source.consumed, start_row=first.source.rows, found=first.source.found)
    kept = [said for said, item in zip(first.said, [*first.rows, *first.bad], strict=True) if not getattr(item, "tail", False)]
    assert sorted(map(repr, kept + rest.said)) == sorted(map(repr, whole.said))
    assert (rest.source.consumed, rest.source.rows) == (whole.source.consumed, whole.source.rows)


def exports(path, **more: Any) -> tuple[list[ScoresOf], list[Any], Source]:
    source = Source(path, path.name, str(path), **more)
    items = list(prime_rl_tokens.read(source))
    return [i for i in items if isinstance(i, ScoresOf)], [i for i in items if not isinstance(i, ScoresOf)], source


def test_a_token_export_gives_the_entropies_without_the_padding(tmp_path):
    rows = dumps.episodes({"a": [1.0, 0.0]}, advantages=True)
    path = dumps.token_export(tmp_path, rows)
    scores, bad, source = exports(path)
    assert not bad and not source.notes
    assert [s.row for s in scores] == [0, 1]
    for s, written in zip(scores, loads(path), strict=True):
        assert s.token_ids == written["token_ids"]
        assert s.entropies[1:] == written["entropy"][1:]
        assert written["entropy"][0] == max(written["entropy"]) > 6  # log(vocabulary)
        assert max(s.entropies) < 2
        assert s.logprobs and s.logprobs[1:] == written["trainer_logprobs"][1:]
        assert s.step == 4
        assert parse_json(s.raw) == written


def test_its_tokens_are_those_of_the_rollout(tmp_path, read):
    rows = dumps.episodes({"a": [1.0, 0.0]}, advantages=True)
    rollouts = one(tmp_path, read, *rows).rows
    scores, _, _ = exports(dumps.token_export(tmp_path, rows))
    for r, s in zip(rollouts, scores, strict=True):
        assert r.fields["prompt_ids"] + r.fields["completion_ids"] == s.token_ids


def test_without_its_marker_a_token_export_is_read_and_it_is_said(tmp_path):
    path = dumps.token_export(tmp_path, dumps.episodes({"a": [1.0]}), stable=False)
    scores, _, source = exports(path)
    assert len(scores) == 1
    assert "STABLE" in source.notes[0]


def test_the_step_of_the_run_comes_before_that_of_the_trainer(tmp_path):
    row = {**dumps.export([1, 2], [False, True], step=9), "export_step": 7}
    assert exports(dumps.lines(tmp_path / "rank_0.jsonl", [row]))[0][0].step == 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema_version": 2}, "schema_version is 2, only 1 is known"),
        ({"token_ids": None}, "token_ids is not a list: NoneType"),
        ({"token_ids": [1, None, 3]}, "token_ids is not a list of token ids"),
        ({"token_ids": []}, "loss_mask is not true or false for each of 0 tokens"),
        ({"loss_mask": [False, True]}, "loss_mask is not true or false for each of 3 tokens"),
        ({"loss_mask": [False, True, "x"]}, "loss_mask is not true or false for each of 3 tokens"),
        ({"loss_mask": [True, True, True]}, "the first token is in the loss mask, but no entropy belongs to it"),
        ({"entropy": [6.0, 1.0]}, "entropy has 2 entries for 3 tokens"),
        ({"entropy": [6.0, 1.0, None]}, "the entropy of token 2 is null"),
        ({"entropy": [6.0, "x", 1.0]}, "entropy is not a list of numbers"),
        ({"entropy": {}}, "entropy is not a list: dict"),
        ({"trainer_logprobs": [0.0]}, "trainer_logprobs has 1 entries for 3 tokens"),
        ({"step": "x"}, "step is not a whole number: 'x'"),
    ],
)
def test_a_malformed_row_of_a_token_export_says_why(tmp_path, changes, reason):
    good = dumps.export([1, 2, 3], [False, True, True])
    path = dumps.lines(tmp_path / "rank_0.jsonl", [{**good, **changes}, good])
    scores, bad, _ = exports(path)
    assert [s.row for s in scores] == [1]
    assert [(b.row, b.reason, bool(b.raw)) for b in bad] == [(0, reason, True)]


def test_a_null_among_log_probabilities_makes_them_unknown_but_not_at_the_padding(tmp_path):
    good = dumps.export([1, 2, 3], [False, True, True])
    rows = [{**good, "trainer_logprobs": lp} for lp in ([0.0, None, -1.0], [None, -1.0, -2.0])]
    rows.append({**good, "entropy": [None, 1.0, 2.0]})
    scores, bad, _ = exports(dumps.lines(tmp_path / "rank_0.jsonl", rows))
    assert not bad
    assert [s.logprobs for s in scores] == [None, [0.0, -1.0, -2.0], [0.0, -0.5, -0.5]]
    assert scores[2].entropies == [0.0, 1.0, 2.0]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_odd_values_in_a_token_export_never_raise(scratch, data):
    row = dumps.export([1, 2, 3], [False, True, True])
    *way, last = data.draw(st.sampled_from(places(row)[1:]))
    at: Any = row
    for step in way:
        at = at[step]
    at[last] = copy.deepcopy(data.draw(ODD))
    scores, bad, _ = exports(dumps.lines(scratch / "rank_0.jsonl", [row]))
    assert len(scores) + len(bad) == 1
