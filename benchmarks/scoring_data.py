"""The whole of ../shared/data scored once from the command line: how long it takes on this machine.

    python benchmarks/scoring_data.py

The model is a tiny random one with the real tokenizer and its real vocabulary, so that the head does all of its work.
Writes benchmarks/results/scoring_data.md as it came out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import RESULTS, machine, table

import echolab

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ECHOLAB = Path(sys.executable).with_name("echolab")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--hidden", type=int, default=64)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--where", default="true", help="a part of the data, for a trial")
    o = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, model = Path(folder, "store"), Path(folder, "model")
        with echolab.open(store, create=True) as lab:
            lab.ingest(DATA / "rollouts", run="amc")
            lab.ingest(DATA / "experts", run="experts", role="expert")
            lab.ingest(DATA / "dumps" / "trl", run="trl")
        _model(model, o.hidden, o.layers)
        command = [ECHOLAB, "score", "--model", model, "--tokenizer", DATA / "tokenizers" / "qwen2.5", "--dtype", o.dtype]
        command += [
            "--backend",
            "process",
            "--workers",
            o.workers,
            "--threads",
            1,
            "--where",
            o.where,
            "--store",
            store,
            "--json",
        ]
        started = time.perf_counter()
        done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=True)
        wall = time.perf_counter() - started
        said = json.loads(done.stdout)
        with echolab.open(store) as lab:
            scored = lab.sql("SELECT count(*) AS n, sum(len(token_ids))::BIGINT AS tokens FROM scores").row(0, named=True)
            prompts = lab.sql("SELECT run, count(*) AS n FROM rollouts GROUP BY run ORDER BY run").rows()
            sound = lab.validate() == []
            entropy = lab.query("entropy_by_step").head(3)
    rows = [
        ["rollouts stored", sum(n for _, n in prompts)],
        ["rollouts scored", scored["n"]],
        ["completion tokens", scored["tokens"]],
        ["wall s, start of the command to its end", wall],
        ["completion tokens a second", scored["tokens"] / wall],
    ]
    text = (
        f"# Scoring: all of the real data\n\n{machine(('torch', 'transformers'))}, {o.workers} workers of one thread."
        " Made by `python benchmarks/scoring_data.py`.\n\n"
        f"A random Qwen2, {o.layers} layers of width {o.hidden}, vocabulary 151,936, {o.dtype}; prompts are read, but only"
        f" completion tokens are scored and counted. The store is sound afterwards: {'yes' if sound else 'NO'}."
        f" Not scored: {said['skipped'] or 'none'}; failed: {said['failed'] or 'none'}.\n\n{table(['', ''], rows)}"
    )
    (RESULTS / "scoring_data.md").write_text(text)
    print(text, entropy, sep="\n")


def _model(folder: Path, hidden: int, layers: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=40_960, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
