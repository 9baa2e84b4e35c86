"""`echolab curate` as a shell sees it, on a set made by hand and on one that was mined."""

from __future__ import annotations

import json
import random
import re

import pytest
from generators.mined import mined
from test_cli import echolab, refused

BENCHMARK = [{"problem": "How many ducks lay sixteen eggs on rainy Mondays?", "answer": "7"}, {"problem": "Solve x = 2."}]


@pytest.fixture
def benchmark(tmp_path):
    path = tmp_path / "ducks.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in BENCHMARK))
    return path


@pytest.fixture
def store(make_store):
    store = make_store([{"reward": 1.0}])
    copied = [{"prompt": "HOW many ducks lay sixteen eggs on rainy Mondays?", "clip": c} for c in "ab"]
    mined(store, [*copied, {"prompt": "Solve $x=2$"}, *[{"prompt": f"P{i % 3}", "clip": "c" * (i // 2)} for i in range(2, 14)]])
    return store.root


def test_it_says_what_each_rule_dropped_and_every_hit(store, benchmark):
    result = echolab(
        "curate", "--clipset", "mined", "--name", "hard", "--min-tokens", 2, "--against", benchmark, "--dedup", "--cap",
        "problem=2", "--validation", 0.1, "--weights", "uniform", "--store", store,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "hard@1: 6 of 15 clips of mined@1\n"
        "    length: 4 dropped, 11 left\n"
        "    contaminated: 1 dropped, 10 left\n"
        "    duplicate: 0 dropped, 10 left\n"
        "    cap_problem: 4 dropped, 6 left\n"
        "against ducks.jsonl (3 texts, n-grams of 8 and 13 words): 1 clip with text of 1 row\n"
        "    row 1 problem: prompt of 1 clip, exact: Solve x = 2.\n"
        "4 train, 2 validation\n"
    )
    again = echolab("curate", "--clipset", "mined", "--name", "copies", "--against", f"{benchmark}:problem", store=store)
    assert "    row 0 problem: prompt of 2 clips, ngram: how many ducks lay sixteen eggs on rainy\n" in again.stdout
    again = echolab("curate", "--clipset", "mined", "--name", "copies", "--against", f"{benchmark}:problem", store=store)
    assert again.stdout.startswith("copies@1: 12 of 15 clips of mined@1 (nothing new: as it stands)\n    contaminated: 3")


def test_json_is_one_document(store, benchmark, tmp_path):
    result = echolab("curate", "--clipset", "mined@1", "--name", "hard", "--against", benchmark, "--near-dedup", 0.8,
                     "--list", tmp_path / "dropped.jsonl", "--json", store=store)  # fmt: skip
    document = json.loads(result.stdout)
    assert result.stderr == "" and (document["clipset"], document["parent"], document["made"]) == ("hard@1", "mined@1", True)
    assert [list(stage["dropped"]) for stage in document["counts"]] == [["contaminated"], ["near_duplicate"]]
    assert document["in"] - sum(n for s in document["counts"] for n in s["dropped"].values()) == document["out"]
    lines = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert len(lines) == document["in"] - document["out"]
    assert "clean" not in (result.stdout + (tmp_path / "dropped.jsonl").read_text()).lower()


def test_a_long_list_of_hits_is_cut_on_the_screen_and_told(make_store, tmp_path):
    problems = [f"{'abcdefghijklmnop'[i] * 3} Solve x = {i}." for i in range(16)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"problem": p}) + "\n" for p in problems))
    store = make_store([{"reward": 1.0}])
    mined(store, [{"prompt": p} for p in problems])
    result = echolab("curate", "--clipset", "mined", "--name", "x", "--against", tmp_path / "b.jsonl", store=store.root)
    assert "    and 6 more: --list FILE writes all\nno clip is left: there is nothing to export\n" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--name", "b"], 2, "--clipset"),
        (["--clipset", "mined"], 2, "--name"),
        (["--clipset", "mined", "--name", "b"], 2, "nothing to do: name a rule, such as --dedup or --against FILE"),
        (["--clipset", "hard", "--name", "b", "--dedup"], 1, "no clip set 'hard'"),
        (["--clipset", "mined", "--name", "mined", "--dedup"], 2, "a name of its own"),
        (["--clipset", "mined", "--name", "b", "--cap", "problem"], 2, "expected NAME=VALUE"),
        (["--clipset", "mined", "--name", "b", "--cap", "prompt=2"], 2, "'problem', 'source' or 'step'"),
        (["--clipset", "mined", "--name", "b", "--cap", "problem=few"], 2, "valid integer"),
        (["--clipset", "mined", "--name", "b", "--near-dedup", "80"], 2, "less than or equal to 1"),
        (["--clipset", "mined", "--name", "b", "--against", "aime99.jsonl"], 1, "aime99.jsonl: No such file"),
        (["--clipset", "mined", "--name", "b", "--against", "BENCHMARK:text"], 1, "its columns are problem, answer"),
        (["--clipset", "mined", "--name", "b", "--weights", "staleness"], 2, "half_life"),
    ],
)
def test_errors_are_one_line(arguments, code, says, store, benchmark):
    arguments = [a.replace("BENCHMARK", str(benchmark)) for a in arguments]
    assert says in refused(echolab("curate", *arguments, "--store", store), code)


def test_from_rollouts_to_a_curated_set(tmp_path, benchmark):
    """Ingest, score, mine, curate: what stays is part of what was mined, and the store is sound."""
    pytest.importorskip("torch", reason="scoring needs torch")
    pytest.importorskip("transformers", reason="scoring needs transformers")
    from generators import models

    rng, words = random.Random(0), models.WORDS.split()
    prompts = [f"x = {g} so" for g in range(8)] + [BENCHMARK[0]["problem"] + " Let's think step by step."]
    rows = [
        {"prompt": p, "completion": " ".join(rng.choice([*words, "\n", "\n"]) for _ in range(rng.randrange(4, 30))),
         "reward": float(rng.random() < 0.7), "step": g % 2}
        for g, p in enumerate(prompts) for _ in range(4)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    store, model = tmp_path / "store", models.model(tmp_path / "tiny")
    assert echolab("ingest", tmp_path / "rows.jsonl", "--run", "r", "--source", "sums", "--store", store).returncode == 0
    assert echolab("score", "--model", model, "--threads", 1, "--store", store).returncode == 0
    assert echolab("mine", "--name", "all", "--scope", "rollout", "--store", store).returncode == 0
    result = echolab(
        "curate", "--clipset", "all", "--name", "hard", "--against", benchmark, "--dedup", "--near-dedup", 0.9,
        "--drop-cut-off", "--max-repetition", 0.5, "--difficulty-temperature", 2, "--cap", "source=9", "--cap", "step=5",
        "--weights", "staleness", "--half-life", 4, "--validation", 0.3, "--store", store,
    )  # fmt: skip
    assert result.returncode == 0 and re.search(r"contaminated: [1-4] dropped", result.stdout)
    query = "SELECT clip_id, prompt, step, clipset, weight FROM clips"
    clips = json.loads(echolab("sql", query, "--json", "--store", store).stdout)["rows"]
    hard, everything = ([c for c in clips if c["clipset"] == label] for label in ("hard@1", "all@1"))
    assert 0 < len(hard) <= 9 and {c["clip_id"] for c in hard} < {c["clip_id"] for c in everything}
    assert BENCHMARK[0]["problem"] not in "".join(c["prompt"] for c in hard)
    assert all(sum(c["step"] == s for c in hard) <= 5 for s in (0, 1))
    assert len({c["weight"] for c in hard}) > 1
    assert echolab("store", "validate", "--store", store).returncode == 0
