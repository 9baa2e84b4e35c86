"""Ingest through its public door: files on disk into a store, judged by what its views show."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import echolab
from echolab import EcholabError
from echolab.lab import Lab

STORED = (
    "rollout_id, run, split, step, role, group_id, group_source, prompt_id, problem_id, sample, part, prompt,"
    " completion, reward"
)
SLOW_DISK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def verl(prompt: str, output: str, score: float, step: int = 1, gts: str = "4", **extra) -> dict:
    return {"input": prompt, "output": output, "gts": gts, "score": score, "step": step, **extra}


def write(path: Path, rows: list[dict], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(r) for r in rows) + (end if rows else ""))
    return path


def stored(lab: Lab, columns: str = STORED) -> list[tuple]:
    return sorted(lab.sql(f"SELECT {columns} FROM rollouts").rows(), key=repr)


@pytest.fixture
def lab(tmp_path):
    with echolab.open(tmp_path / "store", create=True) as lab:
        yield lab


def test_the_same_bytes_again_change_nothing(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [verl("a", "x", 1.0), verl("a", "y", 0.0)])
    assert lab.ingest(dump, run="r").rows == 2
    before = lab.snapshot.versions
    report = lab.ingest(dump, run="r")
    assert (report.rows, report.files[0].status) == (0, "unchanged")
    assert lab.snapshot.versions == before


def test_a_longer_file_is_read_on_from_where_it_ended(lab, tmp_path):
    rows = [verl("a", f"x{i}", 1.0) for i in range(6)]
    dump = write(tmp_path / "1.jsonl", rows[:4])
    lab.ingest(dump, run="r")
    write(dump, rows)
    report = lab.ingest(dump, run="r")
    assert (report.rows, report.files[0].status) == (2, "continued")
    assert lab.sql("SELECT n FROM groups").item() == 6
    assert sorted(lab.sql("SELECT origin.row FROM rollouts").to_series()) == list(range(6))


def test_a_changed_file_is_refused_and_replace_takes_its_place(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [verl("a", "x", 1.0), verl("a", "y", 1.0)])
    lab.ingest(dump, run="r")
    write(dump, [verl("a", "z", 0.0)])
    with pytest.raises(EcholabError, match="--replace"):
        lab.ingest(dump, run="r")
    assert lab.ingest(dump, run="r", replace=True).files[0].status == "replaced"
    assert lab.sql("SELECT completion, reward FROM rollouts").rows() == [("z", 0.0)]


def test_replace_supersedes_every_live_reading_of_the_file(lab, tmp_path):
    rows = [verl("a", f"x{i}", 1.0) for i in range(6)]
    dump = write(tmp_path / "1.jsonl", rows[:2])
    for n in (2, 4, 6):
        lab.ingest(write(dump, rows[:n]), run="r")
    lab.ingest(write(dump, [verl("a", "new", 0.0)]), run="r", replace=True)
    assert lab.sql("SELECT completion FROM rollouts").to_series().to_list() == ["new"]
    assert lab.sql("SELECT count(*) FROM ingests WHERE live").item() == 1


def test_other_options_for_the_same_bytes_are_refused_by_name(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [verl("a", "x", 1.0)])
    lab.ingest(dump, run="r")
    with pytest.raises(EcholabError, match="step was not given, is 7.*--replace"):
        lab.ingest(dump, run="r", step=7)
    lab.ingest(dump, run="r", step=7, replace=True)
    assert lab.sql("SELECT DISTINCT step FROM rollouts").item() == 7


def test_the_same_name_from_another_folder_needs_replace_or_another_name(lab, tmp_path):
    lab.ingest(write(tmp_path / "a" / "dump.jsonl", [verl("a", "x", 1.0, step=1)]), run="r")
    other = write(tmp_path / "b" / "dump.jsonl", [verl("a", "y", 1.0, step=2)])
    with pytest.raises(EcholabError, match="--as"):
        lab.ingest(other, run="r")
    lab.ingest(other, run="r", rename="b/dump.jsonl")
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 2


def test_the_same_file_under_two_runs_stays_two_runs(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [verl("a", "x", 1.0), verl("a", "y", 0.0)])
    lab.ingest(dump, run="r")
    lab.ingest(dump, run="s")
    assert lab.sql("SELECT run, n, kind FROM groups ORDER BY run").rows() == [("r", 2, "mixed"), ("s", 2, "mixed")]
    assert lab.sql("SELECT count(DISTINCT rollout_id) FROM rollouts").item() == 4


def test_a_resumed_run_as_a_later_attempt_has_no_group_of_double_size(lab, tmp_path):
    for step in range(95, 121):
        write(tmp_path / "dump" / f"{step}.jsonl", [verl("p", f"first {step} {i}", 1.0, step) for i in range(4)])
    lab.ingest(tmp_path / "dump", run="r")
    for step in range(100, 123):
        write(tmp_path / "dump" / f"{step}.jsonl", [verl("p", f"again {step} {i}", 0.0, step) for i in range(4)])
    with pytest.raises(EcholabError, match="--replace"):
        lab.ingest(tmp_path / "dump", run="r")
    lab.ingest(tmp_path / "dump", run="r", attempt=2)
    groups = lab.sql("SELECT step, n, kind FROM groups ORDER BY step").rows()
    assert groups == [(s, 4, "all_success" if s < 100 else "all_fail") for s in range(95, 123)]
    again = lab.ingest(tmp_path / "dump", run="r")  # what was read as an attempt stays read, also without saying so
    assert {f.status for f in again.files} == {"unchanged"}
    write(tmp_path / "dump" / "123.jsonl", [verl("p", "on", 1.0, 123)])
    assert lab.ingest(tmp_path / "dump", run="r").rows == 1
    assert lab.sql("SELECT max(step) FROM rollouts").item() == 123, "a new file belongs to the newest attempt"


def test_a_resumed_run_with_replace_has_no_group_of_double_size(lab, tmp_path):
    for step in range(98, 104):
        write(tmp_path / "dump" / f"{step}.jsonl", [verl("p", f"first {step} {i}", 1.0, step) for i in range(4)])
    lab.ingest(tmp_path / "dump", run="r")
    for step in range(100, 105):
        write(tmp_path / "dump" / f"{step}.jsonl", [verl("p", f"again {step} {i}", 0.0, step) for i in range(4)])
    report = lab.ingest(tmp_path / "dump", run="r", replace=True)
    assert Counter(f.status for f in report.files) == {"unchanged": 2, "replaced": 4, "ingested": 1}
    assert lab.sql("SELECT DISTINCT n FROM groups").rows() == [(4,)]


def test_an_unfinished_last_line_waits_in_quarantine_until_it_is_complete(lab, tmp_path):
    rows = [verl("a", f"x{i}", 1.0) for i in range(4)]
    whole = "\n".join(json.dumps(r) for r in rows) + "\n"
    dump = tmp_path / "1.jsonl"
    dump.write_text(whole[:-30])
    report = lab.ingest(dump, run="r")
    assert (report.rows, report.quarantined) == (3, 1)
    assert lab.ingest(dump, run="r").files[0].status == "unchanged"
    dump.write_text(whole)
    assert lab.ingest(dump, run="r").rows == 1
    assert lab.snapshot.ledger.n_quarantined() == 0
    assert lab.sql("SELECT n FROM groups").item() == 4


@SLOW_DISK
@given(data=st.data())
def test_any_prefix_of_a_line_dump_then_the_whole_file_is_the_whole_file_at_once(tmp_path_factory, data):
    row = st.builds(
        verl,
        st.sampled_from(["p", "q", "r s"]),
        st.sampled_from(["x", "y", "longer\ntext", "\u00e9\U0001f600"]),
        st.sampled_from([0.0, 1.0, 0.5]),
        st.integers(1, 2),
    )
    rows = data.draw(st.lists(row, min_size=1, max_size=12))
    content = "".join(json.dumps(r) + "\n" for r in rows).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=3)))
    size = data.draw(st.sampled_from([None, 2]))
    folder = tmp_path_factory.mktemp("prefix")
    dump = folder / "dump.jsonl"
    with echolab.open(folder / "parts", create=True) as parts, echolab.open(folder / "whole", create=True) as whole:
        for cut in [*cuts, len(content)]:
            dump.write_bytes(content[:cut])
            if cut:
                parts.ingest(dump, run="r", format="verl", group_size=size)
        whole.ingest(dump, run="r", format="verl", group_size=size)
        assert stored(parts, STORED + ", origin.row") == stored(whole, STORED + ", origin.row")
        assert parts.sql("SELECT count(*) FROM rollouts").item() == len(rows)
        assert parts.snapshot.ledger.n_quarantined() == 0


@SLOW_DISK
@given(data=st.data())
def test_the_order_of_rows_does_not_matter(tmp_path_factory, data):
    """Of several identical completions any may carry which reward; all else is the same."""
    uid = st.sampled_from(["u0_0_0", "u0_1_0", "u0_1_1", "u1_0_0", "u1_1_0"])
    explicit = data.draw(st.booleans())
    rows = []
    for i in range(data.draw(st.integers(1, 10))):
        extra = {"uid": data.draw(uid)} if explicit else {}
        output = f"text {i}" if explicit else data.draw(st.sampled_from(["x", "y"]))
        rows.append(verl(data.draw(st.sampled_from(["p", "q"])), output, data.draw(st.sampled_from([0.0, 1.0])), **extra))
    shuffled = data.draw(st.permutations(rows))
    folder = tmp_path_factory.mktemp("order")
    contents = []
    for name, some in (("a", rows), ("b", shuffled)):
        with echolab.open(folder / name, create=True) as lab:
            lab.ingest(write(folder / f"dump_{name}" / "d.jsonl", some), run="r")
            ids = "rollout_id, group_id, prompt_id, problem_id, sample, part, prompt, completion"
            contents.append(
                (stored(lab, ids), stored(lab, "group_id, completion, reward"), lab.query("degenerate_by_step").rows())
            )
    assert contents[0] == contents[1]


def test_groups_of_a_row_order_format_do_not_depend_on_the_order_of_groups(lab, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def block(prompt: str, rewards: list[float]) -> list[dict]:
        return [{"step": 1, "prompt": prompt, "completion": f"c{i}", "rew": r, "advantage": 0.0} for i, r in enumerate(rewards)]

    blocks = [block("p", [1.0, 1.0, 1.0, 1.0]), block("q", [0.0] * 4), block("s", [0.0, 1.0, 0.0, 1.0])]
    answers = []
    for run, order in (("r", (0, 1, 2)), ("s", (2, 0, 1))):
        path = tmp_path / run / "completions_00001.parquet"
        path.parent.mkdir()
        pq.write_table(pa.Table.from_pylist([row for i in order for row in blocks[i]]), path)
        lab.ingest(path, run=run)
        answers.append(lab.sql(f"SELECT problem_id, kind, n, mean FROM groups WHERE run = '{run}' ORDER BY ALL").rows())
    assert answers[0] == answers[1]


def test_identical_completions_of_a_group_are_all_kept(lab, tmp_path):
    lab.ingest(write(tmp_path / "1.jsonl", [verl("a", "same", float(i % 2)) for i in range(8)]), run="r")
    assert lab.sql("SELECT n, n_success FROM groups").rows() == [(8, 4)]
    assert lab.query("duplicates").height == 1


def test_the_same_rollout_twice_in_one_file_goes_to_quarantine(lab, tmp_path):
    row = verl("a", "x", 1.0, uid="u_0_0")
    report = lab.ingest(write(tmp_path / "1.jsonl", [row, row, verl("a", "y", 1.0, uid="u_1_0")]), run="r")
    assert (report.rows, report.quarantined) == (2, 1)
    entry = json.loads(Path(report.quarantine[0]).read_text())
    assert entry["row"] == 1 and "again" in entry["reason"] and json.loads(entry["raw"]) == row


def test_a_rollout_that_two_files_hold_is_stored_twice_and_shown_once(lab, tmp_path):
    rows = [verl("a", f"x{i}", 1.0, uid=f"u_{i}_0") for i in range(3)]
    lab.ingest(write(tmp_path / "one.jsonl", rows), run="r")
    rows[0]["score"] = 0.0
    report = lab.ingest(write(tmp_path / "two.jsonl", [*rows, verl("a", "x9", 0.0, uid="u_9_0")]), run="r")
    assert (report.rows, report.files[0].shared, report.files[0].conflicts) == (4, 3, 1)
    assert lab.sql("SELECT n, n_success FROM groups").rows() == [(4, 3)], "the oldest reading wins"
    lab.ingest(write(tmp_path / "one.jsonl", [verl("b", "z", 0.0)]), run="r", replace=True)
    assert lab.sql("SELECT n, n_success FROM groups WHERE n > 1").rows() == [(4, 2)], "its place is taken when it goes"


def test_rows_in_are_rows_stored_and_rows_in_quarantine_with_reason_and_bytes(lab, tmp_path):
    good = [verl("a", f"x{i}", 1.0) for i in range(5)]
    bad = [
        b"{broken",
        b"[1, 2]",
        b'{"input": "a", "output": ["list"], "score": 1.0}',
        b'{"input": "a", "output": "x", "score": "high"}',
        b'{"input": "a", "output": "\xff", "score": 1}',
        b'{"input": "a", "output": "\\ud800", "score": 1}',
        b'{"input": "a", "output": "x", "score": Infinity}',
    ]
    lines = [json.dumps(r).encode() for r in good[:3]] + bad + [json.dumps(r).encode() for r in good[3:]]
    dump = tmp_path / "1.jsonl"
    dump.write_bytes(b"\n".join(lines) + b"\n")
    report = lab.ingest(dump, run="r")
    assert (report.rows, report.quarantined) == (len(good), len(bad))
    entries = [json.loads(line) for line in Path(report.quarantine[0]).read_text().splitlines()]
    kept = [(e["raw"].encode() if "raw" in e else bytes.fromhex(e["raw_hex"])).rstrip(b"\n") for e in entries]
    assert sorted(kept) == sorted(bad)
    assert sorted(e["row"] for e in entries) == list(range(3, 10))
    assert all(e["reason"] and e["file"] == "1.jsonl" for e in entries)


def test_nan_rewards_are_kept_and_unrewarded(lab, tmp_path):
    dump = tmp_path / "1.jsonl"
    dump.write_text('{"input": "a", "output": "x", "score": NaN}\n{"input": "a", "output": "y", "score": 1.0}\n')
    lab.ingest(dump, run="r", format="verl")
    assert lab.sql("SELECT n, n_rewarded, n_unrewarded, kind FROM groups").rows() == [(2, 1, 1, "single")]


def test_group_size_splits_a_prompt_that_was_drawn_twice(lab, tmp_path):
    rows = [verl("a", f"x{i}", float(i < 4)) for i in range(8)]
    lab.ingest(write(tmp_path / "1.jsonl", rows), run="merged")
    report = lab.ingest(write(tmp_path / "1.jsonl", rows), run="split", group_size=4)
    assert any("--group-size 4" in note for note in report.files[0].notes)
    kinds = lab.sql("SELECT run, kind, n FROM groups ORDER BY ALL").rows()
    assert kinds == [("merged", "mixed", 8), ("split", "all_fail", 4), ("split", "all_success", 4)]


def test_problems_meet_over_templates_and_a_mapping_file_overrides(lab, tmp_path):
    lab.ingest(write(tmp_path / "1.jsonl", [verl("user\nWhat  is 1+1?\nassistant\n", "2", 1.0)]), run="rendered")
    lab.ingest(
        write(tmp_path / "e.jsonl", [{"prompt": "What is 1+1? ", "completion": "2", "reward": 1}]), run="plain", role="expert"
    )
    own = write(tmp_path / "t.jsonl", [{"prompt": "<<What is 1+1?>>", "completion": "2", "reward": 1}])
    lab.ingest(own, run="stripped", strip_template="<<|>>")
    lab.ingest(own, run="named", problems={"<<What is 1+1?>>": "What is 1+1?"})
    assert lab.sql("SELECT count(DISTINCT problem_id), count(DISTINCT prompt_id) FROM rollouts").rows() == [(1, 3)]


def test_a_run_keeps_its_success_threshold(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [verl("a", "x", 0.6), verl("a", "y", 0.6)])
    lab.ingest(dump, run="r", success_threshold=0.5)
    assert lab.sql("SELECT kind FROM groups").item() == "all_success"
    with pytest.raises(EcholabError, match="--success-threshold 0.5, not 0.9"):
        lab.ingest(dump, run="r", success_threshold=0.9)
    lab.ingest(dump, run="r", success_threshold=0.9, replace=True)
    assert lab.sql("SELECT kind FROM groups").item() == "constant"


def test_where_the_step_is_unknown_files_do_not_share_groups(lab, tmp_path):
    rows = [{"prompt": "p", "completion": "x", "reward": 1.0}, {"prompt": "p", "completion": "y", "reward": 1.0}]
    write(tmp_path / "d" / "a.jsonl", rows)
    write(tmp_path / "d" / "b.jsonl", rows)
    lab.ingest(tmp_path / "d", run="r")
    assert lab.sql("SELECT n FROM groups").to_series().to_list() == [2, 2]
    lab.ingest(tmp_path / "d", run="s", step=3)
    assert lab.sql("SELECT n FROM groups WHERE run = 's'").to_series().to_list() == [2], "same step, same rollouts: shown once"


def test_the_step_of_the_path_is_used_and_said(lab, tmp_path):
    dump = write(tmp_path / "global_step_400" / "a.jsonl", [{"prompt": "p", "completion": "x", "reward": 1.0}])
    report = lab.ingest(dump, run="r")
    assert lab.sql("SELECT step FROM rollouts").item() == 400
    assert any("from the path" in n for n in report.files[0].notes)


def test_mapped_lists_become_one_rollout_an_element(lab, tmp_path):
    rows = [
        {"q": "p", "ys": ["a", "b", "c"], "infos": [{"r": 1}, {"r": 0}, {"r": 1}]},
        {"q": "p", "ys": ["d"], "infos": [{"r": 0}]},
    ]
    fields = {"completion": "ys[]", "reward": "infos[].r", "prompt": "q"}
    lab.ingest(write(tmp_path / "lists.jsonl", rows), run="r", map=fields)
    assert lab.sql("SELECT kind, n FROM groups ORDER BY n").rows() == [("single", 1), ("mixed", 3)]
    assert lab.sql("SELECT sample FROM rollouts ORDER BY completion").to_series().to_list() == [0, 1, 2, 0]


def test_a_folder_reads_what_it_knows_and_names_what_it_does_not(lab, tmp_path):
    write(tmp_path / "d" / "1.jsonl", [verl("a", "x", 1.0)])
    (tmp_path / "d" / "notes.txt").write_text("hello")
    (tmp_path / "d" / "broken.parquet").write_bytes(b"PAR1 this is no Parquet")
    (tmp_path / "d" / ".hidden.jsonl").write_text("{}")
    report = lab.ingest(tmp_path / "d", run="r")
    assert {f.file: f.status for f in report.files} == {
        "1.jsonl": "ingested",
        "notes.txt": "skipped",
        "broken.parquet": "failed",
    }
    with pytest.raises(EcholabError, match="--map"):
        lab.ingest(tmp_path / "d" / "notes.txt", run="r")


def test_a_file_that_changes_while_it_is_read_leaves_nothing(lab, tmp_path, monkeypatch):
    from echolab.readers import plain

    dump = tmp_path / "array.json"
    dump.write_text(json.dumps([{"prompt": "p", "completion": str(i), "reward": 1.0} for i in range(3)]))
    read = plain.read

    def disturbed(source):
        yield from read(source)
        dump.write_text("[]")

    monkeypatch.setattr(plain, "read", disturbed)
    report = lab.ingest(dump, run="r")
    assert report.files[0].status == "failed" and "changed while it was read" in report.files[0].notes[0]
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 0


def test_two_files_of_one_name_in_one_command_are_refused(lab, tmp_path):
    a, b = (write(tmp_path / d / "x.jsonl", [verl(d, "x", 1.0)]) for d in "ab")
    with pytest.raises(EcholabError, match="two files"):
        lab.ingest([a, b], run="r")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"run": ""}, "run"),
        ({"run": "a\nb"}, "printable"),
        ({"run": "r", "role": "teacher"}, "policy"),
        ({"run": "r", "format": "excel"}, "unknown format"),
        ({"run": "r", "group_size": 0}, "at least 1"),
        ({"run": "r", "strip_template": "("}, "regular expression"),
        ({"run": "r", "grup_size": 3}, "grup_size"),
        ({"run": "r", "map": {"compleetion": "x"}}, "completion"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(lab, tmp_path, options, says):
    with pytest.raises(EcholabError, match=says) as e:
        lab.ingest(write(tmp_path / "1.jsonl", [verl("a", "x", 1.0)]), **options)
    assert "\n" not in str(e.value)


def test_a_big_dump_is_staged_in_several_sorted_files_and_shown_as_one(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("echolab.ingest.STAGE_BYTES", 200_000)
    monkeypatch.setattr("echolab.ingest.CHUNK_ROWS", 300)
    rng = random.Random(1)
    rows = [verl(f"p{rng.randint(0, 99)}", f"{i} " + "x" * 500, float(rng.random() < 0.5), step=i // 500) for i in range(3_000)]
    lab.ingest(write(tmp_path / "all.jsonl", rows), run="r")
    assert len(lab.snapshot.files("rollouts")) > 3
    expected = Counter((r["step"], r["input"]) for r in rows)
    found = lab.sql("SELECT step, prompt, count(*) FROM rollouts GROUP BY ALL").rows()
    assert {(step, prompt): n for step, prompt, n in found} == expected
    assert lab.sql("SELECT count(*) FROM groups").item() == len(expected)
