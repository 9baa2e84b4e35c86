"""Verdicts: what each verifier says, what is made anew and when, and that nothing is lost or made twice."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import echolab
from echolab import EcholabError
from echolab.errors import WrongUsage
from echolab.verifiers import Verifier, judge
from echolab.verify import verify

ROOT = Path(__file__).resolve().parents[1]
SAY = "python:worker_functions:verifier"
PROMPTED = "python:worker_functions:with_prompt"


def verdicts(store, columns="completion, status, success, score, extracted", verifier=None):
    with echolab.open(store.root) as lab:
        wanted = f"WHERE verifier = '{verifier}'" if verifier else ""
        source = "verdicts JOIN (SELECT rollout_id, completion FROM rollouts) USING (rollout_id)"
        return lab.sql(f"SELECT {columns} FROM {source} {wanted} ORDER BY ALL").rows()


def judged(name, gold, answer, **options):
    """The word of a verifier on one answer, as its workers give it."""
    verifier = Verifier.make(name, options)
    return judge(name, verifier.options.model_dump(mode="json"))(("", (gold, answer)))


@pytest.fixture
def rollouts(make_store):
    """A store with one rollout for each (completion, ground truth)."""

    def make(*pairs, **fields):
        rows = [{"completion": c, "ground_truth": g, "sample": i, "reward": 0.0, **fields} for i, (c, g) in enumerate(pairs)]
        return make_store(rows)

    return make


# What the verifiers say.


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("27.0", "27", True),
        ("27.0", "3^3", True),
        ("4", "9 - 5 = 4", True),
        ("13", "3^2+2^2 = 13", True),
        ("5", "x=5", True),
        (r"\frac{1}{2}", "0.5", True),
        ("0.5", r"50\%", True),
        ("3", "4", False),
        ("1<x<2", "(1,2)", True),
        ("(1,2)", "1<x<2", False),
        ("(1,2)", "(2,1)", False),
        (r"\{3,5\}", "5,3", True),
        ("3", "5,3", False),
        ("7", "7.", True),
        ("7", "$7$", True),
        ("7", r"\(7\)", True),
        ("3,4", "$3$ and $4$", True),
        ("18", "$18", True),
        ("18", r"\$18", True),
        (r"\text{Monday}", "Monday", True),
        ("10", r"10 \text{ cm}", True),
        ("3 <<1+2=3>>\n#### 3", "3", True),
        ("5", "}{", False),
        ("7", "the answer is 7", False),
        ("1\n2", "12", False),
    ],
)
def test_math_compares_values_with_gold_first(gold, answer, right):
    assert judged("math", gold, answer) == ("ok", right, float(right), answer)


@pytest.mark.parametrize(
    ("name", "options", "gold", "answer", "right"),
    [
        ("exact", {}, "Paris", " paris. ", True),
        ("exact", {"case": "true"}, "Paris", "paris", False),
        ("exact", {}, "New  York", r"\text{New York}", True),
        ("exact", {}, "1/2", "0.5", False),
        ("exact", {}, "ﬁne", "fine", True),
        ("numeric", {}, "1234.5", "1,234.5", True),
        ("numeric", {}, "0.75", r"\frac{3}{4}", True),
        ("numeric", {}, "0.5", "50%", True),
        ("numeric", {}, "1000001", "1000002", False),
        ("numeric", {}, "0.333333", "0.3333331", True),
        ("numeric", {}, "3", "none", False),
        ("numeric", {"rel_tol": "0.01"}, "3.14159", "3.14", True),
        ("numeric", {}, "3.14159", "3.14", False),
        ("numeric", {}, "0", "1e-10", True),
        ("choice", {}, "B", "B", True),
        ("choice", {}, "(C) 12", "B", False),
        ("choice", {}, r"\boxed{\text{B}}", "B", True),
    ],
)
def test_exact_numeric_and_choice_compare_as_they_say(name, options, gold, answer, right):
    assert judged(name, gold, answer, **options)[:3] == ("ok", right, float(right))


def test_a_verdict_is_right_wrong_or_a_state_of_its_own(rollouts):
    store = rollouts(
        (r"\boxed{5}", "5"),
        (r"\boxed{6}", "5"),
        ("no mark: 5", "5"),
        (r"<think>\boxed{5}", "5"),
        (r"\boxed{9^{9^{9^{9}}}}", "5"),
        (r"\boxed{7}", None),
        (r"\boxed{8}", " "),
        (None, "5"),
    )
    report = verify(store, "math", timeout=1.5)
    assert verdicts(store) == [
        (r"<think>\boxed{5}", "no_answer", None, None, None),
        (r"\boxed{5}", "ok", True, 1.0, "5"),
        (r"\boxed{6}", "ok", False, 0.0, "6"),
        (r"\boxed{9^{9^{9^{9}}}}", "timeout", None, None, None),
        ("no mark: 5", "no_answer", None, None, None),
    ]
    assert report.statuses == {"ok": 2, "no_answer": 2, "timeout": 1, "error": 0}
    assert (report.right, report.wrong, report.without_gold, report.without_text) == (1, 1, 2, 1)
    with echolab.open(store.root) as lab:
        assert lab.validate() == []


def test_a_prompt_that_opens_the_thought_is_minded(rollouts):
    store = rollouts((r"so \boxed{5}", "5"), prompt="What?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert verify(store, "math").statuses["no_answer"] == 1


def test_the_chosen_verifier_decides_success_and_kind(make_store):
    """Group a: recorded all wrong, in truth one right. Group b: a timeout is unrewarded, and no answer is wrong."""
    store = make_store(
        [
            {"group": "a", "completion": r"\boxed{5}", "ground_truth": "5", "reward": 0.0},
            {"group": "a", "completion": r"\boxed{6}", "ground_truth": "5", "reward": 0.0},
            {"group": "b", "completion": r"\boxed{9^{9^{9^{9}}}}", "ground_truth": "5", "reward": 1.0},
            {"group": "b", "completion": "none", "ground_truth": "5", "reward": 1.0},
            {"group": "b", "completion": r"\boxed{1}", "ground_truth": "5", "reward": 1.0},
        ]
    )
    verify(store, "math", timeout=1.5)
    with echolab.open(store.root) as lab:
        kinds = "SELECT kind, n_rewarded, n_success FROM groups ORDER BY kind"
        assert lab.sql(kinds).rows() == [("all_fail", 2, 0), ("all_success", 3, 3)]
        assert lab.sql(kinds, verifier="math").rows() == [("all_fail", 2, 0), ("mixed", 2, 1)]
        words = dict(lab.sql("SELECT completion, success FROM rollouts", verifier="math@1").rows())
        assert words == {
            r"\boxed{5}": True,
            r"\boxed{6}": False,
            r"\boxed{9^{9^{9^{9}}}}": None,
            "none": False,
            r"\boxed{1}": False,
        }
        agreement = lab.query("verifier_agreement").to_dicts()[0]
        assert (agreement["n"], agreement["n_compared"], agreement["n_agree"]) == (5, 4, 1)
        assert (agreement["only_verifier"], agreement["only_recorded"], agreement["timeout"]) == (1, 2, 1)
        assert agreement["mean_recorded"] == pytest.approx(0.6) and agreement["mean_verifier"] == pytest.approx(0.25)
        rows = lab.query("verifier_disagreements", verifier="math").select("extracted", "reward", "success").rows()
        assert sorted(rows, key=str) == sorted([("5", 0.0, True), (None, 1.0, False), ("1", 1.0, False)], key=str)


# A user's function.


def test_a_function_returns_a_bool_a_score_nothing_or_a_dict(rollouts):
    word = {"success": True, "score": 0.2, "extracted": 7}
    store = rollouts(
        *((f"say {w}", "g") for w in ("True", "False", "0.5", "1", "None", word, "{'odd': 1}", "float('nan')", "'x'"))
    )
    report = verify(store, SAY)
    assert {c[4:]: row for c, *row in verdicts(store)} == {
        "True": ["ok", True, 1.0, None],
        "False": ["ok", False, 0.0, None],
        "0.5": ["ok", False, 0.5, None],
        "1": ["ok", True, 1.0, None],
        "None": ["no_answer", None, None, None],
        str(word): ["ok", True, 0.2, "7"],
        "{'odd': 1}": ["error", None, None, None],
        "float('nan')": ["error", None, None, None],
        "'x'": ["error", None, None, None],
    }
    assert len(report.reasons) == 3 and any("odd" in r for r in report.reasons)
    verify(store, SAY, {"threshold": "0.5"})
    assert dict(verdicts(store, "completion, success", verify(store, SAY, {"threshold": 0.5}).id))["say 0.5"] is True


def test_a_function_may_ask_for_the_prompt_and_do_without_a_ground_truth(rollouts):
    store = rollouts(("p g", "g"), ("p None", None), prompt="p")
    assert verify(store, PROMPTED).without_gold == 1
    report = verify(store, PROMPTED, {"gold": "false"})
    assert (report.right, report.wrong, report.verifier) == (2, 0, f"{PROMPTED}@2")


def test_whatever_a_function_does_costs_its_own_rollout_only(rollouts):
    harm = ["sleep", "loop", "power", "memory", "kill", "crash", "leave", "exit", "raise", "child"]
    store = rollouts(*((f"{h} x", "g") for h in harm), *((f"say {i % 2 == 0}  # {i}", "g") for i in range(200)))
    report = verify(store, SAY, timeout=1, workers=2, memory_gb=2)
    found = {c.split()[0]: status for c, status in verdicts(store, "completion, status") if not c.startswith("say")}
    assert found == {
        **dict.fromkeys(["sleep", "loop", "power", "child"], "timeout"),
        **dict.fromkeys(["memory", "kill", "crash", "leave", "exit", "raise"], "error"),
    }
    assert (report.right, report.wrong, report.made) == (100, 100, 210)


def test_the_example_of_the_page_runs(rollouts, tmp_path, monkeypatch):
    """docs/verify.md shows a verifier for the game of 24: it is found in the folder where one stands."""
    page = (ROOT / "docs" / "verify.md").read_text()
    example = next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def verify" in b)
    (tmp_path / "game24.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    store = rollouts(
        ("<answer>(10 - 4) * (8 - 4)</answer>", "4 4 8 10"), ("<answer>6 * 4</answer>", "4 4 8 10"), ("I give up", "4 4 8 10"),
        ("<answer>(10 - 4) * (8 - 4</answer>", "4 4 8 10"), ("<answer>4 + 4 + 8 + 10</answer>", "4 4 8 10"),
        ("<answer>8 / (4 - 4) * 10</answer>", "4 4 8 10"),
    )  # fmt: skip
    report = verify(store, "python:game24:verify")
    assert (report.right, report.wrong, report.statuses["no_answer"]) == (1, 4, 1)
    # A function that was changed is another version.
    (tmp_path / "game24.py").write_text(example + "\n# changed\n")
    again = verify(store, "python:game24:verify")
    assert (again.verifier, again.made) == ("python:game24:verify@2", 6)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("maths", {}, "python:module:function"), ("math:x", {}, "unknown verifier"), ("python", {}, "unknown verifier"),
        ("python:json", {}, "write python:module:function"), ("math", {"rounding": "3"}, "float_rounding"),
        ("math", {"extract": "boxes"}, "boxed"), ("numeric", {"rel_tol": "much"}, "rel_tol"),
    ],
)  # fmt: skip
def test_a_verifier_that_makes_no_sense_is_refused_in_one_line(name, options, says):
    with pytest.raises(WrongUsage, match=re.escape(says)) as e:
        Verifier.make(name, options)
    assert "\n" not in str(e.value)


def test_what_is_missing_is_said_in_one_line(rollouts, monkeypatch):
    store = rollouts(("say True", "g"))
    for name, says in (
        ("python:absent_module:f", "absent_module"),
        ("python:worker_functions:absent", "no function absent"),
    ):
        with pytest.raises(EcholabError, match=says):
            verify(store, name)

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("echolab.verifiers.version", absent)
    with pytest.raises(EcholabError, match=re.escape("pip install 'echolab[math]'")):
        verify(store, "math")
    with pytest.raises(EcholabError, match="there are: r"):
        verify(store, "exact", run="nobody")
    with pytest.raises(EcholabError, match="oops"):
        verify(store, "exact", where="oops = 1")
    with pytest.raises(WrongUsage, match="no state 'wrong'"):
        verify(store, "exact", again=["wrong"])


# What is made, and when.


def test_only_what_has_no_verdict_is_made(rollouts, add_reading):
    store = rollouts((r"\boxed{1}", "1"), ("none", "1"))
    assert verify(store, "exact").made == 2
    add_reading(store, [{"completion": r"\boxed{3}", "ground_truth": "3", "group": "new"}])
    report = verify(store, "exact")
    assert (report.made, report.stood) == (1, 2)
    assert verify(store, "exact", {"case": True}).verifier == "exact@2"
    before = store.snapshot().versions
    report = verify(store, "exact")
    assert (report.made, report.stood, report.verifier) == (0, 3, "exact@1")
    assert store.snapshot().versions == before


def test_run_and_where_choose(make_store, add_reading):
    store = make_store([{"completion": f"\\boxed{{{i}}}", "ground_truth": "1", "step": i} for i in range(4)])
    add_reading(store, [{"completion": r"\boxed{9}", "ground_truth": "1", "run": "other"}])
    assert verify(store, "exact", run="other").made == 1
    assert verify(store, "exact", where="step > 1 -- and nothing else").made == 2
    assert verify(store, "exact", where="step = 0 OR kind = 'unrewarded'").made == 2


def test_a_verdict_is_made_anew_when_the_ground_truth_changes_and_when_it_changes_back(tmp_path):
    dump = tmp_path / "d.jsonl"

    def ingest(gold):
        golds = ["0", gold, "2"]
        rows = [
            {"input": f"p{i}", "output": f"\\boxed{{{i}}}", "gts": g, "score": 0.0, "uid": str(i)} for i, g in enumerate(golds)
        ]
        dump.write_text("".join(json.dumps(r) + "\n" for r in rows))
        lab.ingest(dump, run="r", replace=True)

    with echolab.open(tmp_path / "s", create=True) as lab:
        for gold, made, right in (("1", 3, True), ("5", 1, False), ("1", 1, True), ("1", 0, True)):
            ingest(gold)
            report = lab.verify("exact")
            assert (report.made, report.stood) == (made, 3 - made)
            said = lab.sql(r"SELECT success FROM rollouts WHERE completion = '\boxed{1}'", verifier="exact")
            assert said.item() is right
            assert lab.validate() == []


def test_a_verdict_is_made_anew_when_another_answer_is_extracted(rollouts, monkeypatch):
    store = rollouts((r"\boxed{1} <answer>2</answer>", "2"), (r"\boxed{3}", "3"))
    verify(store, "exact")
    extract = echolab.verifiers.answers.extract  # type: ignore[attr-defined]
    monkeypatch.setattr("echolab.answers.extract", lambda text, names, *rest: extract(text, ("answer", "boxed"), *rest))
    report = verify(store, "exact")
    assert (report.made, report.stood, report.right) == (1, 1, 1)
    assert [row[2:] for row in verdicts(store)] == [(True, 1.0, "2"), (True, 1.0, "3")]


def test_again_makes_states_anew_and_keeps_one_verdict_for_each_input(rollouts):
    store = rollouts(("late x", "late"), ("raise x", "g"), ("say True", "g"), ("say None", "g"))
    assert verify(store, SAY, timeout=0.4).statuses == {"ok": 1, "no_answer": 1, "timeout": 1, "error": 1}
    assert verify(store, SAY, timeout=60).made == 0
    report = verify(store, SAY, timeout=60, again=["timeout"])
    assert report.statuses == {"ok": 1, "no_answer": 0, "timeout": 0, "error": 0}
    assert verify(store, SAY, again=("timeout", "error")).statuses["error"] == 1
    with echolab.open(store.root) as lab:
        assert lab.validate() == []
        assert lab.sql("SELECT status, count(*) FROM verdicts GROUP BY ALL ORDER BY ALL").rows() == [
            ("error", 1), ("no_answer", 1), ("ok", 2),
        ]  # fmt: skip


def test_a_verdict_that_is_made_anew_late_still_replaces_the_old_one(rollouts, add_reading, monkeypatch):
    """Others are committed while it is under way."""
    store = rollouts(("late x", "late"))
    assert verify(store, SAY, timeout=0.4).statuses["timeout"] == 1
    add_reading(store, [{"completion": f"say True  # {i}", "ground_truth": "g", "group": "new"} for i in range(20)])
    monkeypatch.setattr("echolab.verify.COMMIT_ROWS", 1)
    assert verify(store, SAY, timeout=60, again=["timeout"]).right == 21
    with echolab.open(store.root) as lab:
        assert lab.validate() == [] and lab.sql("SELECT count(*) FROM base.verdicts").item() == 21


def test_equal_inputs_are_judged_once(rollouts, monkeypatch):
    seen = []
    run = echolab.verify.run_tasks  # type: ignore[attr-defined]

    def counting(task, items, **limits):
        return run(task, (seen.append(i) or i for i in items), **limits)

    monkeypatch.setattr("echolab.verify.run_tasks", counting)
    store = rollouts(*((f"text {i}: \\boxed{{{i % 3}}}", "1") for i in range(300)))
    assert (verify(store, "exact").right, len(seen)) == (100, 3)


# Interrupted, raced, killed.


@pytest.fixture
def many(rollouts):
    return rollouts(*((f"{i}: \\boxed{{{i}}}" if i % 7 else "none", str(i - i % 3)) for i in range(600)))


def test_an_interrupted_run_keeps_what_it_has_and_goes_on_to_the_same_end(many, rollouts, monkeypatch):
    whole = rollouts(
        *((c, g) for c, g in sorted(echolab.open(many.root).sql("SELECT completion, ground_truth FROM rollouts").rows()))
    )
    verify(whole, "exact")

    def interrupt(done, total):
        if done >= 256:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(many, "exact", progress=interrupt)
    kept = len(verdicts(many))
    assert 30 < kept < 600
    report = verify(many, "exact")
    assert (report.stood, report.made) == (kept, 600 - kept)
    assert verdicts(many) == verdicts(whole)


def test_many_commits_give_what_one_gives(many, rollouts, monkeypatch):
    monkeypatch.setattr("echolab.verify.COMMIT_ROWS", 50)
    report = verify(many, "exact")
    assert report.made == 600 == len(verdicts(many))
    commits = [h for h in many.history("verdicts") if h.get("echolab.kind") == "append"]
    assert len(commits) >= 10


CODE = """
import sys, echolab, echolab.verify as v
v.COMMIT_ROWS = 40
sys.path.append(sys.argv[2])
v.verify(v.Store.open(sys.argv[1]), sys.argv[3], timeout=float(sys.argv[4]))
"""


def start(store, name, timeout=5.0) -> subprocess.Popen[bytes]:
    arguments = [str(store.root), str(Path(__file__).parent), name, str(timeout)]
    return subprocess.Popen([sys.executable, "-c", CODE, *arguments], stderr=subprocess.PIPE)


def test_two_processes_at_once_make_every_verdict_once(many):
    processes = [start(many, "exact") for _ in range(2)]
    for p in processes:
        _, errors = p.communicate(timeout=120)
        assert p.returncode == 0, errors.decode()
    assert len(verdicts(many)) == 600
    with echolab.open(many.root) as lab:
        assert lab.validate() == [] and lab.sql("SELECT count(*) FROM verifiers").item() == 1
        assert lab.sql("SELECT count(*) FROM base.verdicts").item() == 600


@pytest.mark.parametrize("commit_rows", [50_000, 40])
def test_what_another_process_brought_meanwhile_is_dropped_and_counted(many, monkeypatch, commit_rows):
    """Also where we have read its file already for a commit, and the rest of what it judged comes in later ones."""
    monkeypatch.setattr("echolab.verify.COMMIT_ROWS", commit_rows)
    done = []

    def meanwhile(read, total):
        if read >= 256 and not done:
            done.append(verify(many, "exact", where="sample % 2 = 0"))

    report = verify(many, "exact", progress=meanwhile)
    assert done[0].made + done[0].elsewhere + done[0].stood == 300
    assert (report.made + report.elsewhere, report.elsewhere) == (600, done[0].made)
    with echolab.open(many.root) as lab:
        assert lab.sql("SELECT count(*) FROM base.verdicts").item() == 600


def test_sigkill_in_the_middle_leaves_a_sound_store_and_a_rerun_completes_it(rollouts):
    store = rollouts(*((f"say {i % 2 == 0} if not __import__('time').sleep(0.01) else {i}", "g") for i in range(400)))
    for _ in range(3):
        process = start(store, SAY)
        before = len(verdicts(store))
        deadline = time.monotonic() + 60
        while len(verdicts(store)) < before + 40 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with echolab.open(store.root) as lab:
            assert lab.validate() == []
    kept = len(verdicts(store))
    assert kept >= 40
    report = verify(store, SAY)
    assert (report.stood, report.made) == (kept, 400 - kept) and len(verdicts(store)) == 400
