"""`echolab train` and `evaluate`, and the way round: a run, its store, clips of it, and a run that replays them."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from echolab.errors import EcholabError
from pipelines.cli import main
from trainer.config import PRESETS, load, show
from trainer.pretrain import new_model, save
from trainer.replay import stored

CONFIG = """
out = "run"
run = "a"
store = "store"
steps = 2
[model]
path = "policy"
threads = 1
device = "cpu"
[task]
prompts = "maze"
problems = 8
verifier = "python:trainer_functions:short"
require_end = false
[sampling]
prompts = 4
n = 4
max_tokens = 8
[optimizer]
lr = 1e-3
[evaluation]
prompts = "maze"
problems = 4
n = 2
"""


@pytest.fixture
def echolab(tmp_path, monkeypatch):
    """`echolab("train", "run.toml")` in a folder with a policy and a configuration; its output, which must be good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECHOLAB_STORE", "store")
    save(new_model(0), tmp_path / "policy")
    (tmp_path / "run.toml").write_text(CONFIG)

    def run(*words: str, refused: int = 0, errors: list[str] | None = None) -> str:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as e:
            monkeypatch.setattr(sys, "argv", ["echolab", *words])
            main()
        assert (e.value.code or 0) == refused, err.getvalue()
        if errors is not None:
            errors.append(err.getvalue())
        return err.getvalue() if refused else out.getvalue()

    return run


def test_the_loop_closes(echolab):
    facts = json.loads(echolab("train", "run.toml", "--json"))
    assert (facts["run"], facts["steps"]) == ("a", 2) and Path(facts["checkpoint"]).name == "step_000002"
    steps = json.loads(echolab("query", "degenerate_by_step", "--param", "run=a", "--json"))["rows"]
    assert {(r["split"], r["step"], r["n_groups"]) for r in steps} >= {("train", 1, 4), ("train", 2, 4)}
    echolab("mine", "--name", "c", "--selector", "peak", "--split", "train")
    echolab("export", "--clipset", "c", "--to", "replay", "--out", "clips")
    replay = ("--set", "replay.source=clips", "--set", "replay.coefficient=0.5")
    echolab("train", "run.toml", "--set", "run=b", "--set", "out=again", *replay)
    last = json.loads(Path("again/metrics.jsonl").read_text().splitlines()[-1])
    assert last["replay/clips"] > 0 and last["loss/replay"] > 0
    runs = json.loads(echolab("sql", "SELECT run, count(*) AS n FROM rollouts GROUP BY run ORDER BY run", "--json"))["rows"]
    assert [r["run"] for r in runs] == ["a", "b"]
    # The clip set itself, from the store: the same clips, and so the same run.
    replay = ("--set", "replay.source=clipset:c", "--set", "replay.coefficient=0.5")
    echolab("train", "run.toml", "--set", "run=b", "--set", "out=direct", *replay)
    direct = json.loads(Path("direct/metrics.jsonl").read_text().splitlines()[-1])
    assert [direct[k] for k in ("replay/nll", "replay/tokens", "grad_norm")] == [
        last[k] for k in ("replay/nll", "replay/tokens", "grad_norm")
    ]
    with pytest.raises(EcholabError, match="the clips of clipset:c were made with tokenizer .*, the model has another"):
        list(stored("clipset:c", "store", "another"))
    said = echolab("train", "run.toml", "--set", "out=none", "--set", "replay.source=clipset:d", refused=1)
    assert "no clip set 'd'" in said and "c@1" in said


def test_two_models_are_compared_on_the_same_questions(echolab):
    found = json.loads(echolab("evaluate", "run.toml", "--model", "policy", "--against", "policy", "-n", "4", "--json"))
    assert (found["questions"], found["n"]) == (4, 4)
    assert found["difference"]["mean"] == 0 and found["difference"]["p"] == 1.0  # drawn with the same random numbers
    values = found["models"]["policy"]
    assert 0 <= values["mean/low"] <= values["mean"] <= values["mean/high"] <= 1
    assert values["mean"] <= values["pass@2"] <= values["pass@4"]
    assert "--model minus --against: +0.0000" in echolab("evaluate", "run.toml", "--model", "policy", "--against", "policy")


def test_a_question_that_is_a_problem_of_a_profile_is_warned_of(echolab):
    from echolab.lab import Lab

    echolab("train", "run.toml", "--set", "steps=1")
    with Lab.open("store") as lab:
        lab.profile("p", "split = 'eval'", bootstrap=0)
    echolab("evaluate", "run.toml", "--model", "policy", "--profile", "p", "-n", "1", errors=(said := []))
    assert "warning: 4 of 4 problems of p@1 are among the 4 questions" in said[0]


def test_the_configuration_is_shown_with_its_texts_and_reads_back_as_it_was(echolab, tmp_path):
    shown = echolab("train", "run.toml", "--show-config", "--set", "echo.coefficient=0.25")
    assert "# The weight of the clips' loss; 0.001 in the paper. 0: no echo.\ncoefficient = 0.25" in shown
    (tmp_path / "shown.toml").write_text(shown)
    assert load("shown.toml") == load("run.toml", ["echo.coefficient=0.25"])


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.toml")))
def test_presets_are_whole(preset):
    assert show(load(preset))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("train none.toml", 1, "none.toml: No such file or directory; presets are echorl, maze"),
        ("train run.toml --set steps", 2, "--set takes KEY=VALUE"),
        ("train run.toml --set optimizer.lrr=1", 2, "there is no key optimizer.lrr; did you mean optimizer.lr?"),
        ("train run.toml --set task.prompts=store", 1, "store: no such folder"),
        ("train run.toml --set model.path=nothing", 1, "nothing: no such folder"),
        ("train run.toml --set replay.source=nothing", 1, "nothing is no replay export"),
        ("train run.toml --set task.verifier=maths", 2, "unknown verifier 'maths'"),
        ("evaluate run.toml --model policy -n 0", 2, "-n is at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(echolab, words, code, said):
    errors = echolab(*words.split(), refused=code)
    assert said in errors and len([line for line in errors.splitlines() if line.startswith("echolab:")]) == 1, errors
    assert "Traceback" not in errors
