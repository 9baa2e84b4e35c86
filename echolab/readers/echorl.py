"""EchoRL's entropy dumps (COLLECT_ENTROPY=1): `step_<N>/samples.json` with the entropies of each rollout in a .npy file
beside it; and those of its golden script, whose `samples.jsonl` grows until it is written again as `samples.json`.

The trainer writes padded ids: `prompt_ids` is prompt and response, `response_ids` is filled up to a fixed length, and both
texts are decoded with the padding in them. It writes no attention mask: how long a response is, its entropies say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from echolab.readers.base import (
    Bad,
    Head,
    Row,
    Scores,
    Source,
    hash_whole,
    integer,
    look,
    number,
    parse_json,
    rows_of_lines,
    unpacked_name,
)
from echolab.readers.jsonstream import ALL, Broken, walk
from echolab.readers.plain import token_ids
from echolab.readers.tensors import entropies

NAME = "echorl"
VERSION = 1
CONTINUES = True  # lines do; samples.json says found["whole"]

GOLDEN = "golden_trajectories"
_SUCCESS = {"correct_rollouts": True, "wrong_rollouts": False, GOLDEN: None}  # by category
_PATH = (frozenset(_SUCCESS), ALL)
_DOCUMENT = re.compile(
    rb'(?:\xef\xbb\xbf)?\s*\{\s*(?:"step"\s*:\s*-?\d+\s*,\s*)?"(?:correct_rollouts|wrong_rollouts|golden_trajectories)"\s*:\s*\['
)
_RECORD = frozenset({"sample_id", "prompt", "response", "prompt_ids", "response_ids", "entropy_tensor_file"})
_COLUMNS = _RECORD | {"step", "reward"}
_REPR = re.compile(r"\[\{'(?:role|content)':")  # chat messages as Python shows them, a bug of the golden script
_LAST_FILE = re.compile(rb'"entropy_tensor_file":\s*"([^"]*)"')
_PAD_BEFORE = re.compile(r"(<[^<>\s]+>|\[PAD\])")
_PAD_AFTER = re.compile(r"(<[^<>\s]+>|\[PAD\])\Z")
_PAD_CHARS = 100  # of a special token, at most
_RUN = 4  # a prompt that begins with as many equal ids is padded


def sniff(head: Head) -> str | None:
    if head.schema is not None:
        return None
    if _DOCUMENT.match(head.start):
        return "it has correct_rollouts, wrong_rollouts and golden_trajectories"
    return "its rows have response_ids and an entropy_tensor_file" if head.keys >= _RECORD else None


def companions(path: Path) -> list[Path]:
    """The entropies beside samples.json. Lines are written after theirs."""
    if path.suffix == ".jsonl":
        return []
    folders = (path.with_name(f"{category}_tensors") for category in _SUCCESS)
    return [f for folder in folders if folder.is_dir() for f in folder.glob("*.npy")]


def aside(path: Path) -> str | None:
    if path.suffix == ".npy":
        if path.parent.name.removesuffix("_tensors") not in _SUCCESS or not path.name.endswith("_entropy.npy"):
            return None
        if path.parent.parent.name == "latest":
            return "EchoRL's latest/ is a copy of its newest step: not read"
        if not any(path.parent.with_name(name).is_file() for name in ("samples.json", "samples.jsonl")):
            return "entropies of EchoRL's rollouts, without their samples.json"
        return "entropies of EchoRL's rollouts: read with samples.json"
    if path.name not in ("samples.json", "samples.jsonl"):
        return None
    try:
        if path.parent.name == "latest" and sniff(look(path)):
            return "EchoRL's latest/ is a copy of its newest step: not read"
        if path.suffix == ".jsonl" and _written_again(path):
            return "EchoRL's golden script wrote samples.jsonl again as samples.json, which is read"
    except OSError:  # said when it is read
        return None
    return None


def _written_again(lines: Path) -> bool:
    """samples.json beside the lines ends with the last of them. It does not while the script is adding more."""
    document = lines.with_name("samples.json")
    if not document.is_file():
        return False
    last = []
    for path in (lines, document):
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - (1 << 13)))
            last.append(next(reversed(_LAST_FILE.findall(f.read())), None))
    return last[0] is not None and last[0] == last[1]


@dataclass
class _Reading:
    """One file: where its entropies are, its padding, and what there is to say of its rows."""

    folder: Path
    pad: int | None = None
    guessed: bool = False
    seen: Counter[str] = field(default_factory=Counter)  # records by category
    ids: set[int] = field(default_factory=set)  # sample_id of the trainer's
    stats: Any = None
    unscored: list[str] = field(default_factory=list)  # reasons
    trimmed: int = 0  # responses whose end is taken from the padding
    untold: int = 0  # texts whose padding cannot be told from them
    reprs: int = 0
    rounded: int = 0


def read(source: Source) -> Iterator[Row | Bad]:
    reading = _Reading(source.path.parent.resolve())
    if unpacked_name(source.path.name).endswith(".jsonl") or look(source.path).keys >= _RECORD:
        yield from rows_of_lines(source, partial(_line, reading))
    else:
        yield from _document(source, reading)
    _say(source, reading)


def _document(source: Source, reading: _Reading) -> Iterator[Row | Bad]:
    source.found["whole"] = True
    hash_whole(source)
    _find_padding(source, reading)
    whole = True
    for piece in walk(source.path, _PATH, source.size):
        if not isinstance(piece, Broken) and piece.side:
            if piece.at == ("stats",):
                reading.stats = _json(piece.raw)
            continue
        row = source.rows
        source.rows += 1
        try:
            if isinstance(piece, Broken):
                whole = False
                raise ValueError(piece.reason)
            yield _rollout(reading, row, str(piece.at[0]), parse_json(piece.raw), piece.raw)
        except ValueError as e:
            yield Bad(row, str(e), piece.raw)
    if whole:
        _count(source, reading)


def _line(reading: _Reading, row: int, value: dict[str, Any]) -> list[Row | Bad]:
    return [_rollout(reading, row, GOLDEN, value, b"")]


def _json(data: bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError:
        return None


def _find_padding(source: Source, reading: _Reading) -> None:
    """The id that fills up: what follows the end of a response; else what a prompt begins and its response ends with; else,
    as a guess, what a prompt begins with several times."""
    guess = None
    for piece in walk(source.path, _PATH, source.size):
        record = None if isinstance(piece, Broken) or piece.side or piece.at[0] == GOLDEN else _json(piece.raw)
        try:
            prompt, response = _ids(record) if isinstance(record, dict) else (None, None)
        except ValueError:
            continue
        if not isinstance(record, dict) or not prompt or not response:
            continue
        numbers, _ = _numbers(reading, record)
        rest = set(response[len(numbers) :]) if numbers is not None else None
        if rest and len(rest) == 1:
            reading.pad = rest.pop()
            return
        if (rest is None or rest) and prompt[0] == response[-1]:
            reading.pad = prompt[0]
            return
        if guess is None and len(set(prompt[:_RUN])) == 1:
            guess = prompt[0]
    reading.pad, reading.guessed = guess, guess is not None


def _ids(record: dict[str, Any]) -> tuple[list[int] | None, list[int] | None]:
    prompt, response = record.get("prompt_ids"), record.get("response_ids")
    return (
        None if prompt is None else token_ids(prompt, "prompt_ids"),
        None if response is None else token_ids(response, "response_ids"),
    )


def _numbers(reading: _Reading, record: dict[str, Any]) -> tuple[list[float] | None, str]:
    """The record's entropies, or why there are none. A dump's file names lead nowhere outside of its folder."""
    name = record.get("entropy_tensor_file")
    if not isinstance(name, str):
        return None, "entropy_tensor_file is null" if name is None else "entropy_tensor_file is not a text"
    try:
        path = (reading.folder / name).resolve()
        if ".." in PurePosixPath(name).parts or not path.is_relative_to(reading.folder):
            return None, f"entropy_tensor_file leads out of the dump's folder: {name[:80]!r}"
        return floats(path), ""
    except FileNotFoundError:
        return None, f"{name} is missing"
    except (OSError, ValueError) as e:
        return None, f"{name[:80]!r}: {e.strerror if isinstance(e, OSError) else e}"


def floats(path: Path) -> list[float]:
    """The numbers of a .npy file. Raises ValueError where it holds anything else, OSError where it cannot be read."""
    with path.open("rb") as f:
        try:
            numbers = np.lib.format.read_array(f, allow_pickle=False)
        except OSError:
            raise
        except Exception as e:  # of many kinds: a header is an expression, and may ask for any amount of memory
            raise ValueError(f"a .npy file that cannot be read: {(str(e) or type(e).__name__).splitlines()[0][:120]}") from None
        if f.read(1):
            raise ValueError("a .npy file with more behind its numbers")
    if numbers.ndim != 1 or numbers.dtype.kind != "f":
        raise ValueError(f"a .npy file of {str(numbers.dtype)[:40]} in {numbers.ndim} dimensions, not of floats in one")
    return numbers.astype(np.float64).tolist()


def _rollout(reading: _Reading, row: int, category: str, record: Any, raw: bytes) -> Row:
    reading.seen[category] += 1
    if not isinstance(record, dict):
        raise ValueError(f"expected a record, got {type(record).__name__}")
    sample = integer(record.get("sample_id"), "sample_id")
    if sample is not None and category != GOLDEN:
        reading.ids.add(sample)
    for name in ("prompt", "response"):
        if not isinstance(record.get(name), str | None):
            raise ValueError(f"{name} is not a text: {type(record[name]).__name__}")
    numbers, problem = _numbers(reading, record)
    fields, fits = (_golden if category == GOLDEN else _trained)(reading, record, numbers)
    scores = None
    if numbers is not None and not fits:
        problem = f"{len(numbers)} entropies do not fit {len(record.get('response_ids') or ())} response_ids"
    elif numbers is not None:
        try:
            scores = Scores(entropies(numbers))
            reading.rounded += min(numbers, default=0.0) < 0
        except ValueError as e:
            problem = str(e)
    if scores is None:
        reading.unscored.append(problem)
    extra = {k: v for k, v in record.items() if k not in _COLUMNS and v is not None}
    extra |= {"category": category} | ({} if sample is None else {"sample_id": sample})
    if shown := [name for name in ("prompt", "completion") if _REPR.search(fields[name] or "")]:
        extra["repr"] = shown
        reading.reprs += 1
    fields |= {
        "step": integer(record.get("step"), "step"),
        "split": "train",
        "reward": number(record.get("reward"), "reward"),
        "success_recorded": _SUCCESS[category],
        "extra": extra,
    }
    return Row(row, fields, raw=raw, scores=scores)


def _golden(reading: _Reading, record: dict[str, Any], numbers: list[float] | None) -> tuple[dict[str, Any], bool]:
    """Columns of a record of the golden script, which pads nothing, and whether the entropies fit."""
    prompt, response = _ids(record)
    fields = {
        "role": "expert",
        "prompt": record.get("prompt"),
        "prompt_format": "unknown",
        "completion": record.get("response"),
        "prompt_ids": prompt,
        "completion_ids": response,
    }
    return fields, numbers is not None and response is not None and len(numbers) == len(response)


def _trained(reading: _Reading, record: dict[str, Any], numbers: list[float] | None) -> tuple[dict[str, Any], bool]:
    """Columns of a record of the trainer without its padding, and whether the entropies fit. Where they do not, all that
    looks like padding is cut off a response."""
    whole, response = _ids(record)
    if not whole or not response:
        raise ValueError("no prompt_ids or no response_ids")
    begin = len(whole) - len(response)
    if begin < 1 or whole[begin:] != response:
        raise ValueError("prompt_ids is not a prompt and then response_ids, as the trainer writes it")
    left = next((i for i in range(begin) if whole[i] != reading.pad), begin)
    if left == begin:
        raise ValueError("prompt_ids holds nothing but padding before the response")
    fits = numbers is not None and len(numbers) <= len(response) and set(response[len(numbers) :]) <= {reading.pad}
    end = len(numbers) if numbers is not None and fits else len(response)
    while not fits and end and response[end - 1] == reading.pad:
        end -= 1
    reading.trimmed += not fits
    asked, said = record.get("prompt") or "", record.get("response") or ""
    prompt = _without(asked.removesuffix(said), left, _PAD_BEFORE) if asked.endswith(said) else None
    completion = _without(said, len(response) - end, _PAD_AFTER)
    reading.untold += None in (prompt, completion)
    fields = {
        "prompt": prompt or None,
        "prompt_format": "rendered",
        "completion": completion,
        "prompt_ids": whole[left:begin],
        "completion_ids": response[:end],
    }
    return fields, fits


def _without(decoded: str, count: int, pad: re.Pattern[str]) -> str | None:
    """A text without the padding that was decoded with it: `count` times the same special token at its beginning or end."""
    if not count:
        return decoded
    before = pad is _PAD_BEFORE
    token = pad.match(decoded) if before else pad.search(decoded[-_PAD_CHARS:])
    padding = token[1] * count if token else ""
    if not padding or not (decoded.startswith(padding) if before else decoded.endswith(padding)):
        return None
    return decoded[len(padding) :] if before else decoded[: -len(padding)]


def _count(source: Source, reading: _Reading) -> None:
    """What a whole dump left out. The trainer numbers all rollouts and leaves out those that neither succeed nor fail."""
    numbered = len(reading.ids) == sum(reading.seen.values()) - reading.seen[GOLDEN]
    left_out = max(reading.ids) - min(reading.ids) + 1 - len(reading.ids) if numbered and reading.ids else 0
    if left_out:
        source.found["completeness"] = "effective"
        source.notes.append(
            f"{left_out} numbers of samples are not used: the trainer leaves out rollouts whose reward is neither that of"
            " success nor that of failure"
        )
    for category, stats in reading.stats.items() if isinstance(reading.stats, dict) else ():
        count = stats.get("count") if isinstance(stats, dict) else None
        if category in _SUCCESS and isinstance(count, int) and count != reading.seen[category]:
            source.notes.append(f"stats counts {count} {category}, the file has {reading.seen[category]}")


def _say(source: Source, reading: _Reading) -> None:
    notes = source.notes
    if reading.unscored:
        notes.append(f"{len(reading.unscored)} rollouts have no entropies, the first because: {reading.unscored[0]}")
    if reading.trimmed and reading.pad is not None:
        same = "and with it a final end token if that is the same"
        notes.append(f"the padding of {reading.trimmed} of them is cut off by its id {reading.pad}, {same}")
    if reading.guessed:
        notes.append(f"the padding is id {reading.pad}: a guess, as prompts begin with it and no response ends before its time")
    if reading.untold:
        notes.append(f"a text of {reading.untold} rollouts is left out: its padding cannot be told from it (the ids are kept)")
    if reading.rounded:
        notes.append(f"entropies that rounding made negative are read as 0, in {reading.rounded} rollouts")
    if reading.reprs:
        notes.append(f"{reading.reprs} texts are chat messages as Python shows them, a bug of the golden script (extra.repr)")
    if reading.seen[GOLDEN]:
        notes.append(f"{reading.seen[GOLDEN]} golden trajectories, which no policy sampled: their role is expert")
