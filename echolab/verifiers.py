"""What a verifier is: a name, a version and options; how it finds the answer in a completion, and how it judges it.

Judging happens in worker processes (echolab/workers.py), so nothing here is imported but what a worker needs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from echolab import answers, ids
from echolab.errors import EcholabError, WrongUsage
from echolab.workers import Task

VERSION = 1  # of all verifiers here: another one makes every verdict anew
STATUSES = ("ok", "no_answer", "timeout", "error")
TOLERANCE = 1e-6  # below the threshold of a success


class Judged(NamedTuple):
    """A verdict, as far as a worker can tell: `ok` or `no_answer`."""

    status: str
    success: bool | None = None
    score: float | None = None
    extracted: str | None = None


def _names(value: Any) -> tuple[str, ...]:
    names = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
    if not names or not set(names) <= set(answers.EXTRACTORS):
        raise ValueError(f"it is a list of {', '.join(answers.EXTRACTORS)}, not {','.join(names)!r}")
    return names


Extractors = Annotated[tuple[str, ...], BeforeValidator(_names)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Extracting(_Options):
    """The extractors that are tried, in this order."""

    extract: Extractors = ("boxed", "answer", "hashes")


class MathOptions(_Extracting):
    float_rounding: int = 6


class ExactOptions(_Extracting):
    case: bool = False


class NumericOptions(_Extracting):
    rel_tol: float = 1e-6
    abs_tol: float = 1e-9


class ChoiceOptions(_Extracting):
    extract: Extractors = ("boxed", "answer", "choice")


class PythonOptions(_Options):
    """`gold=false`: rollouts without ground truth are verified too."""

    threshold: float = 1.0
    gold: bool = True


_OPTIONS: dict[str, type[_Options]] = {
    "math": MathOptions, "exact": ExactOptions, "numeric": NumericOptions, "choice": ChoiceOptions, "python": PythonOptions,
}  # fmt: skip


@dataclass(frozen=True)
class Verifier:
    """`Verifier.make("math")`. Equal configurations have one id; `source` is what else decides the verdicts: the version
    of a library, or the hash of a user's module."""

    name: str
    options: _Options
    source: str | None = None

    @classmethod
    def make(cls, name: str, options: Mapping[str, Any] | None = None) -> Verifier:
        kind = name.partition(":")[0]
        if kind not in _OPTIONS or (name != kind) != (kind == "python"):
            known = ", ".join(k for k in _OPTIONS if k != "python")
            raise WrongUsage(f"unknown verifier {name!r}: there are {known} and python:module:function")
        try:
            parsed = _OPTIONS[kind].model_validate(dict(options or {}))
        except ValidationError as e:
            first = e.errors()[0]
            what, why = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                why = f"there is none of this name, only {', '.join(_OPTIONS[kind].model_fields)}"
            raise WrongUsage(f"option {what} of verifier {kind}: {why}") from None
        return cls(name, parsed, _math_verify() if kind == "math" else _module_hash(name) if kind == "python" else None)

    @property
    def config(self) -> dict[str, Any]:
        options = self.options.model_dump(mode="json")
        return {"name": self.name, "version": VERSION, "options": options, "source": self.source}

    @property
    def id(self) -> str:
        return ids.config_id("verifier", (json.dumps(self.config, sort_keys=True),))

    @property
    def needs_gold(self) -> bool:
        return getattr(self.options, "gold", True)

    @property
    def reads_all(self) -> bool:
        """It sees the completion and its prompt, not an extracted answer."""
        return self.name.startswith("python:")

    @property
    def task(self) -> Task:
        arguments = {"name": self.name, "options": self.options.model_dump(mode="json")}
        return Task("echolab.verifiers:judge", arguments, path=[os.getcwd()] if self.reads_all else [])

    def input(self, completion: str, gold: str | None, prompt: str | None) -> tuple[str | None, ...] | None:
        """What the verdict depends on, and all that a worker gets to see. None: there is no answer to judge."""
        if self.reads_all:
            return completion, gold, prompt
        accept = answers.letter if self.name == "choice" else str.strip
        extractors: Sequence[str] = self.options.extract  # type: ignore[attr-defined]
        answer = answers.extract(completion, extractors, answers.opens_thought(prompt), accept)
        return None if answer is None else (gold, answer)


def _math_verify() -> str:
    try:
        return f"math-verify {version('math-verify')}"
    except PackageNotFoundError:
        raise EcholabError("verifier math needs math-verify: pip install 'echolab[math]'") from None


def _module_hash(name: str) -> str:
    """Of the file that a `python:module:function` names: a function that was changed is another verifier."""
    parts = name.split(":")
    if len(parts) != 3 or not all(parts):
        raise WrongUsage(f"{name!r}: write python:module:function")
    search: Sequence[str] | None = [os.getcwd(), *sys.path]
    spec, full = None, ""
    for part in parts[1].split("."):  # without importing it: that is left to the workers
        full = f"{full}.{part}" if full else part
        spec = PathFinder.find_spec(full, search) if search else None
        search = spec.submodule_search_locations if spec else None
    if spec is None or not spec.origin:
        raise EcholabError(f"no module {parts[1]!r} for the verifier {name}, in this folder or on Python's path")
    return hashlib.blake2b(Path(spec.origin).read_bytes(), digest_size=16).hexdigest()


# In the workers.


def judge(name: str, options: Mapping[str, Any]) -> Callable[[tuple[str, tuple[Any, ...]]], Judged]:
    """The function of one item (key, input)."""
    kind, _, function = name.partition(":")
    judged = _JUDGES[kind](function, _OPTIONS[kind].model_validate(options))
    return lambda item: judged(*item[1])


def _math(_: str, options: MathOptions) -> Callable[[str, str], Judged]:
    """math-verify's word on `$gold$` and `$answer$`, in this order: it is not symmetric. Of its ways to find an answer only
    LaTeX is left on, and of its time limits none: they are alarms in Python, which a hang in C does not hear."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.ERROR)  # it warns that the time limits are off
    latex = [LatexExtractionConfig()]

    def read(text: str) -> list[Any]:
        return parse(in_dollars(text), extraction_config=latex, parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]

    @lru_cache(4096)
    def gold(text: str) -> list[Any]:
        return read(answers.gold(text))

    def judged(truth: str, answer: str) -> Judged:
        right = verify(gold(truth), read(answer), options.float_rounding, timeout_seconds=None, raise_on_error=True)
        return _right(right, answer)

    for usual in _USUAL:  # the first of its kind is slow: before workers are forked
        judged("1", usual)
    return judged


_USUAL = (r"x = \frac{-3 + 2\sqrt{5}}{4}", "9 - 5 = 4", r"2 \cdot 3 \times (n + 1)^2", "(1, 2.5]")


def in_dollars(text: str) -> str:
    """An answer as a formula; one that has formulas in it stays as it is."""
    text = answers.bare(text)
    signs = text.count("$") - text.count(r"\$")
    if signs and signs % 2 == 0:
        return text
    amount = text.replace(r"\$", "$").replace("$", r"\$")
    return f"${amount}$"


def _exact(_: str, options: ExactOptions) -> Callable[[str, str], Judged]:
    def judged(truth: str, answer: str) -> Judged:
        right = answers.plain(answers.gold(truth), options.case) == answers.plain(answer, options.case)
        return _right(right, answer)

    return judged


def _numeric(_: str, options: NumericOptions) -> Callable[[str, str], Judged]:
    def judged(truth: str, answer: str) -> Judged:
        gold, found = answers.number(answers.gold(truth)), answers.number(answer)
        if gold is None:
            raise EcholabError("the ground truth is no number")
        return _right(found is not None and same_number(gold, found, options.rel_tol, options.abs_tol), answer)

    return judged


def same_number(gold: float, found: float, rel_tol: float, abs_tol: float) -> bool:
    """Within the tolerance; of whole numbers only the same is the same, however large."""
    if gold.is_integer() and found.is_integer():
        return gold == found
    return abs(gold - found) <= max(rel_tol * abs(gold), abs_tol)


def _choice(_: str, options: ChoiceOptions) -> Callable[[str, str], Judged]:
    def judged(truth: str, answer: str) -> Judged:
        gold = answers.letter(answers.gold(truth))
        if gold is None:
            raise EcholabError("the ground truth is no letter of a choice")
        return _right(gold == answer, answer)

    return judged


def _right(right: bool, answer: str) -> Judged:
    return Judged("ok", right, float(right), answer)


def _python(path: str, options: PythonOptions) -> Callable[[str, str | None, str | None], Judged]:
    module, _, name = path.partition(":")
    function = getattr(import_module(module), name, None)
    if not callable(function):
        raise EcholabError(f"module {module} has no function {name}")
    with_prompt = "prompt" in inspect.signature(function).parameters

    def judged(completion: str, truth: str | None, prompt: str | None) -> Judged:
        return from_word(function(completion, truth, **({"prompt": prompt} if with_prompt else {})), options.threshold)

    return judged


def from_word(word: Any, threshold: float) -> Judged:
    """What a user's function returned: right or wrong, a score, None for no answer, or a dict of these."""
    said = dict(word) if isinstance(word, Mapping) else {"success" if isinstance(word, bool) else "score": word}
    if unknown := said.keys() - {"success", "score", "extracted"}:
        raise EcholabError(f"the function's dict holds {', '.join(map(repr, unknown))}: it may hold success, score, extracted")
    success, score, extracted = (said.get(k) for k in ("success", "score", "extracted"))
    extracted = None if extracted is None else str(extracted)[-answers.MAX_CHARS :]
    if success is None and score is None:
        return Judged("no_answer", extracted=extracted)
    score = float(bool(success) if score is None else score)
    if not math.isfinite(score):
        raise EcholabError(f"the function's score is {score}")
    return Judged("ok", score >= threshold - TOLERANCE if success is None else bool(success), score, extracted)


_JUDGES: dict[str, Callable[..., Callable[..., Judged]]] = {
    "math": _math, "exact": _exact, "numeric": _numeric, "choice": _choice, "python": _python,
}  # fmt: skip
