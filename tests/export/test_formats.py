"""The exact columns, types and values of every format."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generators.clipsets import TOKENIZER, add_clipset, clip, lines, rollout

from echolab import ids
from echolab.errors import EcholabError, WrongUsage
from echolab.export.config import TARGETS, ExportConfig

MESSAGES = "list<element: struct<role: string, content: string>>"
IDS = "list<element: int32>"
EXTRA = (
    "struct<split: string, index: int64, answer: string, question: string, prompt_id: string, problem_id: string,"
    " success_rate: double>"
)
# By format and form: each column with its Parquet type.
COLUMNS = {
    ("trl-sft", "text"): {"prompt": "string", "completion": "string"},
    ("trl-sft", "chat"): {"prompt": MESSAGES, "completion": MESSAGES},
    ("trl-sft", "tokens"): {"input_ids": IDS, "attention_mask": IDS, "labels": IDS},
    ("trl-grpo", "text"): {
        "prompt": "string", "ground_truth": "string", "source": "string", "prompt_id": "string", "problem_id": "string",
        "success_rate": "double",
    },
    ("verl", "chat"): {
        "data_source": "string", "prompt": MESSAGES, "ability": "string",
        "reward_model": "struct<style: string, ground_truth: string>", "extra_info": EXTRA,
    },
    ("replay", None): {
        "prompt_ids": IDS, "clip_ids": IDS, "clip_mask": "list<element: bool>", "weight": "double", "problem_id": "string",
        "step": "int64", "tokenizer": "string", "temperature": "double", "clip_id": "string",
    },
}  # fmt: skip
COLUMNS["trl-grpo", "chat"] = COLUMNS["trl-grpo", "text"] | {"prompt": MESSAGES}

CLIP_COLUMNS = [
    "clip_id",
    "clipset",
    "rollout_id",
    "group_id",
    "group_kind",
    "prompt_id",
    "problem_id",
    "run",
    "step",
    "scorer",
    "segmenter",
    "selector",
    "tokenizer",
    "temperature",
    "end_token",
    "n_tokens",
    "peak_segment",
    "peak_entropy",
    "distance",
    "weight",
    "split",
    "prompt",
    "clip",
    "prompt_ids",
    "clip_ids",
    "clip_mask",
    "source",
    "model",
    "messages",
    "ground_truth",
    "reward",
]
ROLLOUT_COLUMNS = [
    "rollout_id",
    "ingest_id",
    "run",
    "split",
    "step",
    "role",
    "model",
    "source",
    "group_id",
    "group_source",
    "prompt_id",
    "problem_id",
    "sample",
    "part",
    "prompt",
    "messages",
    "prompt_format",
    "completion",
    "tokenizer",
    "prompt_ids",
    "completion_ids",
    "logprobs",
    "loss_mask",
    "n_prompt_tokens",
    "n_completion_tokens",
    "n_chars",
    "reward",
    "rewards",
    "success_recorded",
    "advantage",
    "finish_reason",
    "ground_truth",
    "policy_version",
    "sampling",
    "origin",
    "extra",
    "success",
    "kind",
    "success_threshold",
    "failure_reward",
    "completeness",
]
PROMPT_COLUMNS = [
    "prompt_id",
    "problem_id",
    "run",
    "split",
    "role",
    "source",
    "prompt",
    "messages",
    "prompt_format",
    "ground_truth",
    "tokenizer",
    "prompt_ids",
    "first_step",
    "last_step",
    "visits",
    "n",
    "n_rewarded",
    "n_success",
    "success_rate",
    "kind",
]


@pytest.mark.parametrize(("to", "form"), COLUMNS, ids=str)
def test_parquet_formats_have_exactly_these_columns_and_types(once, to, form):
    report, out = once(to, **({"form": form} if form else {}))
    files = sorted(out.glob("*.parquet"))
    assert [f.name for f in files] == ["train.parquet", "validation.parquet"]
    for file in files:
        schema = pq.read_schema(file)
        assert {f.name: str(f.type) for f in schema} == COLUMNS[to, form]
    assert report.form == form


@pytest.mark.parametrize(
    ("what", "columns"), [("clips", CLIP_COLUMNS), ("rollouts", ROLLOUT_COLUMNS), ("prompts", PROMPT_COLUMNS)]
)
def test_rows_as_they_are_have_the_same_columns_in_every_container(once, what, columns):
    (_, parquet), (_, jsonl), (_, hf) = (once(to, what=what) for to in ("parquet", "jsonl", "hf"))
    table = pq.read_table(parquet / "train.parquet")
    assert table.column_names == columns
    assert lines(jsonl / "train.jsonl") == table.to_pylist()
    assert list(lines(jsonl / "train.jsonl")[0]) == columns
    assert pq.read_table(hf / "data/train-00000-of-00001.parquet").equals(table)
    if what == "rollouts":
        assert str(table.schema.field("rewards").type) == "list<element: struct<key: string, value: double>>"


def test_clips_rows_are_those_of_the_table(once):
    _, out = once("parquet", what="clips")
    found = {r["clip_id"]: r for name in ("train", "validation") for r in pq.read_table(out / f"{name}.parquet").to_pylist()}
    for g in range(6):
        made = clip(rollout(g, 0))
        row = found.pop(made["clip_id"])
        assert {k: row[k] for k in made} == made
        known = {"clipset": "hard@1", "source": "sums", "model": "policy-1", "ground_truth": str(2 * g), "reward": 1.0}
        assert {k: row[k] for k in known} == known
        assert row["split"] == ("validation" if g > 3 else None)
    assert not found


def test_trl_sft_text_and_chat(exported, fill):
    _, out = exported("trl-sft", where="split IS NULL AND step = 0 AND prompt LIKE '%0%'")
    assert pq.read_table(out / "train.parquet").to_pylist() == [{"prompt": "What is 0 + 0?", "completion": "Let me see 0.\n"}]
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "Well?"}]
    chats = fill([rollout(0, 0, messages=json.dumps(messages), prompt_format="chat")])
    report, out = exported("trl-sft", chats, name="chat")
    assert report.form == "chat"
    assert pq.read_table(out / "train.parquet").to_pylist() == [
        {"prompt": messages, "completion": [{"role": "assistant", "content": "Let me see 0.\n"}]}
    ]


@pytest.mark.parametrize("to", ["trl-sft", "axolotl"])
def test_tokenised_rows_train_the_counted_clip_tokens_alone(exported, fill, to):
    row = rollout(3, 0)
    store = fill([row], [clip(row, clip_mask=[True, False, True])])
    _, out = exported(to, store, form="tokens")
    rows = pq.read_table(out / "train.parquet").to_pylist() if to == "trl-sft" else lines(out / "train.jsonl")
    assert rows == [
        {"input_ids": [1, 2, 3, 103, 200, 7], "attention_mask": [1] * 6, "labels": [-100, -100, -100, 103, -100, 7]}
    ]


def test_axolotl_segments_label_the_clip_and_not_the_prompt(exported):
    _, out = exported("axolotl", where="prompt LIKE '%1%'")
    assert lines(out / "train.jsonl") == [
        {"segments": [{"label": False, "text": "What is 1 + 1?"}, {"label": True, "text": "Let me see 0.\n"}]}
    ]


def test_verl_rows(exported):
    _, out = exported("verl", where="prompt LIKE '%1%'", ability="sums")
    row = rollout(1, 0)
    assert pq.read_table(out / "train.parquet").to_pylist() == [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
            "ability": "sums",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {
                "split": "train",
                "index": 0,
                "answer": "2",
                "question": "What is 1 + 1?",
                "prompt_id": ids.prompt_id(row["problem"]),
                "problem_id": ids.problem_id(row["problem"]),
                "success_rate": 2 / 3,
            },
        }
    ]


def test_openrlhf_rows(exported, fill):
    _, out = exported("openrlhf", where="prompt LIKE '%1%'")
    assert (out / "train.jsonl").read_text() == '{"input":"What is 1 + 1?","label":"2","datasource":"sums"}\n'
    store = fill([rollout(0, 0, source=None, messages='[{"role": "user", "content": "Well?"}]', prompt_format="chat")])
    _, out = exported("openrlhf", store, name="chat")
    assert lines(out / "train.jsonl") == [
        {"input": [{"role": "user", "content": "Well?"}], "label": "0", "datasource": "default"}
    ]


def test_llamafactory_alpaca_and_sharegpt(exported, fill):
    _, out = exported("llamafactory", where="split IS NULL AND prompt LIKE '%0%'")
    assert json.loads((out / "train.json").read_text()) == [
        {"instruction": "What is 0 + 0?", "input": "", "output": "Let me see 0.\n", "system": "", "history": []}
    ]
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
    assert json.loads((out / "dataset_info.json").read_text()) == {
        "train": {"file_name": "train.json", "formatting": "alpaca", "columns": columns}
    }
    said = [("system", "Think."), ("user", "2 + 2?"), ("assistant", "5"), ("user", "Sure?")]
    messages = json.dumps([{"role": r, "content": c} for r, c in said])
    store = fill([rollout(0, 0, messages=messages, prompt_format="chat")])
    _, out = exported("llamafactory", store, name="chat")
    turns = [("human", "2 + 2?"), ("gpt", "5"), ("human", "Sure?"), ("gpt", "Let me see 0.\n")]
    assert json.loads((out / "train.json").read_text()) == [
        {"conversations": [{"from": f, "value": v} for f, v in turns], "system": "Think."}
    ]
    assert json.loads((out / "dataset_info.json").read_text()) == {
        "train": {
            "file_name": "train.json",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "system"},
        }
    }
    _, out = exported("llamafactory", store, name="alpaca", form="text")
    assert json.loads((out / "train.json").read_text()) == [
        {"instruction": "Sure?", "input": "", "output": "Let me see 0.\n", "system": "Think.", "history": [["2 + 2?", "5"]]}
    ]


def test_replay_writes_masks_and_weights_out(exported, fill):
    rows = [rollout(g, 0) for g in range(3)]
    clips = [clip(rows[0]), clip(rows[1], 2, clip_mask=[False, True], weight=0.5), clip(rows[2], 5, temperature=None)]
    _, out = exported("replay", fill(rows, clips))
    found = {r.pop("clip_id"): r for r in pq.read_table(out / "train.parquet").to_pylist()}
    expected = [([True] * 3, 1.0, 1.0), ([False, True], 0.5, 1.0), ([True] * 5, 1.0, None)]
    for row, made, (mask, weight, temperature) in zip(rows, clips, expected, strict=True):
        assert found[made["clip_id"]] == {
            "prompt_ids": row["prompt_ids"],
            "clip_ids": row["completion_ids"][: len(mask)],
            "clip_mask": mask,
            "weight": weight,
            "problem_id": made["problem_id"],
            "step": row["step"],
            "tokenizer": TOKENIZER,
            "temperature": temperature,
        }


def test_replay_reads_as_arrow_lists_without_a_null(once):
    _, out = once("replay")
    table = pq.read_table(out / "train.parquet")
    for name in ("prompt_ids", "clip_ids", "clip_mask", "weight", "tokenizer", "clip_id"):
        assert table[name].null_count == 0
    assert table.schema.field("clip_ids").type.value_type == pa.int32()


# Which rows a format can hold, and which it takes unasked: with a clip set, and without.
TAKES = {
    "hf": ({"clips", "rollouts", "prompts"}, "clips", "rollouts"),
    "jsonl": ({"clips", "rollouts", "prompts"}, "clips", "rollouts"),
    "parquet": ({"clips", "rollouts", "prompts"}, "clips", "rollouts"),
    "trl-sft": ({"clips", "rollouts"}, "clips", "rollouts"),
    "axolotl": ({"clips", "rollouts"}, "clips", "rollouts"),
    "llamafactory": ({"clips", "rollouts"}, "clips", "rollouts"),
    "trl-grpo": ({"prompts"}, "prompts", "prompts"),
    "verl": ({"prompts"}, "prompts", "prompts"),
    "openrlhf": ({"prompts"}, "prompts", "prompts"),
    "replay": ({"clips"}, "clips", None),
}


@pytest.mark.parametrize("to", TAKES)
def test_formats_take_what_they_can_hold_and_refuse_the_rest(to):
    takes, of_clips, usual = TAKES[to]
    assert set(TARGETS) == set(TAKES)
    assert ExportConfig.make(to=to, clipset="c").rows == of_clips
    if usual is None:
        with pytest.raises(WrongUsage, match="which clips"):
            ExportConfig.make(to=to)
    else:
        assert ExportConfig.make(to=to).rows == usual
    for what in ("clips", "rollouts", "prompts"):
        if what in takes:
            assert ExportConfig.make(to=to, what=what, clipset="c").rows == what
        else:
            with pytest.raises(WrongUsage, match=f"{to} takes .*, not {what}"):
                ExportConfig.make(to=to, what=what, clipset="c")


def test_clips_without_a_text_or_ids_are_refused_with_the_condition_that_leaves_them_out(exported, fill):
    rows = [rollout(0, 0), rollout(1, 0)]
    store = fill(rows, [clip(rows[0], prompt_ids=None), clip(rows[1], clip=None)])
    with pytest.raises(EcholabError, match='1 of 2 clips have no prompt_ids.*--where "prompt_ids IS NOT NULL"'):
        exported("replay", store)
    with pytest.raises(EcholabError, match='1 of 2 clips have no text.*--where "completion IS NOT NULL"'):
        exported("trl-sft", store)
    report, _ = exported("replay", store, where="prompt_ids IS NOT NULL")
    assert report.splits == {"train": 1}
    assert report.counts[-1]["dropped"] == {"where": 1}


def test_masked_clips_are_refused_where_text_cannot_say_it(exported, fill):
    row = rollout(0, 0)
    store = fill([row], [clip(row, clip_mask=[True, False, True])])
    for to in ("trl-sft", "axolotl", "llamafactory"):
        with pytest.raises(EcholabError, match="1 of 1 clips have tokens that the loss leaves out"):
            exported(to, store)


def test_ids_of_two_tokenizers_or_of_another_than_asked_are_refused(exported, fill):
    rows = [rollout(0, 0), rollout(1, 0)]
    store = fill(rows, [clip(rows[0]), clip(rows[1], tokenizer="c" * 32)])
    with pytest.raises(EcholabError, match=f"ids of several tokenizers .{TOKENIZER} .of tiny., c+.: choose"):
        exported("replay", store)
    report, _ = exported("replay", store, where=f"tokenizer = '{TOKENIZER}'", tokenizer=TOKENIZER)
    assert report.splits == {"train": 1}
    with pytest.raises(EcholabError, match=f"made with tokenizer {TOKENIZER} .of tiny., not with {'d' * 32}"):
        exported("replay", store, "other", where=f"tokenizer = '{TOKENIZER}'", tokenizer="d" * 32)


def test_a_weighted_clip_set_says_where_weights_are_lost(exported, fill):
    rows = [rollout(0, 0), rollout(1, 0)]
    add_clipset(store := fill(rows, []), "hard", [clip(rows[0], weight=2.0), clip(rows[1])])
    report, _ = exported("trl-sft", store)
    assert any("1 of 2 clips have a weight, for which trl-sft has no column" in n for n in report.notes)
    report, _ = exported("replay", store, name="b")
    assert report.notes == []
