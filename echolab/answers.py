"""The answer in a completion: found by marks that a model was told to set, never guessed from its prose.

What is thought does not count. Every function takes time linear in the text, whatever the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

MAX_CHARS = 2_000  # of an answer; of a longer one the end is kept, where its value stands

_THOUGHTS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
_HASHES = re.compile(r"####([^\n]{0,200})")
_NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?|[-+−]?\.\d+%?")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|operatorname)\{([^{}]*)\}")


def extract(
    text: str, extractors: Sequence[str], opened: bool = False, accept: Callable[[str], str | None] = str.strip
) -> str | None:
    """The answer by the first extractor that finds one that `accept` takes. `opened`: the prompt opened a thought.

    Only what stands after the last thought counts. Of a thought that never ends, only a closed `<answer>` does: whatever
    else stands there, the model was still thinking."""
    said, tail = after_thought(text, opened)
    for name in extractors:
        found = _EXTRACTORS[name](tail if name == "answer" else said)
        if found and (found := accept(found)):
            return found[-MAX_CHARS:]
    return None


def after_thought(text: str, opened: bool = False) -> tuple[str, str]:
    """What follows the last thought that ended: as far as no other thought begins, and to its end."""
    end = max(text.rfind(close) + len(close) if close in text else 0 for _, close in _THOUGHTS)
    tail = text[end:]
    begins = [i for i in (tail.find(begin) for begin, _ in _THOUGHTS) if i >= 0]
    return tail[: 0 if opened and not end else min(begins, default=len(tail))], tail


def opens_thought(prompt: str | None) -> bool:
    """Templates that begin the thought for the model: the completion then only closes it."""
    return (prompt or "")[-100:].rstrip().endswith(tuple(begin for begin, _ in _THOUGHTS))


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds that is closed and not empty."""
    last = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if last < 0:
        return None
    return _box(text, last) or _box(text, 0)  # from its beginning only where the last box is no answer


def _box(text: str, start: int) -> str | None:
    """Of the boxes that begin at `start` or later, the one that begins last."""
    open_braces: list[tuple[int, int] | None] = []
    best, found = -1, None
    for token in _BRACES.finditer(text, start):
        what = token[0]
        if what == "{":
            open_braces.append(None)
        elif what == "}":
            box = open_braces.pop() if open_braces else None
            if box and box[0] > best and (inside := text[box[1] : token.start()].strip()):
                best, found = box[0], inside
            if start and not open_braces:
                break
        elif what[-1] == "{" and len(what) > 2:
            open_braces.append((token.start(), token.end()))
    return found


def tagged(text: str) -> str | None:
    """What the last closed `<answer>` holds; of a box in it, what that holds."""
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, max(end, 0))
    if begin < 0:
        return None
    inside = text[begin + len("<answer>") : end].strip()
    return boxed(inside) or inside


def hashes(text: str) -> str | None:
    """The number of the last line `#### n`. Headings of that depth are no answers."""
    if "####" not in text:
        return None
    lines = (m[1].strip().strip("$").rstrip(".").strip() for m in _HASHES.finditer(text))
    return next((line for line in reversed(list(lines)) if _NUMBER.fullmatch(line)), None)


_LETTER = r"([A-J])(?![\w'’])(?<!I(?= [a-z]))"  # "I think" names no choice
_ANNOUNCED = re.compile(
    r"(?i:\b(?:answer|choice|option)\b[^\n:=]{0,60}?(?:\bis\b|:|=))[\s*_$({\[\"']{0,6}"
    r"(?:\\(?:text|textbf|mathrm|mathbf|boxed)\{){0,2}(?i:(?:option|choice|answer)\s)?[\s*_(\[]{0,6}" + _LETTER
)
_LINE = re.compile(r"[*_($\[]{0,4}" + _LETTER + r"[*_)$\].]{0,4}")
_LEADING = re.compile(r"[\s*_($\[\"'{]{0,6}" + _LETTER + r"(?<!A(?= [a-z]))")
_SMALL = re.compile(r"[(\[]?([a-j])[)\]]?")


def choice(text: str) -> str | None:
    """The letter of the last "answer is B", else of a last line that holds nothing but a letter."""
    announced = [m[1] for m in _ANNOUNCED.finditer(text)]
    if announced:
        return announced[-1]
    lines = text.rstrip()[-200:].splitlines()
    found = _LINE.fullmatch(lines[-1].strip()) if lines else None
    return found[1] if found else None


def letter(text: str) -> str | None:
    r"""The letter of a choice as it is written: `B`, `(B)`, `B.`, `**B**`, `\text{(B)}`, `B) 12 apples`."""
    short = unwrapped(text)
    found = _LEADING.match(short) or _SMALL.fullmatch(short)
    return found[1].upper() if found else choice(text)


def whole(text: str) -> str | None:
    """All that was said: for completions that are nothing but an answer."""
    return text.strip() or None


_EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed, "answer": tagged, "hashes": hashes, "choice": choice, "text": whole,
}  # fmt: skip
EXTRACTORS = tuple(_EXTRACTORS)


def gold(text: str) -> str:
    r"""The answer in a ground truth that may be a whole solution: its last `\boxed{}`, its `#### n`, else all of it."""
    return boxed(text) or hashes(text) or text.strip()


def bare(text: str) -> str:
    r"""Without `$...$`, `\(...\)` or `\[...\]` around it, and without a full stop at its end."""
    text = " ".join(text.split())
    for begin, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = text[len(begin) : -len(end)]
        if inside and text.startswith(begin) and text.endswith(end) and begin not in inside:
            text = inside.strip()
            break
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def unwrapped(text: str) -> str:
    r"""Without what only typesets it: as `bare`, and without `\text{...}` around it."""
    text = bare(text)
    found = _WRAPPED.fullmatch(text)
    return bare(found[1]) if found else text


def plain(text: str, case: bool = False) -> str:
    """As `exact` compares it: one form of each character, white space collapsed, small letters unless `case`."""
    text = " ".join(unicodedata.normalize("NFKC", unwrapped(text)).split()).strip("*\"'` ")
    return text if case else text.casefold()


_FRACTION = re.compile(r"\\[dt]?frac\s?(?:\{([-+\d.]{1,40})\}|(\d))\s?(?:\{([-+\d.]{1,40})\}|(\d))")
_TIMES = re.compile(r"\s*(?:\\times|\\cdot|[×·*x])\s*10\s*(?:\^|\*\*)\s*\{?([-+]?\d{1,4})\}?")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,|\\!|_| )(?:\\!)?(?=\d{3}(?![\d/]))")
_PLAIN = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?)(?:\s*/\s*([-+]?\d+\.?\d*))?")
_SIGNED = re.compile(r"^([-+]) (?=\d)")
_MIXED = re.compile(r"([-+]?)(\d{1,15}) (\d{1,15})/([1-9]\d{0,14})")
_UNIT = re.compile(
    r"(?:\s?(?:\^\{?\\?circ\}?|°|%|percent\b|pct\b)|\s(?:(?!pi\b)[A-Za-z]{2,20}|[mghsLNJWVKCF]\b)(?:[ -][A-Za-z]{1,20}){0,3})?"
)


def number(text: str) -> float | None:
    r"""A text that is one number: `-1,234.5`, `3/4`, `\frac{3}{4}`, `1\frac{1}{4}`, `12%` (= 0.12), `1.5e3`,
    `1.5 \times 10^3`, also after `x =`, with a currency before it or a unit after it. None for anything else, and for what
    no float can hold."""
    text = unwrapped(text.rpartition("=")[2]).translate(_SIGNS)
    text = _WRAPPED.sub(r" \1", text).replace(r"\$", "").replace(r"\%", "%").lstrip("$€£¥₹ ").replace(r"\ ", " ")
    text = _THOUSANDS.sub("", text)
    text = _TIMES.sub(r"e\1", _FRACTION.sub(r" \1\2/\3\4", text))
    text = _SIGNED.sub(r"\1", " ".join(text.split()))
    if mixed := _MIXED.fullmatch(text):
        whole, part = float(mixed[2]), float(mixed[3]) / float(mixed[4])
        return (whole + part) * (-1 if mixed[1] == "-" else 1)
    found = _PLAIN.match(text)
    if found is None:
        return None
    unit = text[found.end() :]
    if not _UNIT.fullmatch(unit):
        return None
    percent = unit.strip() in ("%", "percent", "pct")
    try:
        value = float(found[1]) / (float(found[2]) if found[2] else 1.0) / (100 if percent else 1)
    except (ValueError, ZeroDivisionError):
        return None
    return value if abs(value) != float("inf") else None


_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " "})
