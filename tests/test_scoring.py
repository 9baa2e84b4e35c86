"""`echolab score` from the command line: what is stored does not depend on stops, backends or who asks twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deltalake import DeltaTable

pytest.importorskip("torch", reason="scoring needs torch")
pytest.importorskip("transformers", reason="scoring needs transformers")

from generators import models, prime_rl
from generators.plain import lines

import echolab
from echolab import files, jobs, scoring
from echolab.entropy.scorer import Scorer, ScorerConfig
from echolab.segment import Segmenter
from echolab.vocab import load_tokenizer, tokenizer_fingerprint
from pipelines.cli import main

N = 48
NUMBERS = "SELECT rollout_id, step, token_ids, entropies, logprobs, mean_entropy, n_tokens FROM scores ORDER BY rollout_id"


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return models.model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def dump(tmp_path_factory) -> Path:
    rng, words = random.Random(0), models.WORDS.split()
    path = tmp_path_factory.mktemp("dump") / "1.jsonl"
    rows = [
        {
            "prompt": f"x = {i // 4} so",
            "completion": " ".join(rng.choices(words, k=rng.randrange(1, 40))) + "\n" + "five",
            "reward": i % 2,
            "step": i // 16,
        }
        for i in range(N)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def store(tmp_path, dump) -> Path:
    with echolab.open(tmp_path / "store", create=True) as lab:
        lab.ingest(dump, run="r")
    return tmp_path / "store"


def echo(*args: object) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(sys, "argv", ["echolab", *map(str, args)])
        main()
    return int(e.value.code or 0)


def rows(store: Path, query: str = NUMBERS) -> list[tuple]:
    with echolab.open(store) as lab:
        return lab.sql(query).rows()


@pytest.fixture(scope="session")
def expected(tmp_path_factory, dump, model) -> list[tuple]:
    """What one undisturbed run stores."""
    store = tmp_path_factory.mktemp("whole") / "store"
    with echolab.open(store, create=True) as lab:
        lab.ingest(dump, run="r")
    assert echo("score", "--model", model, "--threads", 1, "--store", store) == 0
    return rows(store)


def test_every_rollout_is_scored_once_and_entropy_questions_have_answers(store, model, expected, capsys):
    assert echo("score", "--model", model, "--threads", 1, "--store", store) == 0
    assert f"{N} rollouts scored" in capsys.readouterr().out
    assert rows(store) == expected
    assert len(expected) == N
    [(n, segments, ends)] = rows(
        store, "SELECT count(*), sum(n_segments), count(*) FILTER (WHERE segment_ends[-1] = len(token_ids))"
        " FROM segmentations JOIN scores USING (rollout_id, scorer)"
    )  # fmt: skip
    assert (n, segments, ends) == (N, 2 * N, N)
    assert rows(store, "SELECT count(*) FROM tokens WHERE text IS NULL OR entropy IS NULL") == [(0,)]
    for name in (
        "entropy_by_step",
        "entropy_by_outcome",
        "entropy_by_position",
        "segment_entropy_histogram",
        "top_entropy_tokens",
    ):
        with echolab.open(store) as lab:
            assert len(lab.query(name)), name
    assert echo("score", "--model", model, "--threads", 1, "--store", store) == 0
    said = capsys.readouterr().out
    name = rows(store, "SELECT name || '@' || version FROM scorers")[0][0]
    assert f"scorer {name}: 0 rollouts scored" in said and "rollouts had scores already" in said
    assert rows(store) == expected
    assert echo("score", "--model", model, "--threads", 1, "--where", "run = 'nobody'", "--store", store) == 0
    assert "no rollout fits --where" in capsys.readouterr().out


def test_where_chooses_and_the_rest_can_follow(store, model, expected):
    assert echo("score", "--model", model, "--threads", 1, "--where", "step = 1", "--store", store) == 0
    assert {r[1] for r in rows(store)} == {1}
    assert echo("score", "--model", model, "--threads", 1, "--store", store) == 0
    assert [(r[0], r[2]) for r in rows(store)] == [(r[0], r[2]) for r in expected]


@pytest.mark.parametrize("backend", ["process", pytest.param("ray", marks=pytest.mark.slow)])
def test_other_backends_store_what_the_serial_one_does(store, model, expected, backend):
    if backend == "ray":
        pytest.importorskip("ray", reason="Ray is not installed")
    assert echo("score", "--model", model, "--backend", backend, "--workers", 2, "--threads", 1, "--store", store) == 0
    assert rows(store) == expected


FEW = """
from echolab import jobs
items, jobs.COMMIT_ITEMS = jobs.items, 2
jobs.items = lambda groups, tokens: items(groups, tokens, 100)
from pipelines.cli import main
main()
"""


@pytest.mark.parametrize("backend", ["serial", pytest.param("process", marks=pytest.mark.slow)])
def test_a_job_that_is_killed_three_times_gives_the_same_table_bit_for_bit(store, model, tmp_path, dump, backend):
    extra = ["--backend", "process", "--workers", "2"] if backend == "process" else []
    options = ["score", "--model", str(model), "--threads", "1", *extra, "--store"]
    whole, rng = tmp_path / "whole", random.Random(5)
    with echolab.open(whole, create=True) as lab:
        lab.ingest(dump, run="r")
    assert subprocess.run([sys.executable, "-c", FEW, *options, str(whole)]).returncode == 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", FEW, *options, str(store)], start_new_session=True)
        done, deadline = finished(store), time.monotonic() + 120
        while finished(store) <= done and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert echo("score", "status", "--store", store) == 0
    if finished(store) < 12:
        assert echo("score", "resume", *extra, "--store", store) == 0
    assert rows(store) == rows(whole)


def finished(store: Path) -> int:
    """Items that a job has finished so far."""
    found = jobs.jobs(echolab.open(store).store, "score")
    return sum(j.n_items - len(j.pending()) for j in found)


def test_resegment_cuts_anew_without_the_model(store, model, capsys):
    assert echo("score", "--model", model, "--store", store) == 0
    assert echo("score", "resegment", "--scorer", "tiny", "--mode", "fixed:5", "--store", store) == 0
    assert f"{N} rollouts cut by fixed:5" in capsys.readouterr().out
    assert rows(store, "SELECT segmenter, count(*) FROM segmentations GROUP BY ALL ORDER BY 2")[0][1] == N
    assert echo("score", "resegment", "--scorer", "tiny", "--mode", "fixed:5", "--store", store) == 0
    assert "0 rollouts cut" in capsys.readouterr().out
    assert echo("query", "entropy_by_position", "--store", store) == 1
    assert "choose with --segmenter" in capsys.readouterr().err
    assert echo("query", "entropy_by_position", "--segmenter", "fixed:5", "--store", store) == 0


TEXTS = ["two and three\nis five", "so x = 12\nthen y = 7 .\n", "wait", "naïve 日本語\n😀 five\nis so"]


@pytest.fixture
def recorded(tmp_path, model) -> tuple[Path, list[list[int]]]:
    """A store whose entropies were recorded while sampling, and the tokens, the second half with an end behind them."""
    tokenizer = load_tokenizer(model)
    ids = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] * (i > 1) for i, t in enumerate(TEXTS)]
    made = [{"prompt_ids": [9, 9], "completion_ids": tokens, "completion": "c", "reward": 1.0, "step": 4} for tokens in ids]
    export = [prime_rl.export([9, 9, *tokens], [False] * 2 + [True] * len(tokens), 4, i) for i, tokens in enumerate(ids)]
    with echolab.open(tmp_path / "recorded", create=True) as lab:
        lab.ingest(lines(tmp_path / "d.jsonl", made), run="sampled")
        lab.ingest(lines(tmp_path / "token_exports" / "step_4" / "rank_0.jsonl", export), run="sampled")
    return tmp_path / "recorded", ids


def test_what_a_dump_recorded_is_cut_with_its_tokenizer_which_the_store_then_knows(recorded, model, capsys):
    store, ids = recorded
    resegment = ("score", "resegment", "--scorer", "sampled", "--store", store, "--mode")
    assert echo(*resegment, "newline") == 1
    assert "no vocabulary for scorer sampled: give the tokenizer itself, --tokenizer FOLDER" in capsys.readouterr().err
    assert echo(*resegment, "newline", "--tokenizer", model) == 0
    assert "4 rollouts cut by newline" in capsys.readouterr().out
    assert echo(*resegment, "fixed:3") == 0

    tokenizer, expected = load_tokenizer(model), []
    for tokens in ids:
        numbers = prime_rl.entropies([9, 9, *tokens])[2:]
        kept = [t for t in tokens if t != tokenizer.eos_token_id]
        ends = sorted({i + 1 for i, t in enumerate(kept) if "\n" in tokenizer.decode([t])} | {len(kept)})
        starts = [0, *ends][:-1]
        expected.append((tokens, ends, [sum(numbers[a:b]) / (b - a) for a, b in zip(starts, ends, strict=True)]))
    found = rows(
        store,
        """SELECT token_ids, segment_ends, segment_entropies FROM segmentations JOIN scores USING (rollout_id)
        JOIN segmenters ON segmenters.id = segmenter AND segmenters.name = 'newline'""",
    )
    for (tokens, ends, means), (*same, exact) in zip(sorted(found), sorted(expected), strict=True):
        assert [tokens, ends] == same
        assert means == pytest.approx(exact, rel=1e-6)
    with echolab.open(store) as lab:
        shown = lab.sql("SELECT token_id, text FROM tokens", segmenter="newline").rows()
        assert all(text is not None for _, text in shown)
        assert len(lab.query("top_entropy_tokens", segmenter="newline", min_count=1))
        assert lab.validate() == []


def test_a_tokenizer_that_cannot_be_the_one_that_sampled_is_refused_and_nothing_is_kept(recorded, model, tmp_path, capsys):
    store, ids = recorded
    small = tmp_path / "small"
    models.tokenizer(small, size=max(map(max, ids)))
    assert echo("score", "--model", model, "--where", "false", "--store", store) == 0  # a scorer that names its tokenizer
    assert echo("score", "resegment", "--scorer", "tiny", "--mode", "fixed:4", "--tokenizer", model, "--store", store) == 0
    capsys.readouterr()
    reasons = [
        ("sampled", small, "does not fit scorer sampled: its token ids are "),
        ("tiny", small, "is not the tokenizer of scorer tiny"),
        ("sampled", tmp_path / "gone", "no such folder"),
    ]
    for scorer, folder, reason in reasons:
        assert echo("score", "resegment", "--scorer", scorer, "--mode", "newline", "--tokenizer", folder, "--store", store) == 1
        said = capsys.readouterr().err.strip()
        assert reason in said and "\n" not in said
    assert rows(store, "SELECT count(*) FROM segmentations") == [(0,)]
    assert rows(store, "SELECT count(DISTINCT tokenizer) FROM vocab") == [(1,)]  # that of the model


def test_scores_of_two_scorers_and_recorded_logprobs_are_compared(store, model, expected):
    for temperature in (1.0, 0.5):
        assert echo("score", "--model", model, "--temperature", temperature, "--store", store) == 0
    with echolab.open(store) as lab:
        [pair] = lab.query("scorer_agreement").to_dicts()
        names = {e["name"]: e["version"] for e in lab.sql("SELECT name, version FROM scorers ORDER BY version").to_dicts()}
    assert names == {"tiny": 2}
    assert (pair["n_rollouts"], pair["n_other_tokens"]) == (N, 0)
    assert pair["mean_abs_difference"] > 0.01
    assert pair["n_tokens"] == sum(len(r[2]) for r in expected)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["--model", "nowhere/at-all"],
            1,
            "nowhere/at-all: no such folder, not downloaded before, and the Hub does not answer",
        ),
        (["--model", "./nowhere"], 1, "nowhere: no such folder"),
        (["--model", "MODEL", "--tokenizer", "nowhere/at-all"], 1, "nowhere/at-all: no such folder, not downloaded before"),
        (["--model", "MODEL", "--tokenizer", "./nowhere"], 1, "nowhere: no such folder"),
        ([], 2, "which model"),
        (["--model", "MODEL", "--where", "no_such_column = 1"], 1, "no_such_column"),
        (["--model", "MODEL", "--segmenter", "words"], 2, "unknown mode"),
        (["--model", "MODEL", "--backend", "threads"], 2, "unknown backend"),
        (["--model", "MODEL", "--workers", "2"], 2, "--workers and --ray-address are for"),
        (["--model", "MODEL", "--dtype", "int8"], 2, "dtype"),
        (["--model", "MODEL", "--backend", "process", "--workers", "0"], 2, "--workers must be at least 1"),
    ],
)
def test_bad_options_are_one_clear_line_before_anything_is_done(store, model, options, code, message, capsys):
    options = [str(model) if o == "MODEL" else o for o in options]
    assert echo("score", *options, "--store", store) == code
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "Traceback" not in said
    assert rows(store) == []


ON_DISK = {  # what writes, and how often it succeeds before there is no more space
    "a new job": (jobs, "write_synced", 0),
    "an item": (jobs, "write_synced", 1),
    "the vocabulary": (files, "write_parquet", 2),
    "scores": (files, "write_parquet", 3),
    "a new table": (DeltaTable, "create", 4),
    "the log": (DeltaTable, "create_write_transaction", 3),
}
FULL = [
    OSError(28, "No space left on device"),
    OSError("Generic error\n   \x1b[31m↳\x1b[0m No space left on device (os error 28)\n"),
]


@pytest.mark.parametrize("what", ON_DISK)
def test_no_space_on_the_device_is_one_line_and_leaves_a_job_that_goes_on(store, model, expected, monkeypatch, capsys, what):
    place, name, left = ON_DISK[what]
    error, write, calls = FULL[place is DeltaTable], getattr(place, name), []

    def full(*args, **options):
        calls.append(name)
        if len(calls) > left:
            raise error
        return write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        assert echo("score", "--model", model, "--threads", 1, "--store", store) == 1
    said = capsys.readouterr().err.strip()
    assert "cannot write to " in said and "No space left on device" in said and "\n" not in said
    assert echo("score", "--model", model, "--threads", 1, "--store", store) == 0
    assert rows(store) == expected
    with echolab.open(store) as lab:
        assert lab.validate() == []


def on_disk(job: jobs.Job) -> dict[str, bytes]:
    return {str(f.relative_to(job.folder)): f.read_bytes() for f in job.folder.rglob("*") if f.is_file()}


def test_bad_models_are_one_line_and_leave_a_stopped_job_as_it_was(
    store, model, expected, tmp_path, monkeypatch, capsys, small_items
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        poison(patch, {6}, KeyboardInterrupt())
        scoring.score(echolab.open(store).store, ScorerConfig(model=str(model), threads=1))
    [job] = jobs.jobs(echolab.open(store).store, "score")
    before, scored = on_disk(job), rows(store)
    assert 0 < len(scored) < N
    models.tokenizer(
        tmp_path / "large", 460, models.TEXT + [bytes(range(256)).decode("latin-1") * 3, "".join(map(chr, range(3000)))]
    )
    nan = models.model(tmp_path / "nan", scale=float("nan"))
    bad = [
        (["--model", tmp_path / "gone"], "no such folder"),
        (["--model", nan], "holds NaN or infinite weights"),
        (["--model", model, "--tokenizer", tmp_path / "large"], "does not fit model"),
        (["--model", model, "--tokenizer", tmp_path / "gone"], "no such folder"),
    ]
    for options, reason in bad:
        capsys.readouterr()
        assert echo("score", *options, "--store", store) == 1
        said = capsys.readouterr().err.strip()
        assert reason in said and "\n" not in said
    assert (on_disk(job), rows(store)) == (before, scored)
    assert echo("score", "resume", "--store", store) == 0
    assert [(r[0], r[2]) for r in rows(store)] == [(r[0], r[2]) for r in expected]


def test_rollouts_that_no_model_can_score_are_told_and_counted_and_the_others_scored(tmp_path, model, capsys):
    tokenizer = load_tokenizer(model)
    whose = {"prompt": "x", "reward": 1.0, "step": 1, "tokenizer": tokenizer_fingerprint(tokenizer)}
    ids = [[1, 2, 450], [1, 2, 451], [1, 2, 151_935], [5]]
    made = [{**whose, "completion_ids": i} for i in ids] + [{**whose, "completion": c} for c in ("", "two", "")]
    with echolab.open(tmp_path / "store", create=True) as lab:
        lab.ingest(lines(tmp_path / "d.jsonl", made), run="r")
    assert echo("score", "--model", model, "--store", tmp_path / "store") == 0
    told = capsys.readouterr().out.splitlines()
    assert "3 rollouts scored" in told[0]
    assert sorted(told[1:]) == [
        "2 rollouts not scored: it has token ids beyond the model's vocabulary",
        "2 rollouts not scored: its completion is empty",
    ]
    assert echo("score", "status", "--store", tmp_path / "store") == 0
    assert ": done, 1 of 1 items" in capsys.readouterr().out


@pytest.fixture
def small_items(monkeypatch):
    """One item for each group of four rollouts."""
    cut = jobs.items
    monkeypatch.setattr(jobs, "items", lambda groups, tokens: cut(groups, tokens, 1))


def poison(monkeypatch, poisoned: set[int], error: BaseException) -> None:
    """An error for the item that holds one of these rollouts."""
    score = Scorer.__call__

    def call(self, rows):
        if poisoned & {int(p.split()[2]) for p in rows["prompt"].to_pylist()}:
            raise error
        return score(self, rows)

    monkeypatch.setattr(Scorer, "__call__", call)


def test_an_item_that_always_fails_blocks_no_other_and_stays_listed(store, model, expected, monkeypatch, capsys, small_items):
    score = ("score", "--model", model, "--threads", 1, "--store", store)
    with monkeypatch.context() as patch:
        poison(patch, {2}, ValueError("no good"))
        assert echo(*score, "--where", "step = 0") == 3
        assert len(rows(store)) == 12
        capsys.readouterr()
        for _ in range(2):
            assert echo(*score, "--json") == 3
            report = json.loads(capsys.readouterr().out)
            assert list(report["failed"].values()) == ["ValueError: no good"]
            assert len(rows(store)) == N - 4
        assert echo("score", "status", "--store", store) == 0
        assert "failed, 8 of 9 items" in capsys.readouterr().out
    assert echo("score", "resume", "--store", store) == 0
    assert [(r[0], r[2]) for r in rows(store)] == [(r[0], r[2]) for r in expected]


def test_rollouts_that_cannot_be_scored_are_counted_once_after_a_stop(store, model, monkeypatch, capsys, small_items):
    score = ("score", "--model", model, "--threads", 1, "--max-tokens", 20, "--store", store, "--json")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        poison(patch, {6}, KeyboardInterrupt())
        scoring.score(echolab.open(store).store, ScorerConfig(model=str(model), threads=1, max_tokens=20))
    capsys.readouterr()
    assert echo(*score) == 0
    skipped = json.loads(capsys.readouterr().out)["skipped"]
    assert 0 < sum(skipped.values()) == N - len(rows(store))
    more = ("score", "--model", model, "--threads", 1, "--store", store, "--json")
    assert echo(*more) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == {}
    assert len(rows(store)) == N


def test_what_a_stopped_job_scored_is_cut_by_its_own_segmenters_too(store, model, monkeypatch, small_items):
    settings = ScorerConfig(model=str(model), threads=1, segmenters=(Segmenter(mode="fixed:3"),))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        poison(patch, {6}, KeyboardInterrupt())
        scoring.score(echolab.open(store).store, settings)
    assert echo("score", "--model", model, "--threads", 1, "--store", store) == 0
    assert rows(store, "SELECT count(*) FROM segmentations GROUP BY segmenter") == [(N,), (N,)]


def test_a_job_whose_process_was_killed_is_shown_as_stopped(store, model, capsys):
    assert echo("score", "--model", model, "--threads", 1, "--store", store) == 0
    [job] = jobs.jobs(echolab.open(store).store, "score")
    job._say({**job.status, "state": "running"})  # as a kill leaves it
    with job.lock():
        assert echo("score", "status", "--store", store) == 0
    assert "running" in capsys.readouterr().out
    assert echo("score", "status", "--store", store) == 0
    assert "stopped" in capsys.readouterr().out
