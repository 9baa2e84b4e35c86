"""A tiny policy for the slide mazes, from nothing: `python -m trainer.pretrain --out policy --seed 0`.

What is left out of a language model's pre-training: everything but next-token loss on an expert's traces, of all levels. The
policy that comes out solves most easy mazes by sampling, nearly all in eight tries, and few hard ones: RL has room."""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer import maze

STEPS, BATCH, LEVELS, WARM_UP = 700, 64, (1, 10), 30
MUON_LR, ADAM_LR, DECAY_TO = 0.03, 3e-3, 0.1
PROMPT_TOKENS = maze.WALLS + 4


def new_model(seed: int) -> Any:
    """A Qwen3 of 364,000 parameters with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = maze.tokenizer()
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.1,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    )


def pretrain(seed: int = 0, steps: int = STEPS, say: Callable[[str], Any] = lambda _: None) -> Any:
    """The model after `steps` batches of traces that it has not seen before."""
    rng, tokenizer, model = random.Random(f"pretraining {seed}"), maze.tokenizer(), new_model(seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, steps)) for o in optimizers]
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        loss = _loss(model, *_batch(rng, tokenizer))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, schedule in zip(optimizers, schedules, strict=True):
            o.step()
            o.zero_grad()
            schedule.step()
        if step % 50 == 49:
            say(f"step {step + 1} of {steps}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s")
    return model.eval()


def _rate(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return DECAY_TO + (1 - DECAY_TO) * 0.5 * (1 + math.cos(math.pi * done))


def _batch(rng: random.Random, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids padded to the longest, and labels: prompts and padding are not learnt."""
    mazes = [maze.make(rng.randint(*LEVELS), rng) for _ in range(BATCH)]
    texts = [m.prompt + maze.solve(m, rng) + maze.EOS for m in mazes]
    ids = tokenizer(texts, padding=True, return_tensors="pt")
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    labels[:, :PROMPT_TOKENS] = -100
    return ids["input_ids"], labels


def _loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Right padding needs no attention mask: no token sees what comes after it."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def save(model: Any, folder: Path) -> None:
    """As transformers reads it, with the tokenizer."""
    model.save_pretrained(folder)
    maze.tokenizer().save_pretrained(folder)


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m trainer.pretrain", description=__doc__)
    options.add_argument("--out", type=Path, required=True, help="folder of the policy")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--steps", type=int, default=STEPS)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--half", action="store_true", help="save in 16 bits")
    o = options.parse_args()
    torch.set_num_threads(o.threads)
    model = pretrain(o.seed, o.steps, lambda text: print(text, file=sys.stderr, flush=True))
    save(model.half() if o.half else model, o.out)


if __name__ == "__main__":
    main()
