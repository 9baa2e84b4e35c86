"""reasoning-gym-eval's results.json: {metadata, categories: [{name, datasets: [{name, results: [{completions}]}]}]}.

The file is walked twice: the names of datasets and the model may stand behind the results that they belong to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from echolab.readers.base import Bad, Head, Row, Source, hash_whole, number, parse_json, raw_json, scalars, text
from echolab.readers.jsonstream import ALL, At, Broken, Piece, walk

NAME = "reasoning_gym"
VERSION = 1
CONTINUES = False

_PATH = ("categories", ALL, "datasets", ALL, "results", ALL)
_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{")
_DATASETS = re.compile(rb'"categories"\s*:\s*\[\s*\{.*"datasets"\s*:\s*\[', re.DOTALL)
_NONE = re.compile(rb'"categories"\s*:\s*\[\s*\]')  # an evaluation without any, known by its metadata
_RESULT = frozenset({"question", "expected_answer", "best_score", "mean_score", "completions"})
_COMPLETION = frozenset({"full_model_response", "score"})


def sniff(head: Head) -> str | None:
    if head.schema is not None or not _START.match(head.start):
        return None
    known = _DATASETS.search(head.start) or (_NONE.search(head.start) and b'"eval_repeats"' in head.start)
    return "it has categories of datasets of results" if known else None


@dataclass
class _Document:
    """What stands around the results: metadata, and a label for each dataset that is its own within the file."""

    metadata: dict[str, Any] = field(default_factory=dict)
    datasets: dict[At, dict[str, Any]] = field(default_factory=dict)
    labels: dict[At, str | None] = field(default_factory=dict)


def read(source: Source) -> Iterator[Row | Bad]:
    hash_whole(source)
    document = _outline(source)
    mismatches = 0
    for piece in walk(source.path, _PATH, source.size):
        if isinstance(piece, Piece) and piece.side:
            continue
        row = source.rows
        source.rows += 1
        if isinstance(piece, Broken):
            yield Bad(row, piece.reason, piece.raw)
            continue
        try:
            result = parse_json(piece.raw)
            rows = _result(source.rel, row, piece.at, result, document)
        except ValueError as e:
            yield Bad(row, str(e), piece.raw)
            continue
        yield from rows
        mismatches += not _scores_agree(result, rows)
    if mismatches:
        source.notes.append(f"mean_score or best_score does not agree with the scores in {mismatches} results")


def _outline(source: Source) -> _Document:
    document = _Document()
    categories: dict[At, Any] = {}
    for piece in walk(source.path, _PATH, source.size):
        if isinstance(piece, Broken):
            continue  # reported when the results are read
        if not piece.side:
            document.datasets.setdefault(piece.at[:4], {})
            continue
        try:
            value = parse_json(piece.raw)
        except ValueError:
            continue
        match piece.at:
            case ("metadata",) if isinstance(value, dict):
                document.metadata = value
            case ("categories", int(), "name"):
                categories[piece.at[:2]] = value
            case ("categories", int(), "datasets", int(), "name" | "category" as name):
                document.datasets.setdefault(piece.at[:4], {})[name] = value
    full = {at: (text(d.get("category") or categories.get(at[:2])), text(d.get("name"))) for at, d in document.datasets.items()}
    by_name, by_both, seen = Counter(n for _, n in full.values()), Counter(full.values()), Counter()
    for at, (category, name) in full.items():
        label = name if by_name[name] == 1 else f"{category}/{name}"
        if by_both[category, name] > 1:
            seen[category, name] += 1
            label = f"{label}#{seen[category, name]}"
        document.labels[at] = label
    return document


def _result(rel: str, row: int, at: At, result: Any, document: _Document) -> list[Row | Bad]:
    if not isinstance(result, dict):
        raise ValueError(f"expected a result object, got {type(result).__name__}")
    completions = result.get("completions")
    if not isinstance(completions, list):
        raise ValueError("completions is missing" if completions is None else "completions is not a list")
    if not completions:
        raise ValueError("completions is empty")
    metadata, dataset = document.metadata, at[:4]
    sampling = {k: metadata[k] for k in ("temperature", "top_p", "max_tokens") if metadata.get(k) is not None}
    shared = {
        "model": text(metadata.get("model")) or None,
        "source": text(document.datasets.get(dataset, {}).get("name")) or None,
        "sampling": sampling,
        "prompt": text(result.get("question")),
        "prompt_format": "unknown",
        "ground_truth": text(result.get("expected_answer")) or None,
        "split": "eval",
    }
    about = scalars(result, without=_RESULT)
    rows: list[Row | Bad] = []
    for i, completion in enumerate(completions):
        try:
            fields = {**shared, "sample": i, **_completion(completion, about)}
            rows.append(Row(row, fields, key=(rel, document.labels.get(dataset), at[-1])))
        except ValueError as e:
            rows.append(Bad(row, f"sample {i}: {e}", raw_json({"question": result.get("question"), "completion": completion})))
    return rows


def _completion(value: Any, about: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a completion object, got {type(value).__name__}")
    response = value.get("full_model_response")
    if not isinstance(response, str):
        kind = type(response).__name__
        raise ValueError("full_model_response is missing" if response is None else f"full_model_response is not a text: {kind}")
    own = {k: v for k, v in value.items() if k not in _COMPLETION and v is not None}
    return {"completion": response, "reward": number(value.get("score"), "score"), "extra": {**about, **own}}


def _scores_agree(result: dict[str, Any], rows: list[Row | Bad]) -> bool:
    """The file's own summary of a result, as a check; nothing to say where a score is unknown."""
    scores = [r.fields["reward"] for r in rows if isinstance(r, Row)]
    if not scores or len(scores) < len(rows) or any(s is None or s != s for s in scores):
        return True
    expected = {"mean_score": sum(scores) / len(scores), "best_score": max(scores)}
    try:
        recorded = {name: number(result.get(name), name) for name in expected}
    except ValueError:
        return False
    return all(r is None or abs(r - expected[name]) <= 1e-6 for name, r in recorded.items())
