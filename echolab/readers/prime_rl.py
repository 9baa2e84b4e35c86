"""prime-rl's rollout dumps: `rollouts/step_N/{train,eval}/{all,effective}/traces.jsonl` and its older forms, JSONL.

A line is an episode with the traces of its agents, before August 2026 one bare trace, and in v0.6 one rollout with the
messages of its prompt and completion. A trace is a tree of messages: each path from a root to a leaf is one training
sample, and the paths of one trace are the parts of one rollout. `all` holds every rollout as it arrived, `effective` beside
it those that went to the trainer, with their advantages: these are read along with `all`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from echolab.readers.base import (
    NESTED,
    Bad,
    Head,
    Row,
    Source,
    flag,
    integer,
    number,
    open_bytes,
    parse_json,
    raw_json,
    rows_of_lines,
    scalars,
    text,
    unpacked_name,
)
from echolab.readers.prime_rl_nodes import Node, listed, nodes_of, obj, said, shown, word

NAME = "prime_rl"
VERSION = 1
CONTINUES = True

_FILE = "traces.jsonl"
_LENGTH = re.compile(r"(?:^|_)(?:tokens?|length|long|truncated|seq_len|context)(?:_|$)")  # max_total_tokens, prompt_too_long
_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")
_V0 = frozenset({
    "prompt", "completion", "answer", "reward", "advantage", "group_id", "stop_condition", "env_name", "step", "trajectory",
    "tool_defs", "timing", "policy_version",
})  # fmt: skip


def sniff(head: Head) -> str | None:
    first, keys = head.first, head.keys
    if not isinstance(first, dict):
        return None
    if isinstance(traces := first.get("traces"), list):
        around = sum(isinstance(first.get(name), dict) for name in ("env", "task", "group", "run")) + ("ok" in keys)
        return "its rows are episodes: they have traces" if around > 1 and all(map(_is_trace, traces)) else None
    if _is_trace(first):
        known = {"group_id", "rewards", "is_completed"} & keys
        return "its rows are traces: they have nodes" if known and (first["nodes"] or len(known) > 1) else None
    if {"prompt", "completion"} <= keys and ({"group_id", "is_filtered"} <= keys or {"example_id", "is_completed"} <= keys):
        return "its rows have prompt and completion, and what verifiers says of a rollout"
    return None


def _is_trace(value: Any) -> bool:
    nodes = value.get("nodes") if isinstance(value, dict) else None
    return isinstance(nodes, list) and all(isinstance(n, dict) and "message" in n for n in nodes)


def aside(path: Path) -> str | None:
    """`effective` repeats rollouts of `all`."""
    if _is_dump(path) and path.parent.name == "effective" and _beside(path, "all"):
        return "its rollouts are in the folder `all` beside it, which is read, and takes their advantages from here"
    return None


def companions(path: Path) -> list[Path]:
    return _beside(path, "effective") if _is_dump(path) and path.parent.name == "all" else []


def _is_dump(path: Path) -> bool:
    return unpacked_name(path.name) == _FILE


def _beside(path: Path, folder: str) -> list[Path]:
    there = path.absolute().parent.parent / folder
    return sorted(p for p in there.glob(f"{_FILE}*") if _is_dump(p)) if there.is_dir() else []


def read(source: Source) -> Iterator[Row | Bad]:
    reading = _Reading(_split(source), _shipped(source))
    yield from rows_of_lines(source, partial(_line, reading))
    if reading.untrained:
        names = ", ".join(sorted(reading.untrained))
        source.notes.append(
            f"{sum(reading.untrained.values()):,} traces of agents that are not trained ({names}) are no rollouts:"
            " their rewards are in `extra` of their episode's rollouts"
        )


@dataclass
class _Reading:
    split: str
    shipped: dict[str, dict[int, list[Any]]]  # trace -> node -> its advantages, of the traces that went to the trainer
    untrained: dict[str, int] = field(default_factory=dict)


@dataclass
class _Around:
    """What the traces of one line share: columns, `extra`, and the group's own name."""

    fields: dict[str, Any]
    extra: dict[str, Any]
    group: str | None


def _split(source: Source) -> str:
    """The path says the split, and which of its rollouts the trainer wrote. A continued file keeps them."""
    if "split" not in source.found:
        typed = PurePath(source.typed)
        folders = {*source.path.absolute().parent.parts[-2:], *typed.parent.parts[-2:]}
        evaluation = "eval" in folders or typed.name.startswith("eval_")
        source.found["split"] = "eval" if evaluation else "train"
        source.found["completeness"] = "effective" if "effective" in folders and "all" not in folders else "all"
    return source.found["split"]


def _shipped(source: Source) -> dict[str, dict[int, list[Any]]]:
    """Advantages of the rollouts that `effective`, beside this file, holds. What is wrong with a line there is said when
    that file itself is read."""
    found: dict[str, dict[int, list[Any]]] = {}
    for path in companions(source.path):
        with open_bytes(path) as lines:
            for line in lines:
                try:
                    value = parse_json(line)
                except ValueError:
                    continue
                traces = value.get("traces", [value]) if isinstance(value, dict) else []
                for trace in filter(_is_trace, traces if isinstance(traces, list) else []):
                    if isinstance(trace.get("id"), str):
                        given = ((i, n.get("advantages")) for i, n in enumerate(trace["nodes"]))
                        found[trace["id"]] = {i: _packed(values) for i, values in given if isinstance(values, list)}
    return found


def _packed(values: list[Any]) -> list[Any]:
    """Mostly one value for all tokens of a trace: then it is held once."""
    return values[:1] * len(values) if values.count(values[0] if values else None) == len(values) else values


def _line(reading: _Reading, row: int, value: dict[str, Any]) -> list[Row | Bad]:
    try:
        if "traces" in value:
            return _episode(reading, row, value)
        if "nodes" in value:
            return _bare(reading, row, value)
        if "completion" in value:
            return _v0(reading, row, value)
    except RecursionError:
        raise ValueError(NESTED) from None
    raise ValueError("neither an episode (traces) nor a trace (nodes) nor a rollout (prompt, completion)")


def _episode(reading: _Reading, row: int, value: dict[str, Any]) -> list[Row | Bad]:
    run, env = obj(value.get("run"), "run"), obj(value.get("env"), "env")
    work = obj(run.get("work"), "run.work")
    errors = _errors(value.get("errors"))
    around = _Around(
        {
            "step": integer(work.get("step"), "run.work.step"),
            "split": word(work.get("type"), "run.work.type") or word(run.get("type"), "run.type") or reading.split,
            "source": word(env.get("name"), "env.name") or word(env.get("id"), "env.id"),
            "policy_version": _version(work.get("policy")),
        },
        {"episode": value.get("id"), "env": env.get("id"), "episode_ok": value.get("ok"), "episode_errors": errors},
        word(obj(value.get("group"), "group").get("id"), "group.id"),
    )
    traces = listed(value.get("traces"), "traces")
    rows, others = [], []
    for i, trace in enumerate(traces):
        where = f"trace {i}: " if len(traces) > 1 else ""
        try:
            if not isinstance(trace, dict):
                raise ValueError(f"not an object: {type(trace).__name__}")
            agent = obj(trace.get("agent"), "agent")
            if flag(agent.get("trainable"), "agent.trainable") is False:
                others.append(
                    {"agent": word(agent.get("name"), "agent.name"), "reward": _rewards(trace.get("rewards"))["reward"]}
                )
                continue
            if trace.get("task") is None:
                trace = {**trace, "task": value.get("task")}
            rows += _trace(reading, around, row, i, trace, where)
        except ValueError as e:
            rows.append(Bad(row, f"{where}{e}", raw_json(trace)))
    if not rows:
        raise ValueError(f"the episode has no trace of a trained agent{f' ({errors[-1]})' if errors else ''}")
    for other in others:
        reading.untrained[other["agent"] or "?"] = reading.untrained.get(other["agent"] or "?", 0) + 1
    if others:
        for r in rows:
            if isinstance(r, Row):
                r.fields["extra"]["other_agents"] = others
    return rows


def _bare(reading: _Reading, row: int, trace: dict[str, Any]) -> list[Row | Bad]:
    split = word(trace.get("kind"), "kind") or reading.split
    around = _Around(
        {
            "step": integer(trace.get("eval_step"), "eval_step"),
            "split": split,
            "source": word(trace.get("env_name"), "env_name"),
            "policy_version": text(trace.get("policy_version")),
        },
        {name: trace.get(name) for name in ("filters", "off_policy_steps", "actor")},
        word(trace.get("group_id"), "group_id"),
    )
    return _trace(reading, around, row, 0, trace, "")


def _trace(reading: _Reading, around: _Around, row: int, index: int, trace: dict[str, Any], where: str) -> list[Row | Bad]:
    """The rollout of one trace, or its parts. Only parts need a sample number, by which they are one rollout. The trace's
    id makes it, as its position would change with the file that it is read from."""
    identity = trace["id"] if isinstance(trace.get("id"), str) else f"{row}.{index}"
    shipped = reading.shipped.get(identity)
    nodes = nodes_of(trace.get("nodes"), shipped or {})
    agent = obj(trace.get("agent"), "agent")
    name = word(agent.get("name"), "agent.name")
    shared = _about(around, trace, agent)
    if shipped is not None:
        shared["extra"]["effective"] = True
    key = None if around.group is None else (around.group,) if name is None else (around.group, name)
    paths = _paths(nodes)
    if len(paths) > 1:
        shared["sample"] = _number(identity)
    rows: list[Row | Bad] = []
    for part, path in enumerate(paths):
        numbered = {"part": part} if len(paths) > 1 else {}
        try:
            own = _sampled([nodes[i] for i in path], _calls(trace, path), trace)
        except ValueError as e:
            at = f"{where}part {part}: " if numbered else where
            raw = {"id": trace.get("id"), "part": part, "nodes": [nodes[i].value for i in path]}
            rows.append(Bad(row, f"{at}{e}", raw_json(raw)))
            continue
        extra = {k: v for k, v in {**shared["extra"], **own.pop("extra")}.items() if v is not None}
        rows.append(Row(row, {**shared, **numbered, **own, "extra": extra}, key))
    return rows


def _number(identity: str) -> int:
    """A sample number from an id: 31 bits, so that two of a group's branching rollouts share it once in billions."""
    return int.from_bytes(blake2b(identity.encode(), digest_size=4).digest(), "big") >> 1


def _paths(nodes: list[Node]) -> list[list[int]]:
    """From a root to each leaf, in the order of the leaves."""
    parents = {n.parent for n in nodes}
    paths = []
    for leaf in (i for i in range(len(nodes)) if i not in parents):
        path, at = [], leaf
        while at is not None:
            path.append(at)
            at = nodes[at].parent
        paths.append(path[::-1])
    return paths


def _about(around: _Around, trace: dict[str, Any], agent: dict[str, Any]) -> dict[str, Any]:
    """What all parts of a trace have in common."""
    task = obj(trace.get("task"), "task")
    data: dict[str, Any] = task["data"] if isinstance(task.get("data"), dict) else {}
    said_of_task = {k: v for k, v in {"key": task.get("key"), "hash": task.get("hash")}.items() if v is not None}
    said_of_task |= scalars(data, without=frozenset({"answer"}))
    extra = {
        **around.extra,
        "trace": trace.get("id"),
        "agent": agent.get("name"),
        "ok": trace.get("ok"),
        "is_completed": trace.get("is_completed"),
        "errors": _errors(trace.get("errors")),
        "metrics": trace.get("metrics") or None,
        "info": scalars(trace["info"]) or None if isinstance(trace.get("info"), dict) else None,
        "task": said_of_task or None,
    }
    rewards = _rewards(trace.get("rewards"))
    extra["reward_weights"] = rewards.pop("weights")
    fields = {**around.fields, **rewards, "ground_truth": text(data.get("answer")) or None}
    return {**fields, "extra": extra}


def _rewards(value: Any) -> dict[str, Any]:
    """Scores by name and their weighted sum. A reward without a value was not computed; one whose score is null was no
    number, and then neither is the sum."""
    scores, weights, total = {}, {}, 0.0
    for name, reward in obj(value, "rewards").items():
        if reward is None:
            continue
        entry = reward if isinstance(reward, dict) else {"score": reward}
        score, weight = number(entry.get("score"), f"rewards.{name}"), number(entry.get("weight"), f"the weight of {name}")
        weights[name] = 1.0 if weight is None else weight
        if score is not None and score == score:
            scores[name] = score
            total += score * weights[name]
        else:
            total = float("nan")
    return {
        "reward": total if weights and total == total else None,
        "rewards": scores or None,
        "weights": weights if any(w != 1.0 for w in weights.values()) else None,
    }


def _errors(value: Any) -> list[str] | None:
    """What went wrong, without tracebacks."""
    errors = [f"{e.get('type')}: {e.get('message')}" if isinstance(e, dict) else str(e) for e in listed(value, "errors")]
    return [e[:500] for e in errors] or None


def _version(policy: Any) -> str | None:
    """Weights may change while an episode runs: then the first and the last version."""
    policy = obj(policy, "run.work.policy")
    ends = [word(policy.get(end), f"run.work.policy.{end}") for end in ("start", "end")]
    return "-".join(dict.fromkeys(e for e in ends if e is not None)) or None


def _calls(trace: dict[str, Any], path: list[int]) -> list[dict[str, Any]]:
    """The model calls that made the messages of a path."""
    calls = trace.get("calls")
    known = [c for c in calls if isinstance(c, dict)] if isinstance(calls, list) else []
    return [c for c in known if isinstance(c.get("node"), int) and c["node"] in path]


def _sampled(path: list[Node], calls: list[dict[str, Any]], trace: dict[str, Any]) -> dict[str, Any]:
    """One training sample. What was put before the first sampled token is the prompt, and so is the part of the template that
    opens the answer; all after it is the completion."""
    first = next((i for i, n in enumerate(path) if n.sampled), None)
    if first is None:
        errors = _errors(trace.get("errors"))
        raise ValueError(f"nothing was sampled{f' ({errors[-1]})' if errors else ''}")
    asked, answered = path[:first], path[first:]
    extra: dict[str, Any] = {}
    fields = {
        **_words(asked, answered, extra),
        **_tokens(asked, answered),
        **_end(trace, answered, calls, extra),
        "advantage": _advantage(trace, answered, extra),
        "extra": extra,
    }
    if model := next((c["model"] for c in calls if isinstance(c.get("model"), str)), None):
        fields["model"] = model
    settings = next((c["sampling"] for c in calls if isinstance(c.get("sampling"), dict)), {})
    fields["sampling"] = {k: settings[k] for k in _SAMPLING if settings.get(k) is not None} or None
    if fields["completion"] is None and fields["completion_ids"] is None:
        fields["completion"] = ""  # a tool call and no word
    if any(n.reference_logprobs is not None for n in answered):
        extra["reference_logprobs"] = list(chain.from_iterable(n.compact(n.reference_logprobs) for n in answered))
    return fields


def _words(asked: list[Node], answered: list[Node], extra: dict[str, Any]) -> dict[str, Any]:
    """The completion's text is what the policy said, as a tool or user may name the answer; the whole dialogue is kept in
    `extra`, where it is more."""
    dialogue = [shown(n.message) for n in answered]
    spoken = [s for n in answered if n.sampled for s in said(n.message)]
    silent = "" if any(n.sampled and n.message.get("content") == "" for n in answered) else None
    completion = "\n\n".join(spoken) if spoken else silent
    if dialogue != [{"role": "assistant", "content": completion}]:
        extra["completion_messages"] = dialogue
    messages = [shown(n.message) for n in asked]
    return {"messages": messages or None, "prompt_format": "chat" if messages else "unknown", "completion": completion}


def _tokens(asked: list[Node], answered: list[Node]) -> dict[str, Any]:
    """A message may have its tokens at the beginning of the next one: all together they are what the model saw."""
    opened = answered[0].opening
    prompt = [*chain.from_iterable(n.ids for n in asked), *answered[0].ids[:opened]]
    fields: dict[str, Any] = {"completion_ids": None}
    fields["prompt_ids"] = (prompt or None) if opened or all(n.ids for n in asked) else None
    if not all(n.ids for n in answered if n.sampled):
        return fields
    mask = list(chain.from_iterable(n.mask for n in answered))[opened:]
    fields["completion_ids"] = list(chain.from_iterable(n.ids for n in answered))[opened:]
    fields["loss_mask"] = None if all(mask) else mask
    if any(n.logprobs for n in answered):  # NULL where nothing was sampled, or not recorded
        fields["logprobs"] = list(chain.from_iterable(n.spread(n.logprobs) for n in answered))[opened:]
    return fields


def _advantage(trace: dict[str, Any], answered: list[Node], extra: dict[str, Any]) -> float | None:
    """The advantage that all sampled tokens share. Advantages that differ are kept as a list, one for each sampled token."""
    if all(n.advantages is None for n in answered):
        return number(trace.get("advantage"), "advantage")
    each = list(chain.from_iterable(n.compact(n.advantages) for n in answered))
    if len(set(each)) > 1:
        extra["advantages"] = each
        return None
    return each[0] if each else None


def _end(trace: dict[str, Any], answered: list[Node], calls: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
    reasons = [*(n.finish_reason for n in answered if n.sampled), *(c.get("finish_reason") for c in calls)]
    last = next((r for r in reversed(reasons) if isinstance(r, str)), None)
    stop = word(trace.get("stop_condition"), "stop_condition")
    return {"finish_reason": _finish(stop, last == "length" or trace.get("is_truncated") is True, extra) or last}


def _finish(stop: str | None, cut: bool, extra: dict[str, Any]) -> str | None:
    if not cut and not (stop and _LENGTH.search(stop)):
        return stop
    if stop and stop != "length":
        extra["stop_condition"] = stop
    return "length"


def _v0(reading: _Reading, row: int, value: dict[str, Any]) -> list[Row | Bad]:
    """v0.6: messages, or texts, without tokens. A message of the completion is the policy's if the assistant says it."""
    completion, prompt = value["completion"], value.get("prompt")
    metrics = obj(value.get("metrics"), "metrics")
    repeated = {k for k, v in metrics.items() if isinstance(v, int | float) and value.get(k) == v}
    extra = {k: v for k, v in value.items() if k not in _V0 and k not in repeated and v is not None}
    fields: dict[str, Any] = {
        "step": integer(value.get("step"), "step"),
        "split": reading.split,
        "source": word(value.get("env_name"), "env_name"),
        "policy_version": text(value.get("policy_version")),
        "reward": number(value.get("reward"), "reward"),
        "advantage": number(value.get("advantage"), "advantage"),
        "ground_truth": text(value.get("answer")) or None,
        "extra": extra,
    }
    if isinstance(completion, list):
        if not all(isinstance(m, dict) for m in completion):
            raise ValueError("completion is not a list of messages")
        spoken = [m for m in completion if m.get("role") == "assistant"]
        if not spoken:
            raise ValueError(f"nothing was sampled{f' ({_brief(value)})' if value.get('error') else ''}")
        fields["completion"] = "\n\n".join(s for m in spoken for s in said(m))
        if (dialogue := [shown(m) for m in completion]) != [{"role": "assistant", "content": fields["completion"]}]:
            extra["completion_messages"] = dialogue
    elif isinstance(completion, str):
        fields["completion"] = completion
    else:
        raise ValueError(f"completion is neither a text nor a list of messages: {type(completion).__name__}")
    if isinstance(prompt, list):
        if not all(isinstance(m, dict) for m in prompt):
            raise ValueError("prompt is not a list of messages")
        fields |= {"messages": [shown(m) for m in prompt] or None, "prompt_format": "chat"}
    elif isinstance(prompt, str):
        fields |= {"prompt": prompt, "prompt_format": "unknown"}
    elif prompt is not None:
        raise ValueError(f"prompt is neither a text nor a list of messages: {type(prompt).__name__}")
    stop = word(value.get("stop_condition"), "stop_condition")
    fields["finish_reason"] = _finish(stop, value.get("is_truncated") is True, extra)
    group = word(value.get("group_id"), "group_id")
    return [Row(row, fields, None if group is None else (group,))]


def _brief(value: dict[str, Any]) -> str:
    error = value["error"]
    return str(error.get("error", error) if isinstance(error, dict) else error)[:200]
