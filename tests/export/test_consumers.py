"""Exports as their readers read them: `datasets`, our own ingest, and checkers that follow each trainer's loader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generators import models
from generators.clipsets import HOSTILE, clip, lines, rollout

import echolab
from echolab.export import card, yaml
from echolab.export.select import ROWS
from echolab.readers import choose, own

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def load(*arguments: Any, **options: Any) -> Any:
    return datasets.load_dataset(*map(str, arguments), **options)


@pytest.mark.parametrize("what", ["clips", "rollouts", "prompts"])
def test_load_dataset_reads_the_folder_and_finds_what_the_card_says(once, what):
    report, out = once("hf", what=what)
    loaded = load(out)
    assert {name: part.num_rows for name, part in loaded.items()} == report.splits
    for split, part in loaded.items():
        table = pq.read_table(out / f"data/{split}-00000-of-00001.parquet")
        assert part.column_names == table.column_names
        assert part.to_list() == table.to_pylist()
        assert part.info.features == datasets.Features.from_arrow_schema(ROWS[what])
        assert part.info.splits[split].num_examples == report.splits[split]


@pytest.mark.parametrize("what", ["clips", "rollouts", "prompts"])
def test_the_card_is_yaml_that_agrees_with_the_files(once, what):
    from huggingface_hub import DatasetCard

    report, out = once("hf", what=what)
    data = DatasetCard.load(out / "README.md").data.to_dict()
    splits = list(report.splits)
    assert data["configs"] == [{"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in splits]}]
    info = data["dataset_info"]
    assert info["features"] == datasets.Features.from_arrow_schema(ROWS[what])._to_yaml_list()
    files = {s: out / f"data/{s}-00000-of-00001.parquet" for s in splits}
    assert [(s["name"], s["num_examples"]) for s in info["splits"]] == list(report.splits.items())
    for said, file in zip(info["splits"], files.values(), strict=True):
        table = pq.read_table(file)
        marks = table.num_columns * 8  # of NULLs: a reader may leave them out where there are none
        assert abs(said["num_bytes"] - table.nbytes) <= marks
    assert info["download_size"] == sum(f.stat().st_size for f in files.values())
    assert info["dataset_size"] == sum(s["num_bytes"] for s in info["splits"])
    assert data["task_categories"] == ["text-generation"] and data["size_categories"] == ["n<1K"]
    assert data["tags"][:2] == ["echolab", what] and data["source_datasets"] == ["sums"]
    assert not {"license", "language", "pretty_name"} & data.keys(), "nobody gave them"


def test_every_type_of_a_column_is_written_as_datasets_writes_it():
    types = [pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_()]
    types += [pa.list_(t) for t in types] + [pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))])]
    types.append(pa.list_(types[-1]))
    for t in types:
        features = datasets.Features.from_arrow_schema(pa.schema([("x", t)]))
        assert [card.feature("x", t)] == features._to_yaml_list()


@pytest.mark.parametrize("to", ["trl-sft", "trl-grpo", "verl", "replay", "parquet"])
def test_parquet_files_load_one_by_one(once, to):
    report, out = once(to)
    loaded = load("parquet", data_files={"train": str(out / "train.parquet")})["train"]
    assert loaded.num_rows == report.splits["train"]
    assert loaded.to_list() == pq.read_table(out / "train.parquet").to_pylist()
    streamed = load("parquet", data_files={"train": str(out / "train.parquet")}, streaming=True)["train"]
    assert next(iter(streamed)) == loaded[0]


@pytest.mark.parametrize("to", ["openrlhf", "axolotl", "llamafactory", "jsonl"])
def test_json_files_load_one_by_one(once, to):
    report, out = once(to)
    name = "train.json" if to == "llamafactory" else "train.jsonl"
    loaded = load("json", data_files={"train": str(out / name)})["train"]
    rows = json.loads((out / name).read_text()) if to == "llamafactory" else lines(out / name)
    assert loaded.num_rows == report.splits["train"] and loaded.to_list() == rows


# Checkers, written from what each trainer's loader does with a row.


def verl_row(row: dict[str, Any], number: int) -> None:
    """RLHFDataset renders `prompt` by the chat template; the reward manager asks data_source, reward_model and extra_info."""
    assert row.keys() == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
    assert isinstance(row["data_source"], str) and isinstance(row["ability"], str)
    assert row["prompt"] and all(m.keys() == {"role", "content"} for m in row["prompt"])
    assert row["prompt"][-1]["role"] == "user"
    assert row["reward_model"].keys() == {"style", "ground_truth"} and row["reward_model"]["style"] == "rule"
    assert isinstance(row["reward_model"]["ground_truth"], str)
    assert {"split", "index", "answer", "question"} <= row["extra_info"].keys()
    assert row["extra_info"]["index"] == number


def openrlhf_row(row: dict[str, Any], template: bool) -> None:
    """PromptDataset: input goes through the template (text becomes a user's message) or stands as it is."""
    chat = [{"role": "user", "content": row["input"]}] if isinstance(row["input"], str) else row["input"]
    assert template or isinstance(row["input"], str)
    assert all(m.keys() == {"role", "content"} for m in chat)
    assert isinstance(row["label"], str) and isinstance(row["datasource"], str)


def axolotl_row(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """input_output: the segments' tokens one after another, nothing between or after them."""
    ids, labels = [], []
    for segment in row["segments"]:
        assert segment.keys() == {"label", "text"} and isinstance(segment["label"], bool)
        tokens = tokenizer(segment["text"], add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if segment["label"] else [-100] * len(tokens)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def llamafactory_rows(folder: Path, name: str) -> list[list[dict[str, str]]]:
    """Each row as a conversation, through dataset_info.json; a row that its loader would skip is an error."""
    info = json.loads((folder / "dataset_info.json").read_text())[name]
    columns = info["columns"]
    made = []
    for row in json.loads((folder / info["file_name"]).read_text()):
        system = [{"role": "system", "content": row[columns["system"]]}] if row[columns["system"]] else []
        if info["formatting"] == "alpaca":
            asked = "\n".join(filter(None, (row[columns["prompt"]], row[columns["query"]])))
            pairs = [*row[columns["history"]], [asked, row[columns["response"]]]]
            turns = [t for user, said in pairs for t in (("user", user), ("assistant", said))]
        else:
            who = {"human": "user", "gpt": "assistant"}
            turns = [(who[t["from"]], t["value"]) for t in row[columns["messages"]]]
            assert len(turns) % 2 == 0 and all(r == ("user", "assistant")[i % 2] for i, (r, _) in enumerate(turns))
        made.append([*system, *({"role": r, "content": c} for r, c in turns)])
    return made


def test_verl_takes_every_row(once):
    _, out = once("verl")
    for file in ("train.parquet", "validation.parquet"):
        for number, row in enumerate(pq.read_table(out / file).to_pylist()):
            verl_row(row, number)


def test_verl_takes_the_prompts_of_a_verl_dump(tmp_path, exported):
    """Prompts that verl dumped go back to verl: the template is taken off, and rendered again it gives the same prompt."""
    asked = [("system\nThink.\nuser\nWhat is 1 + 1?\nassistant\n", "2"), ("user\nWhat is 2 + 2?\nassistant\n<think>\n", "4")]
    rows = [{"input": i, "output": "It is 2.", "gts": g, "score": s, "step": 1} for i, g in asked for s in (0.0, 1.0)]
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with echolab.open(tmp_path / "s", create=True) as lab:
        lab.ingest(tmp_path / "1.jsonl", run="r")
        report, out = exported("verl", lab.store, clipset=None, source="math", where="success_rate BETWEEN 0.1 AND 0.9")
    found = pq.read_table(out / "train.parquet").to_pylist()
    for number, row in enumerate(found):
        verl_row(row, number)
    user = {"role": "user", "content": "What is 1 + 1?"}
    prompts = sorted((r["prompt"] for r in found), key=len)
    assert prompts == [[{"role": "user", "content": "What is 2 + 2?"}], [{"role": "system", "content": "Think."}, user]]
    assert report.notes == ["2 of 2 rendered prompts were taken apart into messages, which your trainer renders anew"]
    chat, _ = exported("trl-grpo", lab.store, name="grpo", clipset=None)
    assert chat.form == "chat"
    text, _ = exported("trl-sft", lab.store, name="sft", clipset=None, form="text")
    assert "4 of 4 prompts are chats whose special tokens were lost: --form chat takes them apart" in text.notes


def test_openrlhf_takes_every_row(once):
    for form in ("text", "chat"):
        _, out = once("openrlhf", form=form)
        for row in lines(out / "train.jsonl"):
            openrlhf_row(row, template=form == "chat")


def test_axolotl_trains_the_clip_and_adds_no_end(once, tmp_path):
    tokenizer = models.tokenizer(tmp_path)
    _, out = once("axolotl")
    for row in lines(out / "train.jsonl"):
        made = axolotl_row(row, tokenizer)
        trained = [t for t in made["labels"] if t != -100]
        assert tokenizer.decode(trained) == "Let me see 0.\n" and tokenizer.eos_token_id not in made["input_ids"]
    _, out = once("axolotl", form="tokens")
    for row in lines(out / "train.jsonl"):
        assert row.keys() == {"input_ids", "attention_mask", "labels"}
        assert len({len(v) for v in row.values()}) == 1


def test_llamafactory_skips_no_row(once, exported):
    prompts = [f"What is {g} + {g}?" for g in range(4)]
    for form in ("text", "chat"):
        _, out = once("llamafactory", form=form)
        found = llamafactory_rows(out, "train")
        assert sorted(c[0]["content"] for c in found) == prompts
        assert all([m["role"] for m in c] == ["user", "assistant"] for c in found)
        assert len(llamafactory_rows(out, "validation")) == 2


def test_llamafactory_refuses_what_its_loader_would_skip_in_silence(exported, fill):
    messages = json.dumps([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}])
    store = fill([rollout(0, 0, messages=messages, prompt_format="chat")])
    for form in ("text", "chat"):
        with pytest.raises(echolab.EcholabError, match="turns user, tool: LLaMA-Factory takes user and assistant in turn"):
            exported("llamafactory", store, form=form)


# Our own rows come back.


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_exported_rollouts_are_ingested_again_with_their_ids(once, tmp_path, store, to):
    _, out = once(to, what="rollouts", clipset=None)
    path = out / f"train.{to}"
    assert (choose(path) or [None])[0] is own
    content = (
        "run, step, sample, prompt, completion, prompt_ids, completion_ids, tokenizer, reward, ground_truth, sampling, kind"
    )
    with echolab.open(store.root) as lab, echolab.open(tmp_path / "again", create=True) as again:
        report = again.ingest(path, run="r")
        assert (report.files[0].format, report.rows, report.quarantined) == ("echolab", 18, 0)
        asked = f"SELECT {content} FROM rollouts ORDER BY ALL"
        assert again.sql(asked).rows() == lab.sql(asked).rows()
        for id in ("problem_id", "prompt_id"):
            made = f"SELECT DISTINCT {id} FROM rollouts WHERE prompt_ids IS NOT NULL ORDER BY ALL"
            assert len(again.sql(made)) == len(lab.sql(made)) == 6
        _, twice = export_rollouts(again, tmp_path / "twice", to)
        third = again.sql("SELECT rollout_id, group_id FROM rollouts ORDER BY ALL").rows()
    with echolab.open(tmp_path / "third", create=True) as lab:
        lab.ingest(twice / path.name, run="r")
        assert lab.sql("SELECT count(*) FROM rollouts").item() == 18
        assert len(third) == len(set(third)) == 18


def export_rollouts(lab: Any, out: Path, to: str) -> tuple[Any, Path]:
    from echolab.export.config import ExportConfig
    from echolab.export.run import export

    return export(lab.store, out, ExportConfig.make(to=to, what="rollouts")), out


# Hostile text


@pytest.fixture(scope="module")
def hostile(fill):
    of = dict.fromkeys(("prompt", "source", "model", "ground_truth"), HOSTILE)
    row = rollout(0, 0, **of, sampling=json.dumps({"x": HOSTILE}))
    return fill([row], [clip(row, clip=HOSTILE + " ", prompt=HOSTILE)])


@pytest.mark.parametrize("to", ["hf", "jsonl", "trl-sft", "axolotl", "llamafactory", "verl", "openrlhf"])
def test_hostile_text_survives(exported, hostile, to):
    options = {"title": HOSTILE, "license": HOSTILE} if to == "hf" else {}
    _, out = exported(to, hostile, where="run = 'r' OR 'a|`b' = '</script>'", **options)
    path = next(p for p in sorted(out.rglob("train*")) if p.is_file())
    loaded = load("parquet" if path.suffix == ".parquet" else "json", data_files=str(path))["train"]
    found = [text for r in loaded.to_list() for text in strings(r)]
    assert HOSTILE in found
    if to not in ("verl", "openrlhf"):
        assert HOSTILE + " " in found


def test_hostile_text_is_no_markup_of_the_card(exported, hostile):
    from huggingface_hub import DatasetCard

    _, out = exported("hf", hostile, title=HOSTILE, license=HOSTILE, where="'a|`b``c' <> '</script>'")
    data = DatasetCard.load(out / "README.md").data.to_dict()
    assert data["pretty_name"] == data["license"] == HOSTILE and data["source_datasets"] == [HOSTILE]
    assert load(out)["train"].num_rows == 1
    body = (out / "README.md").read_text().split("\n---\n", 1)[1]
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", body)  # code spans, as Markdown finds them
    assert "</script>" in body and "<" not in outside.replace("->", "")


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [s for v in inner for s in strings(v)]


def test_half_a_character_in_messages_is_replaced_and_said(exported, make_store):
    content = json.dumps([{"type": "text", "text": "c"}])
    messages = r'[{"role": "user", "content": "a \ud800 b", "name": "me"}, {"role": "user", "content": ' + content + "}]"
    store = make_store([rollout(0, 0, messages=messages, prompt_format="chat", prompt=None)])
    report, out = exported("trl-grpo", store, clipset=None)
    asked = pq.read_table(out / "train.parquet")["prompt"][0].as_py()
    assert asked == [{"role": "user", "content": "a \ufffd b"}, {"role": "user", "content": "c"}]
    assert report.notes == [
        "1 messages have name beside role and content: left out",
        "1 messages hold half of a character: U+FFFD stands in its place",
    ]
    _, rows = exported("jsonl", store, "rows", clipset=None, what="prompts")
    assert lines(rows / "train.jsonl")[0]["messages"] == messages, "rows as they are stay as they are"


def test_yaml_of_any_text_is_read_back():
    import yaml as reader

    doubtful = (
        "yes|No|null|1|1.5|1e3|-|- a|a: b|#|a#b|'|\"|\\|\n|a\nb|\t|é|\U0001f600|\u2028|\x00|\x7f|\x85|~|n<1K|2026-11-21|0x1f"
    )
    for text in ("", " ", "|", *doubtful.split("|"), "a_b", "*x", "&x", "!x", "%", "@"):
        inner = {"f": [], "g": None, "h": True, "i": 3}
        document = {"a": text, "b": [text, {"c": text, "d": [text]}], text or "empty": {}, "e": inner}
        assert reader.safe_load(yaml.dump(document)) == document
    assert reader.safe_load(yaml.dump({"a": "\ud800"})) == {"a": "\ufffd"}
