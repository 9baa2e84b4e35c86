"""The run: it goes on exactly where it was, echo and replay do what they say, and what it samples is in the store."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import safetensors.torch
import torch

import echolab
from echolab.errors import EcholabError, WrongUsage
from trainer import checkpoint
from trainer.config import TrainConfig
from trainer.loop import train

ROOT = Path(__file__).resolve().parents[2]
BASE: dict[str, Any] = {
    "run": "r",
    "steps": 4,
    "task": {"prompts": "maze", "problems": 12, "verifier": "python:trainer_functions:short", "require_end": False},
    "sampling": {"prompts": 4, "n": 4, "max_tokens": 8},
    "optimizer": {"lr": 1e-3},
}


@pytest.fixture
def config(model, tmp_path):
    """`config(out="a", steps=3, echo={...})`: a run of its own folder and store."""

    def make(out: str = "a", **changes: Any) -> TrainConfig:
        document = {**BASE, "out": str(tmp_path / out), "store": str(tmp_path / f"{out}-store")}
        document["model"] = {"path": str(model), "threads": 1, "device": "cpu"}
        for key, value in changes.items():
            document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
        return TrainConfig(**document)

    return make


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(checkpoint.all_of(Path(config.out) / "checkpoints")[-1] / "model.safetensors")


def logged(config: TrainConfig) -> list[dict]:
    """Without what a clock says."""
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "second" not in k and k != "memory_gb"} for x in lines]


def same(a: TrainConfig, b: TrainConfig) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


WITH_ALL = {
    "echo": {"coefficient": 0.1},
    "replay": {"source": "run", "coefficient": 0.1, "ratio": 0.5},
    "evaluation": {"prompts": "maze", "problems": 3, "every": 2, "n": 2},
    "algorithm": {"name": "grpo", "beta": 0.01},
}


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_that_stops_and_goes_on_is_bit_for_bit_the_one_that_did_not(config, updates):
    more = {**WITH_ALL, "optimizer": {"lr": 1e-3, "updates": updates}}
    whole = config("whole", steps=5, **more)
    train(whole)
    for steps in (2, 5):  # 12 problems, 4 a step: the second epoch begins in between
        halves = config("halves", steps=steps, **more)
        train(halves)
    assert same(whole, halves) and logged(whole) == logged(halves)
    with echolab.open(whole.store) as a, echolab.open(halves.store) as b:
        rows = "SELECT step, split, prompt, sample, completion, reward FROM rollouts ORDER BY ALL"
        assert a.sql(rows).equals(b.sql(rows)) and b.validate() == []


def test_sigkill_costs_what_came_after_the_checkpoint_and_changes_nothing(config, tmp_path):
    more = {**WITH_ALL, "steps": 6, "checkpoint": {"every": 2}}
    whole, killed = config("whole", **more), config("killed", **more)
    train(whole)
    file = tmp_path / "killed.json"
    file.write_text(killed.model_dump_json())
    code = "import sys; from trainer.config import TrainConfig as C; from trainer.loop import train; "
    code += f"train(C.model_validate_json(open({str(file)!r}).read()))"
    path = {"PYTHONPATH": str(ROOT / "tests"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=path, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while len(checkpoint.all_of(Path(killed.out) / "checkpoints")) < 1 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= checkpoint.load_facts(checkpoint.all_of(Path(killed.out) / "checkpoints")[-1])["step"] < 6
    train(killed)
    assert same(whole, killed) and logged(whole) == logged(killed)
    with echolab.open(killed.store) as lab:
        assert lab.sql("SELECT step, count(*) AS n FROM rollouts WHERE split = 'train' GROUP BY 1 ORDER BY 1").rows() == [
            (step, 16) for step in range(1, 7)
        ]
        assert lab.validate() == []


def test_a_coefficient_of_zero_is_the_run_without_echo_bit_for_bit(config):
    without, zero = config("without"), config("zero", echo={"coefficient": 0.0, "select": {"selector": "lowest"}})
    train(without)
    train(zero)
    some = config("some", echo={"coefficient": 0.1})
    train(some)
    assert same(without, zero) and not same(without, some)


def test_where_all_succeed_the_policy_has_no_gradient_and_the_clips_have_one(config):
    easy = {"task": {**BASE["task"], "verifier": "python:trainer_functions:easy"}, "log": {"gradients": 1}, "steps": 1}
    plain, echo = config("plain", **easy), config("echo", echo={"coefficient": 0.1}, **easy)
    train(plain)
    train(echo)
    assert logged(plain)[0]["grad_norm"] == 0.0 and logged(plain)[0]["groups/all_success"] == 1.0
    values = logged(echo)[0]
    assert values["grad_norm"] > 0 and values["norm/echo"] == pytest.approx(values["grad_norm"], rel=1e-4)
    assert "norm/pg" not in values or values["norm/pg"] == 0


def test_micro_batches_cost_memory_and_change_no_gradient(config, monkeypatch):
    from trainer import update

    found: list[dict[str, torch.Tensor]] = []

    def keep(policy, *rest):
        found.append({n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None})
        return update.step_optimizer(policy, *rest)

    monkeypatch.setattr("trainer.loop.step_optimizer", keep)
    more = {"echo": {"coefficient": 0.1}, "algorithm": {"name": "dapo", "dynamic_sampling": False}, "steps": 1}
    for tokens in (16_384, 60, 1):
        train(config(str(tokens), optimizer={"lr": 1e-3, "micro_tokens": tokens}, **more))
    whole = found[0]
    for parts in found[1:]:
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            assert torch.allclose(parts[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "rloo_tok", "reinforce_pp", "cispo", "raft"])
def test_every_algorithm_runs_and_moves_the_weights(config, model, name):
    c = config(name, steps=2, algorithm={"name": name}, sampling={**BASE["sampling"], "rounds": 2})
    train(c)
    assert all(v["skipped"] == 0 for v in logged(c))
    before = safetensors.torch.load_file(model / "model.safetensors")
    assert not all(torch.equal(v, before[k]) for k, v in weights(c).items())


def test_what_is_sampled_is_in_the_store_with_entropies_and_segments(config):
    c = config(steps=2, evaluation={"prompts": "maze", "problems": 3, "every": 1, "n": 2, "greedy": False})
    train(c)
    with echolab.open(c.store) as lab:
        counted = lab.sql("SELECT split, step, count(*) AS n FROM rollouts GROUP BY ALL ORDER BY ALL").rows()
        assert counted == [("eval", 0, 6), ("eval", 1, 6), ("eval", 2, 6), ("train", 1, 16), ("train", 2, 16)]
        assert lab.sql("SELECT count(*) FROM scores").item() == 50 == lab.sql("SELECT count(*) FROM segmentations").item()
        kinds = lab.query("degenerate_by_step", run="r")
        assert kinds.filter(kinds["split"] == "train")["share_degenerate"].to_list() == [
            pytest.approx(v["degenerate"]) for v in logged(c)[1:]
        ]
        assert lab.validate() == []
    assert not list((Path(c.out) / "rollouts").iterdir())


def test_where_rewards_are_negative_a_failure_has_the_lowest_as_in_the_store(config):
    """Also at the next start, and for completions that were cut off: they are never worth more than what they say."""
    task = {**BASE["task"], "verifier": "python:trainer_functions:harsh", "require_end": True}
    for steps in (1, 2):
        c = config(steps=steps, task=task, sampling={**BASE["sampling"], "n": 2})
        train(c)
    with echolab.open(c.store) as lab:
        kinds = lab.sql("SELECT step, kind, count(*) FROM groups GROUP BY ALL").rows()
        assert lab.sql("SELECT DISTINCT reward FROM rollouts WHERE finish_reason = 'length' ORDER BY 1").rows() == [(-1,), (0,)]
    assert {kind for _, kind, _ in kinds} >= {"all_fail", "mixed"}
    for step, kind, n in kinds:
        assert logged(c)[step - 1][f"groups/{kind}"] == pytest.approx(n / 4)


@pytest.mark.parametrize("verifier", ["late", "broken"])
def test_a_verifier_that_hangs_or_raises_gives_no_reward_and_the_run_goes_on(config, verifier):
    c = config(steps=1, task={**BASE["task"], "verifier": f"python:trainer_functions:{verifier}", "timeout": 0.5})
    train(c)
    values = logged(c)[0]
    assert 0 < values["unrewarded"] < 1 and values["skipped"] == 0
    with echolab.open(c.store) as lab:
        assert lab.sql("SELECT count(*) FROM rollouts WHERE NOT isfinite(reward) OR reward IS NULL").item() == round(
            16 * values["unrewarded"]
        )


def test_steps_without_a_finite_gradient_are_skipped_counted_and_end_the_run(config, monkeypatch):
    from trainer import update

    monkeypatch.setattr("trainer.loop.backward", lambda *a, **k: _spoilt(update.backward(*a, **k), a[0]))
    c = config(steps=9, optimizer={"lr": 1e-3, "bad_steps": 3}, checkpoint={"every": 1})
    with pytest.raises(
        EcholabError, match="no finite gradient in 3 steps in a row: lower optimizer.lr; the last good checkpoint is"
    ):
        train(c)
    assert [v["skipped"] for v in logged(c)] == [1.0, 1.0]
    assert all(bool(torch.isfinite(v).all()) for v in weights(c).values())


def _spoilt(metrics, policy):
    for p in policy.model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    return metrics


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk: whatever writes more is told so by the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_from_the_last_checkpoint(config):
    whole, c = config("whole"), config("c")
    train(whole)
    train(c.model_copy(update={"steps": 2}))
    checkpoint_4 = f"cannot write checkpoint {c.out}/checkpoints/step_000004: .*File too large.*; the ones before it are whole"
    for size, said in (
        (2_000_000, checkpoint_4),  # no room for the optimizer's state
        (1_000_000, checkpoint_4),  # nor for the weights
        (5_000, "cannot write .*rollouts.* File too large"),
    ):
        with files_of_at_most(size), pytest.raises(EcholabError, match=said) as error:
            train(c)
        assert "\n" not in str(error.value)
        assert [p.name for p in (Path(c.out) / "checkpoints").iterdir()] == ["step_000002"]
    train(c)
    assert same(whole, c) and logged(whole) == logged(c)
    with echolab.open(c.store) as lab:
        assert lab.validate() == []
        steps = "SELECT step, count(*) AS n FROM rollouts GROUP BY step ORDER BY step"
        assert lab.sql(steps).rows() == [(step, 16) for step in range(1, 5)]


def test_ctrl_c_leaves_a_checkpoint_that_the_run_goes_on_from(config, monkeypatch):
    from trainer import loop

    def interrupt(run, number, step=loop.one_step):
        if number == 3:
            raise KeyboardInterrupt
        return step(run, number)

    whole, c = config("whole"), config("b")
    train(whole)
    with monkeypatch.context() as m:
        m.setattr(loop, "one_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(c)
    assert checkpoint.load_facts(checkpoint.all_of(Path(c.out) / "checkpoints")[-1])["step"] == 2
    train(c)
    assert same(whole, c)


def test_a_run_ends_once_its_prompts_have_nothing_left_to_teach_and_stays_ended(config):
    easy = {"task": {"verifier": "python:trainer_functions:easy"}, "until_degenerate": 0.99}
    assert train(config(steps=40, **easy))["steps"] == 12  # so many steps tell
    assert train(config(steps=40, **easy))["steps"] == 12
    assert [row["step"] for row in logged(config())] == [*range(1, 13)]


def test_a_folder_belongs_to_one_configuration(config):
    with pytest.raises(EcholabError):
        train(config(steps=1, model={"path": "nowhere/at/all"}))  # it never began, so that the folder is free
    train(config(steps=1))
    with pytest.raises(EcholabError, match=r"holds a run with optimizer.lr = 0.001, not 0.01: give another `out`"):
        train(config(steps=2, optimizer={"lr": 0.01}))


def test_clips_of_another_tokenizer_are_refused(config, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "export").mkdir()
    row = {"prompt_ids": [1], "clip_ids": [2], "clip_mask": [True], "weight": 1.0, "problem_id": "p", "tokenizer": "other"}
    pq.write_table(pa.Table.from_pylist([{**row, "clip_id": "c"}]), tmp_path / "export" / "train.parquet")
    with pytest.raises(EcholabError, match="were made with tokenizer other, the model has"):
        train(config(replay={"source": str(tmp_path / "export")}))


def test_only_the_newest_checkpoints_and_the_best_stay(config):
    c = config(
        steps=5,
        checkpoint={"every": 1, "keep": 2},
        evaluation={"prompts": "maze", "problems": 2, "every": 2, "n": 2, "greedy": False},
    )
    train(c)
    steps = [checkpoint.load_facts(p)["step"] for p in checkpoint.all_of(Path(c.out) / "checkpoints")]
    best = checkpoint.load_facts(checkpoint.all_of(Path(c.out) / "checkpoints")[-1])["best"][1]
    assert steps == sorted({4, 5} | ({best} if best else set()))


def test_a_mistyped_key_names_the_nearest(tmp_path):
    from trainer.config import load

    file = tmp_path / "c.toml"
    file.write_text('out = "o"\nrun = "r"\nstore = "s"\nsteps = 1\n[model]\npath = "p"\n[task]\nprompts = "maze"\n')
    for change, said in (
        ("optimizer.lrr=1", "there is no key optimizer.lrr; did you mean optimizer.lr?"),
        ("echo.coeficient=1", "there is no key echo.coeficient; did you mean echo.coefficient?"),
        ("algorithm.name=grop", "there is no algorithm 'grop'; did you mean grpo"),
    ):
        with pytest.raises(WrongUsage, match=said.replace("?", r"\?")):
            load(file, [change])
