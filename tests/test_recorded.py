"""Entropies that a dump recorded: rows of `scores` beside its rollouts, or beside those that another dump brought."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from generators import prime_rl
from generators.plain import lines

import echolab
from echolab import EcholabError, ingest, plan, readers
from echolab.errors import Unreadable
from echolab.lab import Lab
from echolab.readers import Row, Scores, Source
from echolab.readers.base import rows_of_lines
from echolab.vocab import Vocab

ROLLOUT = {"fake": 1, "step": 3, "prompt": "p", "reward": 1.0}


def _read(source: Source) -> Iterator[Any]:
    """Rows whose token numbers stand beside them, as slime's and EchoRL's do."""

    def convert(row: int, value: dict[str, Any]) -> list[Any]:
        if value.get("fail"):
            raise Unreadable(f"{source.rel}: no more of it")
        names = ("step", "prompt", "reward", "completion_ids", "loss_mask")
        fields = {"completion": "c", **{n: value[n] for n in names if n in value}}
        return [Row(row, fields, scores=Scores(value["entropies"], value.get("logprobs")) if "entropies" in value else None)]

    return rows_of_lines(source, convert)


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Iterator[Lab]:
    def sniff(head: Any) -> str | None:
        return "it is fake" if "fake" in head.keys else None

    fake = SimpleNamespace(NAME="fake", VERSION=1, CONTINUES=True, sniff=sniff, read=_read)
    for module in (readers, plan):
        monkeypatch.setattr(module, "READERS", (fake, *readers.READERS))
    with echolab.open(tmp_path / "store", create=True) as lab:
        yield lab


def rollouts(n: int, seed: int = 0, masked: bool = True) -> list[dict]:
    rng = random.Random(seed)
    made = []
    for i in range(n):
        k = rng.randint(1, 9)
        numbers = {
            "entropies": [rng.randrange(72) / 8 for _ in range(k)],
            "logprobs": [-rng.randrange(72) / 8 for _ in range(k)],
        }
        mask = {"loss_mask": [rng.random() < 0.6 for _ in range(k)]} if masked and i % 2 else {}
        made.append({**ROLLOUT, "completion_ids": [1000 * i + t for t in range(k)], **numbers, **mask})
    return made


def test_token_numbers_of_a_dump_are_scores_of_one_scorer_named_after_the_run(lab, tmp_path):
    made = rollouts(40)
    report = lab.ingest(lines(tmp_path / "d.jsonl", made), run="my run", tokenizer="tok", temperature=0.6, dtype="float32")
    assert (report.rows, report.scores, report.quarantined) == (40, 40, 0)
    shown = lab.sql(
        """SELECT r.origin.row, s.run, s.step, s.token_ids, s.loss_mask, s.entropies, s.logprobs, s.mean_entropy, s.n_tokens
        FROM scores s JOIN rollouts r USING (rollout_id) ORDER BY ALL"""
    ).rows()
    for i, (row, value) in enumerate(zip(shown, made, strict=True)):
        counted = [e for e, m in zip(value["entropies"], value.get("loss_mask") or [True] * 99, strict=False) if m]
        mean = sum(counted) / len(counted) if counted else None
        assert row[:5] == (i, "my run", 3, value["completion_ids"], value.get("loss_mask"))
        assert row[5:7] == (value["entropies"], value["logprobs"]) and row[8] == len(value["entropies"])
        assert row[7] == (None if mean is None else pytest.approx(mean, rel=1e-12))
    assert any(row[7] is None for row in shown), "a mask that leaves no token leaves the mean unknown"
    (entry,) = lab.snapshot.registry("scorers").values()
    assert entry["name"] == "my run"
    said = {"kind": "sampling", "run": "my run", "tokenizer": "tok", "temperature": 0.6, "dtype": "float32", "rendering": None}
    assert entry["config"] == said
    tokens = lab.sql("SELECT position, token_id, entropy, logprob FROM tokens ORDER BY token_id").rows()
    flat = [
        (p, t, e, q)
        for value in made
        for p, (t, e, q) in enumerate(zip(value["completion_ids"], value["entropies"], value["logprobs"], strict=True))
    ]
    assert tokens == flat
    assert lab.validate() == []


def test_a_final_eos_counts_in_no_mean_where_the_store_knows_the_tokenizer(lab, tmp_path):
    Vocab("tok", {0: b"<end>", 1: b"a", 2: b"b"}, frozenset({0})).keep(lab.store)
    numbers = {"entropies": [1.0, 2.0, 4.0, 8.0], "logprobs": [-1.0] * 4}
    made = [
        {**ROLLOUT, **numbers, "completion_ids": [1, 0, 2, 0]},
        {**ROLLOUT, **numbers, "completion_ids": [1, 2, 0, 0], "loss_mask": [False, True, True, True]},
        {**ROLLOUT, **numbers, "completion_ids": [0, 0, 0, 0]},
    ]
    expected = [(3, 7 / 3), (2, 2.0), (0, None)]
    for tokenizer, means in (("tok", expected), ("other", [(4, 3.75), (4, 14 / 3), (4, 3.75)])):
        lab.ingest(lines(tmp_path / "d.jsonl", made), run=tokenizer, tokenizer=tokenizer)
        rows = lab.sql(
            f"""SELECT n_tokens, mean_entropy FROM scores JOIN rollouts r USING (rollout_id) WHERE r.run = '{tokenizer}'
            ORDER BY origin.row"""
        ).rows()
        assert rows == [(n, mean if mean is None else pytest.approx(mean)) for n, mean in means]


def test_what_the_dump_does_not_say_of_its_numbers_is_asked_for(lab, tmp_path):
    notes = lab.ingest(lines(tmp_path / "d.jsonl", rollouts(2)), run="r", dtype="bfloat16").files[0].notes
    assert "of its entropies it does not say the tokenizer, temperature: --tokenizer, --temperature do" in notes


def test_another_run_has_another_scorer_and_the_same_run_the_same(lab, tmp_path):
    for run, name in (("a", "1"), ("b", "1"), ("a", "2")):
        lab.ingest(lines(tmp_path / f"{name}.jsonl", rollouts(3, seed=int(name))), run=run)
    shown = lab.sql("SELECT run, count(*), count(DISTINCT scorer) FROM scores GROUP BY run ORDER BY run").rows()
    assert shown == [("a", 6, 1), ("b", 3, 1)]
    with pytest.raises(EcholabError, match="scorer"):  # views of tokens show one
        lab.sql("SELECT * FROM tokens")


def test_a_file_that_fails_leaves_no_scores_and_the_others_keep_theirs(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "CHUNK_ROWS", 4)  # some of its scores are on their way when it fails
    lines(tmp_path / "d" / "1.jsonl", [*rollouts(10, seed=1), {**ROLLOUT, "fail": True}])
    lines(tmp_path / "d" / "2.jsonl", [{**r, "step": 4} for r in rollouts(5, seed=2)])
    report = lab.ingest(tmp_path / "d", run="r")
    assert [(f.status, f.rows) for f in report.files] == [("failed", 0), ("ingested", 5)]
    assert lab.sql("SELECT step, count(*) FROM scores GROUP BY step").rows() == [(4, 5)]
    lines(tmp_path / "d" / "1.jsonl", rollouts(10, seed=1))
    lab.ingest(tmp_path / "d", run="r")
    assert lab.sql("SELECT step, count(*) FROM scores GROUP BY step ORDER BY step").rows() == [(3, 10), (4, 5)]
    assert lab.validate() == []


def test_keys_that_stand_are_dropped(lab, tmp_path):
    made = rollouts(6)
    lab.ingest(lines(tmp_path / "1.jsonl", made[:4]), run="r")
    report = lab.ingest(lines(tmp_path / "2.jsonl", made), run="r")
    assert report.files[0].shared == 4
    assert lab.sql("SELECT count(*), count(DISTINCT rollout_id) FROM scores").rows() == [(6, 6)]
    lab.ingest(lines(tmp_path / "1.jsonl", made[:5]), run="r", replace=True)
    assert lab.sql("SELECT count(*), count(DISTINCT rollout_id) FROM scores").rows() == [(6, 6)]
    assert lab.validate() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"entropies": [0.5]}, "1 entropies for 3 tokens"),
        ({"entropies": [0.5, math.nan, 0.1]}, "not numbers from 0 on"),
        ({"entropies": [0.5, math.inf, 0.1]}, "not numbers from 0 on"),
        ({"entropies": [0.5, -0.5, 0.1]}, "not numbers from 0 on"),
        ({"entropies": [0.5, "a", 0.1]}, "no numbers"),
        ({"entropies": [0.5, [], 0.1]}, "no numbers"),
        ({"logprobs": [-1.0]}, "1 log-probabilities for 3 tokens"),
        ({"logprobs": ["a", -1.0, -1.0]}, "no numbers"),
        ({"completion_ids": None}, "no completion_ids"),
    ],
)
def test_numbers_that_cannot_be_those_of_the_tokens_spoil_their_row(lab, tmp_path, change, reason):
    good = {**ROLLOUT, "completion_ids": [1, 2, 3], "entropies": [0.5, -1e-4, 0.1], "logprobs": [-1.0, -2.0, -3.0]}
    report = lab.ingest(lines(tmp_path / "d.jsonl", [good, {**good, "prompt": "q", **change}]), run="r")
    assert (report.rows, report.scores, report.quarantined) == (1, 1, 1)
    assert reason in report.files[0].notes[-1]
    assert lab.sql("SELECT count(*) FROM scores").item() == 1


# Numbers of rollouts that another dump brings


def sequence(prompt: list[int], completion: list[int], **more: Any) -> dict:
    return {"prompt_ids": prompt, "completion_ids": completion, "completion": "c", "reward": 1.0, "step": 4, **more}


def exported(folder: Path, sequences: list[dict], step: int = 4) -> Path:
    rows = []
    for i, s in enumerate(sequences):
        n = len(s["prompt_ids"])
        tokens = s["prompt_ids"] + s["completion_ids"]
        rows.append(prime_rl.export(tokens, [t >= n for t in range(len(tokens))], step, i))
    return lines(folder / "token_exports" / f"step_{step}" / "rank_0.jsonl", rows)


SEQUENCES = [
    sequence([1, 2], [9, 5, 7], group="a"),
    sequence([1, 2], [9, 5], group="a"),
    sequence([1], [2, 9, 5], group="b", loss_mask=[True, False, True]),
    sequence([3], [4], group="b"),
]


def test_a_token_export_finds_its_rollouts_by_their_tokens(lab, tmp_path):
    lab.ingest(lines(tmp_path / "d.jsonl", [*SEQUENCES[:2], SEQUENCES[3]]), run="r")
    report = lab.ingest(exported(tmp_path, [SEQUENCES[3], SEQUENCES[0], SEQUENCES[1]]), run="r")
    assert (report.rows, report.scores, report.quarantined) == (0, 3, 0)
    shown = lab.sql(
        "SELECT r.origin.row, s.token_ids, s.entropies, s.logprobs FROM scores s JOIN rollouts r USING (rollout_id) ORDER BY 1"
    ).rows()
    for row, tokens, entropies, logprobs in shown:
        made = [*SEQUENCES[:2], SEQUENCES[3]][row]
        recorded = prime_rl.entropies(made["prompt_ids"] + made["completion_ids"])
        assert tokens == made["completion_ids"]
        assert entropies == recorded[len(made["prompt_ids"]) :]
        assert logprobs == [-0.5] * len(tokens)
    assert len(shown) == 3


def test_where_prompts_and_completions_join_to_the_same_tokens_the_rollouts_are_taken_in_turn(lab, tmp_path):
    """[1, 2] + [9, 5] and [1] + [2, 9, 5] are the same tokens: the mask of the second counts two of three."""
    lab.ingest(lines(tmp_path / "d.jsonl", SEQUENCES[1:3]), run="r")
    export = exported(tmp_path, [SEQUENCES[1]] * 3)
    report = lab.ingest(export, run="r")
    assert (report.scores, report.quarantined) == (2, 1)
    assert "its rollout has numbers from an earlier row of this file" in report.files[0].notes[-1]
    means = dict(lab.sql("SELECT n_tokens, mean_entropy FROM scores").rows())
    at = prime_rl.entropies([1, 2, 9, 5])
    assert means == {2: pytest.approx((at[2] + at[3]) / 2), 3: pytest.approx((at[1] + at[3]) / 2)}
    assert lab.ingest(export, run="r").files[0].status == "unchanged", "reading it again would bring nothing"


def test_rows_without_a_rollout_wait_in_quarantine_until_their_dump_is_there(lab, tmp_path):
    export = exported(tmp_path, SEQUENCES)
    report = lab.ingest(export, run="r")
    assert (report.scores, report.quarantined) == (0, 4)
    assert "no rollout of run 'r' has these tokens: ingest their dump, then this one again" in report.files[0].notes[-1]
    kept = [json.loads(line) for line in Path(report.quarantine[0]).read_text().splitlines()]
    assert [json.loads(k["raw"]) for k in kept] == [json.loads(line) for line in export.read_text().splitlines()]
    lab.ingest(lines(tmp_path / "d.jsonl", SEQUENCES), run="r")
    report = lab.ingest(export, run="r")
    assert (report.files[0].status, report.scores, report.quarantined) == ("replaced", 4, 0)
    assert lab.snapshot.ledger.n_quarantined() == 0
    assert lab.ingest(export, run="r").files[0].status == "unchanged"
    assert lab.validate() == []


def test_in_one_command_the_rollouts_come_first_whatever_the_names(lab, tmp_path):
    exported(tmp_path / "run" / "a", SEQUENCES)
    lines(tmp_path / "run" / "z" / "d.jsonl", SEQUENCES)
    report = lab.ingest(tmp_path / "run", run="r")
    assert (report.rows, report.scores, report.quarantined) == (4, 4, 0)


def test_rollouts_of_another_run_or_replaced_ones_are_not_found(lab, tmp_path):
    dump = lines(tmp_path / "d.jsonl", SEQUENCES)
    lab.ingest(dump, run="other")
    assert lab.ingest(exported(tmp_path, SEQUENCES), run="r").quarantined == 4
    lab.ingest(dump, run="s")
    lab.ingest(lines(dump, [sequence([8], [8], group="x")]), run="s", replace=True)
    assert lab.ingest(tmp_path / "token_exports", run="s").quarantined == 4
