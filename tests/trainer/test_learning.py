"""A policy learns the built-in task, and only because its advantages have the right sign."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from trainer import loop
from trainer.config import TrainConfig
from trainer.pretrain import pretrain, save

pytestmark = pytest.mark.slow  # about a minute


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("policy")
    save(pretrain(seed=0, steps=200), folder)
    torch.set_num_threads(threads)
    return folder


def rewards(policy: Path, folder: Path) -> list[float]:
    config = TrainConfig.model_validate(
        {
            "out": str(folder / "run"),
            "run": "r",
            "store": str(folder / "store"),
            "steps": 40,
            "seed": 1,
            "model": {"path": str(policy), "threads": 1, "device": "cpu"},
            "task": {"prompts": "maze", "levels": [1, 4], "problems": 32, "verifier": "python:trainer.maze:verify"},
            "sampling": {"prompts": 16, "n": 8, "max_tokens": 29},
            "optimizer": {"lr": 5e-4},
        }  # fmt: skip
    )
    loop.train(config)
    return [json.loads(line)["reward"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_reward_rises_well_above_its_start_and_falls_with_the_sign_flipped(policy, tmp_path, monkeypatch):
    right = rewards(policy, tmp_path / "right")
    start, end = sum(right[:4]) / 4, sum(right[-8:]) / 8
    assert 0.1 < start < 0.8 and end > start + 0.15

    def flipped(*given, **options):
        found = honest(*given, **options)
        return replace(found, values=-found.values)

    honest = loop.advantages
    monkeypatch.setattr(loop, "advantages", flipped)
    wrong = rewards(policy, tmp_path / "wrong")
    assert sum(wrong[-8:]) / 8 < start
