"""slime's dumps below `--dump-details`, as observability/rollout_data_utils.py and train_data_utils.py write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tokens_of(group: int, i: int, prompt: int = 5, response: int = 7) -> list[int]:
    return [1000 + group] * prompt + [2000 + 10 * group + i + t for t in range(response + i)]


def sample(group: int, i: int, n: int = 4, **other: Any) -> dict[str, Any]:
    """`Sample.to_dict()`; index counts the samples of the whole run."""
    tokens = tokens_of(group, i)
    length = len(tokens) - 5
    return {
        "group_index": group,
        "index": group * n + i,
        "rollout_id": None,
        "prompt": f"<|im_start|>user\nWhat is {group}+{group}?<|im_end|>\n<|im_start|>assistant\n",
        "tokens": tokens,
        "multimodal_inputs": None,
        "response": f"group {group}, sample {i}: \\boxed{{{2 * group + i % 2}}}",
        "response_length": length,
        "label": str(2 * group),
        "reward": float(1 - i % 2),
        "loss_mask": [0] + [1] * (length - 1),
        "weight_versions": ["3"],
        "rollout_log_probs": [-0.125 * (t + 1) for t in range(length)],
        "remove_sample": False,
        "status": "truncated" if i == n - 1 else "completed",
        "metadata": {"difficulty": "easy"},
        "train_metadata": None,
        "session_id": None,
        "non_generation_time": 0.0,
        "spec_info": {"spec_accept_token_num": 0, "spec_draft_token_num": 0},
        **other,
    }


def samples(groups: int = 2, n: int = 4, **other: Any) -> list[dict[str, Any]]:
    return [sample(g, i, n, **other) for g in range(7, 7 + groups) for i in range(n)]


def save(path: Path, payload: Any, **options: Any) -> Path:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(payload, path, **options)
    return path


def rollouts(path: Path, of: list[dict[str, Any]] | None = None, **options: Any) -> Path:
    """{rollout_id}.pt; evaluations are eval_{rollout_id}.pt."""
    step = int(path.stem.removeprefix("eval_"))
    return save(path, {"rollout_id": step, "samples": samples() if of is None else of}, **options)


def entropy(position: int, t: int) -> float:
    return 0.25 * position + 0.5 * t


def train(path: Path, of: list[dict[str, Any]] | None = None, order: list[int] | None = None, **other: Any) -> Path:
    """Version 2: one row a sample, sorted by its position among the rollouts; tensors in each."""
    import torch

    of = samples() if of is None else of
    rows = []
    for p in range(len(of)) if order is None else order:
        n = of[p]["response_length"]
        rows.append(
            {
                "data_parallel_rank": p % 2,
                "sample_index": of[p]["index"],
                "rollout_position": p,
                "tokens": torch.tensor(of[p]["tokens"]),
                "response_lengths": n,
                "rewards": 0.5 - p % 2,
                "loss_masks": torch.ones(n, dtype=torch.int),
                "log_probs": torch.tensor([-0.5 * (t + 1) for t in range(n)]),
                "advantages": torch.full((n,), 0.5 - p % 2),
                "returns": torch.full((n,), 0.5 - p % 2),
                "entropy": torch.tensor([entropy(p, t) for t in range(n)]),
                **other,
            }
        )
    layout = [{"rank": r, "data_parallel_rank": r, "sample_indices": [], "partition": []} for r in range(2)]
    rewards = [s["reward"] for s in of]
    head = {"format_version": 2, "rollout_id": int(path.stem), "rank": 0}
    return save(path, {**head, "samples": rows, "dp_shards": layout, "raw_reward": rewards})


def shard(path: Path) -> Path:
    """Version 1: {rollout_id}_{rank}.pt, lists of one rank."""
    import torch

    step, rank = map(int, path.stem.split("_"))
    data = {"tokens": [torch.tensor([1, 2])], "sample_indices": [0], "advantages": [torch.zeros(1)]}
    return save(path, {"rollout_id": step, "rank": rank, "rollout_data": data})


def fixture(folder: Path) -> list[Path]:
    train(folder / "details" / "train_data" / "3.pt")
    files = [rollouts(folder / "details" / "rollout_data" / name) for name in ("3.pt", "4.pt")]
    evals = [{**s, "group_index": None} for s in samples()]
    return [*files, rollouts(folder / "details" / "rollout_data" / "eval_3.pt", evals)]
