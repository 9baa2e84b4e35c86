from __future__ import annotations

import json
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from generators import echorl as dump
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.readers import echorl, look
from echolab.readers.jsonstream import ALL, walk

EOS, PAD = dump.EOS, dump.PAD


def known(path: Path) -> str | None:
    return echorl.sniff(look(path))


def one(folder: Path, *, category: str = "correct_rollouts", first: dict | None = None, **other) -> Path:
    """A dump whose first record shows the padding, and one more with the given changes."""
    rows = [
        first or dump.trained(0, [10, 11], [40, EOS], 1.0, 5),
        {**dump.trained(1, [10, 11], [41, 42, EOS], 1.0, 5), **other},
    ]
    return dump.document(folder, 5, {category: rows})


def test_padding_is_taken_off_ids_and_texts_and_entropies_become_scores(tmp_path, read):
    path = dump.trainer(tmp_path, step=10, prompts=2, n=4)
    assert known(path)
    result = read(echorl, path)
    assert (len(result.rows), result.bad, result.source.notes) == (16, [], [])
    assert result.source.found == {"whole": True}
    assert result.source.consumed == path.stat().st_size
    by_id = {r.fields["extra"]["sample_id"]: r for r in result.rows}
    assert [r.row for r in result.rows] == list(range(16))
    for sample in range(16):
        row, i, p, step = by_id[sample], sample % 4, sample // 4 % 2, 9 + sample // 8
        prompt, response = [10, 11 + p, 12 + step], [40 + t + i for t in range(3 + i)] + [EOS]
        f = row.fields
        assert (f["prompt_ids"], f["completion_ids"]) == (prompt, response)
        assert (f["prompt"], f["completion"]) == (dump.decode(prompt), dump.decode(response))
        assert row.scores.entropies == dump.entropies(sample, len(response))
        assert (f["step"], f["reward"], f["success_recorded"], f["split"]) == (step, float(1 - i % 2), i % 2 == 0, "train")
        assert f["extra"] == {"category": "wrong_rollouts" if i % 2 else "correct_rollouts", "sample_id": sample}
        assert (row.key, f.get("sample"), row.scores.logprobs) == (None, None, None)
    assert len({(tuple(r.fields["prompt_ids"]), r.fields["step"]) for r in result.rows}) == 4  # its groups


def test_a_pad_that_is_the_end_token_too_leaves_one_at_the_end(tmp_path, read):
    rows = [dump.trained(i, [10, 11], [40] * (3 + i) + [PAD], 1.0, 5) for i in range(3)]
    result = read(echorl, dump.document(tmp_path, 5, {"correct_rollouts": rows}))
    assert [r.fields["completion_ids"] for r in result.rows] == [[40] * (3 + i) + [PAD] for i in range(3)]
    assert result.rows[0].fields["completion"] == dump.decode([40] * 3 + [PAD])
    assert not result.source.notes


def test_prompts_and_responses_without_any_padding_keep_all_their_tokens(tmp_path, read):
    full = dump.trained(7, [10] * 2 + [11] * (dump.PROMPT - 2), [42] * dump.RESPONSE, 0.0, 5)
    result = read(echorl, one(tmp_path, first=full))  # before anything shows the padding
    first, second = result.rows
    assert first.fields["prompt_ids"] == [10] * 2 + [11] * (dump.PROMPT - 2)
    assert first.fields["completion_ids"] == [42] * dump.RESPONSE
    assert first.fields["completion"] == dump.decode([42] * dump.RESPONSE)
    assert second.fields["prompt_ids"] == [10, 11]


def test_a_padding_that_no_response_shows_is_a_guess_that_is_said(tmp_path, read):
    rows = [dump.trained(i, [10, 10, 11], [40 + i] * dump.RESPONSE, 1.0, 5) for i in range(2)]
    result = read(echorl, dump.document(tmp_path, 5, {"wrong_rollouts": rows}))
    assert [r.fields["prompt_ids"] for r in result.rows] == [[10, 10, 11]] * 2
    assert any("a guess" in n and str(PAD) in n for n in result.source.notes)
    short = [dump.trained(i, [10, 10] + [11] * (dump.PROMPT - 2), [40 + i] * dump.RESPONSE, 1.0, 5) for i in range(2)]
    result = read(echorl, dump.document(tmp_path / "b", 5, {"wrong_rollouts": short}))
    assert result.rows[0].fields["prompt_ids"][:2] == [10, 10]  # two equal tokens are no padding
    assert not result.source.notes


def _lost(path: Path) -> None:
    path.unlink()


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _short(path: Path) -> None:
    dump.npy(path, [0.5])


def _long(path: Path) -> None:
    dump.npy(path, [0.5] * 99)


def _nan(path: Path) -> None:
    dump.npy(path, [float("nan")] * 3)


def _negative(path: Path) -> None:
    dump.npy(path, [-1.0] * 3)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_lost, "correct_rollouts_tensors/sample_1_entropy.npy is missing"),
        (_torn, "a .npy file that cannot be read"),
        (_short, "1 entropies do not fit 20 response_ids"),
        (_long, "99 entropies do not fit 20 response_ids"),
        (_nan, "an entropy is not finite"),
        (_negative, "an entropy is negative: -1"),
    ],
)
def test_a_rollout_whose_entropies_cannot_be_used_is_kept_without_them_and_it_is_said(tmp_path, read, harm, reason):
    path = one(tmp_path)
    harm(path.parent / "correct_rollouts_tensors" / "sample_1_entropy.npy")
    result = read(echorl, path)
    first, second = result.rows
    assert (first.scores is not None, second.scores) == (True, None)
    assert second.fields["completion_ids"] == [41, 42, EOS]
    assert second.fields["completion"] == dump.decode([41, 42, EOS])
    assert result.source.notes[0].startswith("1 rollouts have no entropies, the first because:")
    assert reason in result.source.notes[0]
    trimmed = [n for n in result.source.notes if n.startswith("the padding of 1 of them is cut off by its id 90")]
    assert len(trimmed) == (harm not in (_nan, _negative))


def test_without_any_entropies_the_padding_still_shows_at_both_ends(tmp_path, read):
    path = dump.trainer(tmp_path, latest=False)
    for file in echorl.companions(path):
        file.unlink()
    result = read(echorl, path)
    assert [r.fields["completion_ids"][-1] for r in result.rows] == [EOS] * 16
    assert {len(r.fields["prompt_ids"]) for r in result.rows} == {3}
    assert result.source.notes[0].startswith("16 rollouts have no entropies")
    assert not any("a guess" in n for n in result.source.notes)


@pytest.mark.parametrize("name", ["../../secret.npy", "/etc/passwd", "link.npy", "a\0b", "", "x" * 5000, 7])
def test_a_file_name_never_leads_out_of_the_dump(tmp_path, read, name):
    dump.npy(tmp_path / "secret.npy", [0.5] * 3)
    path = one(tmp_path / "root", entropy_tensor_file=name)
    (path.parent / "link.npy").symlink_to(tmp_path / "secret.npy")
    result = read(echorl, path)
    assert [r.scores is None for r in result.rows] == [False, True]
    note = result.source.notes[0]
    assert note.startswith("1 rollouts have no entropies")
    assert ("leads out of the dump's folder" in note) == (name in ("../../secret.npy", "/etc/passwd", "link.npy"))


def test_texts_whose_padding_cannot_be_told_are_left_out_and_the_ids_stay(tmp_path, read):
    path = one(tmp_path, response="decoded otherwise")
    result = read(echorl, path)
    assert (result.rows[1].fields["prompt"], result.rows[1].fields["completion"]) == (None, None)
    assert result.rows[1].fields["completion_ids"] == [41, 42, EOS]
    assert any(n.startswith("a text of 1 rollouts is left out") for n in result.source.notes)


def test_golden_trajectories_are_not_padded_and_have_no_verdict(tmp_path, read):
    path = dump.golden(tmp_path, n=3, step=0)
    result = read(echorl, path)
    assert (len(result.rows), result.bad) == (3, [])
    for row, record in zip(result.rows, dump.golden_records(3), strict=True):
        f = row.fields
        assert (f["prompt_ids"], f["completion_ids"]) == (record["prompt_ids"], record["response_ids"])
        assert (f["prompt"], f["completion"]) == (record["prompt"], record["response"])
        assert row.scores.entropies == dump.entropies(record["sample_id"], len(record["response_ids"]))
        assert (f["reward"], f["success_recorded"], f["step"]) == (None, None, 0)
        assert f["extra"]["category"] == "golden_trajectories"
    assert [r.fields["extra"].get("repr") for r in result.rows] == [None, None, ["prompt"]]
    assert any("1 texts are chat messages as Python shows them" in n for n in result.source.notes)
    assert any("3 golden trajectories" in n for n in result.source.notes)
    assert {r.fields["role"] for r in result.rows} == {"expert"}


def test_lines_of_the_golden_script_give_what_the_document_gives(tmp_path, read, read_in_two):
    lines = dump.golden(tmp_path / "a", finished=False)
    assert known(lines)
    assert echorl.aside(lines) is None
    assert echorl.companions(lines) == []
    document = read(echorl, dump.golden(tmp_path / "b"))
    as_lines = read(echorl, lines)
    assert "whole" not in as_lines.source.found
    assert [(r.fields, r.scores) for r in as_lines.rows] == [(r.fields, r.scores) for r in document.rows]
    content = lines.read_bytes()
    for cut in (0, 100, content.index(b"\n") + 1):
        read_in_two(echorl, lines, cut)


def test_lines_are_put_aside_only_where_the_document_holds_them_all(tmp_path):
    path = dump.golden(tmp_path)
    lines = path.with_name("samples.jsonl")
    assert "wrote samples.jsonl again as samples.json" in (echorl.aside(lines) or "")
    assert echorl.aside(path) is None
    with lines.open("a") as f:  # the script went on
        f.write(json.dumps({**dump.golden_records()[0], "entropy_tensor_file": "golden_trajectories_tensors/more.npy"}) + "\n")
    assert echorl.aside(lines) is None


def test_latest_and_entropies_are_put_aside_and_neighbours_are_not(tmp_path):
    path = dump.trainer(tmp_path)
    assert "copy of its newest step" in (echorl.aside(tmp_path / "latest" / "samples.json") or "")
    files = echorl.companions(path)
    assert len(files) == 16
    assert {echorl.aside(f) for f in files} == {"entropies of EchoRL's rollouts: read with samples.json"}
    copied = tmp_path / "latest" / files[0].relative_to(path.parent)
    assert "copy of its newest step" in (echorl.aside(copied) or "")
    path.unlink()
    assert "without their samples.json" in (echorl.aside(files[0]) or "")
    other = tmp_path / "other" / "latest" / "samples.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"completion": "a"}')
    for neighbour in (other, other.with_name("x.npy"), tmp_path / "correct_rollouts_tensors" / "mean.npy"):
        assert echorl.aside(neighbour) is None


def test_skipped_numbers_of_samples_tell_that_rollouts_were_left_out(tmp_path, read):
    kept = [dump.trained(i, [10, 11], [40, EOS], 1.0, 5) for i in (100, 101, 103, 106)]
    result = read(echorl, dump.document(tmp_path, 5, {"correct_rollouts": kept}))
    assert result.source.found["completeness"] == "effective"
    assert result.source.notes[0].startswith("3 numbers of samples are not used")
    twice = dump.document(tmp_path / "b", 5, {"correct_rollouts": [*kept, kept[3]]})
    assert "completeness" not in read(echorl, twice).source.found  # what numbers are worth that come twice is unknown
    kept[2] |= {"reward": "x"}  # a bad row, which the dump has all the same
    result = read(echorl, dump.document(tmp_path / "c", 5, {"correct_rollouts": kept}))
    assert len(result.bad) == 1
    assert result.source.notes[0].startswith("3 numbers of samples are not used")


def test_counts_that_do_not_agree_with_the_records_are_said(tmp_path, read):
    path = dump.document(
        tmp_path, 5, dump.records(step=5), stats={"correct_rollouts": {"count": 8}, "wrong_rollouts": {"count": 9}}
    )
    assert read(echorl, path).source.notes == ["stats counts 9 wrong_rollouts, the file has 8"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_ids": None}, "no prompt_ids or no response_ids"),
        ({"response_ids": [1, 2]}, "prompt_ids is not a prompt and then response_ids, as the trainer writes it"),
        ({"response_ids": ["a"]}, "response_ids is not a list of token ids"),
        ({"prompt_ids": [PAD] * 4 + [41] * 20, "response_ids": [41] * 20}, "prompt_ids holds nothing but padding"),
        ({"prompt": 5}, "prompt is not a text: int"),
        ({"reward": "good"}, "reward is not a number: 'good'"),
        ({"step": 1.5}, "step is not a whole number: '1.5'"),
        ({"sample_id": 1.5}, "sample_id is not a whole number: '1.5'"),
    ],
)
def test_a_bad_record_says_why_and_the_others_stay(tmp_path, read, change, reason):
    result = read(echorl, one(tmp_path, **change))
    assert [r.row for r in result.rows] == [0]
    assert [b.row for b in result.bad] == [1]
    assert result.bad[0].reason.startswith(reason)
    assert b'"sample_id"' in result.bad[0].raw


@pytest.mark.parametrize("indent", [None, 2])
def test_a_document_of_another_order_and_one_that_ends_early(tmp_path, read, indent):
    path = dump.trainer(tmp_path, latest=False)
    whole = read(echorl, path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: content[k] for k in ("wrong_rollouts", "step", "correct_rollouts")}, indent=indent))
    assert known(path)
    swapped = read(echorl, path)
    assert Counter(map(str, (r.fields for r in swapped.rows))) == Counter(map(str, (r.fields for r in whole.rows)))
    path.write_bytes(path.read_bytes()[:-900])
    cut = read(echorl, path)
    assert (len(cut.rows), len(cut.bad)) == (15, 1)
    assert "the file ends in the middle" in cut.bad[0].reason
    assert "completeness" not in cut.source.found  # what is missing was not left out by the trainer


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1, "stats": {}}',
        '{"correct_rollouts": {}}',
        '{"categories": [], "correct_rollouts": []}',
        '{"sample_id": 1, "prompt": "a", "response": "b"}',
        '[{"correct_rollouts": []}]',
        "",
    ],
)
def test_a_neighbours_document_is_not_claimed(tmp_path, text):
    path = tmp_path / "samples.json"
    path.write_text(text)
    assert known(path) is None


def test_thousands_of_records_take_seconds_and_one_record_of_memory(tmp_path, read):
    path = dump.trainer(tmp_path, latest=False, prompts=250, n=8)  # 4,000 records, two steps
    started = time.monotonic()
    assert len(echorl.companions(path)) == 4000
    assert len([r for r in read(echorl, path).rows if r.scores]) == 4000
    assert time.monotonic() - started < 20
    assert max(len(p.raw) for p in walk(path, (frozenset({"correct_rollouts", "wrong_rollouts"}), ALL))) < 5_000


# .npy


@pytest.mark.parametrize("descr", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_floats_of_every_width_are_read(tmp_path, descr, n):
    values = [0.25 * i for i in range(n)]
    assert echorl.floats(dump.npy(tmp_path / "x.npy", values, descr)) == values


def test_files_that_numpy_writes_are_read_and_others_than_floats_in_one_dimension_are_not(tmp_path):
    path, values = tmp_path / "x.npy", np.random.default_rng(0).random(77)
    for kind in ("float16", "float32", "float64", ">f8"):
        np.save(path, values.astype(kind))
        assert echorl.floats(path) == values.astype(kind).tolist()
    with path.open("wb") as f:
        np.lib.format.write_array(f, values, version=(2, 0))
    assert echorl.floats(path) == values.tolist()
    for other in (values.reshape(7, 11), values.astype("int64"), np.array([None]), np.array(1.0), np.zeros(3, "f4,i4")):
        np.save(path, other, allow_pickle=True)
        with pytest.raises(ValueError, match="npy file"):
            echorl.floats(path)
    path.write_bytes(dump.npy(path, [0.5]).read_bytes() + b"\0")
    with pytest.raises(ValueError, match="npy file"):
        echorl.floats(path)
    np.savez(path.with_suffix(".npz"), values)
    with pytest.raises(ValueError, match="npy file"):
        echorl.floats(path.with_suffix(".npz"))


@pytest.mark.parametrize("shape", ["(100000000000,)", "(10000000000000000,)", "(100000000000000000000000,)", "(-1,)", "(-5,)"])
def test_a_header_that_asks_for_more_than_the_file_has_costs_no_memory(tmp_path, shape):
    path = dump.npy(tmp_path / "x.npy", [0.5] * 3, shape=shape)
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match="npy file"):
        echorl.floats(path)
    assert psutil.Process().memory_info().rss - before < 1 << 26


@pytest.mark.parametrize(
    "header", ["{", "[1]", "{'descr': ['<f4'], 'shape': (1,)}", "{'descr': '<f4'}", "(" * 3000, "\xff", "1 + x"]
)
def test_a_broken_header_is_a_reason_and_runs_nothing(tmp_path, header):
    path = tmp_path / "x.npy"
    body = header.encode("latin-1")
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body + b"\0" * 4)
    with pytest.raises(ValueError, match="npy file"):
        echorl.floats(path)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=4), st.booleans())
def test_damaged_npy_files_give_numbers_or_a_reason(scratch, at, other, cut):
    path = dump.npy(scratch / "x.npy", [0.5, 0.25, 1.0])
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at : None if cut else at + len(other)] = other
    path.write_bytes(data)
    try:
        assert all(isinstance(v, float) for v in echorl.floats(path))
    except ValueError as e:
        assert "npy file" in str(e)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 16), st.binary(max_size=4), st.booleans())
def test_damaged_documents_give_rows_and_reasons(scratch, read, at, other, cut):
    path = dump.trainer(scratch, latest=False, prompts=1, n=1)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at : None if cut else at + len(other)] = other
    path.write_bytes(data)
    result = read(echorl, path)
    assert len(result.rows) + len(result.bad) == result.source.rows
    echorl.aside(path)
