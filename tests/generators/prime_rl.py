"""prime-rl's dumps: src/prime_rl/monitors/file.py and trainer/rl/token_export.py, verifiers/v1/graph.py, and what they wrote in
v0.6 and v0.7. A token here is a byte of the text; tokens of the chat template are 300 and above."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROLES = {"system": 300, "user": 301, "assistant": 302, "tool": 303}
END, VOCABULARY = 310, 512
Message = dict[str, Any]


def lines(path: Path, rows: list[Any], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as f:
        f.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    return path


def user(content: Any, role: str = "user") -> Message:
    return {"role": role, "content": content}


def ids(text: str) -> list[int]:
    return list(text.encode())


def logprobs(n: int) -> list[float]:
    return [-(i % 7) / 8 for i in range(n)]  # exact as float32


def add_turn(nodes: list[dict[str, Any]], prompt: list[Message], answer: str | Message, advantage: float | None = None) -> int:
    """graph.py `add_turn`: nodes of a prefix that stands already are used again; each new message gets its own tokens,
    and the answer those of the template that open it, which were not sampled."""
    parent = None
    for message in prompt:
        known = (i for i, n in enumerate(nodes) if (n.get("parent"), n["message"]) == (parent, message))
        found = next(known, None)
        if found is None:
            tokens = [ROLES[message["role"]], *ids(str(message["content"])), END]
            node = {"message": message, "sampled": False, "token_ids": tokens, "mask": [False] * len(tokens), "logprobs": []}
            nodes.append(node if parent is None else {"parent": parent, **node})  # exclude_none
            found = len(nodes) - 1
        parent = found
    message = user(answer, "assistant") if isinstance(answer, str) else answer
    sampled = [*ids(message.get("content") or ""), END]
    node = {"message": message, "sampled": True, "token_ids": [ROLES["assistant"], *sampled]}
    node |= {"mask": [False] + [True] * len(sampled), "logprobs": logprobs(len(sampled)), "finish_reason": "stop"}
    if advantage is not None:
        node["advantages"] = [advantage] * len(sampled)
    nodes.append(node if parent is None else {"parent": parent, **node})
    return len(nodes) - 1


def trace(identity: str, nodes: list[dict[str, Any]], reward: float | None = None, **more: Any) -> dict[str, Any]:
    rewards = {} if reward is None else {"correct": {"score": reward, "weight": 1.0}}
    calls = [
        {"node": i, "model": "Qwen3-4B", "sampling": {"temperature": 1.0, "max_tokens": 64}, "finish_reason": "stop"}
        for i, n in enumerate(nodes)
        if n["sampled"]
    ]
    about = {
        "agent": {"name": "agent", "trainable": True},
        "is_completed": True,
        "ok": True,
        "stop_condition": "agent_completed",
    }
    return {
        "id": identity,
        "nodes": nodes,
        "calls": calls,
        "rewards": rewards,
        "metrics": {"turns": 1.0},
        "info": {},
        **about,
        **more,
    }


def single(identity: str, question: str, answer: str, reward: float | None, advantage: float | None = None) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = []
    add_turn(nodes, [user("Think.", "system"), user(question)], answer, advantage)
    return trace(identity, nodes, reward)


def episode(identity: str, group: str, traces: list[dict[str, Any]], step: int = 4, **more: Any) -> dict[str, Any]:
    work = {"type": "train", "step": step, "policy": {"start": step - 1, "end": step}}
    task = {"type": "GSM8K", "data": {"idx": 7, "question": "Q", "answer": "42"}, "key": "gsm8k-7", "hash": "ab"}
    about = {"env": {"id": "gsm8k", "name": "maths"}, "task": task, "group": {"id": group}}
    return {"id": identity, **about, "run": {"type": "train", "id": "r1", "work": work}, "ok": True, "errors": [],
            "traces": traces, **more}  # fmt: skip


def dump(folder: Path, rows: list[Any], step: int = 4, kind: str = "train", subset: str = "all") -> Path:
    """log_episodes: appended."""
    return lines(folder / f"rollouts/step_{step}/{kind}/{subset}/traces.jsonl", rows, "a")


def episodes(rewards: dict[str, list[float]], step: int = 4, advantages: bool = False) -> list[dict[str, Any]]:
    """One-turn rollouts, `group: rewards`. They arrive without advantages, and are shipped with them."""
    rows = []
    for group, values in rewards.items():
        mean = sum(values) / len(values)
        for i, reward in enumerate(values):
            answer = f"{group}.{i}: \\boxed{{{int(reward)}}}"
            t = single(f"t-{step}-{group}-{i}", f"How many {group}?", answer, reward, reward - mean if advantages else None)
            rows.append(episode(f"e-{step}-{group}-{i}", group, [t], step))
    return rows


def branching(identity: str = "tree", advantage: float | None = 0.5) -> dict[str, Any]:
    """A tool call, then the last turn twice: once on from it, once with the history compacted. Two leaves."""
    nodes: list[dict[str, Any]] = []
    asked, called = user("What is 6*7?"), {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "calc"}]}
    add_turn(nodes, [asked], called, advantage)
    add_turn(nodes, [asked, called, {"role": "tool", "tool_call_id": "1", "content": "42"}], "It is 42.", advantage)
    add_turn(nodes, [asked, user("You found 42.")], "So 42.", advantage)
    return trace(identity, nodes, 1.0)


def bare(identity: str, group: str, reward: float, **more: Any) -> dict[str, Any]:
    """v0.7 and v0.8, orchestrator/types.py `Rollout.to_dict`: rewards are plain numbers there."""
    t = {**single(identity, f"How many {group}?", f"{identity} says", reward), "rewards": {"correct": reward, "format": None}}
    about = {"kind": "train", "env_name": "gsm8k", "group_id": group, "policy_version": 3, "filters": {"gibberish": False}}
    return {**t, "task": {"data": {"answer": "42"}}, **about, **more}


def v0(example: int, sample: int, **more: Any) -> dict[str, Any]:
    """v0.6.0, a verifiers v0 rollout: metrics stand once more at the top."""
    prompt, completion = [user("Think.", "system"), user(f"Q{example}")], [user(f"A{example}.{sample}", "assistant")]
    row = {
        "example_id": example,
        "prompt": prompt,
        "completion": completion,
        "answer": str(example),
        "reward": float(sample % 2),
    }
    row |= {
        "timing": {"total_ms": 1.0},
        "is_completed": True,
        "is_truncated": False,
        "stop_condition": "has_final_env_response",
    }
    row |= {"metrics": {"num_turns": 1.0}, "num_turns": 1.0, "env_name": "gsm8k", "advantage": sample % 2 - 0.5}
    return {**row, "group_id": f"g{example}", "is_filtered": False, "filters": {"zero_advantage": False}, **more}


def v0_dump(folder: Path, prompts: int = 2, n: int = 4, step: int = 5, name: str = "train_rollouts.jsonl") -> Path:
    return lines(folder / f"rollouts/step_{step}/{name}", [v0(p, s) for p in range(prompts) for s in range(n)])


def entropies(tokens: list[int]) -> list[float]:
    """Shifted to the token that was produced; before the first one the padding, which is the largest of all."""
    return [math.log(VOCABULARY), *((t % 16) / 8 for t in tokens[1:])]


def export(tokens: list[int], mask: list[bool], step: int = 4, index: int = 0) -> dict[str, Any]:
    n = len(tokens)
    about = {"schema_version": 1, "step": step, "rank": 0, "micro_step": 0, "micro_sequence_idx": index}
    about |= {"export_sequence_idx": index, "env_name": "maths"}
    zeros = ("advantages", "mismatch_kl", "log_importance_ratio", "prob_delta", "rl_weights", "ce_weights")
    lists = {"token_ids": tokens, "position_ids": list(range(n)), "loss_mask": mask, **{name: [0.0] * n for name in zeros}}
    lists |= {"inference_logprobs": [-0.25] * n, "trainer_logprobs": [0.0, *[-0.5] * (n - 1)], "entropy": entropies(tokens)}
    return {**about, **lists, "importance_ratio": [1.0] * n, "is_masked": [False] * n, "ref_kl_weights": [None] * n}


def sequence(t: dict[str, Any], path: list[int]) -> tuple[list[int], list[bool]]:
    """The tokens of a path through a trace, and which of them were sampled."""
    nodes = [t["nodes"][i] for i in path]
    return [x for n in nodes for x in n["token_ids"]], [m for n in nodes for m in n["mask"]]


def token_export(folder: Path, rows: list[dict[str, Any]], step: int = 4, stable: bool = True) -> Path:
    """Of one-turn episodes."""
    traces = [t for row in rows for t in row["traces"]]
    path = folder / f"token_exports/step_{step}/rank_0.jsonl"
    lines(path, [export(*sequence(t, list(range(len(t["nodes"])))), step, i) for i, t in enumerate(traces)])
    if stable:
        (path.parent / "STABLE").touch()
    return path


def fixture(folder: Path) -> list[Path]:
    """Two groups, one of which is degenerate and was not shipped."""
    rewards = {"apples": [1.0, 0.0, 0.0, 1.0], "pears": [0.0, 0.0, 0.0, 0.0]}
    path = dump(folder, episodes(rewards, step=3), step=3)
    shipped = episodes({"apples": rewards["apples"]}, step=3, advantages=True)
    dump(folder, shipped, step=3, subset="effective")
    token_export(folder, shipped, step=3)
    return [path]
