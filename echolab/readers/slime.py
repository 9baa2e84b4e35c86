"""slime's rollout dumps: `--save-debug-rollout-data`, or `rollout_data/{rollout_id}.pt` below `--dump-details`.

Beside the latter stands `train_data/{rollout_id}.pt` with what training made of the same samples: advantages, log-probs
and, with `--use-rollout-entropy`, entropies. It is read along with the rollouts, and never on its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echolab.errors import Unreadable
from echolab.readers.base import HEAD_BYTES, Bad, Head, Row, Scores, Source, hash_whole, integer, number, text
from echolab.readers.tensors import (
    NO_ROW,
    constant,
    entropies,
    floats,
    jsonable,
    load_torch,
    mask,
    pickle_names,
    raw,
    said,
    token_ids,
)

NAME = "slime"
VERSION = 1
CONTINUES = False

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before it wrote zip files
_FINISH = {"completed": "stop", "truncated": "length"}
_REWARD_KEYS = ("score", "reward", "total", "acc", "accuracy", "correct")  # of a dict, in this order
_FEW = 64  # a longer list in a sample is one of numbers for each token
_COLUMNS = frozenset(
    {"group_index", "prompt", "tokens", "response", "response_length", "label", "reward", "loss_mask", "rollout_log_probs",
     "status"}
)  # fmt: skip


def sniff(head: Head) -> str | None:
    if head.schema is not None or _kind(head.path, head.start) != "rollout":
        return None
    return "it holds a rollout_id and samples with tokens"


def _kind(path: Path, start: bytes) -> str | None:
    """rollout, train, or shard (of train data, version 1), by the first names in the pickle."""
    import zipfile  # not at every start of the program

    try:
        if start.startswith(_LEGACY):
            names = pickle_names(start, skip=3)  # a magic number, a version, and facts of the system
        elif start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                entry = next(e for e in archive.infolist() if e.filename.endswith("/data.pkl"))
                if entry.compress_type != zipfile.ZIP_STORED:  # torch does not compress
                    return None
                with archive.open(entry) as f:
                    names = pickle_names(f.read(1 << 20))
        else:
            return None
    except Exception:  # whatever a foreign file does to zipfile, it is none of slime's
        return None
    if "rollout_id" not in names:
        return None
    if {"rank", "rollout_data"} <= set(names[:8]):
        return "shard"
    if "samples" not in names:
        return None
    if "format_version" in names[:4]:
        return "train"
    return "rollout" if "tokens" in names or len(names) == 2 else None


def companions(path: Path) -> list[Path]:
    """The train data of a rollout file below `--dump-details`: one file, or shards of version 1."""
    if path.parent.name != "rollout_data" or path.suffix != ".pt":
        return []
    one = path.parent.with_name("train_data") / path.name
    if one.is_file():
        return [one]
    shards = re.compile(re.escape(path.stem) + r"_\d+\.pt")
    return sorted(f for f in one.parent.glob("*.pt") if shards.fullmatch(f.name))


def aside(path: Path) -> str | None:
    if path.suffix != ".pt":
        return None
    try:
        with path.open("rb") as f:
            kind = _kind(path, f.read(HEAD_BYTES))
    except OSError:  # said when it is read
        return None
    if kind == "shard":
        return "slime train data in shards of version 1: which rollouts they belong to is unknown"
    if kind != "train":
        return None
    if path.parent.name == "train_data" and (path.parent.with_name("rollout_data") / path.name).is_file():
        return "slime train data: read with its rollouts"
    return "slime train data whose rollouts are not in rollout_data beside it: nothing to read on its own"


@dataclass
class _Reading:
    """One rollout file: what its rows share, and what there is to say of them at the end."""

    split: str
    step: int | None
    train: dict[int, dict[str, Any]] = field(default_factory=dict)  # by position among the rollouts
    joined: int = 0
    reward_keys: Counter[str | None] = field(default_factory=Counter)
    left_out: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)  # of the train data
    rounded: int = 0


def read(source: Source) -> Iterator[Row | Bad]:
    hash_whole(source)
    payload = load_torch(source.path, source.options.allow_pickle, "slime dumps")
    samples = payload.get("samples") if isinstance(payload, dict) else None
    if not isinstance(samples, list) or "format_version" in payload:
        raise Unreadable(f"{source.path}: no rollout dump of slime: it needs a rollout_id and a list of samples")
    try:
        step = integer(payload.get("rollout_id"), "rollout_id")
    except ValueError as e:
        raise Unreadable(f"{source.path}: {e}") from None
    reading = _Reading("eval" if source.path.name.startswith("eval_") else "train", step)
    reading.train = _train(source)
    numbers = _numbers(samples)
    for i, sample in enumerate(samples):
        source.rows += 1
        samples[i] = None  # let go as we read on
        try:
            yield _rollout(reading, i, sample, *numbers[i])
        except NO_ROW as e:
            yield Bad(i, said(e), raw(sample))
    _say(source, reading)


def _train(source: Source) -> dict[int, dict[str, Any]]:
    """The samples of the train data beside the rollouts, by their positions there."""
    found = companions(source.path)
    if not found:
        return {}
    try:
        if found[0].stem != source.path.stem:
            raise Unreadable("in shards of version 1, and which rollouts they belong to is unknown")
        payload = load_torch(found[0], source.options.allow_pickle, "slime dumps")
        if not isinstance(payload, dict) or payload.get("format_version") != 2 or not isinstance(payload.get("samples"), list):
            raise Unreadable("not of format_version 2, and which rollouts its samples belong to is unknown")
        return {int(s["rollout_position"]): s for s in payload["samples"]}
    except Unreadable as e:
        why = str(e).removeprefix(f"{found[0]}: ")
    except (KeyError, TypeError, ValueError, IndexError):
        why = "its samples have no rollout_position"
    source.notes.append(f"train_data/{found[0].name} is not joined: {why}")
    return {}


def _numbers(samples: list[Any]) -> list[tuple[int | None, int | None]]:
    """Of each row the number of its sample within the group, and the number of its part where one rollout became several
    rows: these share a rollout_id, or else the index. Both count through the run, not through the group."""
    ids = [s.get("rollout_id") for s in samples if isinstance(s, dict)]
    name = "rollout_id" if None not in ids and len(set(map(repr, ids))) > 1 else "index"
    keys: list[tuple[str, str] | None] = []
    for s in samples:
        known = isinstance(s, dict) and s.get("group_index") is not None and s.get(name) is not None
        keys.append((repr(s["group_index"]), repr(s[name])) if known else None)
    rows = Counter(keys)
    places: dict[tuple[str, str], int] = {}
    per_group, parts = Counter[str](), Counter[tuple[str, str]]()
    numbers: list[tuple[int | None, int | None]] = []
    for key in keys:
        if key is None:
            numbers.append((None, None))
            continue
        if key not in places:
            places[key] = per_group[key[0]]
            per_group[key[0]] += 1
        numbers.append((places[key], parts[key] if rows[key] > 1 else None))
        parts[key] += 1
    return numbers


def _rollout(reading: _Reading, row: int, value: Any, sample: int | None, part: int | None) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"expected a sample as a dict, got {type(value).__name__}")
    completion, prompt = value.get("response"), value.get("prompt")
    if not isinstance(completion, str | None):
        raise ValueError(f"response is not a text: {type(completion).__name__}")
    if not isinstance(prompt, str | list | None):
        raise ValueError(f"prompt is neither a text nor messages: {type(prompt).__name__}")
    extra = _extra(reading, value)
    status = text(jsonable(value.get("status")))
    reward, rewards = _reward(reading, value.get("reward"), extra)
    fields = {
        "prompt": prompt or None if isinstance(prompt, str) else None,
        "messages": jsonable(prompt) if isinstance(prompt, list) else None,
        "prompt_format": "chat" if isinstance(prompt, list) else "unknown",
        "completion": completion,
        **_tokens(value),
        "reward": reward,
        "rewards": rewards,
        "finish_reason": _FINISH.get(status or "", status),
        "ground_truth": text(jsonable(value.get("label"))) or None,
        "policy_version": _version(value.get("weight_versions")),
        "sample": sample,
        "part": part,
        "step": reading.step,
        "split": reading.split,
        "extra": extra,
    }
    group = integer(value.get("group_index"), "group_index")
    result = Row(row, fields, None if group is None else (group,))
    if row in reading.train:
        _join(reading, result, reading.train.pop(row))
    return result


def _tokens(value: dict[str, Any]) -> dict[str, Any]:
    """`tokens` is prompt and response; masks and log-probs are of the response alone. Aborted samples may have none."""
    tokens = token_ids(value["tokens"], "tokens") if value.get("tokens") is not None else []
    if not tokens:
        return {}
    n = integer(value.get("response_length"), "response_length")
    if n is None or not 0 <= n <= len(tokens):
        raise ValueError(f"response_length is {n}, of {len(tokens)} tokens")
    begin = len(tokens) - n
    given, logprobs = value.get("loss_mask"), value.get("rollout_log_probs")
    return {
        "prompt_ids": tokens[:begin] or None,
        "completion_ids": tokens[begin:],
        "loss_mask": mask(given, "loss_mask") if given is not None else None,
        "logprobs": floats(logprobs, "rollout_log_probs") if logprobs is not None else None,
    }


def _reward(reading: _Reading, value: Any, extra: dict[str, Any]) -> tuple[float | None, dict[str, float] | None]:
    """The total and the rewards by name. Which of several is the total (`--reward-key`) the dump does not say."""
    if not isinstance(value, dict):
        return number(_scalar(value), "reward"), None
    found = {str(name): _scalar(v) for name, v in value.items()}
    numbers = {name: number(v, name) for name, v in found.items() if isinstance(v, int | float)}
    rewards = {name: r for name, r in numbers.items() if r is not None and r == r}
    if others := {name: v for name, v in found.items() if name not in rewards and v is not None}:
        extra["reward"] = jsonable(others)
    names = list(rewards) if len(rewards) == 1 else [name for name in _REWARD_KEYS if name in rewards]
    reading.reward_keys[names[0] if names else None] += 1
    return (rewards[names[0]] if names else None), rewards or None


def _scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def _version(value: Any) -> str | None:
    """The version that the last tokens were sampled with, where it changed on the way."""
    if isinstance(value, list):
        value = value[-1] if value else None
    return text(jsonable(value))


def _extra(reading: _Reading, value: dict[str, Any]) -> dict[str, Any]:
    """What has no column and says something. Numbers for each token stay out, and it is said."""
    extra = {}
    for name, v in value.items():
        if name in _COLUMNS or v is None or v is False:
            continue
        if hasattr(v, "tolist") or (isinstance(v, list) and len(v) > _FEW):
            reading.left_out.add(str(name))
            continue
        v = jsonable(v)
        if v in ("", [], {}) or (isinstance(v, dict) and not any(v.values())):
            continue
        if name != "weight_versions" or (isinstance(v, list) and len(set(map(str, v))) > 1):
            extra[str(name)] = v
    return extra


def _join(reading: _Reading, row: Row, train: dict[str, Any]) -> None:
    """What training made of a rollout: its advantage, and the entropies of the distributions that it was sampled from."""
    f = row.fields
    completion = f.get("completion_ids") or []
    try:
        if token_ids(train.get("tokens"), "tokens") != [*(f.get("prompt_ids") or ()), *completion]:
            raise ValueError("its tokens are not those of the rollout")
        numbers = {n: floats(train[n], n) for n in ("advantages", "entropy", "log_probs") if train.get(n) is not None}
        for name, values in numbers.items():
            if len(values) != len(completion):
                raise ValueError(f"{len(values)} {name} for {len(completion)} tokens")
        scores = Scores(entropies(numbers["entropy"]), numbers.get("log_probs")) if "entropy" in numbers else None
    except ValueError as e:
        reading.problems.append(str(e))
        return
    row.scores = scores
    reading.joined += 1
    reading.rounded += scores is not None and min(numbers["entropy"], default=0.0) < 0
    if "advantages" in numbers:
        f["advantage"] = constant(numbers["advantages"], f.get("loss_mask"))
        if f["advantage"] is None and completion:
            f["extra"]["advantages"] = numbers["advantages"]


def _say(source: Source, reading: _Reading) -> None:
    notes = source.notes
    if reading.joined:
        notes.append(f"train_data is joined: {reading.joined} of {source.rows} rollouts")
    if reading.problems:
        notes.append(f"{len(reading.problems)} samples of train_data are not joined, the first because: {reading.problems[0]}")
    if reading.train:
        notes.append(f"{len(reading.train)} samples of train_data have no rollout here")
    if reading.rounded:
        notes.append(f"entropies that rounding made negative are read as 0, in {reading.rounded} rollouts")
    for key, n in reading.reward_keys.items():
        where = f"taken from {key!r}" if key else "unknown, as nothing says which of its numbers is the total"
        notes.append(f"the reward of {n} rollouts is a dict: their total is {where}; all its numbers are in rewards")
    if reading.left_out:
        notes.append(f"left out, as no column holds them: {', '.join(sorted(reading.left_out))}")
