"""The ids of a store, once: blake2b-128 over length-prefixed fields, written as 32 hex characters.

Every id starts with the name of its kind and the version of the scheme, so that two kinds never meet.
"""

from __future__ import annotations

import re
import unicodedata
import uuid
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

SCHEME = "1"

Field = str | int | float | bool | None | Sequence["Field"]


def _encode(field: Field | bytes) -> bytes:
    """One field, prefixed with its type and length: no two different fields encode alike."""
    if isinstance(field, str):
        kind, data = b"s", field.encode()
    elif field is None:
        kind, data = b"n", b""
    elif isinstance(field, bool):
        kind, data = b"b", b"1" if field else b"0"
    elif isinstance(field, int):
        kind, data = b"i", str(field).encode()
    elif isinstance(field, float):
        kind, data = b"f", repr(field).encode()
    elif isinstance(field, bytes):
        kind, data = b"x", field
    else:
        kind, data = b"l", b"".join(_encode(f) for f in field)
    return kind + len(data).to_bytes(8, "little") + data


def _hash(kind: str, fields: Iterable[Field | bytes]) -> str:
    digest = blake2b(_encode(kind + SCHEME), digest_size=16)
    for field in fields:
        if isinstance(field, str):  # as `_encode`, without copying a long text once more
            data = field.encode()
            digest.update(b"s" + len(data).to_bytes(8, "little"))
            digest.update(data)
        else:
            digest.update(_encode(field))
    return digest.hexdigest()


def tokens(ids: Sequence[int]) -> bytes:
    """Token ids as bytes, so that long lists hash at memory speed."""
    return array("q", ids).tobytes()


def group_id(run: str, split: str, step: int | None, group_key: Sequence[Field]) -> str:
    return _hash("group", (run, split, step, group_key))


def rollout_id(
    group: str, prompt: str | None, completion: str | bytes | None, part: int | None, sample: int | None, occurrence: int = 0
) -> str:
    """`completion` is its text, or `tokens(ids)` where ids are known. `occurrence` counts equal content
    within the group where there is no sample number."""
    return _hash("rollout", (group, prompt, completion, part, sample, occurrence))


def prompt_id(prompt: str | bytes) -> str:
    """Of the exact prompt as sampled: its ids, else its messages as JSON, else its text."""
    return _hash("prompt", (prompt,))


def problem_id(problem: str) -> str:
    """Of the problem text, after `normalise`."""
    return _hash("problem", (normalise(problem),))


def clip_id(rollout: str, tokenizer: str | None, end_token: int) -> str:
    return _hash("clip", (rollout, tokenizer, end_token))


def config_id(kind: str, config: Sequence[Field]) -> str:
    """Of a scorer, segmenter or verifier: the same configuration has the same id everywhere."""
    return _hash(kind, config)


def input_hash(input: Sequence[str | None]) -> str:
    """Of all that a verdict depends on beside its verifier: ground truth and answer, or what a user's function sees."""
    return _hash("verdict", input)


def random_id() -> str:
    return uuid.uuid4().hex


def normalise(text: str) -> str:
    """NFC, white space collapsed, case kept."""
    return " ".join(unicodedata.normalize("NFC", text).split())


# What chat templates leave around the user's words, with and without their special tokens.
_ROLE_MARKERS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<\|im_start\|>user\n(.*?)<\|im_end\|>",
        r"<\|start_header_id\|>user<\|end_header_id\|>\n*(.*?)<\|eot_id\|>",
        r"<start_of_turn>user\n(.*?)<end_of_turn>",
        r"<｜User｜>(.*?)(?:<｜Assistant｜>|$)",
        r"\[INST\]\s*(.*?)\s*\[/INST\]",
        r"^(?:system\n.*?\n)?user\n(.*?)\n?(?:assistant\n?(?:<think>\n?)?)?$",
    )
)


def problem_text(
    prompt: str | None, messages: Sequence[dict] | None = None, strip: re.Pattern[str] | None = None
) -> str | None:
    """The problem behind a prompt: the user's messages, else what stands between known role markers, else all
    of it; `strip` then cuts every match of a template that only the user knows."""
    text = prompt
    if messages:
        asked = [m.get("content") for m in messages if m.get("role") == "user"]
        text = "\n".join(c for c in asked if isinstance(c, str)) or prompt
    elif prompt is not None:
        found = next((f for f in (p.findall(prompt) for p in _ROLE_MARKERS) if f), None)
        text = "\n".join(found) if found else prompt
    return strip.sub("", text) if strip and text is not None else text
