"""The demo's experiment compares what it says it compares: its prompts, and what differs between its arms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the demo trains")

from pipelines import experiment
from pipelines.demo import plan_of
from pipelines.experiment import ARMS, Plan, fresh, held_out, pool, run_arms


def prompts(rows) -> set[str]:
    return {row["prompt"] for row in rows}


@pytest.mark.parametrize("fast", [True, False])
def test_what_is_held_out_is_never_trained_on_and_seeds_have_their_own_prompts(fast):
    plan = plan_of(Path("nowhere"), fast)
    questions = prompts(held_out(plan))
    assert len(questions) == 2 * plan.questions
    for seed in (0, 1):
        here, new = prompts(pool(plan, seed)), prompts(fresh(plan, seed))
        assert not here & questions and not new & questions and not new & here
        assert len(here) == plan.pool and len(new) > 0.95 * plan.fresh
    assert len(prompts(pool(plan, 0)) & prompts(pool(plan, 1))) <= 1
    assert pool(plan, 0) == pool(plan, 0) and fresh(plan, 1) == fresh(plan, 1)


def test_arms_differ_in_one_thing_only(tmp_path, monkeypatch):
    configs = {}
    monkeypatch.setattr(experiment, "train", lambda c: configs.setdefault(c.run, c.model_dump(mode="json")))
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "3.json").write_text(json.dumps({"peak": 0.1, "random": 0.23}))
    run_arms(Plan(folder=tmp_path), 3, tmp_path / "policy", lambda arm: None)
    assert [*configs] == [f"{arm}-s3" for arm in ARMS]
    base = configs["grpo-s3"]
    for arm in ARMS[1:]:
        other = configs[f"{arm}-s3"]
        differ = {key for key in base if base[key] != other[key]}
        assert differ == {"run", "out", "task" if arm == "fresh" else "replay"}
    assert configs["random-s3"]["replay"]["coefficient"] == 0.23 and configs["peak-s3"]["replay"]["coefficient"] == 0.1
