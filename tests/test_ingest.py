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


def test_a_store_beside_the_dumps_is_not_taken_for_one(tmp_path):
    write(tmp_path / "1.jsonl", [verl("a", "x", 1.0)])
    with echolab.open(tmp_path / "store", create=True) as lab:
        for run in "rs":
            assert [f.file for f in lab.ingest(tmp_path, run=run).files] == ["1.jsonl"]


def test_a_file_that_changes_while_it_is_read_leaves_nothing(lab, tmp_path, monkeypatch):
    from echolab.readers import plain

    dump = tmp_path / "array.json"
    dump.write_text(json.dumps([{"prompt": "p", "completion": str(i), "reward": 1.0} for i in range(3)]))
    read = plain.read

    def disturbed(source):
        yield from read(source)
        dump.write_text("[]")

    monkeypatch.setattr(plain, "read", disturbed)
    with pytest.raises(EcholabError, match="changed while it was read"):
        lab.ingest(dump, run="r")
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
        ({"run": "r", "grup_size": 3}, "did you mean group_size"),
        ({"run": "r", "map": {"compleetion": "x"}}, "completion"),
        ({"run": "r", "success_threshold": float("nan")}, "finite"),
        ({"run": "r", "failure_reward": float("inf")}, "finite"),
        ({"run": "r", "reward_weights": {"a": float("inf")}}, "finite"),
        ({"run": "\u4f60" * 100}, "too long"),
        ({"run": "r", "rename": "../x"}, "relative"),
        ({"run": "r", "rename": ""}, "relative"),
        ({"run": "r", "format": "verl", "map": {"completion": "x"}}, "--map"),
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


# Attempts, counting and interruptions: each of these went wrong once.


def steps_of(lab: Lab) -> dict[int, int]:
    return dict(lab.sql("SELECT step, count(*) FROM rollouts GROUP BY step ORDER BY step").rows())


def test_a_file_that_an_attempt_leaves_as_it_was_does_not_vanish(lab, tmp_path):
    """Greedy validation of a resumed run may come out byte by byte as before."""
    for step in (1, 2, 3):
        write(tmp_path / "d" / "train" / f"{step}.jsonl", [verl("p", f"first {step} {i}", 1.0, step) for i in range(4)])
        write(tmp_path / "d" / "val" / f"{step}.jsonl", [verl("q", f"greedy {step}", 1.0, step)])
    lab.ingest(tmp_path / "d", run="r")
    for step in (2, 3):
        write(tmp_path / "d" / "train" / f"{step}.jsonl", [verl("p", f"again {step} {i}", 0.0, step) for i in range(4)])
    report = lab.ingest(tmp_path / "d", run="r", attempt=2)
    assert steps_of(lab) == {1: 5, 2: 5, 3: 5}
    assert {f.file: f.status for f in report.files}["val/3.jsonl"] == "replaced"
    assert lab.sql("SELECT count(*) FROM rollouts WHERE completion LIKE 'first%'").item() == 4
    assert lab.validate() == []


def test_a_file_that_an_attempt_appends_to_keeps_its_beginning(lab, tmp_path):
    rows = [verl("p", f"{step} {i}", 1.0, step) for step in (1, 2, 3) for i in range(2)]
    dump = write(tmp_path / "all.jsonl", rows[:4])
    lab.ingest(dump, run="r")
    write(dump, [*rows, verl("p", "2 again", 0.0, 2)])
    lab.ingest(dump, run="r", attempt=2)
    assert steps_of(lab) == {1: 2, 2: 3, 3: 2}
    assert lab.validate() == []


def test_late_rows_belong_to_the_attempt_that_sampled_their_step(lab, tmp_path):
    first = [verl("p", f"{step} {i}", 1.0, step) for step in range(1, 6) for i in range(4)]
    dump = write(tmp_path / "a.jsonl", first)
    lab.ingest(dump, run="r")
    lab.ingest(write(tmp_path / "b.jsonl", [verl("p", f"again {i}", 0.0, 5) for i in range(4)]), run="r", attempt=2)
    lab.ingest(write(dump, [*first, verl("p", "late", 1.0, 2)]), run="r")
    lab.ingest(write(tmp_path / "c.jsonl", [verl("new", "late", 1.0, 3)]), run="r")
    assert steps_of(lab) == {1: 4, 2: 5, 3: 5, 4: 4, 5: 4}


def test_an_attempt_whose_steps_are_unknown_is_refused(lab, tmp_path):
    dump = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": str(i), "reward": 1.0} for i in range(4)])
    lab.ingest(dump, run="r")
    write(dump, [{"prompt": "p", "completion": f"new {i}", "reward": 0.0} for i in range(4)])
    with pytest.raises(EcholabError, match="--replace"):
        lab.ingest(dump, run="r", attempt=2)
    assert lab.sql("SELECT n, kind FROM groups").rows() == [(4, "all_success")]


def test_rows_that_do_not_fit_are_not_counted_into_groups(lab, tmp_path):
    """Else a file read in parts would group otherwise than at once."""
    rows = [
        {"prompt": "p", "completion": c, "reward": 1.0, "part": part} for c, part in zip("abcd", (0, 2**40, 0, 0), strict=True)
    ]
    for run, cuts in (("whole", [4]), ("parts", [2, 4])):
        for n in cuts:
            lab.ingest(write(tmp_path / run / "d.jsonl", rows[:n]), run=run, group_size=2, step=1)
    groups = lab.sql(
        "SELECT run, list(completion ORDER BY completion) FROM rollouts GROUP BY run, group_id ORDER BY ALL"
    ).rows()
    assert groups == [("parts", ["a", "c"]), ("parts", ["d"]), ("whole", ["a", "c"]), ("whole", ["d"])]


def test_a_repeated_sample_is_refused_at_once_and_by_continuation(lab, tmp_path):
    rows = [verl("p", "x", 1.0, uid="u_0_0"), verl("p", "y", 1.0, uid="u_1_0"), verl("p", "x", 1.0, uid="u_0_0")]
    counts = []
    for run, cuts in (("whole", [3]), ("parts", [2, 3])):
        reports = [lab.ingest(write(tmp_path / run / "d.jsonl", rows[:n]), run=run) for n in cuts]
        counts.append((sum(r.rows for r in reports), sum(r.quarantined for r in reports)))
    assert counts == [(2, 1), (2, 1)]


def test_a_continued_file_keeps_step_and_split_however_its_path_is_typed(lab, tmp_path, monkeypatch):
    rows = [{"input": "p", "output": f"x{i}", "score": 1.0} for i in range(4)]
    dump = write(tmp_path / "val" / "step_400" / "d.jsonl", rows[:2])
    monkeypatch.chdir(tmp_path)
    lab.ingest("val/step_400/d.jsonl", run="r")
    write(dump, rows)
    monkeypatch.chdir(dump.parent)
    lab.ingest("d.jsonl", run="r")
    assert lab.sql("SELECT split, step, n FROM groups").rows() == [("eval", 400, 4)]


def test_the_group_size_of_a_file_helps_the_next_one_of_the_same_command(lab, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def dump(name: str, rewards: list[float], advantages: list[float]) -> None:
        both = enumerate(zip(rewards, advantages, strict=True))
        rows = [{"step": 1, "prompt": name, "completion": str(i), "rew": r, "advantage": a} for i, (r, a) in both]
        (tmp_path / "d").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / f"{name}.parquet")

    spread = [1.0, 0.0, 0.0, 0.0]
    std = 0.5 + 1e-4
    dump("a", spread, [(r - 0.25) / std for r in spread])
    dump("b", [0.0] * 8, [0.0] * 8)  # one prompt drawn twice: nothing in this file says so
    lab.ingest(tmp_path / "d", run="r")
    assert lab.sql("SELECT n FROM groups").to_series().to_list() == [4, 4, 4]


def test_a_tail_that_grows_without_end_leaves_one_ledger_row(lab, tmp_path):
    dump = tmp_path / "1.jsonl"
    text = json.dumps(verl("p", "x", 1.0)) + "\n" + json.dumps(verl("p", "long " * 50, 1.0))
    for cut in (100, 150, 200):
        dump.write_text(text[:cut])
        lab.ingest(dump, run="r", format="verl")
    assert lab.sql("SELECT count(*), sum(n_quarantined) FROM ingests").rows() == [(1, 1)]
    assert lab.validate() == []


def test_a_line_file_that_is_swapped_while_it_is_read_leaves_nothing(lab, tmp_path, monkeypatch):
    from echolab.readers import verl as reader

    dump = write(tmp_path / "1.jsonl", [verl("p", f"a{i}", 1.0) for i in range(4)])
    read = reader.read

    def swapped(source):
        yield from read(source)
        write(tmp_path / "other", [verl("p", f"b{i}", 0.0) for i in range(6)]).replace(dump)

    monkeypatch.setattr(reader, "read", swapped)
    with pytest.raises(EcholabError, match="changed while it was read"):
        lab.ingest(dump, run="r")
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 0


def test_a_failed_file_counts_no_rows_and_the_others_are_read(lab, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "d").mkdir()
    broken = tmp_path / "d" / "a.parquet"
    rows = [{"prompt": "p", "completion": f"{i}" * 50, "reward": 1.0} for i in range(400)]
    pq.write_table(pa.Table.from_pylist(rows), broken, row_group_size=200)
    column = pq.read_metadata(broken).row_group(1).column(1)
    at = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(broken.read_bytes())
    content[at : at + 40] = b"\xff" * 40
    broken.write_bytes(content)
    write(tmp_path / "d" / "b.jsonl", [verl("p", "x", 1.0)])
    report = lab.ingest(tmp_path / "d", run="r")
    assert {f.file: (f.status, f.rows) for f in report.files} == {"a.parquet": ("failed", 0), "b.jsonl": ("ingested", 1)}
    assert (report.rows, lab.sql("SELECT count(*) FROM rollouts").item()) == (1, 1)


def test_what_is_replaced_is_not_counted_as_shared(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [verl("p", f"x{i}", 1.0) for i in range(4)])
    lab.ingest(dump, run="r")
    report = lab.ingest(write(dump, [verl("p", f"x{i}", 0.0) for i in range(4)]), run="r", replace=True)
    assert (report.files[0].shared, report.files[0].conflicts) == (0, 0)


def test_an_unknown_reward_beside_a_known_one_is_a_conflict(lab, tmp_path):
    lab.ingest(write(tmp_path / "a.jsonl", [verl("p", "x", None, uid="u_0_0")]), run="r", format="verl")  # type: ignore[arg-type]
    report = lab.ingest(write(tmp_path / "b.jsonl", [verl("p", "x", 1.0, uid="u_0_0")]), run="r")
    assert (report.files[0].shared, report.files[0].conflicts) == (1, 1)


def test_files_with_odd_names_are_read_or_named(lab, tmp_path):
    folder = tmp_path / "d"
    names = ["1\u00b23.jsonl", "a b'\"*[1]?.jsonl", "new\nline.jsonl", "%41.jsonl"]
    for i, name in enumerate(names):
        write(folder / name, [verl("p", f"x{i}", 1.0, step=i)])
    (folder / "loop").symlink_to(folder)
    with open(bytes(folder) + b"/\xff.jsonl", "wb") as f:
        f.write(b"{}")
    report = lab.ingest(folder, run="r")
    found = {f.file: f.status for f in report.files}
    assert [found[n] for n in names] == ["ingested"] * 4
    assert found["loop"] == "skipped" and sum(s == "failed" for s in found.values()) == 1
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 4


def test_a_file_that_vanishes_fails_alone(lab, tmp_path, monkeypatch):
    from echolab import ingest

    for step in (1, 2, 3):
        write(tmp_path / "d" / f"{step}.jsonl", [verl("p", "x", 1.0, step)])
    plans = ingest._plans

    def vanishing(*arguments):
        found = plans(*arguments)
        (tmp_path / "d" / "2.jsonl").unlink()
        return found

    monkeypatch.setattr(ingest, "_plans", vanishing)
    assert [f.status for f in lab.ingest(tmp_path / "d", run="r").files] == ["ingested", "failed", "ingested"]
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 2


def test_a_map_that_names_no_field_reads_nothing(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [{"resp": "x", "question": "q", "score": 1.0}])
    with pytest.raises(EcholabError, match="completion=respp: no such field; there are resp, question, score"):
        lab.ingest(dump, run="r", map={"completion": "respp", "prompt": "question"})
    assert lab.ingest(dump, run="r", map={"completion": "resp", "prompt": "question"}).rows == 1


def test_problems_in_the_options_are_a_hash(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [verl("p", "x", 1.0)])
    problems = {f"prompt {i}": f"problem {i}" for i in range(1000)}
    lab.ingest(dump, run="r", problems=problems)
    assert len(lab.sql("SELECT options FROM ingests").item()) < 1000
    assert lab.ingest(dump, run="r", problems=problems).files[0].status == "unchanged"
    with pytest.raises(EcholabError, match="problems"):
        lab.ingest(dump, run="r", problems={"p": "q"})


def test_groups_named_1_and_1_point_0_are_one_and_nan_is_none(lab, tmp_path):
    dump = tmp_path / "1.jsonl"
    groups = ["1", "1.0", "NaN", '"1"', "true"]
    lines = (f'{{"completion": "{i}", "prompt": "p", "reward": 1, "group": {g}}}' for i, g in enumerate(groups))
    dump.write_text("\n".join(lines))
    report = lab.ingest(dump, run="r")
    assert (report.rows, report.quarantined) == (4, 1)
    members = lab.sql("SELECT list(completion ORDER BY completion) AS c FROM rollouts GROUP BY group_id ORDER BY c")[
        "c"
    ].to_list()
    assert members == [["0", "1"], ["2"], ["3"]]


def test_a_mapped_path_that_no_row_has_is_said_and_so_are_missing_rewards(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [{"q": "p", "ys": ["a", "b"], "infos": [{"score": 1}, {"score": 0}]}])
    report = lab.ingest(dump, run="r", map={"prompt": "q", "completion": "ys[]", "reward": "infos[].scor"})
    notes = " ".join(report.files[0].notes)
    assert "--map reward=infos[].scor: no row has it" in notes and "no rollout has a reward" in notes


def test_a_reading_of_which_nothing_was_left_is_replaced_unasked(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [{"prompt": "p", "completion": "x", "reward": 1.0}])
    assert lab.ingest(dump, run="r", format="verl").quarantined == 1
    assert lab.ingest(dump, run="r").files[0].status == "replaced"
    assert lab.sql("SELECT count(*) FROM rollouts").item() == 1
    assert lab.snapshot.ledger.n_quarantined() == 0


def test_an_earlier_state_cannot_be_written(lab, tmp_path):
    dump = write(tmp_path / "1.jsonl", [verl("p", "x", 1.0)])
    lab.ingest(dump, run="r")
    with pytest.raises(EcholabError, match="earlier state"):
        echolab.open(lab.store.root, version=1).ingest(dump, run="s")
