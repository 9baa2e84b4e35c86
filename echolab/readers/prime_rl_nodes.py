"""The messages of prime-rl's traces: what was said, and the tokens of it in their compact layout."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from echolab.readers.base import flag, integer


def obj(value: Any, what: str) -> dict[str, Any]:
    """An object, empty where there is none."""
    if not isinstance(value, dict | None):
        raise ValueError(f"{what} is not an object: {type(value).__name__}")
    return value or {}


def listed(value: Any, what: str) -> list[Any]:
    """A list, empty where there is none."""
    if not isinstance(value, list | None):
        raise ValueError(f"{what} is not a list: {type(value).__name__}")
    return value or []


def word(value: Any, what: str) -> str | None:
    """A name or an id: a text or a whole number."""
    if not isinstance(value, str | int | None) or isinstance(value, bool):
        raise ValueError(f"{what} is not a single word: {type(value).__name__}")
    return None if value is None else str(value) or None


def content(value: Any) -> str | None:
    """The text of a message's content, which may be a list of parts: images are no text."""
    if isinstance(value, list):
        parts = [p.get("text") for p in value if isinstance(p, dict) and p.get("type") == "text"]
        return "".join(p for p in parts if isinstance(p, str))
    if not isinstance(value, str | None):
        raise ValueError(f"a message's content is neither a text nor a list of parts: {type(value).__name__}")
    return value


def said(message: dict[str, Any]) -> list[str]:
    """What a message says: its reasoning, where that is kept apart, and its content."""
    return [said for name in ("reasoning_content", "content") if (said := content(message.get(name)))]


def shown(message: dict[str, Any]) -> dict[str, Any]:
    """A message as it is kept: role and content first, a list of nothing but texts as one text."""
    body = message.get("content")
    only_text = isinstance(body, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in body)
    body = content(body) if only_text else body
    more = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
    return {"role": message.get("role"), "content": body, **more}


@dataclass
class Node:
    """One message of a trace. Its numbers are parsed when a path that leads through it needs them."""

    index: int
    value: dict[str, Any]
    parent: int | None
    sampled: bool
    given: list[Any] | None  # advantages from elsewhere

    @cached_property
    def message(self) -> dict[str, Any]:
        message = self.value.get("message")
        if not isinstance(message, dict):
            raise ValueError(f"node {self.index}: message is not an object: {type(message).__name__}")
        return message

    @cached_property
    def ids(self) -> list[int]:
        what = f"node {self.index}: token_ids"
        ids = _array("i", listed(self.value.get("token_ids"), what), what)
        if ids and min(ids) < 0:
            raise ValueError(f"{what} holds a negative token id")
        return ids

    @cached_property
    def mask(self) -> list[bool]:
        """Which tokens were sampled."""
        what = f"node {self.index}: mask"
        mask = listed(self.value.get("mask"), what)
        if not mask and not self.sampled:
            return [False] * len(self.ids)
        if not {*map(type, mask)} <= {bool}:
            raise ValueError(f"{what} is not a list of true and false")
        if len(mask) != len(self.ids):
            raise ValueError(f"{what} has {len(mask)} entries for {len(self.ids)} tokens")
        return mask

    @property
    def opening(self) -> int:
        """Tokens of the chat template before the first one that was sampled."""
        return self.mask.index(True) if True in self.mask else len(self.ids)

    @cached_property
    def logprobs(self) -> list[float | None] | None:
        return self._numbers("logprobs") or None

    @cached_property
    def advantages(self) -> list[float | None] | None:
        """None: never assigned. Zeros: of a degenerate group."""
        return self._numbers("advantages")

    @cached_property
    def reference_logprobs(self) -> list[float | None] | None:
        return self._numbers("reference_logprobs")

    @property
    def finish_reason(self) -> Any:
        return self.value.get("finish_reason")

    def _numbers(self, name: str) -> list[float | None] | None:
        """One number for each sampled token: null where it was none."""
        values, what = self.value.get(name), f"node {self.index}: {name}"
        if values is None and name == "advantages":
            values = self.given
        if values is None:
            return None
        known = [v for v in listed(values, what) if v is not None]
        numbers: list[float | None] = [*_array("d", known, what)]
        if len(known) < len(values):
            each = iter(numbers)
            numbers = [None if v is None else next(each) for v in values]
        if numbers and len(numbers) != sum(self.mask):
            raise ValueError(f"{what} has {len(numbers)} entries for {sum(self.mask)} sampled tokens")
        return numbers

    def compact(self, values: list[float | None] | None) -> list[float | None]:
        """One value for each sampled token, None where there are no values."""
        return values or [None] * sum(self.mask)

    def spread(self, values: list[float | None] | None) -> list[float | None]:
        """One value for each token, None for those that were not sampled."""
        each = iter(self.compact(values))
        return [next(each) if sampled else None for sampled in self.mask]


def _array(kind: str, values: list[Any], what: str) -> list[Any]:
    """Checked at the speed of C."""
    try:
        return list(array(kind, values))
    except (TypeError, OverflowError):
        raise ValueError(f"{what} is not a list of {'token ids' if kind == 'i' else 'numbers'}") from None


def nodes_of(value: Any, advantages: dict[int, list[Any]]) -> list[Node]:
    """The nodes of a trace. A parent stands before its children, so that no path runs in a circle."""
    nodes = []
    for i, node in enumerate(listed(value, "nodes")):
        if not isinstance(node, dict):
            raise ValueError(f"node {i} is not an object: {type(node).__name__}")
        parent = integer(node.get("parent"), f"node {i}: parent")
        if parent is not None and not 0 <= parent < i:
            raise ValueError(f"node {i}: its parent {parent} does not stand before it")
        nodes.append(Node(i, node, parent, bool(flag(node.get("sampled"), f"node {i}: sampled")), advantages.get(i)))
    if not nodes:
        raise ValueError("the trace has no nodes")
    return nodes
