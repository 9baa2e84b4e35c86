"""SkyRL's dumps: evaluations as JSONL, `dumped_evals/global_step_{N}_evals/{data_source}.jsonl`, and training batches as
pickles, `dumped_data/global_step_{N}_training_input.pkl`.

A training batch holds no rewards and no group ids: its groups are its prompts, and there is only the advantage. A pickle
can run code, so that it is read with --allow-pickle only. SkyRL itself is not needed for it."""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echolab.errors import Unreadable
from echolab.readers.base import Bad, Head, Row, Source, hash_whole, is_compressed, number, rows_of_lines, text
from echolab.readers.tensors import NO_ROW, constant, floats, import_torch, mask, pickle_names, raw, said, token_ids

NAME = "skyrl"
VERSION = 1
CONTINUES = True  # pickles say found["whole"]

_EVAL = frozenset({"input_prompt", "output_response", "score", "stop_reason", "data_source"})
_EVALS = re.compile(r"global_step_\d+_evals")
_BATCH = re.compile(r"global_step_\d+_training_input\.pkl")
_TRAJECTORY = re.compile(r"(.+)_([0-9]{1,9})", re.DOTALL)  # {instance_id}_{repetition_id}
_PER_TOKEN = ("response_mask", "loss_mask", "rollout_logprobs", "action_log_probs", "advantages", "rewards")


def sniff(head: Head) -> str | None:
    if head.schema is not None:
        return None
    if {"input_prompt", "output_response", "score"} <= head.keys:
        return "its rows have input_prompt, output_response and score"
    if head.start[:1] != b"\x80" or is_compressed(head.path):
        return None
    names = pickle_names(head.start)
    if "TrainingInputBatch" in names or (_BATCH.fullmatch(head.path.name) and "sequences" in names):
        return "it is a pickled training batch"
    return None


def aside(path: Path) -> str | None:
    if path.name == "aggregated_results.jsonl" and _EVALS.fullmatch(path.parent.name):
        return "SkyRL's means of the evaluations beside it: not rollouts"
    return None


def read(source: Source) -> Iterator[Row | Bad]:
    with source.path.open("rb") as f:
        pickled = f.read(1) == b"\x80"
    return _batch(source) if pickled else rows_of_lines(source, _evaluated)


def _evaluated(row: int, value: dict[str, Any]) -> list[Row | Bad]:
    prompt, completion, score = value.get("input_prompt"), value.get("output_response"), value.get("score")
    for name, v in (("input_prompt", prompt), ("output_response", completion)):
        if not isinstance(v, str):
            raise ValueError(f"{name} is missing" if v is None else f"{name} is not a text: {type(v).__name__}")
    extra = {k: v for k, v in value.items() if k not in _EVAL and v is not None}
    if isinstance(score, list | str):
        extra["score"] = score
    spec = extra["env_extras"].get("reward_spec") if isinstance(extra.get("env_extras"), dict) else None
    fields = {
        "source": text(value.get("data_source")) or None,
        "prompt": prompt,
        "prompt_format": "rendered",
        "completion": completion,
        "reward": _total(score),
        "finish_reason": text(value.get("stop_reason")) or None,
        "ground_truth": (text(spec.get("ground_truth")) or None) if isinstance(spec, dict) else None,
        "split": "eval",
        "extra": extra,
    }
    return [Row(row, fields)]


def _total(score: Any) -> float | None:
    """A score, or rewards of tokens, which SkyRL adds up."""
    if not isinstance(score, list):
        return number(score, "score")
    rewards = [number(s, "score") for s in score]
    if not rewards or None in rewards:
        return None
    return math.fsum(r for r in rewards if r is not None)


def _batch(source: Source) -> Iterator[Row | Bad]:
    source.found["whole"] = True
    if not source.options.allow_pickle:
        raise Unreadable(f"{source.path}: reading a pickle can run code in it: if you trust the file, give --allow-pickle")
    hash_whole(source)
    batch, metadata = _load(source.path)
    n = len(batch["sequences"])
    padding = metadata.get("pad_size")
    padding = padding if isinstance(padding, int) and 0 < padding < n else 0
    if padding:
        source.notes.append(f"{padding} rows are no rollouts: copies that fill the batch up (pad_size)")
    places = _places(metadata, n - padding)
    for i in range(n - padding):
        source.rows += 1
        try:
            yield _rollout(batch, i, *places[i])
        except NO_ROW as e:
            yield Bad(i, said(e), raw({name: tensor[i] for name, tensor in batch.items()}))
    if "rewards" not in batch:
        source.notes.append("SkyRL's training batches hold advantages but no rewards")
    if "rollout_logprobs" not in batch and "action_log_probs" in batch:
        source.notes.append("logprobs are those that training computed (action_log_probs): the batch has none from sampling")


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The batch's tensors by name, all with as many rows as `sequences`, and its metadata."""
    import_torch("SkyRL's training batches")
    try:
        with path.open("rb") as f:
            value = _Unpickler(f).load()
    except ImportError as e:
        raise Unreadable(f"{path}: its pickle needs classes that are not installed here ({e})") from None
    except Exception as e:  # whatever foreign code, or a damaged file, does
        raise Unreadable(f"{path}: cannot be unpickled ({said(e)})") from None
    if not isinstance(value, dict) or not _is_table(value.get("sequences")):
        raise Unreadable(f"{path}: no training batch of SkyRL: it needs a tensor sequences")
    n = len(value["sequences"])
    batch = {k: v for k, v in value.items() if k in ("sequences", "attention_mask", *_PER_TOKEN) and v is not None}
    if missing := {"attention_mask", "response_mask"} - batch.keys():
        raise Unreadable(f"{path}: no {' and no '.join(sorted(missing))}: where responses begin is unknown")
    if wrong := [k for k, v in batch.items() if not _is_table(v) or len(v) != n]:
        raise Unreadable(f"{path}: {wrong[0]} is no tensor of {n} rows")
    metadata = getattr(value, "metadata", None)
    return batch, metadata if isinstance(metadata, dict) else {}


def _is_table(value: Any) -> bool:
    return hasattr(value, "tolist") and getattr(value, "ndim", 0) == 2


class _Batch(dict):
    """Stands for SkyRL's TensorBatch and its kinds."""

    metadata: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state["batch_dict"].items():
            self[name] = _tensor(value)
        self.metadata = state.get("metadata")


def _rebuild(cls: type[_Batch], state: dict[str, Any]) -> _Batch:
    batch = cls()
    batch.__setstate__(state)
    return batch


def _tensor(value: Any) -> Any:
    """A tensor as TensorBatch packs it: by torch.save, or as the bytes, shape and dtype of an array."""
    import torch

    if isinstance(value, dict) and value.get("format") == "torch":
        value = value["data"]
    if isinstance(value, bytes):
        return torch.load(io.BytesIO(value), weights_only=True)
    if isinstance(value, dict) and "dtype" in value:
        return torch.frombuffer(bytearray(value["data"]), dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
    return None  # None, or a list of images


class _Unpickler(pickle.Unpickler):
    """Knows SkyRL's batch without SkyRL, wherever its module was at the time."""

    def find_class(self, module: str, name: str) -> Any:
        if module.endswith(".training_batch") and name in ("TrainingInputBatch", "TensorBatch", "_rebuild_tensor_batch"):
            return _rebuild if name == "_rebuild_tensor_batch" else _Batch
        return super().find_class(module, name)


def _places(metadata: dict[str, Any], n: int) -> list[tuple[tuple | None, int | None, int | None]]:
    """Of each row the key of its group, and the numbers of sample and part: of step-wise trajectories only, each of whose
    turns is a row. Otherwise the prompt decides, or the uid in a batch that still has it."""
    uids, trajectories = ([str(v) for v in metadata.get(name) or ()] for name in ("uids", "trajectory_ids"))
    if len(trajectories) >= n and all(_TRAJECTORY.fullmatch(t) for t in trajectories[:n]):
        seen: Counter[str] = Counter()
        places: list[tuple[tuple | None, int | None, int | None]] = []
        for t in trajectories[:n]:
            match = _TRAJECTORY.fullmatch(t)
            places.append(((match[1],), int(match[2]), seen[t]) if match else (None, None, None))
            seen[t] += 1
        return places
    return [((uids[i],) if len(uids) >= n else None, None, None) for i in range(n)]


def _rollout(batch: dict[str, Any], row: int, key: tuple | None, sample: int | None, part: int | None) -> Row:
    """Tensors of tokens end with the sequence: those of the response cover its last columns."""
    tokens = token_ids(batch["sequences"][row], "sequences")
    real = mask(batch["attention_mask"][row], "attention_mask")
    response = mask(batch["response_mask"][row], "response_mask")
    if len(real) != len(tokens) or len(response) > len(tokens):
        raise ValueError(f"{len(real)} attention_mask and {len(response)} response_mask for {len(tokens)} sequences")
    sampled = [False] * (len(tokens) - len(response)) + response

    def of_response(name: str) -> list[float] | None:
        values = floats(batch[name][row], name) if name in batch else None
        if values is not None and len(values) != len(response):
            raise ValueError(f"{len(values)} {name} for {len(response)} response_mask")
        return None if values is None else [v for v, r in zip(values, response, strict=True) if r]

    loss_mask, advantages, rewards = (of_response(name) for name in ("loss_mask", "advantages", "rewards"))
    counted = None if loss_mask is None else mask(loss_mask, "loss_mask")
    advantage = None if advantages is None else constant(advantages, counted)
    logprobs = of_response("rollout_logprobs")
    fields = {
        "prompt_ids": [t for t, r, s in zip(tokens, real, sampled, strict=True) if r and not s] or None,
        "completion_ids": [t for t, s in zip(tokens, sampled, strict=True) if s],
        "completion": None,
        "logprobs": of_response("action_log_probs") if logprobs is None else logprobs,
        "loss_mask": counted,
        "reward": math.fsum(rewards) if rewards else None,
        "advantage": advantage,
        "sample": sample,
        "part": part,
        "split": "train",
        "extra": {"advantages": advantages} if advantages and advantage is None else {},
    }
    return Row(row, fields, key)
