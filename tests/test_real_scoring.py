"""Real prompts with a real tokenizer through the command, against float64 logits of the model that transformers loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="scoring needs torch")
transformers = pytest.importorskip("transformers", reason="scoring needs transformers")

from generators import models  # noqa: E402

import echolab  # noqa: E402
from pipelines.cli import main  # noqa: E402

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
DUMP, TOKENIZER = DATA / "rollouts/qwen25math_rm_maj_example_math_100x8.jsonl", DATA / "tokenizers/qwen2.5"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data not found: real-data test skipped")

SHORTEST = "group_id IN (SELECT group_id FROM rollouts GROUP BY group_id ORDER BY sum(n_chars), group_id LIMIT 8)"
EXACT = 4  # rollouts whose numbers are computed again


def echo(monkeypatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["echolab", *map(str, args)])
    with pytest.raises(SystemExit) as e:
        main()
    return int(e.value.code or 0)


def reference(model, prompt: list[int], completion: list[int]):
    """All logits at once, in float64."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1), logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_eight_real_prompts_of_eight_rollouts_are_scored_as_the_models_own_logits_say(tmp_path, monkeypatch, capsys):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    sizes = {"max_position_embeddings": 2048, "eos_token_id": tokenizer.eos_token_id}
    folder = models.model(tmp_path / "tiny", "qwen2", scale=8.0, vocab_size=151_936, **sizes)
    store = tmp_path / "store"
    assert echo(monkeypatch, "ingest", DUMP, "--run", "math", "--store", store) == 0
    score = ("score", "--model", folder, "--tokenizer", TOKENIZER, "--where", SHORTEST, "--store", store)
    capsys.readouterr()
    assert echo(monkeypatch, *score) == 0
    assert "64 rollouts scored" in capsys.readouterr().out

    raw = sorted(map(json.loads, DUMP.read_text().splitlines()), key=lambda r: sum(map(len, r["code"])))[:8]
    texts = {(row["question"], i): code for row in raw for i, code in enumerate(row["code"])}
    with echolab.open(store) as lab:
        found = lab.sql(
            """SELECT prompt, sample, token_ids, s.entropies, s.logprobs, segment_ends FROM scores s
            JOIN rollouts USING (rollout_id) JOIN segmentations USING (rollout_id)"""
        ).rows()
        words = lab.query("top_entropy_tokens", min_count=1, top=5)["text"]
    assert {(prompt, sample) for prompt, sample, *_ in found} == set(texts) and len(found) == 64
    for prompt, sample, tokens, _, _, ends in found:
        assert tokens == tokenizer(texts[prompt, sample])["input_ids"]
        assert len(ends) == sum(1 for line in texts[prompt, sample].split("\n") if line.strip())
        assert ends[-1] == len(tokens)
    assert all(w for w in words)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    means = []
    for prompt, _, tokens, entropies, logprobs, _ in sorted(found, key=lambda r: len(r[2]))[:EXACT]:
        exact, of_tokens = reference(model, tokenizer(prompt)["input_ids"], tokens)
        assert torch.allclose(torch.tensor(entropies).double(), exact, rtol=0, atol=1e-5)
        assert torch.allclose(torch.tensor(logprobs).double(), of_tokens, rtol=0, atol=1e-5)
        means.append(float(exact.mean()))
    assert 5 < min(means) < max(means) < 11.5, means  # a flat distribution has 11.9
