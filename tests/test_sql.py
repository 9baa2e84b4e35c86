"""The session: which rows show, how they are judged, and what the sandbox refuses."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echolab import EcholabError, ids, views
from echolab.queries import list_queries
from echolab.scan import relation
from echolab.schema import TABLES, duckdb_type
from echolab.sql import Options, Session
from echolab.store import Store

KINDS = "SELECT kind, count(*) AS n FROM groups GROUP BY kind ORDER BY kind"


def group(name, rewards, **fields):
    return [{"group": name, "problem": name, "sample": i, "reward": r, **fields} for i, r in enumerate(rewards)]


def ask(store, query, params=None, **options):
    with Session(store.snapshot(), Options(**options)) as s:
        return s.sql(query, params)


def kinds(store, **options):
    return dict(ask(store, "SELECT DISTINCT prompt, kind FROM rollouts", **options).iter_rows())


# Kinds


def expected_kind(rewards, failure, tol=1e-6, threshold=1.0):
    known = [r for r in rewards if r is not None and math.isfinite(r)]
    if not known:
        return "unrewarded"
    if len(known) == 1:
        return "single"
    if max(known) - min(known) > tol:
        return "mixed"
    if all(r >= threshold - tol for r in known):
        return "all_success"
    return "all_fail" if abs(min(known) - failure) <= tol else "constant"


REWARD = st.sampled_from([0.0, 1.0, 0.5, -1.0, 1 + 5e-7, 1 - 5e-7, 0.999, 2.0, 5e-7, None, math.nan, math.inf, -math.inf])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.lists(REWARD, min_size=1, max_size=5), REWARD.map(lambda r: [r] * 4)), min_size=1, max_size=12))
def test_groups_equal_brute_force_on_random_rewards(make_store, groups):
    store = make_store(row for i, rewards in enumerate(groups) for row in group(str(i), rewards, n_completion_tokens=i))
    finite = [r for rewards in groups for r in rewards if r is not None and math.isfinite(r)]
    failure = min([0.0, *finite]) if min([0.0, *finite]) < -1e-6 else 0.0
    by_problem = {row["problem_id"]: row for row in ask(store, "SELECT * FROM groups").to_dicts()}
    for i, rewards in enumerate(groups):
        row = by_problem[ids.problem_id(str(i))]
        known = [r for r in rewards if r is not None and math.isfinite(r)]
        assert row["kind"] == expected_kind(rewards, failure)
        assert (row["n"], row["n_rewarded"], row["n_unrewarded"]) == (len(rewards), len(known), len(rewards) - len(known))
        assert row["n_success"] == sum(r >= 1 - 1e-6 for r in known)
        assert (row["min"], row["max"]) == (min(known, default=None), max(known, default=None))
        if known:
            mean = sum(known) / len(known)
            assert row["mean"] == pytest.approx(mean)
            assert row["std"] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in known) / len(known)), abs=1e-9)
        assert row["n_tokens"] == i * len(rewards)


def test_a_negative_failure_reward_is_the_runs_lowest_and_other_shared_rewards_are_constant(make_store):
    store = make_store(group("a", [-1, -1]) + group("b", [0, 0]) + group("c", [1, -1]))
    assert kinds(store) == {"a": "all_fail", "b": "constant", "c": "mixed"}


def test_the_registry_sets_threshold_and_failure_reward_of_a_run(make_store, add_reading):
    store = make_store(group("a", [0.5, 0.5]) + group("b", [0.1, 0.1]))
    add_reading(store, group("c", [0.5, 0.5], run="other"))
    with store.lock():
        store.register("runs", "r", "r", {"success_threshold": 0.5, "failure_reward": 0.1})
    assert kinds(store) == {"a": "all_success", "b": "all_fail", "c": "constant"}
    assert kinds(store, success_threshold=0.4) == {"a": "all_success", "b": "all_fail", "c": "all_success"}
    thresholds = ask(store, "SELECT DISTINCT run, success_threshold AS t FROM rollouts ORDER BY run")
    assert thresholds.rows() == [("other", 1.0), ("r", 0.5)]


def test_a_length_penalty_on_right_answers_is_mixed_and_says_how_many_are_right(make_store):
    store = make_store(group("a", [1.2, 1.1, 1.0]))
    assert ask(store, "SELECT kind, n_success, n FROM groups").row(0) == ("mixed", 3, 3)


def test_an_expert_of_the_same_group_does_not_change_the_kind(make_store):
    store = make_store([*group("a", [0, 0, 0]), *group("a", [1], role="expert")])
    assert ask(store, "SELECT role, kind, n FROM groups ORDER BY role").rows() == [
        ("expert", "single", 1),
        ("policy", "all_fail", 3),
    ]
    assert ask(store, "SELECT role, kind FROM rollouts GROUP BY ALL ORDER BY ALL").rows() == [
        ("expert", "single"),
        ("policy", "all_fail"),
    ]


def test_parts_of_a_rollout_count_once_and_their_lengths_add_up(make_store, add_reading):
    parts = [
        {"group": "a", "sample": 0, "part": None, "reward": 1.0, "n_completion_tokens": 5},
        {"group": "a", "sample": 0, "part": 1, "reward": 1.0, "n_completion_tokens": 7},
        {"group": "a", "sample": 1, "part": 2, "reward": 1.0, "n_completion_tokens": 11},
    ]
    store = make_store(parts)
    plain = [{"group": "b", "sample": 0, "reward": 1.0, "run": "plain"}] * 2
    add_reading(store, plain)
    found = ask(store, "SELECT run, kind, n, n_success, n_tokens FROM groups ORDER BY run")
    assert found.rows() == [("plain", "all_success", 2, 2, None), ("r", "all_success", 2, 2, 23)]
    assert ask(store, "SELECT count(*) FROM rollouts").item() == 5


# Visible rows


def test_rows_of_superseded_and_unfinished_readings_do_not_show(make_store, add_reading):
    store = make_store()
    old = add_reading(store, group("a", [0, 0]))
    add_reading(store, group("a", [1, 1]), supersedes=[old])
    with store.job("lost") as folder, store.lock():  # committed, but its ledger row never came
        row = {**_stored(store)[0], "ingest_id": "lost", "rollout_id": "lost"}
        store.commit("rollouts", store.stage("rollouts", pa.Table.from_pylist([row], TABLES["rollouts"].arrow), folder))
    assert ask(store, "SELECT reward FROM rollouts").to_series().to_list() == [1, 1]
    assert ask(store, "SELECT count(*) FROM ingests WHERE live").item() == 1
    assert ask(store, KINDS).rows() == [("all_success", 1)]


def _stored(store):
    return store.snapshot().table("rollouts").to_pylist()


def test_a_later_attempt_hides_lower_ones_from_its_lowest_step_on(make_store, add_reading):
    rows = [row for step in (99, 100, 101, None) for row in group("p", [0, 0], step=step)]
    store = make_store(rows)
    add_reading(store, group("p", [1, 1], step=100), attempt=2)
    add_reading(store, group("p", [0, 0], step=101, run="other"))
    found = ask(store, "SELECT run, step, n, kind FROM groups ORDER BY run, step")
    assert found.rows() == [
        ("other", 101, 2, "all_fail"), ("r", 99, 2, "all_fail"), ("r", 100, 2, "all_success"), ("r", None, 2, "all_fail"),
    ]  # fmt: skip


def test_a_shared_id_shows_once_from_the_oldest_live_reading(make_store, add_reading):
    store = make_store()
    old = add_reading(store, [{"rollout_id": "x", "reward": 0.0}, {"rollout_id": "y", "reward": 0.0}])
    add_reading(store, [{"rollout_id": "x", "reward": 1.0}, {"rollout_id": "z", "reward": 1.0}], n_shared=1)
    query = "SELECT rollout_id, reward FROM rollouts ORDER BY rollout_id"
    assert ask(store, query).rows() == [("x", 0.0), ("y", 0.0), ("z", 1.0)]
    add_reading(store, [{"rollout_id": "y", "reward": 0.5}], supersedes=[old])
    assert ask(store, query).rows() == [("x", 1.0), ("y", 0.5), ("z", 1.0)]


def test_the_general_path_answers_like_the_fast_one(make_store, add_reading, monkeypatch):
    store = make_store(group("a", [0, 1, 1], n_chars=3) + group("b", [1, 1, 1], n_chars=3))
    add_reading(store, group("a", [0, 0], run="s"))

    def answers():
        with Session(store.snapshot()) as s:
            rows = s.sql("SELECT * EXCLUDE (rewards) FROM rollouts ORDER BY rollout_id")
            return [rows, *(s.query(q.name) for q in list_queries())]

    fast = answers()
    monkeypatch.setattr(views, "_all_visible", lambda files, ledger: False)
    for a, b in zip(fast, answers(), strict=True):
        assert a.equals(b)


def test_an_old_snapshot_is_unaffected_by_later_commits(make_store, add_reading):
    store = make_store(group("a", [0, 0]))
    snapshot = store.snapshot()
    with Session(snapshot) as before:
        add_reading(store, group("b", [1, 1]))
        assert before.sql("SELECT count(*) FROM rollouts").item() == 2
    assert ask(store, "SELECT count(*) FROM rollouts").item() == 4
    with Session(snapshot) as after:
        assert after.sql("SELECT count(*) FROM rollouts").item() == 2


def test_a_vacuumed_file_is_a_clear_error(make_store):
    store = make_store(group("a", [0, 0]))
    session = Session(store.snapshot())
    for f in store.snapshot().files("rollouts"):
        f.path.unlink()
    with session, pytest.raises(EcholabError, match="vacuumed"):
        session.sql("SELECT reward FROM rollouts")
    with pytest.raises(EcholabError, match="vacuumed"):
        Session(store.snapshot())


def test_a_column_that_a_file_lacks_is_null_and_files_may_differ(tmp_path):
    spec = TABLES["vocab"]
    pq.write_table(pa.table({"token_id": pa.array([1], pa.int32())}), tmp_path / "old.parquet")
    pq.write_table(pa.table({"token_id": pa.array([2], pa.int32()), "text": ["x"]}), tmp_path / "new.parquet")
    con = duckdb.connect()
    source = relation(con, spec, sorted(tmp_path.glob("*.parquet")))
    rows = con.sql(f"SELECT token_id, text, special FROM ({source}) ORDER BY token_id").fetchall()
    assert rows == [(1, None, None), (2, "x", None)]


def test_kept_answers_take_the_place_of_views_and_other_threads_see_them(make_store):
    store = make_store([*group("a", [0, 0], step=1), *group("b", [1, 0], step=2)])
    keep = {"groups": "SELECT * FROM groups WHERE step = 2", "steps": "SELECT DISTINCT step FROM rollouts"}
    with Session(store.snapshot(), keep=keep, beside=2) as s:
        for one in (s, *s.beside):
            assert one.sql("SELECT count(*) AS n FROM groups").item() == 1
            assert one.sql("SELECT sum(visits) AS n FROM problems").item() == 1  # a view on a kept one
            assert sorted(one.sql("FROM steps")["step"]) == [1, 2]
            assert one.sql("SELECT current_setting('TimeZone') AS zone").item() == "UTC"
            for write in ("SELECT * FROM read_text('/etc/passwd')", "WITH x AS (DELETE FROM kept.groups RETURNING *) FROM x"):
                with pytest.raises(EcholabError):
                    one.sql(write)
        with ThreadPoolExecutor(3) as pool:
            sums = "SELECT sum(range) AS n FROM range({})"
            found = [
                pool.submit(lambda one=one, i=i: one.sql(sums.format(i)).item()) for i, one in enumerate((s, *s.beside), 9)
            ]
            assert [f.result() for f in found] == [36, 45, 55]


def test_a_query_is_given_up_when_it_is_told_to_and_the_next_one_works(make_store):
    with Session(make_store().snapshot()) as s:
        until = time.monotonic() + 0.3
        s.give_up = lambda: None if time.monotonic() < until else "too long"
        with pytest.raises(EcholabError, match="too long"):
            s.sql("SELECT count(*) AS n FROM range(10000000000) a, range(1000) b WHERE a.range * b.range = 7")
        assert time.monotonic() < until + 5
        s.give_up = None
        assert s.sql("SELECT 1 AS one").item() == 1


# Views


def test_a_new_store_has_every_view_typed_and_empty(make_store):
    with Session(make_store().snapshot()) as s:
        for name in [*TABLES, "groups", "prompts", "problems", "segments", "tokens"]:
            assert s.sql(f"SELECT * FROM {name}").height == 0
        for name, table in TABLES.items():
            if name != "rollouts":
                found = dict(s.sql(f"DESCRIBE base.{name}").select("column_name", "column_type").iter_rows())
                assert found == {c.name: duckdb_type(c.type) for c in table.columns}


def test_prompts_and_problems_keep_experts_apart_and_know_the_newest_kind(make_store):
    store = make_store([
        *group("a", [0, 0], step=1), *group("a", [1, 0], step=5), *group("a", [1], role="expert", step=None),
    ])  # fmt: skip
    query = "SELECT role, first_step, last_step, visits, n, n_rewarded, n_success, success_rate, kind FROM {} ORDER BY role"
    expected = [("expert", None, None, 1, 1, 1, 1, 1.0, "single"), ("policy", 1, 5, 2, 4, 4, 1, 0.25, "mixed")]
    assert ask(store, query.format("problems")).rows() == expected
    assert ask(store, query.format("prompts")).rows() == expected


def test_registries_show_the_newest_row_of_each_id(make_store):
    store = make_store()
    with store.lock():
        store.register("runs", "r", "r", {"success_threshold": 1.0})
        store.register("runs", "r", "r", {"success_threshold": 0.5})
    assert ask(store, "SELECT id, config FROM runs").rows() == [("r", '{"success_threshold": 0.5}')]


def test_kind_of_rollouts_costs_nothing_where_it_is_not_asked_for(make_store):
    store = make_store(group("a", [0, 0]))
    plan = ask(store, "EXPLAIN SELECT count(*) FROM rollouts WHERE success")["explain_value"].item()
    assert "Join" not in plan and plan.count("Read Parquet") == 1
    assert "Join" in ask(store, "EXPLAIN SELECT count(*) FROM rollouts WHERE kind = 'mixed'")["explain_value"].item()


# Verifiers


def test_a_chosen_verifier_replaces_rewards_and_its_silence_is_null(make_store, add_rows):
    rows = [{"rollout_id": c, "group": "a" if c in "abc" else "b", "problem": "p", "reward": 1.0} for c in "abcde"]
    store = make_store(rows)
    then = datetime(2026, 1, 1, tzinfo=UTC)

    def verdict(rollout, status, success, score, verifier="v1", late=0):
        return {
            "rollout_id": rollout, "verifier": verifier, "input_hash": f"{late}", "status": status, "success": success,
            "score": score, "created_at": then + timedelta(seconds=late),
        }  # fmt: skip

    words = [
        verdict("a", "ok", True, 1.0, late=1), verdict("a", "ok", False, 0.0), verdict("b", "ok", True, 1.0),
        verdict("c", "no_answer", None, None), verdict("d", "timeout", None, None), verdict("e", "ok", False, 0.0, "v2"),
    ]  # fmt: skip
    add_rows(store, "verdicts", words)
    with store.lock():
        store.register("verifiers", "v1", "math", {}, version=1)
        store.register("verifiers", "v2", "math", {}, version=2)
    query = "SELECT rollout_id, reward, success, kind FROM rollouts ORDER BY rollout_id"
    assert set(ask(store, query)["kind"]) == {"all_success"}
    expected = [
        ("a", 1.0, True, "mixed"), ("b", 1.0, True, "mixed"), ("c", 0.0, False, "mixed"),
        ("d", None, None, "unrewarded"), ("e", None, None, "unrewarded"),
    ]  # fmt: skip
    assert ask(store, query, verifier="v1").rows() == expected
    assert ask(store, query, verifier="math@1").rows() == expected
    assert ask(store, "SELECT rollout_id FROM rollouts WHERE reward IS NOT NULL", verifier="math").rows() == [("e",)]
    assert ask(store, "SELECT status, success FROM verdicts WHERE rollout_id = 'a'").rows() == [("ok", True)]
    with pytest.raises(EcholabError, match="no verifier 'maths' in this store; there are: math@1, math@2"):
        ask(store, query, verifier="maths")


# Scorers and segmenters


def score(rollout, scorer, n=4, **fields):
    numbers = [float(i) for i in range(n)]
    return {"rollout_id": rollout, "scorer": scorer, "token_ids": list(range(n)), "entropies": numbers,
            "logprobs": [-x for x in numbers], "n_tokens": n, **fields}  # fmt: skip


def cut(rollout, scorer, segmenter, ends, entropies, peak):
    return {"rollout_id": rollout, "scorer": scorer, "segmenter": segmenter, "segment_ends": ends,
            "segment_entropies": entropies, "n_segments": len(ends), "peak_segment": peak,
            "peak_entropy": None if peak is None else entropies[peak]}  # fmt: skip


@pytest.fixture
def scored(make_store, add_rows):
    store = make_store()
    add_rows(store, "scores", [score("x", "s1"), score("y", "s1", 0)])
    add_rows(store, "segmentations", [cut("x", "s1", "g1", [1, 4], [0.5, None], 0), cut("y", "s1", "g1", [], [], None)])
    with store.lock():
        store.register("scorers", "s1", "qwen", {"tokenizer": "t"})
        store.register("scorers", "s2", "qwen", {}, version=2)
    add_rows(store, "vocab", [{"tokenizer": "t", "token_id": 2, "text": "two", "has_newline": False, "special": False}])
    return store


def test_the_only_scorer_and_segmenter_show_segments_and_tokens(scored):
    columns = "segment, start_token, end_token, n_tokens, entropy, position, is_peak"
    assert ask(scored, f"SELECT {columns} FROM segments ORDER BY segment").rows() == [
        (0, 0, 1, 1, 0.5, 0.25, True), (1, 1, 4, 3, None, 0.75, False),
    ]  # fmt: skip
    tokens = ask(scored, "SELECT position, token_id, text, entropy, logprob FROM tokens ORDER BY position")
    assert tokens.rows() == [
        (0, 0, None, 0.0, 0.0), (1, 1, None, 1.0, -1.0), (2, 2, "two", 2.0, -2.0), (3, 3, None, 3.0, -3.0),
    ]  # fmt: skip


def test_several_scorers_are_an_error_that_lists_them_only_when_the_view_is_read(scored, add_rows):
    add_rows(scored, "scores", [score("x", "s2", 2)])
    add_rows(scored, "segmentations", [cut("x", "s2", "g1", [2], [1.0], 0), cut("x", "s2", "g2", [1, 2], [1.0, 0.0], 0)])
    assert ask(scored, "SELECT count(*) FROM scores").item() == 3
    for view in ("tokens", "segments"):
        with pytest.raises(EcholabError, match="^there are several scorers: qwen@1, qwen@2; choose with --scorer$"):
            ask(scored, f"SELECT count(*) FROM {view}")
    assert ask(scored, "SELECT count(*) FROM tokens", scorer="qwen").item() == 2
    assert ask(scored, "SELECT count(*) FROM tokens", scorer="qwen@1").item() == 4
    assert ask(scored, "SELECT count(*) FROM segments", scorer="qwen@1").item() == 2
    with pytest.raises(EcholabError, match="^there are several segmenters: g1, g2; choose with --segmenter$"):
        ask(scored, "SELECT count(*) FROM segments", scorer="s2")
    with pytest.raises(EcholabError, match="no segmenter 'g3' in this store; there are: none"):
        ask(scored, "SELECT 1", segmenter="g3")


@pytest.mark.parametrize("view", ["segments", "tokens"])
def test_filters_on_rollout_and_scorer_reach_the_file_scan(scored, add_rows, view):
    add_rows(scored, "scores", [score("x", "s2", 2)])
    add_rows(scored, "segmentations", [cut("x", "s2", "g1", [2], [1.0], 0)])
    plan = ask(scored, f"EXPLAIN SELECT * FROM {view} WHERE rollout_id = 'x'", scorer="s1")["explain_value"].item()
    below_unnest = plan[plan.index("Unnest") :]
    assert "rollout_id = 'x'" in below_unnest and "scorer = 's1'" in below_unnest and "Filters:" in below_unnest


def test_the_vocabulary_is_joined_only_for_the_text(scored):
    assert "Join" not in ask(scored, "EXPLAIN SELECT count(entropy) FROM tokens")["explain_value"].item()
    assert "Join" in ask(scored, "EXPLAIN SELECT max(text) FROM tokens")["explain_value"].item()


# The sandbox


REFUSED = """
COPY (SELECT 1) TO '{root}/out.csv'
COPY rollouts FROM 'x.csv'
ATTACH 'x.db'
INSTALL httpfs
LOAD json
PRAGMA version
SET threads = 1
RESET threads
CALL pragma_version()
CREATE TABLE t (a INT)
DROP VIEW groups
EXPORT DATABASE '{root}/e'
BEGIN
COMMIT
ROLLBACK
USE base
PREPARE p AS SELECT 1
VACUUM
CHECKPOINT
EXPLAIN ANALYZE COPY (SELECT 1) TO '{root}/out.csv'
EXPLAIN (FORMAT json) COPY (SELECT 1) TO '{root}/out.csv'
WITH d AS (DELETE FROM base.live RETURNING ingest_id) SELECT * FROM d
WITH d AS (INSERT INTO base.live VALUES ('x', 1, 1, true) RETURNING 1) SELECT * FROM d
SELECT * FROM read_text('/etc/hosts')
SELECT * FROM '/etc/hosts.csv'
SELECT * FROM read_csv('/etc/passwd')
SELECT * FROM glob('/etc/*')
SELECT * FROM read_text('{root}/../../outside.txt')
SELECT * FROM read_parquet('{outside}')
SELECT * FROM read_parquet('s3://bucket/x.parquet')
SELECT * FROM delta_scan('{root}/rollouts')
SELECT * FROM query('COPY (SELECT 1) TO ''{root}/out.csv''')
SELECT * FROM enable_logging(storage_path = '{root}')
SELECT 1; SELECT 2
SELECT 1; COPY (SELECT 1) TO '{root}/o.csv'
-- nothing
SELECT 1 WHERE
SELEC 1
SELECT nope FROM rollouts
SELECT * FROM rolouts
SELECT coun(1)
SELECT 1 AS a, 2 AS a
SELECT * FROM somewhere
SELECT 'a'::INT
SELECT $1::INT
SELECT INTERVAL 1 DAY
"""


@pytest.mark.parametrize("query", [*REFUSED.strip().split("\n"), "", "SELECT '\ud800'", "SELECT error('two\nlines')"])
def test_what_is_not_one_read_only_select_is_refused_with_one_line(make_store, tmp_path, query):
    somewhere = pl.DataFrame({"a": [1]})  # a Python variable is no table
    outside = tmp_path / "outside.parquet"
    somewhere.write_parquet(outside)
    store = make_store(group("a", [0, 1]))
    before = sorted(store.root.rglob("*"))
    with Session(store.snapshot()) as s:
        with pytest.raises(EcholabError) as error:
            s.sql(query.format(root=store.root, outside=outside))
        message = str(error.value)
        assert message and "\n" not in message and len(message) < 500
        assert s.sql("SELECT count(*) FROM rollouts").item() == 2  # the session lives on
    assert sorted(store.root.rglob("*")) == before


def test_a_query_of_10_mb_is_refused_before_it_is_parsed(make_store):
    with pytest.raises(EcholabError, match="^the query is 10.0 MB long: at most 1 MB of SQL is read$"):
        ask(make_store(), "SELECT 1 --" + "x" * 10_000_000)


@pytest.mark.parametrize(
    "query",
    ["FROM rollouts", "VALUES (1)", "WITH x AS (SELECT 1) FROM x", "DESCRIBE groups", "SHOW TABLES", "SUMMARIZE rollouts",
     "EXPLAIN SELECT 1", "explain analyze SELECT 1", "SELECT 1;", "-- a comment\nSELECT 1"],
)  # fmt: skip
def test_every_form_of_one_select_is_allowed(make_store, query):
    ask(make_store(group("a", [0, 1])), query)


def test_a_wrong_name_gets_the_nearest_names(make_store):
    store = make_store(group("a", [0, 1]))
    with pytest.raises(EcholabError, match='Did you mean "rollouts"'):
        ask(store, "SELECT * FROM rolouts")
    with pytest.raises(EcholabError, match='Candidate bindings: .*"reward"'):
        ask(store, "SELECT rewardd FROM rollouts")


def test_parameters_are_values_and_never_sql(make_store):
    store = make_store(group("a", [0, 1]))
    query = "SELECT count(*) FROM rollouts WHERE run = $run"
    assert ask(store, query, {"run": "r"}).item() == 2
    assert ask(store, query, {"run": "r' OR true OR '"}).item() == 0
    assert ask(store, "SELECT ?::INT", [7]).item() == 7


def test_integer_sums_are_integers_and_times_are_utc(make_store):
    frame = ask(make_store(group("a", [0, 1])), "SELECT sum(n) AS n, TIMESTAMPTZ '2026-01-01 00:00:00+00' AS t FROM groups")
    assert frame.schema == {"n": pl.Int64, "t": pl.Datetime("us", "UTC")}


def test_ctrl_c_ends_a_query_and_the_session_lives_on(make_store):
    with Session(make_store().snapshot()) as s:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            s.sql("SELECT count(*) FROM range(100000000000) a(i) WHERE hash(i) = 1")
        timer.join()
        assert s.sql("SELECT 1").item() == 1


def test_a_closed_session_leaves_no_files_behind(make_store, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Session(make_store().snapshot(), memory_limit="100MB", threads=1) as s:
        s.sql("SELECT count(*) FROM (SELECT i, count(*) FROM range(3000000) t(i) GROUP BY i)")
    assert list(tmp_path.iterdir()) == []


def test_a_root_with_odd_characters_is_read(tmp_path, add_reading):
    store = Store.create(Path(tmp_path) / "it's a store")
    add_reading(store, group("a", [0, 1], run="it's/100%"))
    assert ask(store, "SELECT run FROM groups").item() == "it's/100%"


@pytest.mark.parametrize("column", ["run", "split", "role"])
def test_a_column_that_is_the_same_in_all_files_answers_as_one_that_differs(make_store, add_reading, column):
    """What all files agree on is not read from them: then every group must still be there, under the right name."""
    other = {"run": "s", "split": "eval", "role": "expert"}[column]
    alike = make_store([{"group": "g", "reward": r} for r in (0.0, 1.0)])
    query = f"SELECT {column}, kind, n FROM groups ORDER BY ALL"
    own = {"run": "r", "split": "train", "role": "policy"}[column]
    assert ask(alike, query).rows() == [(own, "mixed", 2)]
    assert ask(alike, f"SELECT count(*) FROM rollouts WHERE {column} = '{other}'").item() == 0
    add_reading(alike, [{"group": "h", "reward": 1.0, column: other} for _ in range(3)])
    assert ask(alike, query).rows() == sorted([(own, "mixed", 2), (other, "all_success", 3)])
