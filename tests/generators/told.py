"""Stores that have something of everything a report shows: a run over steps, experts, scores, profiles and clips. Tokens are
three bytes each, whatever characters these are of."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa

import echolab
from echolab.schema import TABLES
from echolab.scoring import resegment
from echolab.segment import Segmenter
from echolab.store import Store
from echolab.vocab import Vocab

SCORER, TOKENIZER = "scorer0", "tokenizer0"
SHAPES = {"solved": (1, 1, 1, 1), "lost": (0, 0, 0, 0), "mixed": (1, 0, 1, 0), "lone": (0, 0, 1, 0)}
HOSTILE = {
    "script": "</script><img src=x onerror=alert(1)><!-- <script>window.hacked = true</script>\n\"'&amp;",
    "emoji": "👩‍👩‍👧 naïve 日本語 𝕏 🏳️‍🌈\nzweite Zeile",
    "rtl": "שלום עולם ثم مرحبا\n\u202eabc\u202c (12)",
    "control": "a\tb\rc\x00d\x1b[31me\x7f\u200bf\n\nend\n",
}


def steps(n: int = 12) -> list[dict[str, Any]]:
    """Rollouts of a run in which problem 0 is solved ever since, 1 never, 2 by and by, 3 once."""
    rng, rows = random.Random(3), []
    for step in range(1, n + 1):
        rewards = {
            0: SHAPES["solved"],
            1: SHAPES["lost"],
            2: SHAPES["mixed"] if step < n // 2 else SHAPES["solved"],
            3: SHAPES["lone"] if step == 2 else SHAPES["lost"],
        }
        for problem, group in rewards.items():
            for sample, reward in enumerate(group):
                lines = [f"Step {i}: {rng.randint(10, 99)} and so on." for i in range(rng.randint(2, 6))]
                text = "\n".join([*lines, f"The answer is {7 * problem}."])
                row = {"step": step, "group": f"{step}-{problem}", "problem": f"What is 7 times {problem}?", "sample": sample}
                size = {"n_chars": len(text), "n_completion_tokens": -(-len(text.encode()) // 3)}
                rows.append({**row, **size, "reward": float(reward), "completion": text, "ground_truth": f"{7 * problem}"})
    return rows


def experts() -> list[dict[str, Any]]:
    return [
        {"run": "gold", "role": "expert", "step": None, "group": f"gold-{p}", "problem": f"What is 7 times {p}?",
         "completion": f"Seven times {p}:\nby heart\nThe answer is {7 * p}.", "reward": 1.0, "model": "expert/large"}
        for p in range(3)
    ]  # fmt: skip


def score(store: Store, where: str = "true", id: str = SCORER) -> None:
    """Entropies of these rollouts, by chance, and their segments."""
    with echolab.open(store.root) as lab:
        found = lab.sql(f"SELECT rollout_id, run, step, completion FROM rollouts WHERE {where} ORDER BY rollout_id").rows()
    pieces = {rollout: _cut(text.encode()) for rollout, _, _, text in found}
    vocab = Vocab(TOKENIZER, dict(enumerate(sorted({p for ps in pieces.values() for p in ps}))))
    numbers = {piece: i for i, piece in vocab.pieces.items()}
    rng, rows = random.Random(5), []
    for rollout, run, step, _ in found:
        ids = [numbers[p] for p in pieces[rollout]]
        entropies = [rng.expovariate(1.5) for _ in ids]
        rows.append({"rollout_id": rollout, "scorer": id, "run": run, "step": step, "token_ids": ids, "entropies": entropies,
                     "logprobs": [-rng.expovariate(1.2) for _ in ids], "n_tokens": len(ids),
                     "mean_entropy": sum(entropies) / len(entropies) if ids else None})  # fmt: skip
    vocab.keep(store)
    config = {"kind": "model", "tokenizer": TOKENIZER, "eos": [], "temperature": 1.0, "dtype": "float32", "model": "tiny"}
    with store.lock():
        store.register("scorers", id, "tiny", {**config, "rendering": "auto"}, version=1)
        store.add("scores", pa.Table.from_pylist(rows, schema=TABLES["scores"].arrow))
    resegment(store, id, Segmenter.make())


def _cut(text: bytes, size: int = 3) -> list[bytes]:
    return [text[i : i + size] for i in range(0, len(text), size)]
