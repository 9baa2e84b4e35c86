from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.readers.base import parse_json
from echolab.readers.jsonstream import ALL, Broken, Piece, walk

SCALARS = st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(allow_nan=False) | st.text(max_size=8)
TRICKY = st.sampled_from(['"', "\\", '\\"', "}{", "][", "\\\\", "\u2028", "😀", '{"a": [1]}', "\n"])
VALUES = st.recursive(
    SCALARS | TRICKY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | TRICKY, inner, max_size=4),
    max_leaves=12,
)
LISTS = st.lists(VALUES, max_size=6)
INDENTS = st.sampled_from([None, 0, 2])
CHUNKS = st.integers(1, 64)


def split(path, names, chunk=1 << 20):
    items = list(walk(path, names, chunk=chunk))
    return [i for i in items if isinstance(i, Piece)], [i for i in items if isinstance(i, Broken)]


def elements(pieces):
    return [parse_json(p.raw) for p in pieces if not p.side]


@settings(max_examples=80, deadline=None)
@given(LISTS, INDENTS, st.booleans(), CHUNKS)
def test_elements_of_an_array_equal_json_loads_for_every_chunk_size(scratch, values, indent, ascii, chunk):
    path = scratch / "a.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    pieces, broken = split(path, (ALL,), chunk)
    assert elements(pieces) == values
    assert [p.at for p in pieces] == [(i,) for i in range(len(values))]
    assert not broken


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["rows", "a", "b\\"]), LISTS, max_size=3),
    st.dictionaries(st.text(max_size=3), VALUES),
    CHUNKS,
)
def test_elements_within_objects_and_their_side_values_are_all_of_the_document(scratch, inner, around, chunk):
    around.pop("sets", None)
    document = {**around, "sets": [inner, {"rows": None}, {}]}
    path = scratch / "b.json"
    path.write_text(json.dumps(document, indent=1))
    pieces, broken = split(path, ("sets", ALL, "rows", ALL), chunk)
    assert not broken
    assert elements(pieces) == inner.get("rows", [])
    sides = {p.at: parse_json(p.raw) for p in pieces if p.side}
    expected = {(k,): v for k, v in around.items()} | {("sets", 0, k): v for k, v in inner.items() if k != "rows"}
    assert sides == expected


@settings(max_examples=100, deadline=None)
@given(LISTS, st.data(), CHUNKS)
def test_a_truncated_array_loses_no_complete_element_and_no_byte(scratch, values, data, chunk):
    whole = json.dumps(values).encode()
    cut = data.draw(st.integers(1, len(whole) - 1))
    path = scratch / "c.json"
    path.write_bytes(whole[:cut])
    pieces, broken = split(path, (ALL,), chunk)
    decoder, at, complete, last = json.JSONDecoder(), 1, 0, 0
    for _ in values:
        _, end = decoder.raw_decode(whole.decode(), at)
        at = end + 2
        if end + (whole[end - 1 : end] not in (b'"', b"]", b"}")) <= cut:  # a number needs what ends it
            complete, last = complete + 1, end
    assert elements(pieces) == values[:complete]
    assert len(broken) == 1
    assert "the file ends in the middle of" in broken[0].reason
    assert whole[:cut].endswith(broken[0].raw)
    assert not whole[last : cut - len(broken[0].raw)].strip(b"[, ")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}",:\\ 1etrufalsn', max_size=60).map(str.encode), CHUNKS)
def test_random_bytes_never_raise(scratch, content, chunk):
    path = scratch / "d.json"
    path.write_bytes(content)
    for names in ((ALL,), ("a", ALL), ("a", ALL, "b", ALL)):
        split(path, names, chunk)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_nan_and_infinity_pass_through(tmp_path, chunk):
    path = tmp_path / "a.json"
    path.write_text('[NaN, Infinity, {"r": -Infinity}]')
    pieces, broken = split(path, (ALL,), chunk)
    assert [p.raw for p in pieces] == [b"NaN", b"Infinity", b'{"r": -Infinity}']
    assert not broken


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["", "\r\n \n"])
def test_bom_and_crlf_are_no_part_of_a_document(tmp_path, start, end):
    path = tmp_path / "a.json"
    path.write_bytes((start + "[\r\n1,\r\n2\r\n]" + end).encode())
    pieces, broken = split(path, (ALL,), 2)
    assert elements(pieces) == [1, 2]
    assert not broken


@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_an_empty_file_holds_nothing_and_is_no_error(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert split(path, (ALL,)) == ([], [])


@pytest.mark.parametrize(
    ("content", "complete", "reason"),
    [
        (b"[1, 2 3]", [1, 2], "at byte 6: expected ',', found '3'"),
        (b'[1, :, "x"]', [1], "at byte 4: unexpected ':'"),
        (b"[1] [2]", [1], "something follows the end of the document"),
        (b'{"a": 1}', [], "expected a list at the document"),
    ],
)
def test_a_document_that_is_no_json_says_where_and_keeps_the_rest(tmp_path, content, complete, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    pieces, broken = split(path, (ALL,))
    assert elements(pieces) == complete
    assert reason in broken[0].reason
    assert content.endswith(broken[0].raw)
    assert broken[0].raw


def test_a_backslash_before_a_line_break_spoils_its_element_only(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'["a\\\nb", 1]')
    pieces, broken = split(path, (ALL,), 1)
    assert [p.raw for p in pieces] == [b'"a\\\nb"', b"1"]
    assert not broken


def test_deep_nesting_is_walked_without_recursion(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'["x", ' + b"[" * 100_000 + b"]" * 100_000 + b', "y"]')
    pieces, broken = split(path, (ALL,))
    assert len(pieces) == 3
    assert not broken
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(pieces[1].raw)


def test_parse_json_takes_what_is_nested_less_deeply_and_brackets_in_strings():
    assert parse_json(b"[" * 500 + b"]" * 500)
    assert parse_json(json.dumps({"x": '{"[' * 5000}).encode()) == {"x": '{"[' * 5000}


def test_a_string_of_50_mb_takes_time_in_proportion_to_its_length(tmp_path):
    def seconds(megabytes: int) -> float:
        path = tmp_path / f"{megabytes}.json"
        path.write_bytes(b'["' + rb"some text\n \"quoted\" {[" * (megabytes * 1_000_000 // 24) + b'", 1]')
        begin = time.perf_counter()
        pieces, broken = split(path, (ALL,), 1 << 16)
        assert len(pieces) == 2
        assert not broken
        return time.perf_counter() - begin

    assert seconds(50) < 60 * max(seconds(5), 0.02)  # 800 chunks: a quadratic scan takes hundreds of times as long
