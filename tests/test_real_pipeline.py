"""AMC23 rollouts of two steps and expert traces, from the dumps to every export, through the command; with the real tokenizer
and a tiny random model, on a part of the rollouts."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="scoring needs torch")
transformers = pytest.importorskip("transformers", reason="scoring needs transformers")
pytest.importorskip("math_verify", reason="verifier math needs math-verify")

from generators import models  # noqa: E402

from echolab.export.config import TARGETS  # noqa: E402
from pipelines.cli import main  # noqa: E402

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TOKENIZER, BENCHMARKS = DATA / "tokenizers" / "qwen2.5", DATA / "benchmarks"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data not found: real-data test skipped")

# Successes of the first samples, and short golden solutions: seconds of scoring.
PART = "(role = 'policy' AND success AND sample < 4 AND n_chars < 900) OR (role = 'expert' AND success AND n_chars < 1500)"


@pytest.fixture
def echolab(tmp_path, monkeypatch):
    def run(*words: object) -> str:
        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors), pytest.raises(SystemExit) as e:
            monkeypatch.setattr(sys, "argv", ["echolab", *map(str, words)])
            main()
        assert (e.value.code or 0) == 0, errors.getvalue()
        return out.getvalue()

    monkeypatch.setenv("ECHOLAB_STORE", str(tmp_path / "store"))
    return run


def test_from_dumps_and_expert_traces_to_every_export(echolab, tmp_path):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    sizes = {"max_position_embeddings": 2048, "eos_token_id": tokenizer.eos_token_id, "hidden_size": 32}
    model = models.model(tmp_path / "tiny", "qwen2", scale=8.0, vocab_size=151_936, **sizes)
    for step in (400, 800):
        echolab("ingest", DATA / "rollouts" / f"reasoning_gym_llama3b_step{step}_amc23.json", "--run", "amc")
    echolab("ingest", DATA / "experts" / "qwen25_14b_instruct_amc23.jsonl", "--run", "golden", "--role", "expert")
    said = json.loads(echolab("verify", "--verifier", "math", "--where", "sample < 4 OR role = 'expert'", "--json"))
    assert said["statuses"]["timeout"] == 0 and said["right"] > 40
    scored = json.loads(echolab("score", "--model", model, "--tokenizer", TOKENIZER, "--where", PART, "--json"))
    assert scored["rows"] > 20 and not scored["failed"]

    profile = json.loads(
        echolab("profile", "--name", "golden", "--where", "role = 'expert' AND success AND n_chars < 1500", "--json")
    )
    assert profile["facts"]["trajectories"] >= 3
    mined = json.loads(echolab("mine", "--name", "amc", "--verifier", "math", "--where", PART.partition(" OR ")[0], "--json"))
    clips = mined["statistics"]["n_clips"]
    assert clips == mined["facts"]["outcomes"]["clip"] > 5

    echolab("curate", "--clipset", "amc", "--name", "none", "--against", BENCHMARKS / "qwen25math_amc23_test.jsonl")
    left = json.loads(echolab("sql", "SELECT count(*) AS n FROM clips WHERE clipset = 'none@1'", "--json"))["rows"]
    assert left == [{"n": 0}]  # every problem is of AMC23
    aime = BENCHMARKS / "qwen25math_aime24_test.jsonl"
    echolab("curate", "--clipset", "amc", "--name", "ready", "--against", aime, "--dedup", "--validation", "0.2")

    for target, module in TARGETS.items():
        what = module.TAKES[0]
        chosen = ("--clipset", "ready") if what == "clips" else ("--what", what, "--where", "success_rate BETWEEN 0.1 AND 0.9")
        folder = tmp_path / target
        echolab("export", "--to", target, *chosen, "--out", folder, "--source", "amc23")
        assert echolab("export", "--verify", folder).endswith("is sound: files, counts and clips\n")
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["files"] and all(f["sha256"] for f in provenance["files"])
    assert json.loads(echolab("store", "validate", "--json"))["problems"] == []
