"""What an export chooses, what it says of it, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from generators.clipsets import add_clipset, clip, lines, rollout

from echolab.errors import EcholabError, WrongUsage
from echolab.export import files, pieces
from echolab.export.config import TARGETS, ExportConfig
from echolab.export.files import SUFFIX
from echolab.export.run import export
from echolab.export.verify import verify
from echolab.lab import Lab
from echolab.maintenance import compact, pins
from echolab.sql import Session
from echolab.store import Store

ROOT = Path(__file__).resolve().parents[2]


def contents(out: Path) -> dict[str, str]:
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name != "provenance.json"}


def provenance(out: Path) -> dict:
    return json.loads((out / "provenance.json").read_text())


SLOW = ("jsonl", "parquet", "trl-grpo", "openrlhf")  # written as others are


@pytest.mark.parametrize("to", [pytest.param(t, marks=pytest.mark.slow) if t in SLOW else t for t in TARGETS])
def test_the_same_input_gives_the_same_files_and_the_same_provenance_but_for_its_time(once, exported, to):
    (first, a), (second, b) = once(to), exported(to, name="b")
    assert contents(a) == contents(b) and contents(a)
    one, two = provenance(a), provenance(b)
    assert one.pop("created") < two.pop("created")
    assert one == {**two, "echolab": one["echolab"]}, "somebody may commit between the two"
    assert first.files == second.files
    assert verify(a) == []


def test_files_of_a_store_may_be_rewritten_without_changing_an_export(exported, make_store, add_reading, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    monkeypatch.setattr(files, "SHARD_BYTES", 1200)
    store = make_store()
    rows = [rollout(g, s, advantage=None if s else 0.5) for g in range(6) for s in range(2)]
    for row in reversed(rows):
        add_reading(store, [row])
    _, before = exported("hf", store, "before", clipset=None)
    compact(store)
    report, after = exported("hf", store, "after", clipset=None)
    assert contents(before) == contents(after) and len(report.files) > 3


def test_pieces_and_shards_change_no_row(once, exported, monkeypatch):
    _, whole = once("hf", what="rollouts", clipset=None)
    monkeypatch.setattr(pieces, "BATCH_ROWS", 4)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 7000)
    monkeypatch.setattr(files, "SHARD_BYTES", 1500)
    report, cut = exported("hf", what="rollouts", clipset=None, name="cut")
    names = [f["path"] for f in report.files if f["rows"]]
    assert len(names) > 2 and names == [f"data/train-{i:05}-of-{len(names):05}.parquet" for i in range(len(names))]
    rows = [r for name in names for r in pq.read_table(cut / name).to_pylist()]
    assert rows == pq.read_table(whole / "data/train-00000-of-00001.parquet").to_pylist()
    card = (cut / "README.md").read_text()
    assert "num_examples: 18" in card and f"| train | 18 | {len(names)} |" in card


@pytest.mark.parametrize("what", ["clips", "rollouts", "prompts"])
def test_every_row_is_found_whatever_its_run_and_step_however_small_the_pieces(exported, fill, monkeypatch, what):
    rows = [
        rollout(g, s, run=run, step=step)
        for g, (run, step) in enumerate([("a", 2), ("b", None), ("b", 1), ("a", None)])
        for s in (0, 1)
    ]
    store = fill(rows, [clip(r) for r in rows])
    _, whole = exported("jsonl", store, "whole", what=what)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 if what == "rollouts" else 2500)
    _, cut = exported("jsonl", store, "cut", what=what)
    assert contents(cut) == contents(whole)
    assert len(lines(whole / "train.jsonl")) == (4 if what == "prompts" else 8)


def test_splits_are_those_of_the_curation_also_for_prompts_and_rollouts(once):
    for what, n in (("clips", (4, 2)), ("rollouts", (4, 2)), ("prompts", (4, 2))):
        report, out = once("jsonl", what=what)
        assert report.splits == dict(zip(("train", "validation"), n, strict=True))
        assert {r["prompt"] for r in lines(out / "validation.jsonl")} == {"What is 4 + 4?", "What is 5 + 5?"}


def test_a_split_is_a_file_name_wherever_it_comes_from(exported, make_store):
    store = make_store([rollout(0, 0, split="../../eval"), rollout(1, 0, split="train")])
    report, out = exported("hf", store, clipset=None)
    assert report.splits == {"______eval": 1, "train": 1}
    assert sorted(p.name for p in (out / "data").iterdir()) == [
        "______eval-00000-of-00001.parquet", "train-00000-of-00001.parquet",
    ]  # fmt: skip
    twice = make_store([rollout(0, 0, split="a b"), rollout(1, 0, split="a-b")])
    with pytest.raises(EcholabError, match="split 'a-b' and another one would both be written to"):
        exported("jsonl", twice, clipset=None, name="twice")


def test_best_of_n_equals_a_loop(exported, make_store):
    """Ties, rollouts without a number, and rewards that are none."""
    draw = random.Random(0)
    rows = [
        {**rollout(g, s, reward=draw.choice([None, 0.0, 0.5, 1.0, math.nan, math.inf])), "sample": draw.choice([s, None])}
        for g in range(40)
        for s in range(draw.randint(1, 6))
    ]

    def order(r):
        known = r["reward"] is not None and math.isfinite(r["reward"])
        place = (True, 0) if r["sample"] is None else (False, r["sample"])
        return (not known, -r["reward"] if known else 0, *place, r["rollout_id"])

    store = make_store(rows)
    for n in (1, 3):
        groups = [sorted((r for r in rows if r["group"] == f"g{g}"), key=order) for g in range(40)]
        expected = {r["rollout_id"] for group in groups for r in group[:n]}
        report, out = exported("jsonl", store, f"best {n}", clipset=None, best=n)
        assert {r["rollout_id"] for r in lines(out / "train.jsonl")} == expected
        dropped = {"best": len(rows) - len(expected)}
        assert report.counts == [{"stage": "export", "in": len(rows), "dropped": dropped, "out": len(expected)}]


def test_the_parts_of_a_sample_stay_together(exported, make_store):
    rows = [rollout(0, s, part=p, rollout_id=f"{s}{p}" * 16, reward=float(s)) for s in (0, 1) for p in (0, 1)]
    _, out = exported("jsonl", make_store(rows), clipset=None, what="rollouts", best=1)
    assert [(r["sample"], r["part"]) for r in lines(out / "train.jsonl")] == [(1, 0), (1, 1)]


def test_prompts_between_ten_and_ninety_percent(exported, make_store):
    solved = {0: 0, 1: 1, 2: 2, 3: 3}
    rows = [rollout(g, s, reward=float(s < n)) for g, n in solved.items() for s in range(3)]
    report, out = exported("trl-grpo", make_store(rows), clipset=None, where="success_rate BETWEEN 0.1 AND 0.9")
    found = {r["prompt"]: r["success_rate"] for r in pq.read_table(out / "train.parquet").to_pylist()}
    assert found == {"What is 1 + 1?": 1 / 3, "What is 2 + 2?": 2 / 3}
    assert report.counts[-1] == {"stage": "export", "in": 4, "dropped": {"where": 2, "repeated": 0}, "out": 2}


def test_a_prompt_of_several_runs_is_written_once_and_never_for_training_if_one_run_holds_it_out(exported, make_store):
    rows = [rollout(0, 0, run="a"), rollout(0, 1, run="b", ground_truth="another"), rollout(1, 0, run="a")]
    rows.append(rollout(1, 1, run="b", split="eval"))
    report, out = exported("jsonl", make_store(rows), clipset=None, what="prompts")
    assert report.counts[-1] == {"stage": "export", "in": 4, "dropped": {"repeated": 2}, "out": 2}
    assert [(r["prompt"], r["run"]) for r in lines(out / "train.jsonl")] == [("What is 0 + 0?", "a")]
    assert [(r["prompt"], r["run"]) for r in lines(out / "eval.jsonl")] == [("What is 1 + 1?", "b")]


def test_a_prompt_with_two_ground_truths_is_said(exported, make_store):
    store = make_store([rollout(0, 0), rollout(0, 1, ground_truth="1"), rollout(1, 0, ground_truth=None), rollout(1, 1)])
    report, out = exported("trl-grpo", store, clipset=None)
    assert "1 of 2 prompts have several ground truths in the store: one of them was taken" in report.notes
    assert {r["ground_truth"] for r in pq.read_table(out / "train.parquet").to_pylist()} <= {"0", "1", "2"}


def test_a_verifier_decides_where_it_is_asked_for(exported, make_store, add_rows):
    rows = [rollout(0, s) for s in range(3)]
    store = make_store(rows)
    with store.lock():
        store.register("verifiers", "e" * 32, "math", {})
    say = {"verifier": "e" * 32, "input_hash": "", "status": "ok", "created_at": 0}
    add_rows(store, "verdicts", [{**say, "rollout_id": r["rollout_id"], "success": r["sample"] == 2} for r in rows])
    _, out = exported("jsonl", store, clipset=None, where="success", verifier="math")
    assert [(r["sample"], r["reward"]) for r in lines(out / "train.jsonl")] == [(2, 1.0)]
    assert provenance(out)["config"]["verifier"] == "math"


def test_failures_among_rollouts_are_said(exported):
    report, _ = exported("trl-sft", what="rollouts", clipset=None)
    assert report.notes[0] == '6 of 18 rollouts are no successes: --where "success" leaves them out'
    report, _ = exported("trl-sft", what="rollouts", clipset=None, where="success -- ended by a comment", name="b")
    assert report.notes == [] and report.counts[-1]["dropped"] == {"where": 6}


def test_rollouts_that_the_store_no_longer_shows_are_counted(exported, fill):
    store = fill([rollout(0, 0)], [clip(rollout(0, 0)), clip(rollout(1, 0))])
    report, _ = exported("jsonl", store, what="rollouts")
    assert report.counts[-1] == {"stage": "export", "in": 2, "dropped": {"gone": 1}, "out": 1}
    report, _ = exported("jsonl", store, name="clips")
    assert report.counts[-1] == {"stage": "export", "in": 2, "dropped": {}, "out": 2}, "clips stand for themselves"


def test_clips_are_read_as_they_were_mined_whatever_came_later(exported, fill, add_reading):
    store = fill([rollout(0, 0)], [])
    versions = {t: v for t, v in store.snapshot().versions.items() if t in ("ingests", "rollouts", "runs")}
    add_clipset(store, "hard", [clip(rollout(0, 0))], parents={"versions": versions})
    _, before = exported("hf", store, "before")
    add_reading(
        store,
        [rollout(0, 0, ground_truth="changed", source="later")],
        supersedes=[r.ingest_id for r in store.snapshot().ledger.live],
    )
    _, after = exported("hf", store, "after")
    assert contents(before) == contents(after)
    _, rows = exported("jsonl", store, "rollouts", what="rollouts")
    assert lines(rows / "train.jsonl")[0]["ground_truth"] == "changed"


def test_provenance_says_all_that_it_should(exported, fill):
    rows = [rollout(g, 0) for g in range(4)]
    store = fill(rows)
    mined = {"versions": {}, "facts": {"outcomes": {"clip": 4, "no_success": 3, "unscored": 1}}, "profile": "golden@1"}
    counts = [{"stage": "duplicate", "in": 4, "dropped": {"duplicate": 1}, "out": 3}]
    against = {"file": "aime.jsonl", "sha256": "f" * 64, "ngram": 8, "clips": 2, "n_hits": 5, "hits": [{"row": 1}]}
    add_clipset(store, "mined", [clip(r) for r in rows], {"selector": {"selector": "random", "seed": 7}}, mined)
    add_clipset(
        store, "curated", [clip(r) for r in rows[:3]], {"rules": {"dedup": True, "seed": 9}},
        {"versions": {}, "clipsets": ["mined@1"], "facts": {"counts": counts, "decontamination": [against]}},
    )  # fmt: skip
    _, out = exported(
        "hf", store, clipset="curated", where="step < 1", title="Hard <clips> | one", license="apache-2.0", language=("en",)
    )
    found = provenance(out)
    assert found["store"] == {
        "uri": str(store.root),
        "versions": {t: v for t, v in store.snapshot().versions.items() if t not in ("clips", "clipsets", "exports")},
    }
    assert found["config"]["clipset"] == "curated@1" and found["config"]["where"] == "step < 1"
    assert "c.clipset = 'curated@1'" in found["query"] and "(step < 1\n)" in found["query"]
    assert [c["name"] for c in found["clipsets"]] == ["mined@1", "curated@1"]
    assert found["selector"] == {"selector": "random", "seed": 7} and found["seeds"] == [7, 9]
    assert [(s["model"], s["dtype"]) for s in found["scorer"]] == [("tiny", "float32")]
    assert found["counts"] == [
        {"stage": "mine, groups", "in": 8, "dropped": {"no_success": 3, "unscored": 1}, "out": 4},
        *counts,
        {"stage": "export", "in": 3, "dropped": {"where": 1}, "out": 2},
    ]
    assert found["decontamination"] == [against]
    assert [p.get("clipset") or p["profile"] for p in found["parents"]] == ["mined@1", "curated@1", "golden@1"]
    assert found["echolab"].keys() == {"version", "commit", "dirty"}
    assert {f["path"]: f["sha256"] for f in found["files"]} == contents(out)
    card = (out / "README.md").read_text()
    assert "n-gram decontaminated (n=8) against `aime.jsonl`" in card and "clean" not in card
    assert "license: apache-2.0" in card and "# Hard &lt;clips&gt; \\| one" in card
    assert "| mine, groups | 8 | no_success 3, unscored 1 | 4 |" in card


def test_an_export_is_registered_once_and_pins_its_versions(exported, fill):
    store = fill([rollout(0, 0)])
    first, _ = exported("replay", store, "a/hard clips")
    again, _ = exported("replay", store, "b/hard clips")
    other, _ = exported("replay", store, "c/hard clips", where="step = 0")
    assert [r.name for r in (first, again, other)] == ["hard-clips@1", "hard-clips@1", "hard-clips@2"]
    held = {(p["kind"], p["name"], p["version"]): p["tables"] for p in pins(store.snapshot())}
    assert held["exports", "hard-clips", 1]["rollouts"] == 1
    with Session(store.snapshot()) as session:
        assert session.sql("SELECT name, version, parents->>'$.clipsets[0]' FROM exports ORDER BY version").rows() == [
            ("hard-clips", 1, "hard@1"),
            ("hard-clips", 2, "hard@1"),
        ]


# What is refused, in one line.


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(WrongUsage, match="no format 'trl_sft': did you mean trl-sft"):
        ExportConfig.make(to="trl_sft")
    with pytest.raises(WrongUsage, match="no format 'zip': there are hf, trl-sft"):
        ExportConfig.make(to="zip")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"to": "replay", "clipset": "c", "form": "chat"}, "replay knows no forms, not chat"),
        ({"to": "verl", "form": "text"}, "verl knows chat form, not text"),
        ({"to": "jsonl", "clipset": "c", "best": 2}, "--best chooses rollouts"),
        ({"to": "jsonl", "best": 0}, "best: must be at least 1"),
        ({"to": "jsonl", "where": " "}, "where: is empty: give a condition"),
        ({"to": "jsonl", "what": "clips"}, "which clips"),
        ({"to": "jsonl", "license": "mit"}, "--license is an option of hf"),
        ({"to": "trl-grpo", "ability": "code"}, "--ability is an option of verl"),
        ({"to": "hf", "wher": "x"}, "wher: no such option; did you mean where"),
    ],
)
def test_options_that_make_no_sense(options, why):
    with pytest.raises(WrongUsage, match=why):
        ExportConfig.make(**options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"clipset": "soft"}, "no clip set 'soft' in this store; there are: hard@1"),
        ({"clipset": "hard@7"}, "no clip set 'hard@7' in this store; there are: hard@1"),
        ({"where": "step > 99"}, "nothing to export: none of the 6 clips of clip set hard@1 fits --where"),
        ({"where": "stp > 99"}, 'Referenced column "stp" not found'),
        ({"where": "step >"}, "syntax error"),
        ({"where": "true) OR (SELECT 1 FROM read_csv('/etc/passwd')) = 1 OR (true"}, "[Pp]ermission|disabled"),
        ({"verifier": "math"}, "no verifier 'math'"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(exported, tmp_path, options, why):
    with pytest.raises(EcholabError, match=why) as e:
        exported("jsonl", **options)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_store_and_an_empty_clip_set(exported, make_store, fill):
    with pytest.raises(EcholabError, match="nothing to export: the store holds no rollouts"):
        exported("jsonl", make_store(), clipset=None)
    with pytest.raises(EcholabError, match="nothing to export: clip set hard@1 holds no clips"):
        exported("jsonl", fill([rollout(0, 0)], []))


def test_a_folder_that_exists_is_kept(exported, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(EcholabError, match="out exists and is not empty"):
        exported("jsonl")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(EcholabError, match="file exists and is not empty"):
        exported("jsonl", name="file")
    (tmp_path / "empty").mkdir()
    assert exported("jsonl", name="empty")[0].splits == {"train": 4, "validation": 2}


def test_prompts_of_which_only_some_are_chats_need_a_word(exported, make_store):
    messages = '[{"role": "user", "content": "Well?"}]'
    rows = [rollout(0, 0), rollout(1, 0, messages=messages, prompt_format="chat", prompt=None)]
    store = make_store(rows)
    with pytest.raises(
        EcholabError, match="1 of 2 prompts are chats, the others text: choose some by --where, or say --form chat"
    ):
        exported("openrlhf", store, clipset=None)
    report, _ = exported("openrlhf", store, clipset=None, form="chat")
    assert report.splits == {"train": 2}
    with pytest.raises(
        EcholabError, match="1 of 2 prompts are chats, whose text depends on a template|1 of 2 prompts have no prompt"
    ):
        exported("openrlhf", store, clipset=None, form="text", name="text")


def test_verl_needs_a_source_and_takes_one(exported, make_store):
    store = make_store([rollout(0, 0, source=None)])
    with pytest.raises(EcholabError, match="1 of 1 prompts have no source, by which verl chooses the reward .--source NAME"):
        exported("verl", store, clipset=None)
    _, out = exported("verl", store, clipset=None, source="openai/gsm8k")
    assert pq.read_table(out / "train.parquet")["data_source"].to_pylist() == ["openai/gsm8k"]


def test_a_full_disk_is_said_and_leaves_nothing(exported, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(EcholabError, match="cannot write .*out: no space is left on its disk; nothing was left behind"):
        exported("jsonl")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from echolab.export import pieces
from echolab.export.config import ExportConfig
from echolab.export.run import export
from echolab.store import Store

pieces.BATCH_ROWS = 2
def show(_, done, total):
    print(done, flush=True)
    time.sleep(30 if done > 4 else 0)
export(Store.open(sys.argv[1]), sys.argv[2], ExportConfig.make(to="jsonl", what="rollouts"), show)
"""


def test_a_killed_export_leaves_no_half_folder_and_the_next_one_succeeds(store: Store, tmp_path):
    out = tmp_path / "out"
    before = len(store.snapshot().registry("exports"))
    process = subprocess.Popen([sys.executable, "-c", KILLED, store.root, out], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert [process.stdout.readline().strip() for _ in range(3)] == ["2", "4", "6"]
    unfinished = tmp_path / f".out{SUFFIX}"
    assert (unfinished / "train.jsonl").exists()
    with pytest.raises(EcholabError, match="another process makes export out at this moment"):
        export(store, out, ExportConfig.make(to="jsonl", what="rollouts"))
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert [p.name for p in tmp_path.iterdir()] == [unfinished.name], "nothing stands under the export's name"
    assert len(store.snapshot().registry("exports")) == before
    export(store, out, ExportConfig.make(to="jsonl", what="rollouts"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert verify(out, store) == []
    with Lab(store) as lab:
        assert lab.validate() == []


# verify


def test_verify_finds_what_was_changed(exported, store):
    _, out = exported("jsonl")
    assert verify(out, store) == []
    (out / "notes.txt").write_text("mine")
    assert verify(out) == ["notes.txt: not part of the export"]
    (out / "notes.txt").unlink()
    data = (out / "train.jsonl").read_bytes()
    (out / "train.jsonl").write_bytes(data.replace(b"What is", b"Wh4t is"))
    assert verify(out) == ["train.jsonl: its sha256 is not the one that was written"]
    (out / "train.jsonl").write_bytes(data + b"{}\n")
    assert verify(out) == [f"train.jsonl: {len(data) + 3:,} bytes, {len(data):,} were written"]
    (out / "train.jsonl").unlink()
    assert verify(out) == ["train.jsonl: missing"]


def test_verify_checks_that_counts_add_up_and_rows_are_there(exported):
    _, out = exported("parquet")
    found = provenance(out)
    found["counts"][0]["in"] = 9
    found["files"][0]["rows"] = 3
    found["files"].append({**found["files"][1], "path": "../elsewhere.parquet"})
    (out / "provenance.json").write_text(json.dumps(found))
    assert verify(out) == [
        "train.parquet: 4 rows, the provenance says 3",
        "../elsewhere.parquet: missing",
        "stage export: 9 in, 0 left out, 6 out do not add up",
        "6 rows came out of the last stage, the files have 7",
    ]


@pytest.mark.parametrize("to", ["hf", "jsonl", "replay", "trl-sft"])
def test_verify_finds_clips_that_are_no_prefix_of_their_rollout(exported, fill, to):
    rows = [rollout(g, 0) for g in range(3)]
    wrong = clip(rows[1], clip_ids=[101, 9, 9])
    store = fill(rows, [clip(rows[0]), wrong, clip(rows[2], scorer="f" * 32)])
    _, out = exported(to, store)
    assert verify(out) == []
    assert verify(out, store) == sorted(
        [
            f"clip {wrong['clip_id']}: not a prefix of its rollout's scored tokens",
            f"clip {clip(rows[2])['clip_id']}: its rollout has no scores in the store",
        ]
    )
    elsewhere = fill(rows[:1])
    add_clipset(elsewhere, "other", [])
    found = verify(out, elsewhere)
    assert len(found) == (2 if to != "trl-sft" else 0), "rows without ids are checked by the clip set that is there"
    assert all("the store's clip set does not have it" in problem for problem in found)


def test_verify_refuses_what_is_no_export(tmp_path):
    with pytest.raises(EcholabError, match="is no export: it has no provenance.json"):
        verify(tmp_path)
    (tmp_path / "provenance.json").write_text('{"files": 3}')
    with pytest.raises(EcholabError, match="provenance.json is damaged"):
        verify(tmp_path)


def test_the_name_of_an_export_comes_from_its_folder(exported):
    for name, expected in ((".hidden " + "a" * 200, "hidden-" + "a" * 93 + "@"), ("ü ö", "jsonl@")):
        assert exported("jsonl", name=name)[0].name.startswith(expected)
