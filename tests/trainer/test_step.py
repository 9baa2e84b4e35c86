"""One step of a run: what goes into its loss, by hand from what was sampled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from trainer import loop, maze
from trainer.config import TrainConfig
from trainer.pretrain import new_model
from trainer.run import Run

NEWLINE = 37  # the maze tokenizer's


@pytest.fixture
def step(model, tmp_path, monkeypatch):
    """`step(algorithm={...})` makes one step; `before(run)` may change the run. It gives the rollouts, the batch of the loss
    and what was logged."""

    def make(before: Any = lambda run: None, policy: Path = model, **changes: Any) -> SimpleNamespace:
        document: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "run": "r",
            "store": str(tmp_path / "store"),
            "steps": 4,
            "model": {"path": str(policy), "threads": 1, "device": "cpu"},
            "task": {"prompts": "maze", "verifier": "python:trainer_functions:short", "require_end": False},
            "sampling": {"prompts": 4, "n": 4, "max_tokens": 48},
        }
        for key, value in changes.items():
            document[key] = {**document.get(key, {}), **value}
        seen = SimpleNamespace()
        backward = loop.backward

        def watched(policy: Any, rows: Any, batch: Any, *rest: Any, **options: Any) -> Any:
            seen.rows, seen.batch = rows, batch
            return backward(policy, rows, batch, *rest, **options)

        monkeypatch.setattr(loop, "backward", watched)
        with Run.open(TrainConfig.model_validate(document)) as run:
            before(run)
            seen.logits = [m.model.state_dict() for m in (run.policy, run.reference) if m is not None]
            seen.logits = [{k: v.clone() for k, v in s.items()} for s in seen.logits]
            monkeypatch.setattr(run.recorder, "put", lambda sampled, _: setattr(seen, "rollouts", sampled.rollouts))
            seen.values = loop.one_step(run, 1)
        seen.groups = {g: [r for r in seen.rollouts if r.group == g] for g in sorted({r.group for r in seen.rollouts})}
        return seen

    return make


def test_soft_overlong_lowers_the_reward_that_advantages_are_made_of_and_no_other(step):
    seen = step(algorithm={"name": "grpo", "soft_overlong": 0.75})  # the last 36 of 48 tokens cost up to 1
    expected = []
    for rollouts in seen.groups.values():
        shaped = [r.reward - max(0.0, (len(r.completion_ids) - 12) / 36) for r in rollouts]
        expected += [(s - np.mean(shaped)) / (np.std(shaped, ddof=1) + 1e-4) for s in shaped]
    assert len({len(r.completion_ids) for r in seen.rollouts}) > 4
    assert seen.batch.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert seen.values["reward"] == pytest.approx(np.mean([r.reward for r in seen.rollouts]))
    assert {r.reward for r in seen.rollouts} == {0.0, 1.0}


def moved(run: Run) -> None:
    """As after some steps: the policy is no longer the reference."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in run.policy.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=g))


def logprobs(weights: dict[str, torch.Tensor], rollouts: list[Any]) -> list[torch.Tensor]:
    """Of each completion, by the plain forward of a model in float64."""
    model = new_model(0).double().eval()
    model.load_state_dict(weights)
    found = []
    for r in rollouts:
        ids, n = r.problem.prompt_ids + r.completion_ids, len(r.completion_ids)
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0, -n - 1 : -1].log_softmax(-1)
        found.append(logp[range(n), r.completion_ids])
    return found


def test_the_kl_in_the_loss_is_that_of_the_estimator_over_whole_completions(step):
    seen = step(moved, algorithm={"name": "grpo", "beta": 0.1, "kl": "k3"})
    policy, reference = (logprobs(w, seen.rollouts) for w in seen.logits)
    k3 = [torch.exp(f - p) - (f - p) - 1 for p, f in zip(policy, reference, strict=True)]
    assert seen.values["loss/kl"] == pytest.approx(0.1 * np.mean([float(x.mean()) for x in k3]), rel=1e-4)
    assert seen.values["kl"] == pytest.approx(float(torch.cat(k3).mean()), rel=1e-4)
    assert seen.values["kl"] > 1e-3


def test_the_kl_in_the_reward_is_taken_from_each_rollouts_reward(step):
    seen = step(moved, algorithm={"name": "rloo_tok", "beta": 0.1})
    policy, reference = (logprobs(w, seen.rollouts) for w in seen.logits)
    penalty = {id(r): 0.1 * float((p - f).sum()) for r, p, f in zip(seen.rollouts, policy, reference, strict=True)}
    expected = []
    for rollouts in seen.groups.values():
        rewards = [r.reward - penalty[id(r)] for r in rollouts]
        expected += [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    assert seen.batch.advantages.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert "loss/kl" not in seen.values and min(map(abs, penalty.values())) > 1e-4


def test_dynamic_sampling_fills_the_step_with_groups_that_differ_and_keeps_the_clips_of_the_others(step):
    asked = 6
    sizes = {"prompts": asked, "n": 2, "max_tokens": 48}
    seen = step(algorithm={"name": "dapo", "soft_overlong": 0.0}, echo={"coefficient": 0.1}, sampling=sizes)
    differ = [g for g, rollouts in seen.groups.items() if len({r.success for r in rollouts}) == 2]
    assert asked < len(differ) < len(seen.groups)  # there is something to see
    assert seen.values["rounds"] == len(seen.groups) / asked
    assert len([g for g in differ if g < len(seen.groups) - asked]) < asked  # no round too many
    learnt = [r.group in differ[:asked] for r in seen.rollouts]
    assert seen.batch.mask.any(1).tolist() == learnt
    assert seen.values["groups/kept"] == pytest.approx(asked)
    assert seen.values["count/rows"] == 2 * asked and seen.values["degenerate"] == 1 - len(differ) / len(seen.groups)
    clips = sorted(seen.rollouts[i].group for i in seen.batch.clips["echo"].rows.tolist())
    right = [g for g, rollouts in seen.groups.items() if any(r.success and r.ended for r in rollouts)]
    assert clips == right and not set(right) <= set(differ[:asked])


def segments(ids: list[int]) -> list[tuple[int, int]]:
    """A newline ends one; what is nothing but newlines belongs to the one before, or at the beginning to the first."""
    ends = [i + 1 for i, token in enumerate(ids) if token == NEWLINE] + [len(ids)]
    found: list[tuple[int, int]] = []
    start = 0
    for end in ends:
        if any(token != NEWLINE for token in ids[start:end]):
            found.append((start, end))
            start = end
        elif found and end > start:
            found[-1] = found[-1][0], end
            start = end
    return found


def test_with_region_think_a_clip_ends_in_a_segment_that_begins_before_the_tag(step, model, tmp_path):
    thinker = tmp_path / "thinker"
    thinker.mkdir()
    for file in model.iterdir():  # the token that stands between walls and start in a maze is now the tag
        text = file.read_bytes()
        (thinker / file.name).write_bytes(text.replace(b'"|"', b'"</think>"') if file.name == "tokenizer.json" else text)
    tag = maze.CELLS.index("f6") + 1

    def likelier(run: Run) -> None:
        with torch.no_grad():
            run.policy.model.get_input_embeddings().weight[[tag, NEWLINE, NEWLINE + 1]] *= 1.7  # and newlines, and the end

    seen = step(
        likelier,
        policy=thinker,
        echo={"coefficient": 0.1, "select": {"selector": "peak", "region": "think"}},
        sampling={"prompts": 24, "n": 4, "max_tokens": 48},
        task={"verifier": "python:trainer_functions:easy"},
    )
    expected, everywhere = [], []
    for rollouts in seen.groups.values():
        best: list[Any] = [None, None]
        for r in rollouts:
            body = r.completion_ids[:-1] if r.ended else None
            thought = body.index(tag) if body and tag in body else 10**9
            for start, end in segments(body or []):
                entropy = float(np.mean(r.entropies[start:end], dtype=np.float64))
                for i, limit in enumerate((thought, 10**9)):
                    if start < limit and (best[i] is None or entropy > best[i][0] + 1e-9):
                        best[i] = (entropy, seen.rollouts.index(r), end)
        expected += [best[0][1:]] if best[0] else []
        everywhere += [best[1][1:]] if best[1] else []
    clips = seen.batch.clips["echo"]
    bodies = [len(r.completion_ids) - r.ended for r in seen.rollouts]
    found = [(row, min(n, bodies[row])) for row, n in zip(clips.rows.tolist(), clips.mask.sum(1).tolist(), strict=True)]
    assert sorted(found) == sorted(expected) and sorted(found) != sorted(everywhere)
