"""`echolab mine` on a store that was ingested, scored and cut as users do it, against loops over what SQL says."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="scoring needs torch")
transformers = pytest.importorskip("transformers", reason="scoring needs transformers")

from generators import models  # noqa: E402

import echolab  # noqa: E402
from echolab import ids  # noqa: E402
from echolab.clips import mine as mining  # noqa: E402
from echolab.errors import EcholabError, WrongUsage  # noqa: E402
from echolab.store import Store, now  # noqa: E402
from pipelines.cli import main  # noqa: E402

GROUPS, SAMPLES = 24, 6
SKILL = (0.0, 1.0, 0.5, 0.7)
WORDS = models.WORDS.split()


def completion(rng, thinking):
    def some(n):
        return "".join(rng.choice(WORDS) + rng.choice([" ", " ", "\n", "\n\n", ".\n"]) for _ in range(rng.randrange(1, n)))

    return some(20) + "</think>\n" + some(6) if thinking else some(30)


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return models.model(tmp_path_factory.mktemp("mine") / "tiny")


@pytest.fixture(scope="session")
def scored(tmp_path_factory, model) -> Path:
    """24 groups of 6: some all right, some all wrong, some mixed; some truncated, one in six unscored. Experts of every
    second problem."""
    folder, rng = tmp_path_factory.mktemp("scored"), random.Random(0)
    rows = [
        {
            "prompt": f"x = {g} so", "completion": completion(rng, g % 3 == 0), "step": g // 8,
            "reward": float(rng.random() < SKILL[g % 4]), "finish_reason": rng.choice(["stop", "stop", "length", None]),
        }
        for g in range(GROUPS)
        for _ in range(SAMPLES)
    ]  # fmt: skip
    golden = [{"prompt": f"x = {g} so", "completion": completion(rng, False)} for g in range(0, GROUPS, 2) for _ in range(2)]
    store = folder / "store"
    with echolab.open(store, create=True) as lab:
        lab.ingest(write(folder / "policy.jsonl", rows), run="r")
        lab.ingest(write(folder / "golden.jsonl", golden), run="golden", role="expert")
    choose = "hash(rollout_id) % 6 > 0"
    assert echo("score", "--model", model, "--threads", 1, "--where", choose, "--store", store)[0] == 0
    assert echo("score", "resegment", "--scorer", "tiny", "--mode", "fixed:8", "--store", store)[0] == 0
    return store


@pytest.fixture
def store(scored, tmp_path) -> Path:
    return Path(shutil.copytree(scored, tmp_path / "store"))


def echo(*args: object) -> tuple[int, str]:
    """The command in this process: its exit code, and what it printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", ["echolab", *map(str, args)])
        main()
    return int(e.value.code or 0), out.getvalue()


def mine(store, name, *options, json_=True) -> Any:
    code, out = echo("mine", "--name", name, "--segmenter", "newline", *options, "--store", store, *["--json"] * json_)
    assert code == 0
    return json.loads(out) if json_ else out


@lru_cache(maxsize=1)
def open_lab(store):
    return echolab.open(store)


def rows(store, query):
    return open_lab(store).sql(query, segmenter="newline").to_dicts()


SUCCESSES = """
    SELECT group_id, rollout_id, sample, kind, finish_reason, problem_id, prompt_id, r.run, r.step, r.prompt, completion,
        segment_ends, segment_entropies, token_ids
    FROM rollouts r
    LEFT JOIN (
        SELECT * FROM segmentations WHERE segmenter = (SELECT id FROM segmenters WHERE name = 'newline')
    ) USING (rollout_id)
    LEFT JOIN scores USING (rollout_id)
    WHERE role = 'policy' AND success ORDER BY group_id, sample NULLS LAST, rollout_id"""


def peaks(store, where=lambda r: True, sign=1, region=None):
    """The clip of each group, by the definition, out of what SQL says."""
    best = {}
    for r in rows(store, SUCCESSES):
        if r["finish_reason"] == "length" or r["segment_ends"] is None or not where(r):
            continue
        begin = 0
        for number, (end, entropy) in enumerate(zip(r["segment_ends"], r["segment_entropies"], strict=True)):
            inside = region is None or begin < region(r)
            begin = end
            held = best.get(r["group_id"])
            if entropy is not None and inside and (held is None or sign * entropy > sign * held[2]):
                best[r["group_id"]] = r, number, entropy
    return {r["rollout_id"]: (r["segment_ends"][n], n, pytest.approx(e), r) for r, n, e in best.values()}


def clips(store, label):
    found = rows(store, f"SELECT * FROM clips WHERE clipset = '{label}' ORDER BY clip_id")
    return {c["rollout_id"]: c for c in found}


def test_peak_clips_are_those_of_a_loop_with_every_column_filled(store, model):
    report = mine(store, "c")
    wanted, found = peaks(store), clips(store, "c@1")
    assert {r: (c["end_token"], c["peak_segment"], c["peak_entropy"]) for r, c in found.items()} == {
        r: w[:3] for r, w in wanted.items()
    }
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    [scorer] = rows(store, "SELECT id, config::JSON ->> 'tokenizer' AS tokenizer FROM scorers")
    [segmenter] = rows(store, "SELECT id FROM segmenters WHERE name = 'newline'")
    for rollout, c in found.items():
        r = wanted[rollout][3]
        assert c["clip_ids"] == r["token_ids"][: c["end_token"]] and c["n_tokens"] == len(c["clip_ids"])
        assert c["prompt_ids"] == tokenizer(r["prompt"])["input_ids"]
        assert r["completion"].startswith(c["clip"]) and c["clip"] == tokenizer.decode(c["clip_ids"])
        assert c["clip_id"] == ids.clip_id(rollout, scorer["tokenizer"], c["end_token"])
        same = ("group_id", "problem_id", "prompt_id", "run", "step", "prompt")
        assert {k: c[k] for k in same} == {k: r[k] for k in same} and c["group_kind"] == r["kind"]
        assert (c["scorer"], c["segmenter"], c["tokenizer"]) == (scorer["id"], segmenter["id"], scorer["tokenizer"])
        assert (c["selector"], c["temperature"], c["weight"], c["split"], c["distance"]) == ("peak", 1.0, 1.0, None, None)
        assert c["clip_mask"] is None
    assert report["statistics"]["n_clips"] == len(found) > 8 and report["new"]


def test_the_report_counts_every_group_and_success(store):
    report = mine(store, "c")
    facts, successes = report["facts"], rows(store, SUCCESSES)
    kinds = rows(store, "SELECT kind, count(*) AS n FROM groups WHERE role = 'policy' GROUP BY kind")
    assert facts["groups"] == {k["kind"]: k["n"] for k in kinds}
    whole = [r for r in successes if r["finish_reason"] != "length"]
    left = [r for r in whole if r["segment_ends"] is not None]
    assert facts["successes"] == {
        "all": len(successes), "truncated": len(successes) - len(whole), "unscored": len(whole) - len(left),
        "candidates": len(left),
    }  # fmt: skip
    groups = [{r["group_id"] for r in some} for some in (left, whole, successes)]
    assert facts["outcomes"] == {
        k: n for k, n in {
            "clip": len(groups[0]), "unscored": len(groups[1] - groups[0]), "truncated": len(groups[2] - groups[1]),
            "no_success": GROUPS - len(groups[2]),
        }.items() if n
    }  # fmt: skip
    assert sum(facts["outcomes"].values()) == GROUPS and facts["splits"] == {"train": len(groups[0])}
    found = list(clips(store, "c@1").values())
    lasts = {r["rollout_id"]: r["segment_ends"] for r in left}
    share = [c["end_token"] / lasts[c["rollout_id"]][-1] for c in found]
    statistics = report["statistics"]
    assert statistics["n_tokens"] == sum(c["n_tokens"] for c in found)
    assert statistics["mean_fraction"] == pytest.approx(sum(share) / len(share))
    assert statistics["share_whole"] == pytest.approx(sum(s == 1 for s in share) / len(share))
    position = [(c["peak_segment"] + 0.5) / len(lasts[c["rollout_id"]]) for c in found]
    assert statistics["mean_position"] == pytest.approx(sum(position) / len(position))
    with echolab.open(store) as lab:
        [same] = lab.query("clip_stats", clipset="c").to_dicts()
    assert same == {k: pytest.approx(v) for k, v in statistics.items()}


def test_the_command_that_it_names_scores_what_is_missing(store):
    [note] = mine(store, "c")["notes"]
    said, command = note.split(" and were left out: ")
    assert said.endswith("successes have no score of tiny@1")
    assert echo(*shlex.split(command)[1:], "--store", store)[0] == 0
    again = mine(store, "c")
    assert again["label"] == "c@2" and again["notes"] == [] and "unscored" not in again["facts"]["successes"]
    wanted = {r: w[0] for r, w in peaks(store).items()}
    assert {r: c["end_token"] for r, c in clips(store, "c@2").items()} == wanted


def test_the_same_again_makes_nothing_new_and_says_so(store):
    first = mine(store, "c", json_=False)
    second = mine(store, "c", json_=False)
    assert "(nothing new: as it stands)" in second and "(nothing new" not in first
    assert second.replace(" (nothing new: as it stands)", "") == first
    assert mine(store, "c", "--top-k", 2)["label"] == "c@2"  # another configuration
    more = write(store.parent / "more.jsonl", [{"prompt": "new", "completion": "five\n", "reward": 1.0, "step": 0}])
    open_lab(store).ingest(more, run="r")
    assert mine(store, "c", "--top-k", 2)["label"] == "c@3"  # other data


def test_run_split_and_where_choose_rollouts_and_kinds_stay_those_of_whole_groups(store):
    report = mine(store, "c", "--run", "r", "--split", "train", "--where", "step > 0 AND kind = 'mixed' -- all of it")
    wanted = peaks(store, lambda r: r["step"] > 0 and r["kind"] == "mixed")
    assert {r: c["end_token"] for r, c in clips(store, "c@1").items()} == {r: w[0] for r, w in wanted.items()}
    assert set(report["facts"]["groups"]) == {"mixed"}
    assert {c["group_kind"] for c in clips(store, "c@1").values()} == {"mixed"}


def test_gate_and_lowest_and_region_reach_the_selector(store):
    mine(store, "gated", "--gate", "degenerate", "--selector", "lowest")
    wanted = peaks(store, lambda r: r["kind"] == "all_success", sign=-1)
    assert {r: c["end_token"] for r, c in clips(store, "gated@1").items()} == {r: w[0] for r, w in wanted.items()}
    mine(store, "think", "--region", "think")

    def thinking(r):
        """Tokens that begin before the tag, by the store's own texts of tokens."""
        if "</think>" not in r["completion"]:
            return 10**9
        vocabulary = {v["token_id"]: v["text"] for v in VOCABULARY}
        begins, at = [], 0
        for t in r["token_ids"]:
            begins.append(at)
            at += len(vocabulary[t].encode())  # of a part of a character another number: none stands before the tag here
        return sum(b < len(r["completion"].partition("</think>")[0].encode()) for b in begins)

    VOCABULARY = rows(store, "SELECT token_id, text FROM vocab")
    plain = [r for r in rows(store, SUCCESSES) if r["completion"].partition("</think>")[0].isascii()]
    wanted = peaks(store, region=thinking)
    found = clips(store, "think@1")
    ascii_groups = {r["group_id"] for r in plain} - {r["group_id"] for r in rows(store, SUCCESSES) if r not in plain}
    checked = {r: w[0] for r, w in wanted.items() if w[3]["group_id"] in ascii_groups}
    assert {r: c["end_token"] for r, c in found.items() if c["group_id"] in ascii_groups} == checked
    assert all("</think>" not in c["clip"] or c["clip"].rstrip().endswith("</think>") for c in found.values())


def test_scope_rollout_full_takes_every_success_with_its_eos(store, model):
    """An EOS belongs to a whole completion, and to no shorter clip."""
    report = mine(store, "all", "--scope", "rollout", "--selector", "full")
    assert report["statistics"]["share_whole"] == 1.0
    successes = {r["rollout_id"]: r for r in rows(store, SUCCESSES) if r["segment_ends"] and r["finish_reason"] != "length"}
    found = clips(store, "all@1")
    assert found.keys() == successes.keys()
    for rollout, c in found.items():
        assert c["clip_ids"] == successes[rollout]["token_ids"] and c["clip"] == successes[rollout]["completion"]


@pytest.fixture
def recorded(make_store, add_rows):
    """Made row by row, for what dumps seldom hold: EOS, masks, a character cut in two, prompts and completions as ids."""

    def make(completions, **fields):
        pieces = {0: b"a", 1: b"b\n", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"<end>", 5: b" x", 6: b"\n"}
        made = make_store([
            {"rollout_id": f"r{i}", "group": f"g{i}", "problem": f"p{i}", "reward": 1.0, "sample": 0, **c, **fields}
            for i, c in enumerate(completions)
        ])  # fmt: skip
        add_rows(made, "vocab", [
            {"tokenizer": "tok", "token_id": i, "bytes": p, "text": p.decode(errors="replace"), "has_newline": b"\n" in p,
             "special": i == 4} for i, p in pieces.items()
        ])  # fmt: skip
        with made.lock():
            made.register("scorers", "one", "one", {"kind": "sampling", "tokenizer": "tok", "temperature": 0.5, "run": "r"})
        return made

    return make


def score(add_rows, made, rollout, tokens, ends, entropies, mask=None):
    add_rows(made, "scores", [
        {"rollout_id": rollout, "scorer": "one", "run": "r", "step": 1, "token_ids": tokens, "loss_mask": mask,
         "entropies": [0.5] * len(tokens), "n_tokens": ends[-1]}
    ])  # fmt: skip
    add_rows(made, "segmentations", [
        {"rollout_id": rollout, "scorer": "one", "segmenter": "seg", "segment_ends": ends, "segment_entropies": entropies,
         "n_segments": len(ends)}
    ])  # fmt: skip


def test_eos_masks_and_cut_characters(recorded, add_rows):
    made = recorded([
        {"completion": "b\nab\na", "completion_ids": [1, 0, 1, 0, 4, 4], "prompt_ids": [5, 5]},  # the end lies behind the peak
        {"completion": "b\na", "completion_ids": [1, 0, 4, 4], "prompt_ids": [5]},  # the peak is the last segment
        {"completion": "aé", "completion_ids": [0, 2, 3]},  # cut within the character
        {"completion": "x a", "completion_ids": [5, 5, 0], "prompt_ids": []},  # no first space in the text
        {"completion": "b\na", "completion_ids": [9, 9], "prompt_ids": [9]},  # of another tokenizer
        {"completion": None, "completion_ids": [0, 4, 1], "prompt_ids": [5]},  # an EOS amid, and no text
        {"completion": "ab\na", "completion_ids": [0, 4, 1, 0], "prompt_ids": [5]},  # left out of the text
    ])  # fmt: skip
    score(add_rows, made, "r0", [1, 0, 1, 0, 4, 4], [1, 3, 4], [0.1, 0.9, 0.2], [True, True, False, True, True, False])
    score(add_rows, made, "r1", [1, 0, 4, 4], [1, 2], [0.1, 0.9], [True, True, True, False])
    score(add_rows, made, "r2", [0, 2, 3], [2, 3], [0.9, 0.1])
    score(add_rows, made, "r3", [5, 5, 0], [1, 3], [0.9, 0.1])
    score(add_rows, made, "r4", [1, 0], [1, 2], [0.9, 0.1])
    score(add_rows, made, "r5", [0, 4, 1], [3], [0.9])
    score(add_rows, made, "r6", [0, 4, 1, 0], [3, 4], [0.9, 0.1])
    with echolab.open(made.root) as lab:
        mined = lab.mine("c")
        found = {c["rollout_id"]: c for c in lab.sql("SELECT * FROM clips").to_dicts()}
    texts = {r: (c["end_token"], c["n_tokens"], c["clip_ids"], c["clip"], c["clip_mask"]) for r, c in found.items()}
    assert texts == {
        "r0": (3, 3, [1, 0, 1], "b\nab\n", [True, True, False]),
        "r1": (2, 3, [1, 0, 4], "b\na", [True, True, True]),
        "r2": (2, 2, [0, 2], "a\ufffd", None),
        "r3": (1, 1, [5], "x", None),
        "r4": (1, 1, [1], "b\n", None),
        "r5": (3, 3, [0, 4, 1], "a<end>b\n", None),
        "r6": (3, 3, [0, 4, 1], "ab\n", None),
    }
    assert {r: c["prompt_ids"] for r, c in found.items()} == {
        "r0": [5, 5], "r1": [5], "r2": None, "r3": None, "r4": None, "r5": [5], "r6": [5],
    }  # fmt: skip
    assert mined.notes == [
        "without prompt_ids: 3 of the clips (the dump has none, nor a model whose tokenizer could make them)"
    ]
    assert {c["temperature"] for c in found.values()} == {0.5}


def test_a_chosen_verifier_decides_success_and_kinds(recorded, add_rows):
    made = recorded(
        [{"completion": "b\n", "group": "g"}, {"completion": "ab\n", "group": "g"}, {"completion": "x"}], problem="p"
    )
    score(add_rows, made, "r0", [1], [1], [0.9])
    score(add_rows, made, "r1", [0, 1], [2], [0.1])
    word = {"verifier": "v1", "input_hash": "h", "status": "ok", "created_at": now()}
    said = {"r0": False, "r1": True, "r2": True}
    add_rows(made, "verdicts", [word | {"rollout_id": r, "success": s, "score": float(s)} for r, s in said.items()])
    with made.lock():
        made.register("verifiers", "v1", "math", {})
    with echolab.open(made.root) as lab:
        lab.mine("recorded")
        judged = lab.mine("judged", verifier="math")
        found = lab.sql("SELECT clipset, rollout_id, group_kind FROM clips ORDER BY ALL").rows()
        missing = lab.sql(f"SELECT rollout_id FROM rollouts WHERE {mining._successes(judged.config)} AND rollout_id <> 'r1'")
        # New verdicts change only what asks for them.
        add_rows(made, "verdicts", [word | {"rollout_id": "r0", "success": True, "score": 1.0, "input_hash": "i"}])
        labels = lab.mine("recorded").label, lab.mine("judged", verifier="math").label
    assert found == [("judged@1", "r1", "mixed"), ("recorded@1", "r0", "all_success")]
    assert labels == ("recorded@1", "judged@2") and judged.config["verifier"] == "v1"
    assert missing["rollout_id"].to_list() == ["r2"] and judged.facts["successes"]["unscored"] == 1


def test_clips_of_other_splits_are_told(recorded, add_rows):
    made = recorded([{"completion": "b\n"}], split="eval")
    score(add_rows, made, "r0", [1], [1], [0.9])
    with echolab.open(made.root) as lab:
        assert lab.mine("c").notes[-1].startswith("of split eval: 1 of the clips; do not train on what you evaluate with")


# Matching.


def test_match_takes_experts_of_the_same_problem_and_tells_who_has_none(store):
    report = mine(store, "m", "--selector", "match", "--min-segments", 1)
    experts = rows(
        store,
        """SELECT problem_id, n_segments FROM rollouts LEFT JOIN (SELECT * FROM segmentations WHERE segmenter =
        (SELECT id FROM segmenters WHERE name = 'newline')) USING (rollout_id) WHERE role = 'expert'""",
    )
    scored = {e["problem_id"] for e in experts if e["n_segments"]}
    assert report["facts"]["experts"] == {
        "all": GROUPS, "unscored": sum(e["n_segments"] is None for e in experts), "problems": len(scored)
    }  # fmt: skip
    left = [r for r in rows(store, SUCCESSES) if r["finish_reason"] != "length" and r["segment_ends"]]
    with_expert = {r["group_id"] for r in left if r["problem_id"] in scored}
    found = clips(store, "m@1").values()
    assert {c["group_id"] for c in found} == with_expert and all(c["distance"] >= 0 for c in found)
    assert report["facts"]["outcomes"]["no_expert"] == len({r["group_id"] for r in left} - with_expert)
    assert any(
        n.startswith(f"{report['facts']['experts']['unscored']:,} of 24 experts have no segments") for n in report["notes"]
    )


def test_match_against_a_profile_keeps_its_version_and_knows_it_by_a_bare_name(store):
    with echolab.open(store) as lab:
        lab.profile("golden", "role = 'expert'", segmenter="newline", bootstrap=0)
        curve = lab.sql(
            "SELECT value FROM profiles WHERE axis = 'relative' AND slice = 'all' AND statistic = 'mean' ORDER BY bin"
        )["value"].to_list()
    options = ("--selector", "match", "--against", "golden", "--distance", "dtw", "--min-segments", 2)
    report = mine(store, "m", *options)
    assert report["config"]["selector"]["against"] == "golden@1"
    assert mine(store, "m", *options)["new"] is False
    [parents] = rows(store, "SELECT parents::JSON AS p FROM clipsets WHERE name = 'm'")
    assert json.loads(parents["p"])["profile"] == "golden@1"
    sixteen = [sum(curve[3 * i : 3 * i + 3]) / 3 for i in range(16)]
    segments = {r["rollout_id"]: r["segment_entropies"] for r in rows(store, SUCCESSES)}
    for c in clips(store, "m@1").values():
        own = segments[c["rollout_id"]][: c["peak_segment"] + 1]
        own = [own[int((k + 0.5) / 16 * len(own))] for k in range(16)] if 16 % len(own) == 0 else None
        if own:
            assert c["distance"] == pytest.approx(warped(own, sixteen), rel=1e-4)
    other = mine(store, "m", *options, "--segmenter", "fixed:8")
    assert "profile golden@1 has segmenter newline@1, the clips fixed:8@1: what is near may be the segmenter" in other["notes"]


def test_a_profile_whose_problems_are_in_a_benchmark_is_warned_of(store, tmp_path, capsys):
    problem = rows(store, "SELECT prompt, problem_id FROM rollouts WHERE role = 'expert' ORDER BY rollout_id LIMIT 1")[0]
    file = tmp_path / "bench.jsonl"
    file.write_text(json.dumps({"problem": problem["prompt"]}) + "\n" + json.dumps({"problem": "another one"}) + "\n")
    with echolab.open(store) as lab:
        lab.profile("golden", "role = 'expert'", segmenter="newline", bootstrap=0)
    report = mine(store, "m", "--selector", "match", "--against", "golden", "--check", file)
    assert report["checks"][str(file)]["shared"] == [problem["problem_id"]]
    assert "warning: 1 of" in capsys.readouterr().err


def warped(a, b):
    best = {(-1, -1): 0.0}
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i, j] = (x - y) ** 2 + min(best.get(p, 1e9) for p in ((i - 1, j), (i, j - 1), (i - 1, j - 1)))
    return best[len(a) - 1, len(b) - 1] / len(a)


# Crashes.


def test_a_killed_mining_leaves_nothing_and_begins_anew(store, tmp_path):
    """Killed while it writes: no clip set, no clip; then as if nothing had been."""
    script = tmp_path / "slow.py"
    script.write_text("""
import sys, time, echolab
from echolab.store import Store
stage = Store.stage
def slow(*a):
    stage(*a)
    print("staged", flush=True)
    time.sleep(60)
Store.stage = slow
echolab.open(sys.argv[1]).mine("c", segmenter="newline")
""")
    process = subprocess.Popen([sys.executable, script, store], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "staged\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert rows(store, "SELECT * FROM clips") == [] and rows(store, "SELECT * FROM clipsets") == []
    assert mine(store, "c")["label"] == "c@1"
    assert {r: c["end_token"] for r, c in clips(store, "c@1").items()} == {r: w[0] for r, w in peaks(store).items()}


def test_an_interrupt_leaves_nothing(store, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, echolab.open(store) as lab:
        m.setattr(type(lab.store), "stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lab.mine("c", segmenter="newline")
    assert rows(store, "SELECT * FROM clips") == [] and rows(store, "SELECT * FROM clipsets") == []
    assert not [p for p in (store / "_jobs").iterdir() if p.name.startswith("clipset")]


@pytest.mark.parametrize("selector", ["random", "match"])
def test_batches_change_nothing(store, monkeypatch, selector):
    options = ("--selector", selector, *(["--min-segments", 1] if selector == "match" else []))
    mine(store, "big", *options)
    monkeypatch.setattr(mining, "SEGMENT_ROWS", 3)
    monkeypatch.setattr(mining, "CLIP_ROWS", 2)
    monkeypatch.setattr(mining, "STAGED_BYTES", 1000)
    mine(store, "small", *options)
    big, small = (
        {r: {k: v for k, v in c.items() if k != "clipset"} for r, c in clips(store, f"{n}@1").items()} for n in ("big", "small")
    )
    assert big == small and len(Store.open(store).snapshot().files("clips")) > 2


# What cannot be.


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"selector": "peek"}, WrongUsage, r"selector: no selector 'peek'; did you mean peak\?"),
        ({"topk": 2}, WrongUsage, r"topk: no such option; did you mean top_k\?"),
        ({"run": "q"}, EcholabError, "no run 'q' in this store; there are: golden, r"),
        ({"where": "step > 99"}, EcholabError, r"no rollout fits the condition: role = 'policy' AND \(step > 99\)"),
        ({"where": " "}, EcholabError, "an empty --where"),
        ({"where": "stp > 9"}, EcholabError, 'column "stp" not found'),
        ({"where": "step = 0 AND kind = 'all_fail'"}, EcholabError, "none of 2 groups has a success"),
        ({"selector": "match", "against": "gold"}, EcholabError, "no profile 'gold' in this store; there are: none"),
        ({"segmenter": None}, EcholabError, "there are several segmenters: .*; choose with --segmenter"),
        ({"scorer": "tini"}, EcholabError, "no scorer 'tini' in this store; there are: tiny@1"),
        ({"selector": "match", "min_segments": 500}, EcholabError, "no clip: .* without a segment that may be chosen"),
        ({"name": "a b"}, WrongUsage, "'a b' is no name of a clip set"),
    ],
)  # fmt: skip
def test_errors_are_one_clear_line(scored, options, kind, message):
    with echolab.open(scored) as lab, pytest.raises(kind, match=message) as e:
        lab.mine(**{"name": "c", "segmenter": "newline"} | options)
    assert "\n" not in str(e.value)
    assert rows(scored, "SELECT * FROM clipsets") == []


def test_what_is_not_scored_names_the_command(make_store, recorded, add_rows):
    unscored = make_store([{"reward": 1.0}])
    with (
        echolab.open(unscored.root) as lab,
        pytest.raises(EcholabError, match="nothing is scored in this store: echolab score"),
    ):
        lab.mine("c")
    made = recorded([{"completion": "b\n"}, {"completion": "b\n", "reward": 0.0}])
    score(add_rows, made, "r1", [1], [1], [0.9])
    with echolab.open(made.root) as lab, pytest.raises(EcholabError) as e:
        lab.mine("c")
    assert str(e.value).startswith(
        "no clip: 1 without a success, 1 whose successes have no segments; 1 of 1 successes have no score of one@1"
    )


def test_where_experts_are_missing_match_says_so(recorded, add_rows):
    made = recorded([{"completion": "b\n"}])
    score(add_rows, made, "r0", [1], [1], [0.9])
    with (
        echolab.open(made.root) as lab,
        pytest.raises(EcholabError, match="nothing to match with: there are no rollouts of role expert"),
    ):
        lab.mine("c", selector="match")


# Named queries.


def test_clip_overlap_compares_two_sets(store):
    mine(store, "a", "--where", "step < 2")
    mine(store, "b", "--selector", "full", "--where", "step > 0")
    a, b = clips(store, "a@1"), clips(store, "b@1")
    with echolab.open(store) as lab:
        [found] = lab.query("clip_overlap", a="a", b="b@1").to_dicts()
        assert lab.query("clip_overlap").to_dicts() == [found]  # the two made last
        for query, params in (
            ("clip_overlap", {"a": "z", "b": "b"}),
            *((f"clip_{q}", {"clipset": "z"}) for q in ("stats", "provenance")),
        ):
            with pytest.raises(EcholabError, match="no clip set 'z' in this store; there are: a@1, b@1"):
                lab.query(query, **params)
        assert [r["clipset"] for r in lab.query("clip_stats").to_dicts()] == ["a@1", "b@1"]
    ends = {r: (a.get(r, {}).get("end_token", 0), b.get(r, {}).get("end_token", 0)) for r in a.keys() | b.keys()}
    both = sum(min(e) for e in ends.values())
    groups = [{c["group_id"] for c in s.values()} for s in (a, b)]
    same = {c["group_id"] for r, c in a.items() if r in b}
    assert (found["a"], found["b"], found["clips_a"], found["clips_b"]) == ("a@1", "b@1", len(a), len(b))
    assert found["clips_both"] == len({c["clip_id"] for c in a.values()} & {c["clip_id"] for c in b.values()})
    assert found["rollouts_both"] == len(a.keys() & b.keys()) and found["tokens_both"] == both
    assert found["jaccard_tokens"] == pytest.approx(both / sum(max(e) for e in ends.values()))
    assert found["groups_both"] == len(groups[0] & groups[1]) > 0 and found["same_rollout"] == len(same)
    assert found["same_clip"] == found["clips_both"]


def test_clip_provenance_leads_back_to_file_and_line(scored, store):
    mine(store, "c")
    with echolab.open(store) as lab:
        found = lab.query("clip_provenance", clipset="c").to_dicts()
        one = lab.query("clip_provenance", clip=found[0]["clip_id"]).to_dicts()
    assert one == [found[0]] and {f["source_path"] for f in found} == {"policy.jsonl"}
    made = clips(store, "c@1")
    assert {f["rollout_id"] for f in found} == made.keys()
    source = [json.loads(line) for line in (scored.parent / "policy.jsonl").read_text().splitlines()]
    for f in found:
        assert source[f["row"]]["completion"].startswith(made[f["rollout_id"]]["clip"])
        assert (f["scorer"], f["segmenter"], f["selector"], f["run"]) == ("tiny@1", "newline@1", "peak", "r")
