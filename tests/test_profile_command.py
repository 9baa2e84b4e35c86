"""`echolab profile` from the command line: on a demo scored by a tiny model, and on genuine expert traces."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="scoring needs torch")
pytest.importorskip("transformers", reason="scoring needs transformers")

from generators import models

import echolab
from echolab.ids import problem_id
from pipelines.cli import main
from pipelines.profile_command import sparkline

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def echo(*args: object) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(sys, "argv", ["echolab", *map(str, args)])
        main()
    return int(e.value.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def dumps(tmp_path_factory) -> Path:
    """Six problems: each with one golden solution of many lines and two short ones of the policy, the second wrong."""
    folder = tmp_path_factory.mktemp("dumps")
    golden = [{"prompt": f"x = {i} so", "completion": "five\n" * (3 + i) + "Therefore 12", "reward": 1} for i in range(6)]
    own = [{"prompt": f"x = {i} so", "completion": f"the sum {j}\nis {i}", "reward": 1 - j} for i in range(6) for j in range(2)]
    for name, rows in (("golden", golden), ("own", own)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "benchmark.jsonl").write_text(json.dumps({"problem": "X = 3 so"}) + "\n" + json.dumps({"problem": "else"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, dumps, model) -> Path:
    path = tmp_path_factory.mktemp("store") / "s"
    with echolab.open(path, create=True) as lab:
        lab.ingest(dumps / "golden.jsonl", run="golden", role="expert")
        lab.ingest(dumps / "own.jsonl", run="own", step=1)
    assert echo("score", "--model", model, "--threads", 1, "--store", path) == 0
    for name, where in (("golden", "role = 'expert'"), ("own", "role = 'policy'")):
        assert echo("profile", "--name", name, "--where", where, "--bins", 12, "--store", path) == 0
    return path


def test_a_profile_is_printed_and_shown_again(store, capsys):
    assert echo("profile", "--name", "own", "--store", store) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("own@1: 12 trajectories of 6 problems, scorer tiny@1, segmenter newline@1\n\nslice")
    first = [line.split("  ")[0] for line in shown.splitlines()[4:] if line][:-2]
    assert first == ["all", "length=short", "length=middle", "outcome=failure", "outcome=success"]  # two lengths, no source
    assert echo("profile", "--name", "own", "--where", "role = 'policy'", "--bins", 12, "--store", store) == 0
    assert capsys.readouterr().out == shown.replace("newline@1\n", "newline@1 (nothing new: as it stands)\n", 1)


def test_json_is_one_document_with_the_numbers_that_the_store_has(store, capsys):
    assert echo("profile", "--name", "golden", "--store", store, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    with echolab.open(store) as lab:
        curve = lab.query("entropy_profile", profile="golden")
        [mean] = lab.sql("SELECT avg(m) FROM (SELECT avg(entropy) AS m FROM segments JOIN rollouts USING (rollout_id)"
            " WHERE role = 'expert' GROUP BY rollout_id)").row(0)  # fmt: skip
    [whole] = [s for s in document["slices"] if s["slice"] == "all"]
    assert whole["curve"] == curve["mean"].to_list() and len(whole["curve"]) == 12
    assert whole["mean"] == pytest.approx(mean, rel=1e-6)
    assert whole["lo"] < whole["mean"] < whole["hi"]
    assert document["facts"]["trajectories"] == whole["n"] == 6
    assert document["config"]["where"] == "role = 'expert'"


def test_the_command_that_a_note_names_gives_the_rest_their_scores(tmp_path, dumps, model, capsys):
    with echolab.open(tmp_path / "s", create=True) as lab:
        lab.ingest(dumps / "own.jsonl", run="own", step=1)
    options = ("--threads", 1, "--temperature", 0.7, "--template", "raw", "--too-long", "truncate", "--max-tokens", 12)
    assert echo("score", "--model", model, *options, "--where", "success", "--store", tmp_path / "s") == 0
    profile = ("profile", "--name", "own", "--where", "run = 'own'", "--json", "--store", tmp_path / "s")
    capsys.readouterr()
    assert echo(*profile) == 0
    [note] = json.loads(capsys.readouterr().out)["notes"]
    said, command = note.split(" and were left out: echolab ")
    assert said == "6 of 12 rollouts lack a score of tiny@1"
    assert echo(*shlex.split(command), "--store", tmp_path / "s") == 0
    capsys.readouterr()
    assert echo(*profile) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["label"], document["notes"], document["facts"]["trajectories"]) == ("own@2", [], 12)


def test_two_profiles_are_compared(store, capsys):
    assert echo("profile", "--compare", "golden", "own@1", "--permutations", 200, "--store", store) == 0
    said = capsys.readouterr().out
    for words in ("golden@1", "own@1", "mean squared difference", "1 - correlation", "paired on 6 problems that both have"):
        assert words in said
    assert echo("profile", "--compare", "golden", "own", "--permutations", 200, "--json", "--store", store) == 0
    document = json.loads(capsys.readouterr().out)
    with echolab.open(store) as lab:
        stored = lab.query("profile_compare", a="golden", b="own")
    np.testing.assert_allclose(document["difference"], stored["difference"], rtol=1e-5, atol=1e-7)
    assert f"{document['paired']['difference']:+.4f} nats" in said
    assert document["distances"]["mse"]["value"] == pytest.approx(np.mean(stored["difference"].to_numpy() ** 2), rel=1e-4)


def test_problems_of_a_benchmark_are_a_warning_with_its_count(store, dumps, capsys):
    file = dumps / "benchmark.jsonl"
    assert echo("profile", "--name", "golden", "--check", file, "--store", store) == 0
    assert f"warning: 1 of 6 problems of golden@1 are among the 2 of {file}" in capsys.readouterr().err
    assert echo("profile", "--name", "golden", "--check", f"{file}:problem", "--store", store, "--json") == 0
    captured = capsys.readouterr()
    [check] = json.loads(captured.out)["checks"].values()
    assert check["shared"] == [problem_id("x = 3 so")]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "which profile? Give --name NAME, or --compare A B"),
        (["--name", "golden", "--compare", "golden", "own"], 2, "--name does nothing beside --compare"),
        (["--compare", "golden", "own", "--bootstrap", "5"], 2, "--bootstrap does nothing beside --compare"),
        (["--name", "golden", "--permutations", "5"], 2, "--permutations does nothing beside --name"),
        (["--name", "golden", "--bins", "5"], 2, "--bins does nothing beside a profile that is only shown"),
        (["--name", "a b", "--where", "true"], 2, "'a b' is no name of a profile"),
        (["--name", "new"], 1, "no profile 'new' in this store; there are: golden@1, own@1; --where SQL makes one"),
        (["--name", "new", "--where", "false"], 1, "no rollout fits the condition: false"),
        (["--name", "new", "--where", "rol = 'expert'"], 1, 'Referenced column "rol" not found'),
        (["--compare", "golden", "new"], 1, "no profile 'new' in this store; there are: golden@1, own@1"),
        (["--compare", "golden", "own", "--permutations", "0"], 2, "at least 1 permutation"),
        (["--name", "golden", "--check", "nowhere.jsonl"], 1, "nowhere.jsonl: No such file or directory"),
        (["--name", "golden", "--check", "FILE:nothing"], 1, "no column nothing; its columns are problem"),
    ],
)
def test_mistakes_are_one_line(store, dumps, options, code, message, capsys):
    options = [o.replace("FILE", str(dumps / "benchmark.jsonl")) for o in options]
    assert echo("profile", *options, "--store", store) == code
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("entropy_profile", {"profile": "new"}, "no profile new in this store; there are: golden@1, own@1"),
        ("entropy_profile", {"slice": "x"}, "profile own@1 has no slice x; there are: all, length=middle, length=short"),
        ("profile_compare", {"a": "golden", "b": "new"}, "no profile new in this store; there are: golden@1, own@1"),
    ],
)
def test_queries_name_what_is_not_there(store, name, params, message):
    with echolab.open(store) as lab, pytest.raises(echolab.EcholabError) as error:
        lab.query(name, **params)
    assert str(error.value).startswith(message)


def test_queries_show_one_profile_or_two_bin_by_bin(store):
    with echolab.open(store) as lab:
        curve = lab.query("entropy_profile", profile="golden@1", axis="absolute")
        newest = lab.query("entropy_profile", slice="outcome=success")
        both = lab.query("profile_compare")
        first, last = lab.sql(
            "SELECT avg(entropy) FILTER (WHERE segment = 0), avg(entropy) FILTER (WHERE segment = 8)"
            " FROM segments JOIN rollouts USING (rollout_id) WHERE role = 'expert'"
        ).row(0)
    assert curve["n"].to_list() == [6, 6, 6, 6, 5, 4, 3, 2, 1]
    assert (curve["mean"][0], curve["mean"][8]) == (pytest.approx(first), pytest.approx(last))
    assert curve["se"].is_null().to_list() == [False] * 8 + [True]
    assert curve["share_of_peaks"].sum() == pytest.approx(1)
    assert (newest["profile"][0], newest["n"][0], newest["position"].to_list()) == (
        "own@1",
        6,
        [(i + 0.5) / 12 for i in range(12)],
    )
    assert both.height == 12 and (both["n_a"][0], both["n_b"][0]) == (6, 12)
    apart = (both["lo_a"] > both["hi_b"]) | (both["lo_b"] > both["hi_a"])
    assert both["apart"].to_list() == apart.to_list()


def test_a_curve_is_drawn_from_its_lowest_to_its_highest():
    assert sparkline([0.0, 1.0, None, 0.5], 0, 1) == "▁█ ▅"
    assert sparkline([2.0, 2.0], 2, 2) == "▁▁"
    assert len(sparkline([0.1] * 48, 0, 1)) == 24


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data not found: real-data test skipped")
def test_expert_traces_and_samples_of_a_policy_on_amc23(tmp_path, model, capsys):
    """Genuine texts under a random model: cohorts, pairs by problem and benchmark hits are those of the files."""
    store = tmp_path / "store"
    with echolab.open(store, create=True) as lab:
        lab.ingest(DATA / "experts" / "sky_t1_reflection02_32b_amc23.jsonl", run="sky", role="expert")
        lab.ingest(DATA / "rollouts" / "reasoning_gym_llama3b_step400_amc23.json", run="amc")
    score = ("score", "--model", model, "--threads", 1, "--too-long", "truncate", "--max-tokens", 256, "--store", store)
    assert echo(*score, "--where", "role = 'expert' OR sample < 1") == 0
    assert echo("profile", "--name", "sky", "--where", "role = 'expert' AND success", "--store", store) == 0
    assert echo("profile", "--name", "amc", "--where", "role = 'policy'", "--bootstrap", 100, "--store", store) == 0
    said = capsys.readouterr().out
    with echolab.open(store) as lab:
        scored = "FROM rollouts WHERE rollout_id IN (SELECT rollout_id FROM scores) AND"
        [golden] = lab.sql(f"SELECT count(*) {scored} role = 'expert' AND success").row(0)
        own, problems = lab.sql(f"SELECT count(*), count(DISTINCT problem_id) {scored} role = 'policy'").row(0)
    assert f"sky@1: {golden} trajectories of {golden} problems" in said and 15 < golden <= 29  # a prompt may be too long
    assert f"amc@1: {own} trajectories of {problems} problems" in said
    assert f"{2000 - own:,} of 2,000 rollouts lack a score of tiny@1 and were left out: echolab score --model" in said
    with echolab.open(store) as lab:
        found = lab.compare_profiles("sky", "amc", permutations=99)
        curve = lab.query("entropy_profile", profile="sky")["mean"].to_numpy()
        rows = lab.sql("SELECT rollout_id, entropy FROM segments JOIN rollouts USING (rollout_id)"
            " WHERE role = 'expert' AND success ORDER BY rollout_id, segment")  # fmt: skip
    # On a grid that is fine enough a bin's mean is that of the step function's points.
    each = [part["entropy"].to_numpy() for part in rows.partition_by("rollout_id")]
    points = (np.arange(48 * 500) + 0.5) / (48 * 500)
    steps = [e[(points * len(e)).astype(int)].reshape(48, 500).mean(axis=1) for e in each]
    np.testing.assert_allclose(curve, np.mean(steps, axis=0), atol=2e-3)
    assert found.paired is not None and found.paired.problems == golden
    capsys.readouterr()
    for file, hits in (("qwen25math_amc23_test", golden), ("qwen25math_aime24_test", 0)):
        path = DATA / "benchmarks" / f"{file}.jsonl"
        assert echo("profile", "--name", "sky", "--check", f"{path}:question", "--store", store) == 0
        assert f"{hits} of {golden} problems of sky@1 are among" in capsys.readouterr().err
