"""The named queries: right on a small store counted by hand, and alive on stores that lack what they ask for."""

from __future__ import annotations

import math
import statistics
from math import comb

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echolab import EcholabError, ids
from echolab.queries import list_queries
from echolab.sql import Options, Session

NAMES = [q.name for q in list_queries()]


def group(name, rewards, **fields):
    lengths = {"n_completion_tokens": 10, "n_chars": 40}
    return [
        {"group": name, "problem": name, "sample": i, "reward": r, "completion": f"{name} {i}", **lengths, **fields}
        for i, r in enumerate(rewards)
    ]


def visits(step, **groups):
    return [row for name, rewards in groups.items() for row in group(name, rewards, step=step)]


@pytest.fixture
def store(make_store):
    """P is saturated, Q never solved, R solved once and lost, S stuck at half a reward, U unrewarded, V a single sample."""
    return make_store(
        [
            *visits(1, P=[1, 1, 1, 1], Q=[0, 0, 0, 0], R=[1, 0, 0, 0], S=[0.5] * 4, U=[None, math.nan], V=[1, None]),
            *visits(2, P=[1, 1, 1, 1], Q=[0, 0, 0, 0], R=[0, 0, 0, 0]),
            *visits(3, P=[1, 1, 1, 1], Q=[0, 0, 0, 0], R=[0, 0, 0, 0]),
        ]
    )


def run(store, name, options=None, **params):
    with Session(store.snapshot(), options) as s:
        return s.query(name, **params)


def problem(name):
    return ids.problem_id(name)


def test_there_are_these_queries():
    assert NAMES == [
        "advantage_check", "all_fail_with_expert", "arms", "clip_overlap", "clip_provenance", "clip_stats", "compare_runs",
        "degenerate_by_step", "degenerate_groups", "degenerate_prompts", "difficulty", "duplicates", "entropy_by_outcome",
        "entropy_by_position", "entropy_by_step", "entropy_profile", "length_by_outcome", "pass_at_k", "problem_visits",
        "profile_compare", "reward_by_step", "scorer_agreement", "segment_entropy_histogram", "top_entropy_tokens",
        "truncation_by_step", "verifier_agreement", "verifier_disagreements", "wasted_tokens",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_query_runs_on_an_empty_store(make_store, name):
    assert run(make_store(), name).height == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_query_runs_where_rewards_steps_and_lengths_are_unknown(make_store, name):
    run(make_store([{"step": None, "group": "a"}, {"step": None, "group": "b"}]), name)


@pytest.mark.parametrize("name", NAMES)
def test_every_query_gives_the_same_rows_in_the_same_order_whatever_the_threads(store, name):
    with Session(store.snapshot(), threads=1) as one, Session(store.snapshot(), threads=4) as four:
        assert one.query(name).equals(four.query(name))


def test_degenerate_by_step_counts_kinds_and_divides_by_judged_groups(store):
    first, second, _ = run(store, "degenerate_by_step").to_dicts()
    assert first == {
        "run": "r", "split": "train", "step": 1, "n_groups": 6, "n_judged": 4, "unrewarded": 1, "single": 1, "all_success": 1,
        "all_fail": 1, "constant": 1, "mixed": 1, "share_degenerate": 0.75, "share_all_success": 0.25, "share_all_fail": 0.25,
        "share_constant": 0.25, "share_mixed": 0.25, "note": None,
    }  # fmt: skip
    assert (second["n_judged"], second["share_degenerate"], second["share_all_fail"]) == (3, 1.0, pytest.approx(2 / 3))


@pytest.mark.parametrize("completeness", ["filtered", "effective"])
def test_shares_are_unknown_where_the_dump_left_groups_out(make_store, add_reading, completeness):
    store = make_store(group("a", [0, 1]))
    add_reading(store, group("a", [0, 1], run="f"), completeness=completeness)
    rows = {r["run"]: r for r in run(store, "degenerate_by_step").to_dicts()}
    assert rows["r"]["share_mixed"] == 1.0 and rows["r"]["note"] is None
    assert rows["f"]["share_mixed"] is None and rows["f"]["share_degenerate"] is None and rows["f"]["mixed"] == 1
    assert rows["f"]["note"].startswith("filtered upstream")
    assert {r["run"]: r["share"] for r in run(store, "wasted_tokens").to_dicts()} == {"r": 0.0, "f": None}


def test_degenerate_groups_names_each_with_its_cost_and_prompt(store):
    found = run(store, "degenerate_groups", kind="all_fail", excerpt="1")
    assert set(found.select("n", "n_tokens", "n_chars", "reward").rows()) == {(4, 40, 160, 0.0)}
    assert sorted(found.select("step", "prompt").rows()) == [(1, "Q"), (2, "Q"), (2, "R"), (3, "Q"), (3, "R")]
    assert run(store, "degenerate_groups").height == 9


def test_degenerate_prompts_tells_saturated_never_solved_and_forgotten(store):
    found = {r["problem_id"]: r for r in run(store, "degenerate_prompts").to_dicts()}
    assert {k: (r["status"], r["since_step"], r["streak"]) for k, r in found.items()} == {
        problem("P"): ("saturated", 1, 3), problem("Q"): ("never_solved", 1, 3),
        problem("R"): ("forgotten", 2, 2), problem("S"): ("never_solved", 1, 1),
    }  # fmt: skip
    assert problem("P") not in run(store, "degenerate_prompts", streak=4)["problem_id"]


def test_problem_visits_tells_forgotten_from_failed(store):
    found = run(store, "problem_visits")
    statuses = {p: found.filter(found["problem_id"] == problem(p))["status"].to_list() for p in "PQRSUV"}
    assert statuses == {
        "P": ["solved"] * 3, "Q": ["failed"] * 3, "R": ["mixed", "forgotten", "forgotten"], "S": ["constant"],
        "U": ["unrewarded"], "V": ["single"],
    }  # fmt: skip
    rates = found.filter(found["problem_id"] == problem("R")).select("step", "success_rate", "problem_success_rate").rows()
    assert rates == [(1, 0.25, 1 / 12), (2, 0, 1 / 12), (3, 0, 1 / 12)]


def test_a_saturated_problem_is_saturated_up_to_now(make_store):
    rows = [row for step, r in enumerate([1, 1, 1, 0, 1, 1]) for row in group("P", [r, r], step=step)]
    assert run(make_store(rows), "degenerate_prompts").height == 0
    found = run(make_store(rows), "degenerate_prompts", streak=2)
    assert found.select("status", "since_step", "streak", "visits").rows() == [("saturated", 4, 2, 6)]


def test_wasted_tokens_are_those_of_degenerate_groups(store):
    columns = ["unit", "n_degenerate", "wasted", "wasted_all_success", "wasted_all_fail", "wasted_constant", "total", "share"]
    assert run(store, "wasted_tokens").select(columns).row(0) == ("tokens", 3, 120, 40, 40, 40, 200, 0.6)


def test_wasted_tokens_falls_back_to_characters_where_a_token_count_is_missing(make_store):
    rows = group("a", [0, 0]) + group("b", [0, 1], n_completion_tokens=None) + group("c", [0, 0], split="eval")
    found = run(make_store(rows), "wasted_tokens").select("split", "unit", "wasted", "total").rows()
    assert found == [("eval", "tokens", 20, 20), ("train", "chars", 80, 160)]


def test_pass_at_k_leaves_small_groups_out_and_says_how_many(store):
    found = run(store, "pass_at_k", k="1,2,50").select("step", "k", "pass_at_k", "n_groups", "n_left_out").rows()
    assert found[:3] == [(1, 1, pytest.approx(2.25 / 5), 5, 1), (1, 2, pytest.approx(0.375), 4, 2), (1, 50, None, 0, 6)]
    with pytest.raises(EcholabError, match="^k must be at least 1$"):
        run(store, "pass_at_k", k=[0])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=6))
def test_pass_at_k_equals_the_binomial_formula(make_store, groups):
    store = make_store(row for i, (n, c) in enumerate(groups) for row in group(str(i), [1] * c + [0] * (n - c)))
    ks = [1, 2, 7, 60]
    for row in run(store, "pass_at_k", k=ks).to_dicts():
        k = row["k"]
        exact = [1 - comb(n - c, k) / comb(n, k) for n, c in groups if n >= k]
        assert row["n_groups"] == len(exact) and row["n_left_out"] == len(groups) - len(exact)
        assert row["pass_at_k"] == (pytest.approx(sum(exact) / len(exact), abs=1e-12) if exact else None)


def test_reward_by_step(store):
    row = run(store, "reward_by_step").row(0, named=True)
    assert (row["n_groups"], row["n"], row["n_rewarded"], row["min"], row["max"]) == (6, 20, 17, 0.0, 1.0)
    assert row["mean"] == pytest.approx(8 / 17) and row["success_rate"] == pytest.approx(6 / 17)


def test_length_by_outcome(make_store):
    rows = [
        {"reward": 1.0, "n_completion_tokens": 10, "n_chars": 1}, {"reward": 1.0, "n_completion_tokens": 20, "n_chars": 2},
        {"reward": 0.0, "n_completion_tokens": 90}, {"reward": None},
    ]  # fmt: skip
    found = run(make_store(rows), "length_by_outcome")
    columns = ["outcome", "n", "n_tokens_known", "tokens_mean", "tokens_median", "tokens_max", "chars_mean"]
    assert found.select(columns).rows() == [
        ("failure", 1, 1, 90.0, 90.0, 90, None),
        ("success", 2, 2, 15.0, 15.0, 20, 1.5),
        ("unrewarded", 1, 0, None, None, None, None),
    ]  # fmt: skip


def test_truncation_by_step_is_unknown_where_the_dump_says_nothing(make_store):
    ends = [("length", 0.0), ("stop", 1.0), (None, 0.0), ("LENGTH", 1.0)]
    rows = [{"finish_reason": f, "reward": r} for f, r in ends] + [{"split": "eval", "reward": 1.0}]
    found = run(make_store(rows), "truncation_by_step")
    columns = ["split", "n", "n_truncated", "share", "success_rate_truncated", "success_rate_other"]
    assert found.select(columns).rows() == [("eval", 1, None, None, None, 1.0), ("train", 4, 2, 0.5, 0.5, 0.5)]


def test_difficulty_ranks_problems_hardest_first(store):
    found = run(store, "difficulty", buckets=4).select("problem_id", "success_rate", "quantile", "bucket").rows()
    hard = sorted([(problem("Q"), 0.0, 0.0, 0), (problem("S"), 0.0, 0.0, 0)])
    easy = sorted([(problem("P"), 1.0, 0.75, 3), (problem("V"), 1.0, 0.75, 3)])
    assert found == [*hard, (problem("R"), pytest.approx(1 / 12), 0.5, 0), *easy]


def evaluation(run, step, source, *successes, n=4):
    """One evaluation of questions of which so many of n samples are right."""
    rows = [group(f"{run} {step} {source} {i}", [1.0] * c + [0.0] * (n - c)) for i, c in enumerate(successes)]
    return [{**row, "run": run, "split": "eval", "step": step, "source": source} for rows_ in rows for row in rows_]


def test_arms_are_compared_seed_by_seed_with_students_t(make_store):
    """Gains over three seeds in two rounds, against the textbook formula."""
    counts = {
        "grpo-s0": (2, 2),
        "grpo-s1": (1, 2),
        "grpo-s2": (3, 2),
        "new_seed0": (4, 3),
        "new_seed1": (2, 2),
        "new_seed2": (4, 4),
    }
    rows = [
        r for name, of in counts.items() for step, c in zip((5, 10), of, strict=True) for r in evaluation(name, step, "x", c)
    ]
    rows += evaluation("grpo-s0", 0, "x", 1) + evaluation("new_seed9", 5, "x", 4) + evaluation("new_seed0", 7, "x", 0)
    rows += evaluation("grpo", 5, "x", 0)  # of no seed
    base, new = run(make_store(rows), "arms").to_dicts()
    gains = [(4 - 2 + 3 - 2) / 8, (2 - 1 + 2 - 2) / 8, (4 - 3 + 4 - 2) / 8]
    mean, half = statistics.mean(gains), 4.302653 * statistics.stdev(gains) / math.sqrt(3)
    assert (base["arm"], base["base"], base["start"], base["gain"], base["gain_low"]) == ("grpo", "grpo", 0.25, None, None)
    assert (new["arm"], new["n_seeds"], new["n_steps"], new["n_groups"], new["start"]) == ("new", 3, 2, 1, None)
    assert base["success_rate"] == pytest.approx(12 / 24) and new["success_rate"] == pytest.approx(19 / 24)
    assert (new["gain"], new["gain_low"], new["gain_high"]) == pytest.approx((mean, mean - half, mean + half), abs=1e-4)
    assert (base["solved"], new["solved"], new["solved_gain"]) == (1.0, 1.0, 0.0)


def test_arms_of_several_sources_are_also_told_together_and_one_seed_has_no_interval(make_store):
    rows = evaluation("a-s1", 5, "hard", 0, 0, 2) + evaluation("a-s1", 5, "easy", 4)
    rows += evaluation("b-s1", 5, "hard", 0, 4, 4) + evaluation("b-s1", 5, "easy", 2)
    found = {(r["arm"], r["source"]): r for r in run(make_store(rows), "arms").to_dicts()}
    assert [*found] == [("a", None), ("b", None), ("a", "easy"), ("b", "easy"), ("a", "hard"), ("b", "hard")]
    both = found["b", None]
    assert both["success_rate"] == pytest.approx(10 / 16) and both["gain"] == pytest.approx(10 / 16 - 6 / 16)
    assert (both["gain_low"], both["solved_low"], both["n_seeds"]) == (None, None, 1)
    assert found["b", "hard"]["solved_gain"] == pytest.approx(1 / 3)
    turned = run(make_store(rows), "arms", base="b").to_dicts()
    assert turned[1]["arm"] == "a" and turned[1]["gain"] == pytest.approx(-4 / 16)


def test_compare_runs_puts_steps_side_by_side(make_store, add_reading):
    store = make_store(group("p", [0, 0], run="a") + group("p", [0, 1], run="a", step=2))
    add_reading(store, group("p", [1, 0], run="b"))
    add_reading(store, group("p", [1, 1], run="c"))
    columns = [
        "step",
        "run_a",
        "run_b",
        "reward_a",
        "reward_b",
        "share_degenerate_a",
        "share_degenerate_b",
        "success_rate_gain",
    ]
    expected = [(1, "a", "b", 0.0, 0.5, 1.0, 0.0, 0.5), (2, "a", "b", 0.5, None, 0.0, None, None)]
    assert run(store, "compare_runs").select(columns).rows() == expected
    assert run(store, "compare_runs", a="a", b="b").select(columns).rows() == expected
    assert run(store, "compare_runs", b="a", a="c").select("run_a", "run_b", "reward_a").row(0) == ("c", "a", 1.0)


def test_duplicates_counts_surplus_completions_within_a_group(make_store):
    rows = [{"group": g, "completion": c} for g, c in [("a", "x"), ("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"), ("b", "z")]]
    rows += [{"group": "c", "completion_ids": [1, 2]}, {"group": "c", "completion_ids": [1, 2]}, {"group": "c"}, {"group": "c"}]
    found = run(make_store(rows), "duplicates")
    assert sorted(found.select("n", "n_distinct", "surplus").rows()) == [(2, 1, 1), (4, 2, 2)]


def test_all_fail_with_expert_names_the_longest_successful_expert(make_store, add_reading):
    store = make_store(group("p", [0, 0]) + group("q", [0, 0]) + group("m", [0, 1]))
    experts = [("e1", "p", 1.0, 10), ("e2", "p", 1.0, 30), ("e3", "p", 0.0, 99), ("e4", "q", 0.0, 9), ("e5", "m", 1.0, 9)]
    add_reading(store, [
        {"rollout_id": i, "problem": p, "group": p, "reward": r, "n_chars": n, "role": "expert", "run": "x", "step": None}
        for i, p, r, n in experts
    ])  # fmt: skip
    columns = ["problem_id", "n", "n_experts", "expert_rollout_id", "expert_chars"]
    assert run(store, "all_fail_with_expert").select(columns).rows() == [(problem("p"), 2, 2, "e2", 30)]


def test_advantage_check_finds_the_formula(make_store):
    def rows(name, rewards, formula, **fields):
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        return [{**row, "advantage": formula(row["reward"] - mean, std)} for row in group(name, rewards, **fields)]

    store = make_store([
        *rows("a", [0, 1, 1], lambda d, s: d / (s + 1e-4)), *rows("b", [0, 0], lambda d, s: 0.0),
        *rows("c", [0, 1, 1], lambda d, s: d, step=2), *rows("d", [0, 1, 1], lambda d, s: d + 1, step=3),
    ])  # fmt: skip
    found = run(store, "advantage_check")
    assert found.select("step", "kind", "n", "formula").rows() == [
        (1, "all_fail", 2, "both"), (1, "mixed", 3, "std"), (2, "mixed", 3, "mean"), (3, "mixed", 3, "neither"),
    ]  # fmt: skip
    assert found["max_deviation_std"][1] < 1e-12 and found["max_deviation_mean"][3] == pytest.approx(1)


def test_queries_leave_experts_out_unless_they_ask_for_them(store, add_reading):
    before = {name: run(store, name) for name in NAMES}
    add_reading(store, group("P", [0, 1, 1], role="expert", completion="same", advantage=3.0))
    for name in NAMES:
        assert run(store, name).equals(before[name]), name
    assert run(store, "duplicates", role="expert")["surplus"].to_list() == [2]


def test_run_and_split_narrow_a_query_and_an_unknown_run_is_an_error(store, add_reading):
    add_reading(store, group("z", [0, 0], run="other", split="eval"))
    assert run(store, "degenerate_by_step", run="other")["n_groups"].to_list() == [1]
    assert run(store, "degenerate_by_step", split="eval")["run"].to_list() == ["other"]
    with pytest.raises(EcholabError, match="^no run 'othr' in this store; did you mean 'other'\\?$"):
        run(store, "degenerate_by_step", run="othr")


def test_a_stricter_threshold_changes_queries(store):
    found = run(store, "degenerate_by_step", Options(success_threshold=0.5))
    assert found.select("all_success", "constant").row(0) == (2, 0)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("degenerate_by_stp", {}, "no query 'degenerate_by_stp': did you mean degenerate_by_step?"),
        ("difficulty", {"bucket": 3}, "query difficulty has no parameter bucket: did you mean buckets?"),
        ("difficulty", {"xyz": 3}, "query difficulty has no parameter xyz: it takes run, split, buckets, excerpt"),
        ("difficulty", {"buckets": "many"}, "parameter buckets is a whole number, not 'many'"),
        ("difficulty", {"run": 3}, "parameter run is text, not 3"),
        ("advantage_check", {"tolerance": "x"}, "parameter tolerance is a number, not 'x'"),
    ],
)
def test_wrong_parameters_are_one_clear_line(store, name, params, message):
    with pytest.raises(EcholabError) as error:
        run(store, name, **params)
    assert str(error.value) == message


def test_a_wrong_element_of_a_list_is_one_line(store):
    with pytest.raises(EcholabError) as error:
        run(store, "pass_at_k", k="1,x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "prompt",
    [
        "What is 1 + 1?",
        "user\nWhat is 1 + 1?\nassistant\n",
        "system\nYou help.\nuser\nWhat is  1 +\n1?\nassistant\n",
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n",
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 1 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        "<start_of_turn>user\nWhat is 1 + 1?<end_of_turn>\n<start_of_turn>model\n",
        "<s>[INST] What is 1 + 1? [/INST]",
        "<｜begin▁of▁sentence｜><｜User｜>What is 1 + 1?<｜Assistant｜>",
    ],
)
def test_excerpts_show_what_the_user_asked_and_not_the_template(make_store, prompt):
    store = make_store([{"prompt": prompt, "reward": 0.0, "group": "g", "problem": "p"} for _ in range(2)])
    assert run(store, "degenerate_groups")["prompt"].to_list() == ["What is 1 + 1?"]


# Entropies, on two rollouts of a right group and two of a wrong one.


def scored_row(rollout, scorer, entropies, step, logprobs=None, token_ids=None):
    tokens = token_ids or list(range(len(entropies)))
    mean = sum(entropies) / len(entropies)
    return {
        "rollout_id": rollout, "scorer": scorer, "run": "r", "step": step, "token_ids": tokens, "entropies": entropies,
        "logprobs": logprobs or [-e for e in entropies], "mean_entropy": mean, "n_tokens": len(entropies),
    }  # fmt: skip


def cut_row(rollout, scorer, ends, means):
    peak = max(range(len(means)), key=lambda i: means[i])
    return {
        "rollout_id": rollout, "scorer": scorer, "segmenter": "seg", "segment_ends": ends, "segment_entropies": means,
        "n_segments": len(ends), "peak_segment": peak, "peak_entropy": means[peak],
    }  # fmt: skip


ENTROPIES = {"a": [1.0, 3.0], "b": [2.0, 2.0, 2.0, 6.0], "c": [0.5, 0.5], "d": [0.0, 1.0]}


@pytest.fixture
def scored(make_store, add_rows):
    rows = group("P", [1, 1], step=1) + group("Q", [0, 0], step=2)
    for row, name in zip(rows, ENTROPIES, strict=True):
        row["rollout_id"] = name
    made = make_store(rows)
    add_rows(made, "scores", [scored_row(name, "one", e, 1 if name in "ab" else 2) for name, e in ENTROPIES.items()])
    cuts = {"a": ([1, 2], [1.0, 3.0]), "b": ([3, 4], [2.0, 6.0]), "c": ([2], [0.5]), "d": ([1, 2], [0.0, 1.0])}
    add_rows(made, "segmentations", [cut_row(name, "one", *cut) for name, cut in cuts.items()])
    return made


def test_entropy_by_step_weighs_rollouts_or_tokens(scored):
    rows = run(scored, "entropy_by_step").to_dicts()
    found = [(r["step"], r["n"], r["n_tokens"], r["mean_of_rollouts"], r["mean_of_tokens"]) for r in rows]
    assert found == [(1, 2, 6, 2.5, pytest.approx(16 / 6)), (2, 2, 4, 0.5, 0.5)]


def test_entropy_by_outcome_tells_right_from_wrong(scored):
    rows = run(scored, "entropy_by_outcome").to_dicts()
    assert [(r["kind"], r["outcome"], r["n"], r["mean_entropy"], r["mean_peak_entropy"]) for r in rows] == [
        ("all_fail", "failure", 2, 0.5, 0.75),
        ("all_success", "success", 2, 2.5, 4.5),
    ]


def test_entropy_by_position_puts_segments_into_bins_by_their_middle(scored):
    rows = run(scored, "entropy_by_position", bins=2).to_dicts()
    assert [(r["outcome"], r["bin"], r["n_segments"], r["mean_entropy"], r["share_of_peaks"]) for r in rows] == [
        ("failure", 0, 1, 0.0, 0.0),
        ("failure", 1, 2, 0.75, 1.0),  # the only segment of c has its middle at a half
        ("success", 0, 2, 1.5, 0.0),
        ("success", 1, 2, 4.5, 1.0),
    ]


def test_the_histogram_counts_every_segment_once(scored):
    rows = run(scored, "segment_entropy_histogram", width=1.0).to_dicts()
    assert [(r["low"], r["high"], r["n_segments"], r["n_tokens"], r["n_peaks"]) for r in rows] == [
        (0.0, 1.0, 2, 3, 1), (1.0, 2.0, 2, 2, 1), (2.0, 3.0, 1, 3, 0), (3.0, 4.0, 1, 1, 1), (6.0, 7.0, 1, 1, 1),
    ]  # fmt: skip
    assert sum(r["share"] for r in rows) == pytest.approx(1)


def test_forking_tokens_are_those_of_highest_mean_entropy(scored):
    rows = run(scored, "top_entropy_tokens", min_count=2).to_dicts()
    expected = {t: [e[t] for e in ENTROPIES.values() if t < len(e)] for t in (0, 1)}
    means = {t: sum(v) / len(v) for t, v in expected.items()}
    assert [(r["token_id"], r["n"], r["mean_entropy"]) for r in rows] == [
        (t, 4, means[t]) for t in sorted(means, key=lambda t: -means[t])
    ]


def test_scorer_agreement_compares_tokens_and_counts_those_that_differ(scored, add_rows):
    add_rows(scored, "scores", [
        scored_row("a", "two", [1.0, 2.0], 1, logprobs=[-1.0, -3.5]),
        scored_row("c", "two", [0.5, 0.5], 2, token_ids=[7, 8]),
    ])  # fmt: skip
    [pair] = run(scored, "scorer_agreement").to_dicts()
    assert (pair["a"], pair["b"], pair["n_rollouts"], pair["n_other_tokens"], pair["n_tokens"]) == ("one", "two", 1, 1, 2)
    assert (pair["mean_abs_difference"], pair["max_abs_difference"]) == (0.25, 0.5)
    assert pair["mean_abs_entropy_difference"] == 0.5


def test_scorer_agreement_knows_the_logprobs_recorded_while_sampling(make_store, add_rows):
    rows = group("P", [1, 0], completion_ids=[0, 1], logprobs=[-1.0, -2.0], n_completion_tokens=2)
    rows[0]["rollout_id"] = "a"
    made = make_store(rows)
    add_rows(made, "scores", [scored_row("a", "one", [1.0, 3.0], 1)])
    [pair] = run(made, "scorer_agreement").to_dicts()
    assert (pair["a"], pair["b"], pair["n_rollouts"], pair["mean_abs_difference"]) == ("one", "recorded", 1, 0.5)


def test_tokens_outside_the_loss_mask_count_nowhere(make_store, add_rows):
    """Of entropies 1, 9, 3 the mask leaves out the 9; the other rollout has one token of entropy 4."""
    rows = group("P", [1, 0], step=1)
    for row, name in zip(rows, "ab", strict=True):
        row["rollout_id"] = name
    made = make_store(rows)
    masked = {**scored_row("a", "one", [1.0, 9.0, 3.0], 1), "loss_mask": [True, False, True], "mean_entropy": 2.0}
    add_rows(made, "scores", [masked, scored_row("b", "one", [4.0], 1)])
    other = {**scored_row("a", "two", [1.0, 2.0, 3.0], 1, logprobs=[-1.0, -50.0, -3.0]), "loss_mask": None}
    [step] = run(made, "entropy_by_step").to_dicts()
    assert step["mean_of_tokens"] == pytest.approx((1 + 3 + 4) / 3)
    assert {r["token_id"] for r in run(made, "top_entropy_tokens", min_count=1).to_dicts()} == {0, 2}
    add_rows(made, "scores", [other])
    [pair] = run(made, "scorer_agreement").to_dicts()
    assert (pair["n_tokens"], pair["max_abs_difference"]) == (2, 0.0)
