"""Problems of a run: all of them once an epoch, from files, from the store, and what is refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import echolab
from echolab.errors import EcholabError
from trainer import maze
from trainer.config import TrainConfig
from trainer.tasks import Tasks, held_out


def config(tmp_path, **task) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "out": str(tmp_path / "out"),
            "run": "r",
            "store": str(tmp_path / "store"),
            "steps": 1,
            "model": {"path": "nothing"},
            "task": {"prompts": "maze", "problems": 10, **task},
            "sampling": {"prompts": 4},
            "evaluation": {"prompts": "maze", "problems": 30},
        }  # fmt: skip
    )


@pytest.fixture(scope="module")
def tokenizer():
    return maze.tokenizer()


def test_an_epoch_takes_every_problem_once_in_an_order_of_its_own(tmp_path, tokenizer):
    tasks = Tasks.open(config(tmp_path), tokenizer, needs_gold=True)
    epochs = [[str(p.prompt) for p in tasks.take(10)] for _ in range(3)]
    assert [sorted(e) for e in epochs] == [sorted(epochs[0])] * 3 and len(set(epochs[0])) == 10
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_position_is_all_that_has_to_be_kept(tmp_path, tokenizer):
    whole, later = (Tasks.open(config(tmp_path), tokenizer, needs_gold=True) for _ in range(2))
    taken = [whole.take(4) for _ in range(6)]
    later.position = 12
    assert [[p.prompt for p in later.take(4)] for _ in range(3)] == [[p.prompt for p in t] for t in taken[3:]]


def test_evaluation_holds_mazes_that_training_never_sees(tmp_path, tokenizer):
    c = config(tmp_path, problems=500)
    training = {p.prompt for p in Tasks.open(c, tokenizer, needs_gold=True).problems}
    assert not training & {p.prompt for p in held_out(c, tokenizer)}


def test_problems_of_a_file_keep_their_other_columns(tmp_path, tokenizer):
    rows = maze.problems(3, (1, 3), seed=0)
    file = tmp_path / "p.jsonl"
    file.write_text(
        "".join(json.dumps({"q": r["prompt"], "answer": r["ground_truth"], "level": r["level"]}) + "\n" for r in rows)
    )
    problems = Tasks.open(config(tmp_path, prompts=str(file), map={"prompt": "q"}), tokenizer, needs_gold=True).problems
    assert [(p.prompt, p.ground_truth, p.extra) for p in problems] == [
        (r["prompt"], r["ground_truth"], {"level": r["level"]}) for r in rows
    ]
    assert all(tokenizer.decode(p.prompt_ids) == p.prompt for p in problems)


def test_problems_of_a_store_are_chosen_by_how_they_fared_and_asked_for_again(tmp_path, tokenizer):
    rows = maze.problems(4, (1, 3), seed=0)
    dump = tmp_path / "dump.jsonl"
    dump.write_text(
        "".join(
            json.dumps({**r, "completion": f"{k}", "reward": float(k < i)}) + "\n" for i, r in enumerate(rows) for k in range(3)
        )
    )
    c = config(tmp_path, prompts="store", where="success_rate BETWEEN 0.1 AND 0.9", refresh=1)
    with echolab.open(c.store, create=True) as lab:
        lab.ingest(dump, run="before", step=1)
        tasks = Tasks.open(c, tokenizer, needs_gold=True)
        assert Counter(p.prompt for p in tasks.take(4)) == Counter({rows[1]["prompt"]: 2, rows[2]["prompt"]: 2})
        more = tmp_path / "more.jsonl"
        more.write_text("".join(json.dumps({**rows[0], "completion": f"{k}", "reward": float(k)}) + "\n" for k in range(2)))
        lab.ingest(more, run="before", step=2)
        assert {p.prompt for p in tasks.take(6)} == {r["prompt"] for r in rows[:3]}
        lab.verify("python:trainer_functions:easy")  # all are right
    judged = config(tmp_path, prompts="store", where="success_rate = 1", verdicts="python:trainer_functions:easy")
    assert len(Tasks.open(judged, tokenizer, needs_gold=True).problems) == 4


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"prompts": "FILE"}, "1 of 1 problems have no ground_truth, which verifier math needs"),
        ({"prompts": "FILE", "template": "chat"}, "the tokenizer has no chat template"),
        ({"prompts": "none.jsonl"}, "none.jsonl: No such file"),
    ],
)
def test_what_is_missing_is_said(tmp_path, tokenizer, task, said):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "a1"}) + "\n")
    task = {**task, "prompts": task["prompts"].replace("FILE", str(file))}
    with pytest.raises(EcholabError, match=said):
        Tasks.open(config(tmp_path, **task), tokenizer, needs_gold="template" not in task)
