"""`echolab generate`: rollouts of a tiny model in a store, once each, whatever happens on the way."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch", reason="sampling needs torch")
pytest.importorskip("transformers", reason="sampling needs transformers")

from generators import models
from generators.plain import lines

import echolab
from echolab import generate as generate_module
from echolab import ids
from echolab.engines.torch_engine import TorchEngine
from echolab.entropy.scorer import Scorer, ScorerConfig
from echolab.errors import Busy, EcholabError, WrongUsage
from echolab.lab import Lab
from echolab.scoring import score
from pipelines import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def lab(tmp_path):
    with echolab.open(tmp_path / "store", create=True) as lab:
        yield lab


def problems(path: Path, n: int = 6, **more: Any) -> Path:
    return lines(path, [{"prompt": f"What is {i} + {i}?", "ground_truth": str(2 * i), "level": i, **more} for i in range(n)])


def contents(lab: Lab) -> list[tuple]:
    """All that was sampled, with its numbers, in an order of its own."""
    return lab.sql(
        """SELECT group_id, sample, rollout_id, prompt_ids, completion_ids, completion, logprobs, finish_reason, entropies
        FROM rollouts r JOIN (SELECT rollout_id, entropies FROM scores) USING (rollout_id) ORDER BY ALL"""
    ).rows()


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    sys.argv = ["echolab", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_rollouts_are_stored_as_groups_with_all_that_is_known_of_them(lab, model, tmp_path):
    asked = problems(tmp_path / "p.jsonl", source="sums")
    report = lab.generate(model, asked, run="r", n=4, max_tokens=12, temperature=0.7, top_p=0.9, step=3, split="eval")
    assert (report.prompts, report.rollouts, report.known, report.skipped.total()) == (6, 24, 0, 0)
    rows = lab.sql("SELECT * FROM rollouts ORDER BY ground_truth, sample").to_dicts()
    assert [(r["prompt"], r["sample"], r["ground_truth"]) for r in rows] == [
        (f"What is {i} + {i}?", sample, str(2 * i)) for i in sorted(range(6), key=lambda i: str(2 * i)) for sample in range(4)
    ]
    for r in rows:
        assert (r["run"], r["step"], r["split"], r["role"], r["source"], r["model"]) == (
            "r",
            3,
            "eval",
            "policy",
            "sums",
            "tiny",
        )
        assert (r["group_source"], r["prompt_format"], r["completeness"], r["reward"]) == ("explicit", "raw", "all", None)
        assert json.loads(r["sampling"]) == {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_tokens": 12, "seed": 0}
        extra = json.loads(r["extra"])
        assert extra == {"level": extra["level"], "prompt_origin": {"file": "p.jsonl", "row": extra["level"]}}
        assert str(2 * extra["level"]) == r["ground_truth"]
        n = r["n_completion_tokens"]
        assert (r["finish_reason"] == "length") == (n == 12 and r["completion_ids"][-1] != 0)
        assert n == len(r["completion_ids"]) == len(r["logprobs"]) <= 12
    assert lab.sql("SELECT DISTINCT n, kind FROM groups").rows() == [(4, "unrewarded")]
    assert report.tokens == lab.sql("SELECT sum(n_completion_tokens)::INT FROM rollouts").item()
    assert report.ended == lab.sql("SELECT count(*) FROM rollouts WHERE finish_reason = 'stop'").item()
    assert lab.validate() == []


def test_entropies_are_a_scorer_of_the_run_and_agree_with_scoring(lab, model, tmp_path):
    report = lab.generate(model, problems(tmp_path / "p.jsonl"), run="r", n=4, max_tokens=100, temperature=0.7)
    [(id, entry)] = lab.snapshot.registry("scorers").items()
    assert (id, entry["name"], entry["config"]["kind"], entry["config"]["temperature"]) == (report.scorer, "r", "sampling", 0.7)
    assert lab.sql("SELECT count(*) > 0 FROM segments").item(), "cut already, for mining"
    [[both, a, b]] = lab.sql("SELECT count(*), count(DISTINCT rollout_id), sum(n_segments)::INT > 24 FROM segmentations").rows()
    assert (both, a, b) == (24, 24, True)
    score(lab.store, ScorerConfig.make(model=str(model), temperature=0.7))
    difference = lab.query("scorer_agreement").to_dicts()[0]
    assert difference["n_rollouts"] == 24 and difference["n_tokens"] == report.tokens
    assert difference["max_abs_difference"] < 1e-4 and difference["mean_abs_entropy_difference"] < 1e-5
    rows = lab.sql(
        "SELECT max(n_tokens) - min(n_tokens), max(mean_entropy) - min(mean_entropy) FROM scores GROUP BY rollout_id"
    )
    assert all(n == 0 and difference < 1e-5 for n, difference in rows.rows()), "both leave a final EOS out"
    assert 0 < report.ended < 24 and entry["config"]["eos"] == [0]


def test_what_is_there_is_not_sampled_again_and_another_generation_is(lab, model, tmp_path, monkeypatch):
    asked = problems(tmp_path / "p.jsonl")
    options = {"run": "r", "n": 2, "max_tokens": 8}
    first = lab.generate(model, asked, **options)
    before = contents(lab)
    monkeypatch.setattr(TorchEngine, "sample", None)
    again = lab.generate(model, asked, **options)
    assert (again.rollouts, again.known, again.scorer) == (0, 6, first.scorer) and contents(lab) == before
    copied = lines(tmp_path / "elsewhere" / "q.jsonl", [json.loads(line) for line in asked.read_text().splitlines()])
    assert lab.generate(model, copied, **options).known == 6, "the same prompts from another file"
    monkeypatch.undo()
    for change in ({"seed": 1}, {"temperature": 0.5}, {"step": 1}, {"n": 3}):
        assert lab.generate(model, asked, **{**options, **change}).known == 0
    assert len(contents(lab)) == 12 * 4 + 18
    lab.generate(model, asked, **{**options, "run": "s"})
    assert lab.sql("SELECT count(*) FROM rollouts WHERE run = 's'").item() == 12


def test_a_generation_that_was_stopped_goes_on_and_comes_out_as_undisturbed(lab, model, tmp_path, monkeypatch):
    asked = problems(tmp_path / "p.jsonl", n=50)
    options = {"run": "r", "n": 4, "max_tokens": 6, "rows": 128}
    monkeypatch.setattr(generate_module, "PART_ROLLOUTS", 32)
    sample, calls = TorchEngine.sample, []

    def stops(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, *arguments)

    monkeypatch.setattr(TorchEngine, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        lab.generate(model, asked, **options)
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 128
    report = lab.generate(model, asked, **{**options, "rows": 50})  # in other batches
    assert (report.known, report.rollouts) == (32, 72)
    assert lab.validate() == []
    with echolab.open(tmp_path / "undisturbed", create=True) as other:
        other.generate(model, asked, **{**options, "rows": 1000})
        mine, theirs = contents(lab), contents(other)
    assert [row[:6] + row[7:8] for row in mine] == [row[:6] + row[7:8] for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert all(math.isclose(x, y, abs_tol=1e-5) for i in (6, 8) for x, y in zip(a[i], b[i], strict=True))


def test_a_crash_between_the_rollouts_and_the_ledger_leaves_nothing_that_shows(lab, model, tmp_path, monkeypatch):
    asked, options = problems(tmp_path / "p.jsonl"), {"run": "r", "n": 2, "max_tokens": 6}
    add = type(lab.store).add

    def dies(self: Any, table: str, rows: Any) -> Any:
        if table == "ingests":
            raise KeyboardInterrupt
        return add(self, table, rows)

    with monkeypatch.context() as m:
        m.setattr(type(lab.store), "add", dies)
        with pytest.raises(KeyboardInterrupt):
            lab.generate(model, asked, **options)
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 0
    assert lab.generate(model, asked, **options).rollouts == 12
    assert len(contents(lab)) == 12 and lab.validate() == []


def test_two_processes_do_not_sample_the_same(lab, model, tmp_path):
    config = generate_module.GenerateConfig.make(model=str(model), prompts=str(problems(tmp_path / "p.jsonl")), run="r")
    generation = generate_module.Generation.load(config)
    with lab.store.lock(0, f"generate-{generation.id}"), pytest.raises(Busy, match="another process is sampling just these"):
        generation.run(lab.store)


@pytest.mark.parametrize(
    ("template", "prompt", "format"),
    [
        ("auto", "Add 2 and 3", "raw"),
        ("chat", "Add 2 and 3", "chat"),
        ("auto", [{"role": "user", "content": "Add 2 and 3"}], "chat"),
        ("raw", [{"role": "user", "content": "Add 2 and 3"}], "raw"),
    ],
)
def test_prompts_are_rendered_as_scoring_renders_them(lab, model, tmp_path, template, prompt, format):
    asked = lines(tmp_path / "p.jsonl", [{"prompt": prompt}])
    lab.generate(model, asked, run="r", n=1, max_tokens=3, template=template)
    [row] = lab.sql("SELECT * FROM rollouts").to_dicts()
    tokenizer = Scorer.load(ScorerConfig.make(model=str(model))).tokenizer
    text = "<|user|>Add 2 and 3<|end|><|assistant|>" if format == "chat" else "Add 2 and 3"
    assert (row["prompt_format"], tokenizer.decode(row["prompt_ids"])) == (format, text)
    assert (row["prompt"] is None) == (row["messages"] is not None) == isinstance(prompt, list)
    assert row["problem_id"] == ids.problem_id("Add 2 and 3")


def test_greedy_rollouts_are_one_a_prompt_and_their_numbers_those_at_temperature_1(lab, model, tmp_path):
    lab.generate(model, problems(tmp_path / "p.jsonl"), run="r", n=1, max_tokens=10, temperature=0)
    assert {json.loads(s)["temperature"] for (s,) in lab.sql("SELECT sampling FROM rollouts").rows()} == {0}
    score(lab.store, ScorerConfig.make(model=str(model)))
    assert lab.query("scorer_agreement")["max_abs_difference"].to_list()[0] < 1e-4


def test_columns_of_parquet_are_named_and_a_chat_keeps_its_messages(lab, model, tmp_path):
    path = tmp_path / "p.parquet"
    table = pa.table({"ask": ["one", "two"], "gold": [1.0, 2.0], "data_source": ["d", "d"], "kept": [[1], None]})
    pq.write_table(table, path)
    lab.generate(model, path, run="r", n=1, max_tokens=3, map={"prompt": "ask", "ground_truth": "gold"})
    rows = lab.sql("SELECT prompt, ground_truth, source, extra FROM rollouts ORDER BY prompt").rows()
    assert [row[:3] for row in rows] == [("one", "1.0", "d"), ("two", "2.0", "d")]
    assert json.loads(rows[0][3])["kept"] == [1]


def test_prompts_that_fill_the_context_are_counted_and_the_others_are_sampled(lab, model, tmp_path, capsys):
    asked = lines(tmp_path / "p.jsonl", [{"prompt": "x " * 600}, {"prompt": "short"}])
    options = ("--model", model, "--run", "r", "--n", 2, "--max-tokens", 4, "--store", lab.store.root)
    code, out, _ = run("generate", "--prompts", asked, *options, capsys=capsys)
    assert code == 3 and "1 prompt without rollouts: it fills the model's context" in out
    assert lab.sql("SELECT DISTINCT prompt FROM rollouts").rows() == [("short",)]
    long = lines(tmp_path / "q.jsonl", [{"prompt": "x " * 600}])
    code, _, err = run("generate", "--prompts", long, *options, capsys=capsys)
    assert (code, err.splitlines()[-1]) == (1, f"echolab: {long}: nothing sampled: it fills the model's context")


def test_few_prompts_are_in_memory_at_a_time(lab, model, tmp_path, monkeypatch):
    asked, sizes, sample = problems(tmp_path / "p.jsonl", n=100), [], TorchEngine.sample
    monkeypatch.setattr(generate_module, "PART_ROLLOUTS", 8)
    monkeypatch.setattr(TorchEngine, "sample", lambda self, p, *rest: sizes.append(len(p)) or sample(self, p, *rest))
    lab.generate(model, asked, run="r", n=2, max_tokens=2, rows=32)
    assert sizes == [16] * 6 + [4]


def test_the_command_says_what_it_did(model, tmp_path, capsys):
    asked, store = problems(tmp_path / "p.jsonl"), tmp_path / "new"
    options = ("--model", model, "--prompts", asked, "--run", "r", "--n", 3, "--max-tokens", 5, "--store", store)
    code, out, err = run("generate", *options, "--json", capsys=capsys)
    said = json.loads(out)
    assert code == 0 and (said["rollouts"], said["known"], said["prompts"]) == (18, 0, 6) and "Error" not in err
    code, out, _ = run("generate", *options, capsys=capsys)
    assert code == 0 and out.splitlines()[-1] == "6 prompts had theirs already"


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"--model": "no/such/folder"}, 1, "no such folder"),
        ({"--prompts": "nowhere.jsonl"}, 1, "nowhere.jsonl: No such file or directory"),
        ({"--temperature": "-1"}, 2, "temperature: Input should be greater than or equal to 0"),
        ({"--top-p": "1.5"}, 2, "top_p: Input should be less than or equal to 1"),
        ({"--template": "jinja"}, 2, "template: Input should be 'auto', 'raw' or 'chat'"),
        ({"--map": "prompt=ask"}, 1, "no column ask; its columns are prompt, ground_truth, level"),
        ({"--map": "answer=gold"}, 1, "answer is no column of a prompt"),
        ({"--run": " "}, 2, "a run's name is one printable line"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_leaves_no_store(model, tmp_path, capsys, change, code, said):
    options = {
        "--model": model,
        "--prompts": problems(tmp_path / "p.jsonl"),
        "--run": "r",
        "--store": tmp_path / "new",
        **change,
    }
    ended, _, err = run("generate", *(x for pair in options.items() for x in pair), capsys=capsys)
    last = err.splitlines()[-1]
    assert ended == code and last.startswith("echolab: ") and said in last
    assert not (tmp_path / "new").exists()


def test_a_file_without_prompts_is_an_error(lab, model, tmp_path):
    with pytest.raises(EcholabError, match="no prompts in it"):
        lab.generate(model, lines(tmp_path / "p.jsonl", []), run="r")
    with pytest.raises(WrongUsage, match="temprature: no such option; did you mean temperature"):
        lab.generate(model, problems(tmp_path / "q.jsonl"), run="r", temprature=1)


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_what_it_had_and_the_next_one_goes_on(model, tmp_path):
    asked = problems(tmp_path / "p.jsonl", n=400)
    code = f"""import echolab
with echolab.open({str(tmp_path / "killed")!r}, create=True) as lab:
    lab.generate({str(model)!r}, {str(asked)!r}, run="r", n=4, max_tokens=60, rows=64)"""
    stored = 0
    for kill in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        ledger, before = tmp_path / "killed" / "ingests" / "_delta_log", stored
        while process.poll() is None and stored < before + 3:
            stored = len(list(ledger.glob("*.json"))) if ledger.exists() else 0
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, f"{kill}: it was done before it could be killed"
    with echolab.open(tmp_path / "killed") as lab, echolab.open(tmp_path / "whole", create=True) as other:
        report = lab.generate(model, asked, run="r", n=4, max_tokens=60, rows=64)
        assert 0 < report.known < 400 and report.rollouts == 4 * (400 - report.known)
        other.generate(model, asked, run="r", n=4, max_tokens=60, rows=64)
        assert lab.validate() == []
        columns = "rollout_id, completion_ids, finish_reason"
        rows = [x.sql(f"SELECT {columns} FROM rollouts ORDER BY 1").rows() for x in (lab, other)]
        assert len(rows[0]) == 1600 and rows[0] == rows[1]
        assert lab.sql("SELECT count(*), count(DISTINCT rollout_id) FROM scores").rows() == [(1600, 1600)]
