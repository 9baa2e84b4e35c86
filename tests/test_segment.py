"""Segments against loops over single tokens and characters, and real texts against plain text splitting."""

from __future__ import annotations

import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab import segment as module
from echolab.errors import EcholabError, WrongUsage
from echolab.schema import SCORES, SEGMENTATIONS
from echolab.segment import Segmenter, segment, segment_means, segmentations, split_text
from echolab.sql import Session
from echolab.validate import validate
from echolab.vocab import Vocab, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
EXPERTS = ("qwen25_14b_instruct", "sky_t1_correct_14b", "sky_t1_reflection02_32b")

# Whole and split characters, newlines alone, in runs, within and between text, white space, nothing at all; EOS is 30.
PIECES = (
    b"a", b" b", b"\n", b"\n\n", b".\n", b" ", b"\t \n ", b"", b"\xc3", b"\xa9", b"\xe3\x80", b"\x82", b". ", b".", b"3",
    b"1", b"!", b"x\ny", b"\r\n", "\u3000".encode(), b"\xff", b"12. ", "é。".encode(), b'"', b") ",
)  # fmt: skip
EOS = 30
VOCAB = Vocab("t", {**dict(enumerate(PIECES)), EOS: b"<|end|>"}, frozenset({EOS}))
UNKNOWN = (-7, 27, 31, 2**31 - 1)

MODES = (
    "newline", "paragraph", "sentence", "exact_ids:2,3", "exact_ids:0", "fixed:1", "fixed:3", r"regex:\n", "regex:a+", 
    "regex:.", "regex:(?=b)", "regex:é|a|$", r"regex:\W\s", "regex:x*",
)  # fmt: skip


# By hand.


def bytes_of(token: int) -> bytes:
    return VOCAB.pieces.get(token, b"")


def delimits(tokens: list[int], mode: str) -> list[bool]:
    """Of each token: is there a cut after it?"""
    kind, _, argument = mode.partition(":")
    if kind == "newline":
        return [b"\n" in bytes_of(t) for t in tokens]
    if kind == "exact_ids":
        return [str(t) in argument.split(",") for t in tokens]
    if kind == "fixed":
        return [(i + 1) % int(argument) == 0 for i in range(len(tokens))]
    owner = [i for i, t in enumerate(tokens) for _ in bytes_of(t)]  # of each byte
    text = b"".join(map(bytes_of, tokens)).decode(errors="surrogateescape")
    last_byte, at = [], 0  # of each character
    for character in text:
        at += len(character.encode(errors="surrogateescape"))
        last_byte.append(at - 1)
    ends = {"paragraph": blank_lines, "sentence": sentences}.get(kind, lambda t: [m.end() for m in re.finditer(argument, t)])
    found = {owner[last_byte[end - 1]] for end in ends(text) if 0 < end < len(text)}
    return [i in found for i in range(len(tokens))]


def blank_lines(text: str) -> list[int]:
    """After the last newline of every run of white space that has two."""
    found, i = [], 0
    while i < len(text):
        stop = i + 1
        if text[i].isspace():
            while stop < len(text) and text[stop].isspace():
                stop += 1
            if text[i:stop].count("\n") > 1:
                found.append(i + text[i:stop].rindex("\n") + 1)
        i = stop
    return found


def sentences(text: str) -> list[int]:
    found, i, line = [], 0, 0
    while i < len(text):
        if i == line and (item := re.match(r"[ \t#>*_-]*\d+[.)][ \t]+", text[i:])):
            i += item.end()
            continue
        if text[i] == "\n":
            found.append(i + 1)
            line = i = i + 1
            continue
        marks = next((m for m in (".!?…", "。！？｡") if text[i] in m), "")
        stop = i + 1
        if marks:
            while stop < len(text) and text[stop] in marks:
                stop += 1
            while stop < len(text) and text[stop] in "\"'”’»)]}*_$`":
                stop += 1
            if marks.startswith("。") or (stop < len(text) and text[stop].isspace()):
                found.append(stop)
            else:
                stop = i + 1
        i = stop
    return found


def by_hand(tokens: list[int] | None, config: Segmenter, eos: tuple[int, ...]) -> list[int] | None:
    if tokens is None:
        return None
    tokens = list(tokens)
    while tokens and tokens[-1] in eos:
        tokens.pop()
    segments: list[list[int]] = [[]] if tokens else []
    for token, ends in zip(tokens, delimits(tokens, config.mode), strict=True):
        segments[-1].append(token)
        if ends:
            segments.append([])
    segments = [s for s in segments if s]
    if config.merge_blank and not config.mode.startswith("fixed"):
        segments = without_blank(segments)
    longer: list[list[int]] = []
    gathered: list[int] = []
    for s in segments:
        gathered = gathered + s
        if len(gathered) >= config.min_segment_tokens:
            longer.append(gathered)
            gathered = []
    if gathered:
        longer = [*longer[:-1], longer[-1] + gathered] if longer else [gathered]
    return [sum(map(len, longer[: i + 1])) for i in range(len(longer))]


def without_blank(segments: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    leading: list[int] = []
    for s in segments:
        if any(bytes_of(t).decode(errors="replace").strip() for t in s):
            merged.append(leading + s)
            leading = []
        elif merged:
            merged[-1] = merged[-1] + s
        else:
            leading = leading + s
    return [*merged, leading] if leading else merged


def means_by_hand(numbers: Any, ends: list[int] | None, mask: Any) -> list[float | None] | None:
    if numbers is None or ends is None:
        return None
    found: list[float | None] = []
    for a, b in pairwise([0, *ends]):
        counted = [e for e, m in zip(numbers[a:b], (mask or [True] * len(numbers))[a:b], strict=True) if m]
        known = counted and all(e is not None and math.isfinite(e) for e in counted)
        found.append(float(np.float32(math.fsum(counted) / len(counted))) if known else None)
    return found


# Columns of any shape.

TOKENS = st.one_of(
    st.lists(st.sampled_from([*range(len(PIECES)), EOS]), max_size=14),
    st.lists(st.sampled_from([2, 3, 6, 5, 0]), max_size=8),  # mostly white space
    st.lists(st.sampled_from([0, 4, EOS, *UNKNOWN]), max_size=6),
    st.builds(list.__add__, st.lists(st.sampled_from([0, 4]), max_size=4), st.lists(st.just(EOS), max_size=3)),
)
CONFIGS = st.builds(
    Segmenter, mode=st.sampled_from(MODES), merge_blank=st.booleans(), min_segment_tokens=st.sampled_from([1, 1, 2, 4])
)
NUMBERS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])  # their sums are exact, and there are ties
WRONG = st.sampled_from([None, math.nan, math.inf, -math.inf])


def column(rows: list, type: pa.DataType, rng: random.Random) -> pa.ChunkedArray:
    """Rows as slices of longer arrays, in chunks."""
    chunks, at = [], 0
    while at < len(rows):
        upto = min(len(rows), at + rng.randint(1, 4))
        garbage = [rows[0], *rows[at:upto], rows[-1]]
        chunks.append(pa.array(garbage, type).slice(1, upto - at))
        at = upto
    return pa.chunked_array(chunks, type)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Columns of a few tokens are worked on in several pieces too."""
    monkeypatch.setattr(module, "PIECE", 8)


@settings(deadline=None, max_examples=400)
@given(
    rows=st.lists(st.none() | TOKENS, max_size=7),
    config=CONFIGS,
    eos=st.sampled_from([(), (EOS,), (EOS, 0)]),
    large=st.booleans(),
    seed=st.integers(0, 9),
)
def test_segments_are_those_of_a_loop_over_single_tokens(rows, config, eos, large, seed):
    type = pa.large_list(pa.int64()) if large else pa.list_(pa.int32())
    found = segment(column(rows, type, random.Random(seed)), VOCAB, config, eos)
    assert found.type == pa.list_(pa.int32())
    assert found.to_pylist() == [by_hand(tokens, config, eos) for tokens in rows]


@settings(deadline=None, max_examples=200)
@given(rows=st.lists(TOKENS, min_size=1, max_size=6), config=CONFIGS)
def test_segments_partition_all_tokens_but_final_eos(rows, config):
    for tokens, ends in zip(rows, segment(pa.array(rows, pa.list_(pa.int32())), VOCAB, config, [EOS]).to_pylist(), strict=True):
        assert all(a < b for a, b in pairwise([0, *ends]))
        assert set(tokens[ends[-1] if ends else 0 :]) <= {EOS}
        assert not ends or tokens[ends[-1] - 1] != EOS
        assert all(b - a >= min(config.min_segment_tokens, ends[-1]) for a, b in pairwise([0, *ends]))


def test_a_row_that_is_null_over_values_counts_as_null():
    offsets, values = pa.array([0, 2, 5, 6], pa.int32()), pa.array([0, 2, 2, 2, 2, 0], pa.int32())
    hidden = pa.ListArray.from_arrays(offsets, values, mask=pa.array([False, True, False]))
    assert segment(hidden, VOCAB, Segmenter(merge_blank=False)).to_pylist() == [[2], None, [1]]


@settings(deadline=None, max_examples=300)
@given(data=st.data(), seed=st.integers(0, 9))
def test_means_are_those_of_a_loop_and_only_counted_tokens_count(data, seed):
    rows, ends, masks = [], [], []
    for _ in range(data.draw(st.integers(0, 6))):
        numbers = data.draw(st.none() | st.lists(NUMBERS | NUMBERS | NUMBERS | WRONG, max_size=9))
        n = len(numbers or ())
        cuts = sorted(data.draw(st.sets(st.integers(1, n)))) if n else []
        rows.append(numbers)
        ends.append(data.draw(st.sampled_from([cuts, cuts, None])))
        masks.append(data.draw(st.none() | st.lists(st.booleans() | st.none(), min_size=n, max_size=n)))
    rng = random.Random(seed)
    floats = data.draw(st.sampled_from([pa.list_(pa.float32()), pa.large_list(pa.float64())]))
    columns = column(rows, floats, rng), column(ends, pa.list_(pa.int32()), rng), column(masks, pa.list_(pa.bool_()), rng)
    found = segment_means(*columns)
    assert found.type == pa.list_(pa.float32())
    assert found.to_pylist() == [means_by_hand(*row) for row in zip(rows, ends, masks, strict=True)]
    assert segment_means(*columns[:2]).to_pylist() == [means_by_hand(r, e, None) for r, e in zip(rows, ends, strict=True)]


def test_means_of_long_segments_are_exact_to_the_last_bit_of_a_float32():
    rng = np.random.default_rng(0)
    numbers = rng.gamma(0.2, 2.0, 300_000).astype(np.float32)
    found = segment_means(pa.array([numbers]), pa.array([[100_000, 100_007, 300_000]], pa.list_(pa.int32())))
    parts = np.split(numbers, [100_000, 100_007])
    assert found.to_pylist() == [[float(np.float32(math.fsum(p.tolist()) / len(p))) for p in parts]]


def scores(rows: list[tuple[list, list, list | None]]) -> pa.Table:
    """Rows of token ids, entropies and loss mask."""
    columns = {
        "rollout_id": [f"r{i}" for i in range(len(rows))], "scorer": ["s"] * len(rows), "run": ["r"] * len(rows),
        "step": [1] * len(rows), "token_ids": [t for t, _, _ in rows], "loss_mask": [m for _, _, m in rows],
        "entropies": [e for _, e, _ in rows], "logprobs": [None] * len(rows), "mean_entropy": [None] * len(rows),
        "n_tokens": [len(t) for t, _, _ in rows],
    }  # fmt: skip
    return pa.table(columns, schema=SCORES.arrow)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), config=CONFIGS, seed=st.integers(0, 9))
def test_segmentations_are_those_of_each_score_alone_in_any_order(data, config, seed):
    rows = []
    for _ in range(data.draw(st.integers(0, 5))):
        tokens = data.draw(TOKENS)
        n = len(tokens)
        numbers = data.draw(st.lists(NUMBERS | NUMBERS | NUMBERS | WRONG, min_size=n, max_size=n))
        rows.append((tokens, numbers, data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))))
    found = segmentations(scores(rows), VOCAB, config, [EOS])
    assert found.schema.equals(SEGMENTATIONS.arrow)
    for (tokens, numbers, mask), row in zip(rows, found.to_pylist(), strict=True):
        ends = by_hand(tokens, config, (EOS,))
        means = means_by_hand(numbers, ends, mask)
        known = [m for m in means or () if m is not None]
        assert (row["segment_ends"], row["segment_entropies"], row["n_segments"]) == (ends, means, len(ends or ()))
        assert row["peak_entropy"] == (max(known) if known else None)
        assert row["peak_segment"] == ((means or []).index(max(known)) if known else None)
        assert (row["scorer"], row["segmenter"]) == ("s", config.id("t"))
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    shuffled = segmentations(scores(rows).take(pa.array(order, pa.int64())), VOCAB, config, [EOS])
    assert shuffled.to_pylist() == found.take(pa.array(order, pa.int64())).to_pylist()


def test_nan_and_infinity_never_win_and_the_first_of_equals_does():
    tokens, nan = [4, 4, 4, 4, 4], math.nan
    rows = [(tokens, [0.5, nan, 1.0, 1.0, math.inf], None), (tokens, [nan] * 5, None), ([], [], None), ([EOS], [9.0], None)]
    found = segmentations(scores(rows), VOCAB, eos=[EOS]).to_pylist()
    assert [(r["n_segments"], r["peak_segment"], r["peak_entropy"]) for r in found] == [
        (5, 2, 1.0), (5, None, None), (0, None, None), (0, None, None),
    ]  # fmt: skip
    assert found[0]["segment_entropies"] == [0.5, None, 1.0, 1.0, None]


def test_columns_that_do_not_fit_together_are_clear_errors():
    tokens, floats = pa.array([[0, 2]], pa.list_(pa.int32())), pa.array([[0.5, 1.0]], pa.list_(pa.float32()))
    for wrong in ([[3]], [[2, 1]], [[0, -1]], [[-1]]):
        with pytest.raises(EcholabError, match="segment_ends that do not fit"):
            segment_means(floats, pa.array(wrong, pa.list_(pa.int32())))
    with pytest.raises(EcholabError, match="loss_mask that is longer or shorter"):
        segment_means(floats, tokens.slice(0, 0).from_arrays([0, 1], [2]), pa.array([[True]]))
    with pytest.raises(EcholabError, match="NULL among them"):
        segment(pa.array([[0, None]], pa.list_(pa.int32())), VOCAB)
    for numbers in ([0.5], [0.5, 1.0, 2.0]):
        with pytest.raises(EcholabError, match="more of the one than of the other"):
            segmentations(scores([([0, 2], numbers, None)]), VOCAB)
    empty = segmentations(scores([]), VOCAB)
    assert empty.num_rows == 0 and empty.schema.equals(SEGMENTATIONS.arrow)


# What the modes mean.


@pytest.mark.parametrize(
    ("mode", "text", "segments"),
    [
        ("newline", "a\nb\n\nc", ["a\n", "b\n\n", "c"]),
        ("newline", "\n\n a\n \nb\n", ["\n\n a\n \n", "b\n"]),
        ("newline", "no end", ["no end"]),
        ("newline", " \n\n", [" \n\n"]),
        ("newline", "", []),
        ("newline", "<think>\nso\n</think>\n7", ["<think>\n", "so\n", "</think>\n", "7"]),
        ("newline", "a\r\nb\rc", ["a\r\n", "b\rc"]),
        ("paragraph", "a\nb\n\nc\n \t\nd\r\n\r\ne\n\n\n\nf", ["a\nb\n\n", "c\n \t\n", "d\r\n\r\n", "e\n\n\n\n", "f"]),
        ("paragraph", "a\n\n  indented", ["a\n\n", "  indented"]),
        ("sentence", "It is 3.14. Is it? (Yes!) So…  \nEnd", ["It is 3.14.", " Is it?", " (Yes!)", " So…  \n", "End"]),
        ("sentence", "1. First. Then 2.\n2) Last", ["1. First.", " Then 2.\n", "2) Last"]),
        ("sentence", "### Step 1\n- **3. Bold.** x.", ["### Step 1\n", "- **3. Bold.**", " x."]),
        ("sentence", "所以。对吗？x！", ["所以。", "对吗？", "x！"]),
        ("sentence", 'He said "No." Then', ['He said "No."', " Then"]),
        ("sentence", "e.g. this", ["e.g.", " this"]),
        (r"regex:(?=Step \d)", "Step 1: a Step 2: b", ["Step 1: a ", "Step 2: b"]),
        ("regex:Wait", "Hm. Wait, no. Wait", ["Hm. Wait", ", no. Wait"]),
        ("regex:é", "aé🙂éb", ["aé", "🙂é", "b"]),
    ],
)
def test_texts_are_cut_as_the_page_says(mode, text, segments):
    assert split_text(text, Segmenter(mode=mode)) == segments


def test_options_change_what_is_merged():
    text = "\na\n\nb\n"
    assert split_text(text, Segmenter(merge_blank=False)) == ["\n", "a\n", "\n", "b\n"]
    assert split_text("a\nbcd\ne\nfgh\ni", Segmenter(min_segment_tokens=4)) == ["a\nbcd\n", "e\nfgh\ni"]
    with pytest.raises(EcholabError, match="counts tokens"):
        split_text(text, Segmenter(mode="fixed:2"))


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("a .\n\t\r\x0b\u3000\u00a0é🙂"), max_size=30))
def test_newline_mode_finds_every_line_of_any_text(text):
    segments = split_text(text)
    assert "".join(segments) == text
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    assert [s.strip() for s in segments if s.strip()] == lines
    assert len(segments) == max(len(lines), bool(text))


def test_a_long_text_without_an_end_is_cut_in_linear_time():
    for mode in ("sentence", "paragraph"):
        assert len(split_text("a" * 300_000 + " \t" * 100_000, Segmenter(mode=mode))) == 1


# The options.


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("newline", "newline"), ("exact_ids", "exact_ids:198,271"), ("exact_ids: 271,198,271", "exact_ids:198,271"),
        ("fixed:064", "fixed:64"), ("regex:a:b", "regex:a:b"), ("sentence", "sentence"),
    ],
)  # fmt: skip
def test_the_mode_is_kept_in_one_spelling(written, kept):
    assert Segmenter.make(mode=written).mode == kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "lines"}, "use newline, paragraph"),
        ({"mode": "fixed"}, "unknown mode"),
        ({"mode": "fixed:0"}, "unknown mode"),
        ({"mode": "newline:2"}, "unknown mode"),
        ({"mode": "regex:"}, "unknown mode"),
        ({"mode": "regex:("}, "not a regular expression"),
        ({"mode": "exact_ids:a"}, "takes token ids"),
        ({"mode": "exact_ids:"}, "unknown mode"),
        ({"min_segment_tokens": 0}, "at least 1"),
        ({"merge": True}, "did you mean merge_blank"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, said):
    with pytest.raises(WrongUsage, match=said) as e:
        Segmenter.make(**options)
    assert "\n" not in str(e.value)


def test_the_id_tells_all_options_and_tokenizers_apart():
    configs = [Segmenter(), Segmenter(mode="sentence"), Segmenter(merge_blank=False), Segmenter(min_segment_tokens=2)]
    found = {c.id(t) for c in configs for t in ("t", "u")}
    assert len(found) == 8 and Segmenter(mode="newline").id("t") in found
    assert json.loads(json.dumps(Segmenter().resolved("t"))) == {
        "mode": "newline", "merge_blank": True, "min_segment_tokens": 1, "tokenizer": "t", "version": 1,
    }  # fmt: skip


# Real texts, a real tokenizer, the store.


@pytest.fixture(scope="module")
def qwen() -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed: no tokenizer to test with")
    if not DATA.is_dir():
        pytest.skip("../shared/data not found: real-data test skipped")
    return load_tokenizer(DATA / "tokenizers" / "qwen2.5")


@pytest.fixture(scope="module")
def vocab(qwen) -> Vocab:
    return Vocab.of(qwen)


@pytest.fixture(scope="module")
def experts(qwen) -> dict[str, list[tuple[str, list[int]]]]:
    """Of each file its texts and their tokens."""
    found = {}
    for name in EXPERTS:
        texts = [json.loads(line)["code"][0] for line in (DATA / "experts" / f"{name}_amc23.jsonl").read_text().splitlines()]
        found[name] = list(zip(texts, qwen(texts, add_special_tokens=False)["input_ids"], strict=True))
    return found


def text_lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def texts_of(tokens: list[int], ends: list[int], qwen: Any) -> list[str]:
    return [qwen.decode(tokens[a:b], skip_special_tokens=False) for a, b in pairwise([0, *ends])]


def test_newline_mode_finds_every_text_line_of_the_real_experts(experts, vocab, qwen, monkeypatch):
    monkeypatch.undo()  # pieces of their real size
    for name, rows in experts.items():
        found = segment(pa.array([tokens for _, tokens in rows], pa.list_(pa.int32())), vocab).to_pylist()
        for (text, tokens), ends in zip(rows, found, strict=True):
            assert [s.strip() for s in texts_of(tokens, ends, qwen)] == text_lines(text), name


def test_modes_on_the_real_text_agree_with_each_other(experts, vocab, qwen, monkeypatch):
    monkeypatch.undo()
    rows = experts["qwen25_14b_instruct"]
    tokens = pa.array([tokens for _, tokens in rows], pa.list_(pa.int32()))
    lines, pattern = (segment(tokens, vocab, Segmenter(mode=m)).to_pylist() for m in ("newline", r"regex:\n"))
    assert lines == pattern
    paragraphs = segment(tokens, vocab, Segmenter(mode="paragraph")).to_pylist()
    for (text, ids), ends in zip(rows, paragraphs, strict=True):
        expected = [p.strip() for p in re.split(r"\n[ \t\r]*\n", text) if p.strip()]
        assert [s.strip() for s in texts_of(ids, ends, qwen)] == expected


def test_the_figures_of_the_page_are_those_of_the_data(experts, vocab, monkeypatch):
    monkeypatch.undo()
    page = (ROOT / "docs" / "segments.md").read_text()
    totals = np.zeros(5, int)
    rows = []
    for name, texts in experts.items():
        tokens = pa.array([tokens for _, tokens in texts], pa.list_(pa.int32()))
        cuts = [len(segment(tokens, vocab, Segmenter(mode=mode)).combine_chunks().values) for mode in ("newline", "exact_ids")]
        lines = sum(len(text_lines(text)) for text, _ in texts)
        figures = np.array([sum(len(t) for _, t in texts), lines, *cuts, lines - cuts[1]])
        rows.append((f"`{name}`", figures))
        totals += figures
    for name, figures in [*rows, ("all", totals)]:
        share = f"{figures[4] / figures[1]:.1%}"
        row = f"| {name} | " + " | ".join(f"{n:,}" for n in figures[:4]) + f" | {figures[4]:,} ({share}) |"
        assert row in page, f"docs/segments.md should say: {row}"
    bearing = int(vocab.newline.sum())
    assert f"{bearing:,} of its {vocab.size:,} tokens hold a newline" in page


def test_what_is_stored_is_valid_and_the_views_show_the_segments(make_store, add_rows):
    store = make_store([{"rollout_id": f"r{i}"} for i in range(3)])
    rows = [([0, 4, 1, 2, 0, EOS], [0.5, 1.5, 3.0, 1.0, 0.0, 9.0], None), ([0], [0.25], [False]), ([], [], None)]
    table, config = scores(rows), Segmenter()
    VOCAB.keep(store)
    add_rows(store, "scores", table.to_pylist())
    add_rows(store, "segmentations", segmentations(table, VOCAB, config, [EOS]).to_pylist())
    with store.lock():
        store.register("scorers", "s", "recorded", {"tokenizer": "t"})
        store.register("segmenters", config.id("t"), config.mode, config.resolved("t"))
    with Session(store.snapshot()) as s:
        found = s.sql("SELECT rollout_id, start_token, end_token, entropy, is_peak FROM segments ORDER BY ALL").rows()
        stored = segmentations(
            s.sql("SELECT * FROM scores ORDER BY rollout_id").to_arrow(), Vocab.stored(store.snapshot(), "t")
        )
    assert found == [("r0", 0, 2, 1.0, False), ("r0", 2, 4, 2.0, True), ("r0", 4, 5, 0.0, False), ("r1", 0, 1, None, False)]
    assert stored["n_segments"].to_pylist() == [3, 1, 0]
    assert validate(store.snapshot()) == []
