"""TRL trains on what we write: two steps of each trainer on a tiny random model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from generators import models
from generators.clipsets import clip, rollout

pytestmark = pytest.mark.slow

PROMPTS = ["the sum of two and three", "let us check again", "x = 12 then y", "so naïve 日本語"]
ANSWER = "is five so x = 12\nwait , let us check\n"


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is not installed")


@pytest.fixture(scope="module")
def tiny(trl, tmp_path_factory) -> Path:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return models.model(tmp_path_factory.mktemp("tiny"), scale=1.0)


@pytest.fixture(scope="module")
def store(fill, tiny):
    """Rollouts in the model's own tokens; clips end midway, after the first line."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tiny).encode
    rows = []
    for g, prompt in enumerate(PROMPTS):
        ids = {"prompt_ids": encode(prompt), "completion_ids": encode(ANSWER)}
        rows += [rollout(g, s, prompt=prompt, completion=ANSWER, **ids) for s in range(3)]
    first = ANSWER.split("\n")[0] + "\n"
    return fill(rows, [clip(r, len(encode(first)), clip=first) for r in rows if r["sample"] == 0])


def settings(folder: Path) -> dict[str, Any]:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return {"output_dir": str(folder), "max_steps": 2, "use_cpu": True, "bf16": False, "seed": 0, **quiet}


@pytest.mark.parametrize("form", ["text", "chat", "tokens"])
def test_sft_trains_two_steps(trl, exported, store, tiny, tmp_path, form):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, out = exported("trl-sft", store, form=form)
    rows = load_dataset("parquet", data_files=str(out / "train.parquet"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        trl.SFTConfig(**settings(tmp_path / "run"), per_device_train_batch_size=2, completion_only_loss=True),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert trainer.train().global_step == 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    clips = {tuple(tokenizer.encode(ANSWER.split("\n")[0] + "\n"))}
    trained = {tuple(t for t in row["labels"] if t != -100) for row in trainer.train_dataset}
    if form == "tokens":
        assert trained == clips, "the clip and nothing else"
        assert {tuple(r["input_ids"]) for r in trainer.train_dataset} == {tuple(ids) for ids in rows["input_ids"]}
    else:
        assert trained == {(*c, tokenizer.eos_token_id) for c in clips}, "TRL ends each completion, as our note says"


def test_axolotls_tokenised_rows_are_the_same_to_trl(trl, exported, store, tiny, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, out = exported("axolotl", store, form="tokens")
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        trl.SFTConfig(**settings(tmp_path / "run"), per_device_train_batch_size=2),
        train_dataset=load_dataset("json", data_files=str(out / "train.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(tiny),
    )
    assert trainer.train().global_step == 2


@pytest.mark.parametrize("form", ["text", "chat"])
def test_grpo_trains_two_steps_and_its_reward_sees_the_columns(trl, exported, store, tiny, tmp_path, form):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, out = exported("trl-grpo", store, form=form)
    seen: list[dict[str, Any]] = []

    def reward(prompts, completions, ground_truth, problem_id, success_rate, **rest):
        asked = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        seen.extend({"asked": a, "truth": t, "rate": r} for a, t, r in zip(asked, ground_truth, success_rate, strict=True))
        return [float(len(json.dumps(c)) % 3) for c in completions]

    trainer = trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        reward,
        trl.GRPOConfig(
            **settings(tmp_path / "run"), per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
        ),
        train_dataset=load_dataset("parquet", data_files=str(out / "train.parquet"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(tiny),
    )  # fmt: skip
    assert trainer.train().global_step == 2
    assert seen and all(s["asked"] in PROMPTS and s["truth"] == str(2 * PROMPTS.index(s["asked"])) for s in seen)
    assert {s["rate"] for s in seen} == {2 / 3}
