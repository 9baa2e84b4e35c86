"""Charts show the numbers of the named queries, in few rows, and say what is missing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from generators import told

import echolab
from echolab import EcholabError
from echolab.chartdata import ROWS, Answers
from echolab.charts import CHARTS, figures
from echolab.drawing import Style

pytest.importorskip("altair", reason="charts need Altair: pip install 'echolab[report]'")


@pytest.fixture(scope="module")
def lab(make_store, add_reading):
    store = make_store(told.steps())
    add_reading(store, told.experts())
    told.score(store)
    with echolab.open(store.root) as lab:
        lab.profile("golden", "role = 'expert' AND success", bootstrap=20)
        lab.mine("hard")
        lab.mine("first", selector="first_k")
        yield lab


def rows(spec: dict) -> list[dict]:
    """All data of a chart."""
    return [row for data in spec.get("datasets", {}).values() for row in data]


def answer(lab, name: str, **params) -> list[dict]:
    return lab.query(name, **params).to_dicts()


@pytest.fixture(scope="module")
def experiment(make_store):
    """Two arms against grpo on three seeds: `new` solves more on each, `odd` now more and now less."""
    right = {"grpo": (2, 3, 2), "new": (5, 6, 6), "odd": (1, 6, 3)}
    rows = [
        {"run": f"{arm}-s{seed}", "split": "eval", "group": f"{source} {q}", "step": 5, "source": source, "sample": i,
         "reward": float(i < c)}
        for arm, counts in right.items() for seed, c in enumerate(counts)
        for source in ("easy", "hard") for q in range(4) for i in range(8)
    ]  # fmt: skip
    with echolab.open(make_store(rows).root) as lab:
        yield lab


def test_arms_are_those_of_the_query_with_a_word_for_their_interval(experiment):
    found = rows(experiment.chart("arms").to_dict())
    told = {(r["arm"], r["gain"], r["gain_low"], r["gain_high"]) for r in answer(experiment, "arms") if r["gain"] is not None}
    assert {(r["arm"], r["gain"], r["low"], r["high"]) for r in found} >= told
    assert {(r["arm"], r["word"]) for r in found if r["gain"]} == {("new", "better"), ("odd", "not told apart")}


def test_evaluations_are_no_waste_and_their_rewards_stand_beside_those_of_training(make_store):
    groups = [{"split": s, "group": s, "step": k, "sample": i} for s in ("train", "eval") for k in (1, 2) for i in (0, 1)]
    with echolab.open(make_store([{**g, "reward": 1.0, "n_completion_tokens": 5} for g in groups]).root) as lab:
        answers = Answers.of(lab.session())
        for name in ("degenerate_by_step", "wasted_tokens"):
            assert [f.about for f in figures(answers, name, Style())] == ["r"]
        assert set(answers.lines("reward_by_step")["line"]) == {"r, eval", "r, train"}


@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_is_valid_and_small(lab, experiment, name):
    spec = (experiment if name == "arms" else lab).chart(name).to_dict()  # Altair validates it
    assert 0 < len(rows(spec)) <= ROWS
    assert all(len(json.dumps(row)) < 600 for row in rows(spec))


def test_kinds_and_shares_are_those_of_the_query(lab):
    found = {(r["step"], r["part"]): (r["n"], r["share"]) for r in rows(lab.chart("degenerate_by_step").to_dict())}
    words = {"all_fail": "all wrong", "all_success": "all right", "mixed": "mixed"}
    told = {
        (r["step"], word): (r[kind], r[f"share_{kind}"])
        for r in answer(lab, "degenerate_by_step")
        for kind, word in words.items()
    }
    assert found == told


def test_wasted_tokens_are_those_of_the_query_and_sum_to_the_total(lab):
    found = rows(lab.chart("wasted_tokens").to_dict())
    for r in answer(lab, "wasted_tokens"):
        parts = {f["part"]: f["n"] for f in found if f["step"] == r["step"]}
        assert parts["all wrong"] == r["wasted_all_fail"] and parts["all right"] == r["wasted_all_success"]
        assert sum(parts.values()) == r["total"]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("reward_by_step", ["step", "mean", "success_rate"]),
        ("entropy_by_step", ["step", "median", "p10", "p90", "mean_of_tokens"]),
        ("length_by_outcome", ["step", "outcome", "tokens_mean", "tokens_p90"]),
    ],
)
def test_lines_are_those_of_the_query(lab, name, columns):
    def told(rows):
        return sorted(tuple(row[c] for c in columns) for row in rows)

    assert told(rows(lab.chart(name).to_dict())) == told(answer(lab, name))


def test_cells_of_the_heat_map_are_visits(lab):
    found = {(r["step"], r["group_id"], r["status"]) for r in rows(lab.chart("problem_visits").to_dict())}
    assert found == {(r["step"], r["group_id"], r["status"]) for r in answer(lab, "problem_visits")}
    assert {"solved", "failed", "mixed", "forgotten"} == {status for *_, status in found}


def test_curves_are_those_of_the_profile_and_peaks_add_up(lab):
    found = {r["bin"]: (r["mean"], r["lo"], r["hi"]) for r in rows(lab.chart("entropy_profile").to_dict())}
    assert found == {r["bin"]: (r["mean"], r["lo"], r["hi"]) for r in answer(lab, "entropy_profile", profile="golden")}
    peaks = rows(lab.chart("peak_positions").to_dict())
    for line in {r["line"] for r in peaks}:
        assert sum(r["share"] for r in peaks if r["line"] == line) == pytest.approx(1)
    wrong = next(r for r in answer(lab, "entropy_by_position") if r["outcome"] == "failure" and r["bin"] == 9)
    drawn = next(r for r in peaks if r["line"] == "policy, wrong" and r["bin"] == 9)
    assert drawn["peaks"] == pytest.approx(wrong["share_of_peaks"] * wrong["n_segments"])


def test_clip_sets_are_compared_by_the_quantiles_of_the_query(lab):
    found = {r["clipset"]: r for r in rows(lab.chart("clip_stats").to_dict()) if "tokens_q50" in r}
    assert {k: (r["tokens_q05"], r["tokens_q50"], r["tokens_q95"]) for k, r in found.items()} == {
        r["clipset"]: (r["tokens_q05"], r["tokens_q50"], r["tokens_q95"]) for r in answer(lab, "clip_stats")
    }


def test_a_wrong_name_lists_the_charts(lab):
    with pytest.raises(EcholabError, match="no chart 'loss': there are degenerate_by_step, wasted_tokens, "):
        lab.chart("loss")
    with pytest.raises(EcholabError, match="no run 'x' in this store; there are: gold, r"):
        lab.chart("reward_by_step", run="x")


@pytest.mark.parametrize("name", CHARTS)
def test_an_empty_store_says_what_is_missing_and_how_to_get_it(make_store, name):
    with echolab.open(make_store().root) as lab, pytest.raises(EcholabError, match="this store has no .*: `echolab "):
        lab.chart(name)


def test_charts_say_that_rewards_steps_or_scores_are_missing(make_store):
    with echolab.open(make_store([{"step": None, "problem": "p", "completion": "a"}] * 2).root) as lab:
        for name, what in {
            "degenerate_by_step": "rewards", "wasted_tokens": "rewards", "reward_by_step": "rewards",
            "entropy_by_step": "token entropies", "length_by_outcome": "training steps", "problem_visits": "training steps",
            "entropy_by_position": "token entropies", "entropy_profile": "token entropies",
        }.items():  # fmt: skip
            with pytest.raises(EcholabError, match=f"no {what}"):
                lab.chart(name)


def test_shares_are_not_drawn_where_the_dump_left_groups_out(make_store):
    with echolab.open(make_store(told.steps(3), completeness="filtered").root) as lab, lab.session() as session:
        (figure,) = figures(Answers.of(session), "degenerate_by_step", Style())
        assert "as the dump has them" in figure.title and "filtered upstream" in figure.caption
        assert all(r["share"] is None for r in rows(figure.chart.to_dict()))


def long_run(steps: int, problems: int) -> list[dict]:
    text = {"completion": "x", "n_chars": 1}
    return [
        {"step": step, "group": f"{step}-{p}", "problem": f"P{p}", "reward": float((step + p) % 3 > 0 or n), "sample": n} | text
        for step in range(1, steps + 1) for p in range(problems) for n in range(2)
    ]  # fmt: skip


def test_a_long_run_is_thinned_and_the_last_step_stays(make_store):
    with echolab.open(make_store(long_run(2500, 1)).root) as lab:
        for name in ("degenerate_by_step", "reward_by_step"):
            (figure,) = figures(Answers.of(lab.session()), name, Style())
            found = rows(figure.chart.to_dict())
            assert len(found) <= ROWS and max(r["step"] for r in found) == 2500 and "Drawn: one of" in figure.caption
        told = {r["step"]: r["mean"] for r in answer(lab, "reward_by_step")}
        assert all(r["mean"] == told[r["step"]] for r in found)


def test_the_heat_map_of_a_large_run_shows_forgotten_problems_and_the_newest_visit_of_each_cell(make_store):
    with echolab.open(make_store(long_run(90, 70)).root) as lab:
        (figure,) = figures(Answers.of(lab.session()), "problem_visits", Style())
        found = rows(figure.chart.to_dict())
        assert len(found) <= ROWS and "Of 2 steps together the newest visit counts." in figure.caption
        visits = {r["group_id"]: r for r in answer(lab, "problem_visits")}
        for cell in found:
            visit = visits[cell["group_id"]]
            same = [v["step"] for v in visits.values() if v["problem_id"] == visit["problem_id"] and v["step"] <= cell["step"]]
            assert visit["step"] == max(same) and cell["status"] == visit["status"]


def test_two_runs_are_told_apart(make_store, add_reading):
    store = make_store(told.steps(9))
    add_reading(store, [{**row, "run": "other", "reward": 1 - row["reward"]} for row in told.steps(9)])
    with echolab.open(store.root) as lab:
        assert lab.chart("degenerate_by_step").to_dict()["vconcat"]
        lines = {r["line"] for r in rows(lab.chart("reward_by_step").to_dict())}
        assert lines == {"r", "other"}
        assert {r["run"] for r in rows(lab.chart("reward_by_step", run="other").to_dict())} == {"other"}


def test_without_altair_the_pip_command_is_named(tmp_path):
    code = (
        "import sys; sys.modules['altair'] = None\nimport echolab\n"
        f"lab = echolab.open({str(tmp_path / 's')!r}, create=True)\n"
        "try: lab.chart('reward_by_step')\nexcept echolab.EcholabError as e: print(e)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "charts need Altair: pip install 'echolab[report]'\n"


def test_the_first_line_of_a_report_says_what_helped(experiment, tmp_path):
    experiment.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<h1>Against grpo, over 3 seeds: new helped, odd cannot be told from it.</h1>" in page
    gain = next(r["gain"] for r in answer(experiment, "arms") if r["arm"] == "new" and r["source"] is None)
    assert f"new {100 * gain:+.1f} (" in page


def test_two_seeds_are_an_anecdote_however_narrow_their_interval(make_store, tmp_path):
    rows = [
        {"run": f"{arm}-s{seed}", "split": "eval", "group": f"{q}", "step": 5, "sample": i, "reward": float(i < c)}
        for arm, c in (("grpo", 2), ("new", 4)) for seed in (0, 1) for q in range(3) for i in range(8)
    ]  # fmt: skip
    with echolab.open(make_store(rows).root) as lab:
        assert {r["word"] for d in lab.chart("arms").to_dict()["datasets"].values() for r in d} == {"not told apart"}
        lab.report(tmp_path / "page.html")
    assert "<h1>An anecdote of 2 seeds: new +25.0 points against grpo.</h1>" in (tmp_path / "page.html").read_text()
