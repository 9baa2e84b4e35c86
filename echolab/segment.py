"""Completions -> segments: where a completion is cut, and the mean entropy of what lies between the cuts.

Everything works on whole Arrow columns. `segment_ends` are exclusive 0-based offsets into the completion's tokens; the
first segment starts at 0, and the segments partition all tokens but a final EOS. A cut never splits a token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pydantic import field_validator

from echolab import ids
from echolab.config import Config
from echolab.errors import EcholabError
from echolab.schema import SEGMENTATIONS
from echolab.vocab import Vocab

pc: Any = pyarrow.compute

VERSION = 1  # of the rules below: part of a segmenter's id
PAPERS_IDS = "198,271"  # "\n" and "\n\n" in the vocabularies of Qwen2.5, Llama 3 and GPT-4
PIECE = 1 << 18  # tokens that are worked on at once: they stay in the processor's cache

_CLOSING = r"[\"'”’»)\]}*_$`]*"
PATTERNS = {
    "paragraph": r"\n\s*\n",
    # One match is one sentence: up to its mark, the end of the line, or the end of the text. The number of a list item
    # at the start of a line is passed over.
    "sentence": rf"(?m)(?:^[ \t#>*_-]*\d+[.)][ \t]+)?[^\n]*?(?:[.!?…]+{_CLOSING}(?=\s)|[。！？｡]+{_CLOSING}|\n|\Z)",
}
MODES = "newline, paragraph, sentence, regex:PATTERN, exact_ids[:198,271] or fixed:N"


class Segmenter(Config):
    r"""The rule that cuts completions into segments.

    `mode` is one of

    - `newline`: after every token whose text holds a newline;
    - `paragraph`: after the token that completes a blank line (`\n`, white space, `\n`);
    - `sentence`: after the token with `.`, `!`, `?` or `…` and the quotes and brackets that close there, if white space
      follows, or with their CJK forms; at every newline too. Not within `3.14` nor after the number of a list item;
      abbreviations are not known;
    - `regex:PATTERN`: after the token that holds the end of a match, in the syntax of Python's `re`, on the text of the
      completion. The pattern is run as it is: one that backtracks without end hangs;
    - `exact_ids:198,271`: after these tokens; without numbers the two of the paper's flag;
    - `fixed:N`: after every N tokens, whatever they are.

    The token with the delimiter belongs to the segment that it ends. What follows the last delimiter is a segment too.
    `merge_blank`: segments of white space alone join the one before, at the beginning the first one with text (`fixed`
    merges none). `min_segment_tokens`: a shorter segment joins the next one, the last one that before.

    It only cuts: `<think>` and other tags are ordinary tokens. Which segments may be chosen is the selector's business.
    """

    mode: str = "newline"
    merge_blank: bool = True
    min_segment_tokens: int = 1

    @field_validator("mode")
    @classmethod
    def _mode(cls, mode: str) -> str:
        kind, colon, argument = mode.partition(":")
        if mode in ("newline", *PATTERNS):
            return mode
        if kind == "regex" and argument:
            try:
                re.compile(argument)
            except re.error as e:
                raise ValueError(f"{argument!r} is not a regular expression: {e}") from None
            return mode
        if kind == "exact_ids" and bool(argument) == bool(colon):
            numbers = (argument or PAPERS_IDS).split(",")
            if not all(n.strip().isdecimal() for n in numbers):
                raise ValueError(f"exact_ids takes token ids, as in exact_ids:{PAPERS_IDS}, not {argument!r}")
            return "exact_ids:" + ",".join(map(str, sorted({int(n) for n in numbers})))
        if kind == "fixed" and argument.isdecimal() and int(argument):
            return f"fixed:{int(argument)}"
        raise ValueError(f"unknown mode {mode!r}: use {MODES}")

    @field_validator("min_segment_tokens")
    @classmethod
    def _least(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be at least 1")
        return value

    @property
    def kind(self) -> str:
        return self.mode.partition(":")[0]

    @property
    def argument(self) -> str:
        return self.mode.partition(":")[2]

    def resolved(self, tokenizer: str) -> dict[str, Any]:
        """What the registry keeps of it."""
        return {**self.model_dump(), "tokenizer": tokenizer, "version": VERSION}

    def id(self, tokenizer: str) -> str:
        return ids.config_id("segmenter", list(self.resolved(tokenizer).values()))


DEFAULT = Segmenter()

Column: TypeAlias = "pa.Array | pa.ChunkedArray"


def segment(token_ids: Column, vocab: Vocab, config: Segmenter = DEFAULT, eos: Iterable[int] = ()) -> pa.ChunkedArray:
    """`segment_ends` of every completion. All tokens of `eos` that stand at its very end are left out, however many:
    what follows the first is padding. Within the completion they are ordinary tokens."""
    stop = np.fromiter(eos, np.int64)
    pieces = []
    for batch in _pieces(token_ids):
        start, end, values, valid = _lists(batch.column(0))
        if values.null_count:
            raise EcholabError("token_ids with NULL among them cannot be cut")
        tokens = values.cast(pa.int32()).to_numpy()
        end = _without_eos(tokens, start, end, stop)
        cuts, counts = _cuts(tokens, start, end, vocab, config)
        pieces.append(_list_array(pa.array(cuts - np.repeat(start, counts), pa.int32()), counts, valid))
    return pa.chunked_array(pieces, pa.list_(pa.int32()))


def split_text(text: str, config: Segmenter = DEFAULT) -> list[str]:
    """The segments of a text whose tokens are not known: it is cut between characters."""
    if config.kind in ("exact_ids", "fixed"):
        raise EcholabError(f"mode {config.mode} counts tokens: a text alone has none")
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    vocab = Vocab("characters", {i: character.encode() for character, i in alphabet.items()})
    ends = segment(pa.array([[alphabet[c] for c in text]], pa.list_(pa.int32())), vocab, config)[0].as_py()
    return [text[a:b] for a, b in pairwise([0, *ends])]


def segment_means(entropies: Column, segment_ends: Column, loss_mask: Column | None = None) -> pa.ChunkedArray:
    """Mean entropy of every segment over the tokens that its loss mask counts (no mask, or a NULL one: all). NULL where
    none counts, and where one that counts is NULL, NaN or infinite: what is unknown wins no comparison."""
    masks = () if loss_mask is None or loss_mask.null_count == len(loss_mask) else (loss_mask,)
    pieces = []
    for batch in _pieces(entropies, segment_ends, *masks):
        start, end, values, known = _lists(batch.column(0))
        first, last, cuts, cut = _lists(batch.column(1))
        valid = known if cut is None else cut if known is None else known & cut
        counts = last - first if valid is None else np.where(valid, last - first, 0)
        ends = cuts.to_numpy()[_ranges(first, counts)] + np.repeat(start, counts)
        starts = _starts(ends, start, counts)
        if (ends < starts).any() or (ends > np.repeat(end, counts)).any():
            raise EcholabError("segment_ends that do not fit the entropies: they do not increase, or pass the last token")
        numbers = (values.fill_null(np.nan) if values.null_count else values).to_numpy().astype(np.float64)
        counted = _counted(batch.column(2), start, end, len(numbers)) if masks else None
        means = _means(numbers, counted, starts, ends).astype(np.float32)
        pieces.append(_list_array(pa.array(means, mask=~np.isfinite(means)), counts, valid))
    return pa.chunked_array(pieces, pa.list_(pa.float32()))


def segmentations(scores: pa.Table, vocab: Vocab, config: Segmenter = DEFAULT, eos: Iterable[int] = ()) -> pa.Table:
    """The rows of `segmentations` that belong to rows of `scores`. The peak is the first segment of highest entropy."""
    tokens, entropies = scores["token_ids"], scores["entropies"]
    same = pc.equal(pc.list_value_length(tokens), pc.list_value_length(entropies))
    if not pc.all(pc.fill_null(same, False), min_count=0).as_py():
        raise EcholabError("scores without tokens or entropies, or with more of the one than of the other")
    ends = segment(tokens, vocab, config, eos)
    means = segment_means(entropies, ends, scores["loss_mask"] if "loss_mask" in scores.column_names else None)
    peaks = [_peaks(batch.column(0)) for batch in _pieces(means)]
    columns = {
        "rollout_id": scores["rollout_id"],
        "scorer": scores["scorer"],
        "segmenter": pa.repeat(config.id(vocab.tokenizer), len(tokens)),
        "segment_ends": ends,
        "segment_entropies": means,
        "n_segments": pc.list_value_length(ends),
        "peak_segment": pa.chunked_array([position for position, _ in peaks], pa.int32()),
        "peak_entropy": pa.chunked_array([entropy for _, entropy in peaks], pa.float64()),
    }
    return pa.table(columns, schema=SEGMENTATIONS.arrow)


# Cutting. Below here everything is flat: the tokens of many completions in a row, `start` and `end` of each (what lies
# between an end and the next start belongs to none), and cuts as offsets into all of them.


def _without_eos(tokens: np.ndarray, start: np.ndarray, end: np.ndarray, eos: np.ndarray) -> np.ndarray:
    end = end.copy()
    rows = np.flatnonzero(end > start) if len(eos) else eos
    while len(rows):
        rows = rows[np.isin(tokens[end[rows] - 1], eos)]
        end[rows] -= 1
        rows = rows[end[rows] > start[rows]]
    return end


def _cuts(
    tokens: np.ndarray, start: np.ndarray, end: np.ndarray, vocab: Vocab, config: Segmenter
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of all segments, and how many each completion has."""
    place = tokens.view(np.uint32)  # in the vocabulary: a negative id lies behind its end like all that it lacks
    last = _ended_by(tokens, place, start, end, vocab, config)
    outside = np.append(start[1:], len(tokens)) - end
    last[_ranges(end, outside)] = False
    last[end[end > start] - 1] = True
    ends = np.flatnonzero(last) + 1
    counts = np.diff(np.searchsorted(ends, end, "right"), prepend=0)
    if config.merge_blank and config.kind != "fixed":
        ends, counts = _merge_blank(place, vocab.blank, ends, start, counts)
    if config.min_segment_tokens > 1:
        ends, counts = _merge_short(ends, start, counts, config.min_segment_tokens)
    return ends, counts


def _ended_by(
    tokens: np.ndarray, place: np.ndarray, start: np.ndarray, end: np.ndarray, vocab: Vocab, config: Segmenter
) -> np.ndarray:
    """Of each token: does the mode cut after it?"""
    if config.kind == "newline":
        return vocab.newline.take(place, mode="clip")
    if config.kind == "exact_ids":
        return np.isin(tokens, [int(i) for i in config.argument.split(",")])
    if config.kind == "fixed":
        size = int(config.argument)
        position = np.arange(len(tokens)) - np.repeat(start, np.diff(start, append=len(tokens)))
        return position % size == size - 1
    last = np.zeros(len(tokens), bool)
    pattern = re.compile(PATTERNS.get(config.kind, config.argument))
    texts = vocab.dense.take(pa.array(np.minimum(place, vocab.size)))
    _, offsets, data = texts.buffers()
    offsets, data = np.frombuffer(offsets, np.int64), memoryview(data or b"")
    for a, b in zip(start.tolist(), end.tolist(), strict=True):
        cuts = offsets[a] + _match_ends(pattern, bytes(data[offsets[a] : offsets[b]]))
        last[a + np.searchsorted(offsets[a + 1 : b + 1], cuts)] = True
    return last


def _match_ends(pattern: re.Pattern[str], content: bytes) -> np.ndarray:
    """Where matches end within the text, in bytes. Bytes that are no text stand as one character each."""
    text = content.decode(errors="surrogateescape")
    ends = [m.end() for m in pattern.finditer(text) if 0 < m.end() < len(text)]
    if len(text) < len(content):
        ends = list(accumulate(len(text[a:b].encode(errors="surrogateescape")) for a, b in pairwise([0, *ends])))
    return np.array(ends, np.int64)


def _starts(ends: np.ndarray, start: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The start of every segment: the end of the one before, or the completion's."""
    starts = np.empty_like(ends)
    starts[1:] = ends[:-1]
    some = counts > 0
    starts[(np.cumsum(counts) - counts)[some]] = start[some]
    return starts


def _merge_blank(
    place: np.ndarray, blank: np.ndarray, ends: np.ndarray, start: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A cut stays only before a segment with text, and not before the first of its completion."""
    starts = _starts(ends, start, counts)
    white = blank.take(place[starts], mode="clip") & blank.take(place[ends - 1], mode="clip")
    if (unsure := np.flatnonzero(white & (ends - starts > 2))).size:
        lengths = (ends - starts)[unsure]
        inside = blank.take(place[_ranges(starts[unsure], lengths)], mode="clip")
        white[unsure] = np.logical_and.reduceat(inside, np.cumsum(lengths) - lengths)
    if not white.any():
        return ends, counts
    after = np.cumsum(counts)
    with_text = np.flatnonzero(~white)
    keep = np.zeros(len(ends) + 1, bool)
    keep[with_text] = True  # here: the cut before this segment
    before = np.searchsorted(with_text, after - counts)
    first = with_text[before[before < np.searchsorted(with_text, after)]]
    keep[first] = False
    keep = keep[1:]
    keep[after[counts > 0] - 1] = True
    return ends[keep], _kept_counts(keep, counts)


def _merge_short(ends: np.ndarray, start: np.ndarray, counts: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """From each cut to the first one that is far enough, in all completions at once."""
    after = np.cumsum(counts)
    keep = np.zeros(len(ends), bool)
    latest = np.full(len(start), -1)
    rows, at = np.flatnonzero(counts), start[counts > 0]
    while len(rows):
        found = np.searchsorted(ends, at + least)
        there = found < after[rows]
        rows, found = rows[there], found[there]
        keep[found] = True
        latest[rows] = found
        at = ends[found]
    keep[latest[latest >= 0]] = False  # what is left after it is too short: it ends where the completion does
    keep[after[counts > 0] - 1] = True
    return ends[keep], _kept_counts(keep, counts)


def _kept_counts(keep: np.ndarray, counts: np.ndarray) -> np.ndarray:
    kept = np.concatenate([[0], np.cumsum(keep)])
    after = np.cumsum(counts)
    return kept[after] - kept[after - counts]


# Reducing.


def _means(numbers: np.ndarray, counted: np.ndarray | None, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Means of the counted numbers between starts and ends, NaN where there are none."""
    means = np.full(len(ends), np.nan)
    some = ends > starts  # reduceat gives an empty one its neighbour's number
    starts, ends = starts[some], ends[some]
    if not len(ends):
        return means
    # reduceat sums up to the next start: what lies before it and belongs to no segment must not count.
    gaps = np.append(starts[1:], len(numbers)) - ends
    holes = _ranges(ends[gaps > 0], gaps[gaps > 0])
    n = ends - starts
    if counted is not None:
        counted[holes] = False
        numbers = np.where(counted, numbers, 0.0)  # not a product: 0 * NaN is NaN
        n = np.add.reduceat(counted, starts, dtype=np.int64)
    numbers[holes] = 0.0
    with np.errstate(invalid="ignore"):  # 0 / 0, and infinities of both signs
        means[some] = np.add.reduceat(numbers, starts) / n
    return means


def _counted(lists: pa.Array, start: np.ndarray, end: np.ndarray, n: int) -> np.ndarray:
    """Of each token: does the loss mask count it?"""
    first, last, values, valid = _lists(lists)
    lengths = end - start if valid is None else np.where(valid, end - start, 0)
    if (last - first != lengths).any():
        raise EcholabError("a loss_mask that is longer or shorter than its entropies")
    counted = np.ones(n, bool)
    counted[_ranges(start, lengths)] = values.fill_null(False).to_numpy(zero_copy_only=False)[_ranges(first, lengths)]
    return counted


def _peaks(means: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The first segment of highest entropy of each completion, and that entropy."""
    start, end, values, _ = _lists(means)
    numbers = values.fill_null(-np.inf).to_numpy()
    position = np.zeros(len(start), np.int64)
    highest = np.full(len(start), -np.inf)
    some = end > start
    if some.any():
        highest[some] = np.maximum.reduceat(numbers, start[some])
        equal = np.flatnonzero(numbers == np.repeat(highest, end - start))
        position[some] = equal[np.searchsorted(equal, start[some])] - start[some]
    none = highest == -np.inf
    return pa.array(position, pa.int32(), mask=none), pa.array(highest, pa.float64(), mask=none)


# Arrow.


def _pieces(*columns: Column) -> Iterator[pa.RecordBatch]:
    """Rows of all columns together, so many that the first has about PIECE values; nothing is copied."""
    for batch in pa.table(list(columns), names=[str(i) for i in range(len(columns))]).to_batches():
        if not batch.num_rows:
            continue
        offsets = batch.column(0).offsets.to_numpy()
        row = 0
        while row < batch.num_rows:
            upto = max(row + 1, int(np.searchsorted(offsets, offsets[row] + PIECE, "right")) - 1)
            yield batch.slice(row, upto - row)
            row = upto


def _lists(array: pa.Array) -> tuple[np.ndarray, np.ndarray, pa.Array, np.ndarray | None]:
    """Start and end of each list, the values of these lists alone, and which are not NULL (None: all); one that is NULL
    is empty."""
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    offsets -= offsets[0]
    start, end = offsets[:-1], offsets[1:]
    if not array.null_count:
        return start, end, values, None
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return start, np.where(valid, end, start), values, valid


def _ranges(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(start - before, lengths) + np.arange(lengths.sum())


def _list_array(values: pa.Array, counts: np.ndarray, valid: np.ndarray | None) -> pa.ListArray:
    offsets = pa.array(np.append(0, np.cumsum(counts)), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, mask=None if valid is None else pa.array(~valid))
