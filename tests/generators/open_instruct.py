"""open-instruct's shards and metadata, as open_instruct/rl_utils.py writes them. Groups of equal rewards are gone already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN = "grpo_math__1__1755700000"


def request_info(calls: int = 0) -> dict[str, Any]:
    said = {"tool_errors": "", "tool_outputs": "4" * calls, "tool_runtimes": 0.5 * calls, "tool_calleds": calls > 0}
    return {"num_calls": calls, "timeouts": 0, **said, "tool_call_stats": [], "rollout_state": {}}


def batch(step: int = 5, prompts: int = 2, n: int = 4) -> list[dict[str, Any]]:
    """`sample_idx` goes on from prompt to prompt; the reward of a right answer is 10."""
    rows = []
    for i in range(prompts * n):
        response = [7, 8 + i, 2]
        row = {"step": step, "sample_idx": i, "prompt_idx": i // n, "prompt_tokens": [1, 100 + i // n, 3]}
        row |= {"response_tokens": response, "reward": 10.0 * (i % 2), "advantage": 1.0 if i % 2 else -1.0}
        row |= {"finish_reason": "stop" if i else "length", "dataset": "math", "ground_truth": str(i // n)}
        rows.append(row | {"request_info": request_info(i % 2), "logprobs": [-0.25] * len(response)})
    return rows


def shard(folder: Path, rows: list[dict[str, Any]] | None = None, run: str = RUN, number: int = 0) -> Path:
    path = folder / f"{run}_rollouts_{number:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in (batch() if rows is None else rows))
    return path


def metadata(folder: Path, run: str = RUN, model: str = "allenai/Olmo-3-7B") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run}_metadata.jsonl"
    said = {"run_name": run, "git_commit": "e6c3044", "model_name": model, "timestamp": "2026-08-20T10:00:00+00:00"}
    path.write_text(json.dumps(said) + "\n")
    return path


def fixture(folder: Path) -> list[Path]:
    metadata(folder / "rollouts")
    return [shard(folder / "rollouts", batch(5)), shard(folder / "rollouts", batch(6), number=1)]
