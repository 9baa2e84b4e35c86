"""The report: its numbers, its size, its escaping, and what it says where something is missing."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from generators import told
from hypothesis import given, settings
from hypothesis import strategies as st

import echolab
from echolab import EcholabError
from echolab.report.findings import since_when
from echolab.report.rollouts import pick
from echolab.report.sample import REASONS, as_json
from echolab.report.tokens import pack, pack_lengths, spell, unpack
from echolab.words import percent, short

pytest.importorskip("vl_convert", reason="reports need vl-convert: pip install 'echolab[report]'")


class Page(HTMLParser):
    """What a browser makes of a page: its data, its scripts, its elements, its text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text("utf-8")
        self.data, self.scripts, self.elements, self.attributes, self.text = {}, [], [], [], ""
        self._open = None
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        self._open = (tag, dict(attrs))

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        tag, attrs = self._open or ("", {})
        if tag == "script" and attrs.get("type") == "application/json":
            self.data[attrs["id"]] = json.loads(data)
        elif tag == "script":
            self.scripts.append(data)
        elif tag != "style":
            self.text += data

    @property
    def groups(self):
        return {k.removeprefix("g-"): v for k, v in self.data.items() if k.startswith("g-")}

    def rows(self, *columns):
        """The data of all charts that have these columns."""
        data = [row for spec in self.data["charts"].values() for rows in spec["datasets"].values() for row in rows]
        return [row for row in data if set(columns) <= row.keys()]


@pytest.fixture(scope="module")
def store(make_store, add_reading):
    made = make_store(told.steps())
    add_reading(made, told.experts())
    told.score(made)
    with echolab.open(made.root) as lab:
        lab.profile("golden", "role = 'expert' AND success", bootstrap=20)
        lab.mine("hard")
    return made


@pytest.fixture(scope="module")
def told_page(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    with echolab.open(store.root) as lab:
        done = lab.report(path)
        yield lab, done, Page(path)


def page_of(store, tmp_path, **options):
    with echolab.open(store.root) as lab:
        done = lab.report(tmp_path / "page.html", **options)
    return done, Page(tmp_path / "page.html")


# Numbers.


def test_numbers_of_the_page_are_those_of_the_named_queries(told_page):
    lab, done, page = told_page
    assert done.missing == [] and set(done.charts) >= {"degenerate_by_step", "entropy_profile", "clip_stats"}
    drawn = [row for row in page.rows("part") if row["share"] is not None]
    for r in lab.query("degenerate_by_step").to_dicts():
        assert {d["part"]: d["share"] for d in drawn if d["step"] == r["step"]} == {
            "all wrong": r["share_all_fail"], "all right": r["share_all_success"], "mixed": r["share_mixed"],
        }  # fmt: skip
    rewards = page.rows("success_rate", "mean")
    assert sorted((d["step"], d["mean"]) for d in rewards) == lab.query("reward_by_step").select("step", "mean").rows()
    entropies = page.rows("mean_of_tokens")
    assert sorted((d["step"], d["median"]) for d in entropies) == lab.query("entropy_by_step").select("step", "median").rows()
    for r in lab.query("clip_stats").to_dicts():
        assert f"{r['n_tokens']:,}" in page.text and r["clipset"] in page.text


def test_the_headline_is_true(told_page):
    """12 steps of 4 groups, all of them degenerate but the mixed ones: five of problem 2 and one of problem 3."""
    lab, _, page = told_page
    cost = lab.sql("SELECT sum(n_tokens) FROM groups WHERE role = 'policy' AND kind <> 'mixed'").item()
    assert f"{percent(42 / 48)} of the groups taught nothing; they cost {short(cost)} tokens." in page.text
    assert "Of 48 judged groups, 23 were all wrong and 19 were all right." in page.text
    experts = lab.query("all_fail_with_expert").height
    assert f"To {experts} of the all-wrong ones an expert in this store has the answer." in page.text


def test_every_group_in_the_page_is_as_the_store_has_it(told_page):
    lab, done, page = told_page
    assert done.groups == len(page.groups) == done.n_groups == 48
    texts = dict(lab.sql("SELECT rollout_id, completion FROM rollouts").rows())
    scores = {r["rollout_id"]: r for r in lab.sql("SELECT * FROM scores").to_dicts()}
    clips = dict(lab.sql("SELECT rollout_id, end_token FROM clips").rows())
    for id, group in page.groups.items():
        assert [r["role"] for r in group["rollouts"]] == ["expert"] * (group["problem_id"] in experts(lab)) + ["policy"] * 4, id
        for r in group["rollouts"]:
            score = scores[r["id"]]
            assert r["text"] == texts[r["id"]] and r.get("clip_end") == clips.get(r["id"])
            np.testing.assert_allclose(unpack(r["entropy"]), np.minimum(score["entropies"], 16.376), atol=0.0021)
            np.testing.assert_allclose(unpack(r["surprise"]), np.minimum([-p for p in score["logprobs"]], 16.376), atol=0.0021)


def experts(lab):
    return set(lab.sql("SELECT problem_id FROM rollouts WHERE role = 'expert'")["problem_id"])


def test_reasons_to_read_a_group_hold(told_page):
    _, _, page = told_page
    why = {entry["group_id"]: entry["why"] for entry in page.data["reader-index"]["groups"]}
    for id, group in page.groups.items():
        kind, problem = group["kind"], int(group["prompt"].split()[-1][:-1])
        if problem == 3 and group["step"] > 2:
            assert why[id] == REASONS["forgotten"]
        elif kind == "all_fail":
            assert why[id] == REASONS["teachable" if problem == 1 else "all_fail"]
        elif problem == 3:
            assert why[id] == REASONS["lone_success"]
        else:
            assert why[id] == REASONS[kind]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40), st.sampled_from([0.5, 0.9]))
def test_since_when_is_the_first_step_of_a_degenerate_end(groups, most):
    import polars as pl

    rows = [{"step": i, "n_judged": a + b, "all_fail": a, "constant": 0, "all_success": 0} for i, (a, b) in enumerate(groups)]
    judged = [r for r in rows if r["n_judged"]]
    if not judged:
        return
    step, share = since_when(pl.DataFrame(rows), most)

    def tail(i):
        return sum(r["all_fail"] for r in judged[i:]) / sum(r["n_judged"] for r in judged[i:])

    last = len(judged) - max(2, len(judged) // 10)
    found = [i for i in range(1, last + 1) if tail(i) >= most] if tail(0) < most else []
    assert step == (judged[found[0]]["step"] if found else None)
    assert share == pytest.approx(tail(found[0] if found else 0))


@pytest.mark.parametrize(
    ("share", "said"), [(0.325, "33"), (0, "0"), (1, "100"), (0.001, "under 1"), (0.9999, "over 99"), (0.995, "over 99")]
)
def test_percent_never_rounds_to_all_or_nothing(share, said):
    assert percent(share) == f"{said}\u202f%"


@pytest.mark.parametrize(
    ("number", "said"), [(999, "999"), (1000, "1.0 k"), (9949, "9.9 k"), (9950, "10 k"), (999_600, "1.0 M"), (1.25e9, "1.2 G")]
)
def test_short_numbers(number, said):
    assert short(number) == said.replace(" ", "\u202f")


# Tokens.


@given(st.text(max_size=60), st.lists(st.integers(1, 7), min_size=1, max_size=60))
def test_tokens_spell_their_text_and_each_character_belongs_to_the_token_of_its_first_byte(text, sizes):
    data, pieces, at = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode(), [], 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    written, lengths = spell(range(len(pieces)), dict(enumerate(pieces)))
    assert written.encode() == data
    owners = [i for i, piece in enumerate(pieces) for _ in piece]
    expected, at = [0] * len(pieces), 0
    for character in written:
        expected[owners[at]] += len(character.encode("utf-16-le")) // 2
        at += len(character.encode())
    assert lengths == expected


@given(st.lists(st.binary(max_size=5), max_size=30))
def test_bytes_that_are_no_text_spell_what_they_decode_to(pieces):
    written, lengths = spell(range(len(pieces)), dict(enumerate(pieces)))
    assert written == b"".join(pieces).decode("utf-8", "replace")
    assert sum(lengths) == len(written.encode("utf-16-le")) // 2


@given(st.lists(st.one_of(st.floats(0, 20), st.just(float("nan"))), max_size=50))
def test_packed_numbers_come_back(values):
    back = unpack(pack(np.array(values)))
    np.testing.assert_allclose(back, np.minimum(values, 16.376), atol=0.0021)


@given(st.lists(st.integers(0, 500), max_size=50))
def test_packed_lengths_come_back(lengths):
    """Read as reader.js reads them."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    found, length = [], 0
    for letter in pack_lengths(lengths):
        length += letters.index(letter)
        if letter != "_":
            found.append(length)
            length = 0
    assert found == lengths


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99)), min_size=1, max_size=60),
    st.integers(2, 9),
)
def test_a_pick_holds_the_shortest_the_longest_and_both_outcomes(rows, limit):
    rows = [
        {"success": right, "scored": scored, "clip_end": 3 if clip else None, "n_chars": n, "place": i}
        for i, (right, scored, clip, n) in enumerate(rows)
    ]
    found = pick(rows, limit)
    assert len(found) == min(limit, len(rows)) and [r["place"] for r in found] == sorted(r["place"] for r in found)
    if limit >= 6:
        assert {min(r["n_chars"] for r in rows), max(r["n_chars"] for r in rows)} <= {r["n_chars"] for r in found}
        assert {r["success"] for r in rows} == {r["success"] for r in found} or len(rows) > limit
    assert any(r["clip_end"] for r in found) == any(r["clip_end"] for r in rows)


# Hostile text.


@pytest.fixture
def hostile(make_store):
    texts = [*told.HOSTILE.values(), "x" * 10]
    rows = [
        {"group": f"g{i}", "problem": text, "completion": text, "reward": float(i % 2), "step": 1 + i % 2, "ground_truth": text,
         "model": text, "finish_reason": text, "n_chars": len(text), "sample": i}
        for text in texts for i in range(2)
    ]  # fmt: skip
    made = make_store(rows)
    told.score(made)
    return made


def test_hostile_text_is_data_and_nothing_else(hostile, tmp_path):
    done, page = page_of(hostile, tmp_path)
    assert page.elements.count("script") - len(page.data) == 3  # vega, the reader, the page
    assert "img" not in page.elements and "hacked" not in "".join(page.scripts)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    found = {r["text"] for group in page.groups.values() for r in group["rollouts"]}
    assert found == {*told.HOSTILE.values(), "x" * 10}
    assert "http:" not in page.text + json.dumps(page.data).replace("https://vega.github.io/schema", "")


def test_the_page_forbids_all_but_its_own_scripts(told_page):
    _, _, page = told_page
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page.source)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert "base-uri 'none'; form-action 'none'" in policy and policy.count("'sha256-") == 4


def test_json_in_a_page_cannot_end_its_script():
    assert "<" not in as_json({"</script>": "<!--\u2028</SCRIPT>"})


# Size, and what does not change.


def test_a_page_stays_below_five_megabytes_whatever_the_store(make_store, tmp_path):
    rng = random.Random(1)
    rows = [
        {"group": f"{step}-{g}", "problem": f"problem {g}", "step": step, "sample": n, "reward": float(rng.random() < 0.4),
         "completion": (text := rng.randbytes(rng.choice((2_000, 40_000, 300_000))).hex()), "n_chars": len(text)}
        for step in (1, 2) for g in range(6) for n in range(12)
    ]  # fmt: skip
    rows[0]["completion"] = "<" * 3_000_000  # six bytes each
    done, page = page_of(make_store(rows), tmp_path)
    assert done.size == len(page.source.encode()) < 5_000_000
    assert 0 < done.groups <= done.n_groups == 12
    cut = [r for group in page.groups.values() for r in group["rollouts"] if r.get("chars_left_out")]
    whole = {r["completion"] for r in rows}
    assert all(
        any(text.startswith(r["text"]) and len(text) == len(r["text"]) + r["chars_left_out"] for text in whole) for r in cut
    )


def test_two_reports_of_a_store_differ_in_one_time_stamp(store, tmp_path):
    with echolab.open(store.root) as lab:
        lab.report(tmp_path / "a.html")
        lab.report(tmp_path / "b.html")
    a, b = ((tmp_path / name).read_text() for name in ("a.html", "b.html"))
    stamp = r'"created": "[^"]+"'
    assert len(re.findall(stamp, a)) == 1
    assert re.sub(stamp, "", a) == re.sub(stamp, "", b)
    assert not list(tmp_path.glob("*.part"))


def test_images_for_papers(store, tmp_path):
    with echolab.open(store.root) as lab:
        done = lab.report(tmp_path / "a.html", static=tmp_path / "figures")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {f"{c}.{s}" for c in done.charts for s in ("svg", "png")}
    assert (tmp_path / "figures" / "reward_by_step.svg").read_text().startswith("<svg")
    assert (tmp_path / "figures" / "reward_by_step.png").read_bytes()[:4] == b"\x89PNG"


# What is missing.


def test_an_empty_store_is_a_page_that_says_how_to_fill_it(make_store, tmp_path):
    done, page = page_of(make_store(), tmp_path)
    assert done.groups == 0 and not page.groups and page.data == {"charts": {}}
    assert "There is no policy rollout here." in page.text and "echolab ingest PATH --run NAME" in page.text


def test_a_store_of_one_rollout_is_a_page(make_store, tmp_path):
    done, page = page_of(make_store([{"problem": "p", "completion": "one", "reward": 1.0}]), tmp_path)
    assert done.groups == 1 and "No rollout has a reward to compare." in page.text
    (group,) = page.groups.values()
    assert [r["text"] for r in group["rollouts"]] == ["one"]


def test_without_rewards_scores_and_experts_the_page_names_the_commands(make_store, tmp_path):
    rows = [{**row, "reward": None} for row in told.steps(3)]
    done, page = page_of(make_store(rows), tmp_path)
    for command in ("verify --verifier math", "score --model MODEL", "mine --name NAME", "--role expert"):
        assert any(command in what for what in done.missing) and command in page.text
    assert len(page.groups) == 12 and "Tokens have no colours" in page.text


def test_without_lengths_no_cost_is_made_up(make_store, tmp_path):
    rows = [{k: v for k, v in row.items() if k not in ("n_chars", "n_completion_tokens")} for row in told.steps(3)]
    done, page = page_of(make_store(rows), tmp_path)
    assert "of the groups taught nothing." in page.text and "cost" not in page.text.split("Runs")[0]
    assert any(what.startswith("lengths: ") for what in done.missing)


def test_scores_whose_vocabulary_is_unknown_leave_the_text_as_it_was(make_store, add_rows, tmp_path):
    rows = [{"rollout_id": f"r{i}", "problem": "p", "completion": f"text {i}", "sample": i, "reward": i} for i in (0, 1)]
    score = {
        "rollout_id": "r0",
        "scorer": "s",
        "token_ids": [5, 6],
        "entropies": [1.0, 2.0],
        "n_tokens": 2,
        "mean_entropy": 1.5,
    }
    made = make_store(rows)
    add_rows(made, "scores", [score])
    _, page = page_of(made, tmp_path)
    (group,) = page.groups.values()
    assert [(r["text"], "entropy" in r) for r in group["rollouts"]] == [("text 0", False), ("text 1", False)]


def test_rewards_that_are_no_numbers_are_no_rewards(make_store, tmp_path):
    rows = [
        {"problem": "p", "completion": "x", "sample": i, "reward": r} for i, r in enumerate([float("nan"), float("inf"), 1, 0])
    ]
    _, page = page_of(make_store(rows), tmp_path)
    (group,) = page.groups.values()
    assert [r.get("reward") for r in group["rollouts"]] == [None, None, 1, 0]


def test_numbers_that_are_none_are_left_out(make_store, add_rows, tmp_path):
    made = make_store(told.steps(2))
    nan, score = float("nan"), {"scorer": "s", "run": "r", "step": 1, "token_ids": [5, 6], "n_tokens": 2}
    with echolab.open(made.root) as lab:
        ids = lab.sql("SELECT rollout_id FROM rollouts WHERE step = 1 ORDER BY rollout_id LIMIT 2")["rollout_id"]
    add_rows(made, "scores", [{**score, "rollout_id": id, "entropies": [nan, nan], "mean_entropy": nan} for id in ids])
    done, page = page_of(made, tmp_path)
    assert "entropy_by_step" not in done.charts and len(page.groups) == 8
    assert {r.get("mean_entropy") for group in page.groups.values() for r in group["rollouts"]} == {None}


def test_of_many_runs_charts_show_the_largest_and_the_page_says_so(make_store, add_reading, tmp_path):
    made = make_store(told.steps(2))
    for n in range(7):
        add_reading(made, [{**row, "run": f"run {n}"} for row in told.steps(1)])
    done, page = page_of(made, tmp_path)
    assert done.notes == ["Charts show the 6 largest of 8 runs: `--run` chooses."] and "6 largest of 8 runs" in page.text
    assert {row["run"] for row in page.rows("success_rate", "mean")} == {"r", *(f"run {n}" for n in range(5))}
    assert all(f"run {n}" in page.text for n in range(7))


# Choices, and the other doors.


def test_of_several_scorers_one_is_shown_and_said_so(make_store, tmp_path):
    made = make_store(told.steps(3))
    told.score(made)
    told.score(made, where="step = 1", id="scorer1")
    with echolab.open(made.root) as lab:
        with pytest.raises(EcholabError, match="several scorers"):
            lab.chart("entropy_by_step")
        done = lab.report(tmp_path / "page.html")
        assert done.notes == ["Of 2 scorers this page shows tiny@1, the one with most rollouts: `--scorer` chooses."]
        assert lab.report(tmp_path / "page.html", scorer="scorer1").notes == []
    assert "Of 2 scorers" not in Page(tmp_path / "page.html").text


def test_a_verifiers_word_takes_the_place_of_rewards(make_store, tmp_path):
    made = make_store(told.steps(3))
    with echolab.open(made.root) as lab:
        lab.verify("exact")
        wrong = lab.query("degenerate_by_step", verifier="exact")["all_fail"].sum()
        lab.report(tmp_path / "page.html", verifier="exact")
    page = Page(tmp_path / "page.html")
    assert f"{wrong:,} were all wrong" in page.text
    assert {r["status"] for group in page.groups.values() for r in group["rollouts"]} == {"no_answer"}


def test_only_the_runs_that_were_asked_for(store, add_reading, make_store, tmp_path):
    made = make_store(told.steps(3))
    add_reading(made, [{**row, "run": "other"} for row in told.steps(4)])
    _, page = page_of(made, tmp_path, runs=["other"])
    assert {g["run"] for g in page.groups.values()} == {"other"} and len(page.groups) == 16
    with pytest.raises(EcholabError, match="no run 'x' in this store"):
        page_of(made, tmp_path, runs=["x"])


def test_a_reader_for_a_notebook_is_a_frame_that_may_do_nothing_else(store, tmp_path):
    with echolab.open(store.root) as lab:
        id = lab.sql("SELECT group_id FROM groups WHERE kind = 'mixed' ORDER BY group_id LIMIT 1").item()
        shown = lab.reader(id[:10])
        for word, message in (("f" * 32, "no group"), ("", "several groups begin with")):
            with pytest.raises(EcholabError, match=message):
                lab.reader(word)
    assert shown.group_id == id and shown._repr_html_().startswith('<iframe sandbox="allow-scripts" srcdoc="&lt;!doctype')
    (tmp_path / "cell.html").write_text(shown.html)
    page = Page(tmp_path / "cell.html")
    assert list(page.groups) == [id] and len(page.groups[id]["rollouts"]) in (4, 5)


def test_the_command_says_what_it_wrote_and_what_is_missing(make_store, tmp_path, capsys):
    from pipelines.cli import app

    root = make_store(told.steps(3)).root
    assert not app(["report", "--out", str(tmp_path / "a.html"), "--store", str(root)], standalone_mode=False)
    said = capsys.readouterr().out
    assert re.match(r".*a\.html: 1\.\d MB, 5 charts, 12 of 12 groups to read\n", said)
    assert "no token entropies: 'echolab score --model MODEL' computes them\n" in said
    assert not app(["report", "--out", str(tmp_path / "a.html"), "--store", str(root), "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert document["groups"] == 12 and document["size"] == (tmp_path / "a.html").stat().st_size
