"""`echolab view`: whom it answers, what it lists, that it only reads, and that it follows a store."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from urllib.parse import urlencode, urlsplit

import polars as pl
import pytest
from generators import served as serving
from generators import told
from hypothesis import given, settings
from hypothesis import strategies as st

import echolab
from echolab import EcholabError
from echolab.report.tokens import unpack

for name in ("vl_convert", "starlette", "uvicorn"):
    pytest.importorskip(name, reason="the viewer needs more: pip install 'echolab[view]'")

from echolab.view.browse import OUTCOMES, PAGE, SORTS, Query, find, group  # noqa: E402
from echolab.view.editions import Edition, Editions, Wanted  # noqa: E402


class Served:
    """A store served by the command, in a process of its own."""

    def __init__(self, root, *options):
        self.process, self.url = serving.start(root, *options)
        self.port, self.path = urlsplit(self.url).port or 0, urlsplit(self.url).path

    def ask(self, path, method="GET", **headers):
        """Status, headers and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, dict(answer.getheaders()), body

    def get(self, what, **given):
        status, headers, body = self.ask(f"{self.path}{what}?{urlencode(given)}")
        assert headers["content-type"] == "application/json"
        return status, json.loads(body)

    def until(self, holds, what="state", seconds=60):
        """Asks again until it holds."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            status, said = self.get(what)
            if status == 200 and holds(said):
                return said
            time.sleep(0.1)
        raise AssertionError(f"{what}: {said}")

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        out, errors = self.process.communicate(timeout=30)
        return self.process.returncode, out, errors


@pytest.fixture(scope="module")
def serve():
    running = []

    def serve(root, *options):
        running.append(Served(root, *options))
        return running[-1]

    yield serve
    for served in running:
        if served.process.poll() is None:
            served.stop()


@pytest.fixture(scope="module")
def store(make_store, add_reading):
    made = make_store(told.steps(30))
    add_reading(made, hostile_rows())
    bare = {"run": "bare", "problem": "p", "completion": "no reward, no length"}
    add_reading(made, [{**bare, "group": f"{step}", "step": step} for step in (None, 3, 40)])
    add_reading(made, told.experts())
    told.score(made)
    return made


def hostile_rows():
    return [
        {"run": "hostile", "group": name, "problem": text, "completion": text, "ground_truth": text, "model": text, "sample": n,
         "reward": float(n), "n_chars": len(text)}
        for name, text in told.HOSTILE.items() for n in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def served(serve, store):
    return serve(store.root)


@pytest.fixture(scope="module")
def edition(store):
    made = Edition.of(store.snapshot(), Wanted())
    yield made
    made.session.close()


# Whom it answers.


def test_without_the_token_nothing_is_shown(served):
    for path in (
        "/",
        "/groups",
        "/x/groups",
        served.path[:-2] + "/",
        served.path.upper(),
        "//" + served.path,
        "/favicon.ico",
        "/%ff/x",
        "*",
    ):
        status, _, body = served.ask(path)
        assert status == 403 and len(body) < 100, path
    assert served.ask(served.path)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost", "evil.example:{port}", "[", ""])
def test_under_another_name_it_does_not_answer(served, host):
    """A page that points its own name at this machine sends that name."""
    assert served.ask(served.path, Host=host.format(port=served.port))[0] == 403


def test_it_answers_as_localhost_too_for_a_forwarded_port(served):
    assert served.ask(f"{served.path}groups", Host=f"localhost:{served.port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"])
def test_it_can_only_be_read(served, method):
    assert served.ask(f"{served.path}groups", method)[0] == 405


def test_it_listens_on_this_machine_only(served):
    psutil = pytest.importorskip("psutil")
    listening = [c for c in psutil.Process(served.process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert [(c.laddr.ip, c.laddr.port) for c in listening] == [("127.0.0.1", served.port)]


def test_the_page_may_ask_its_server_and_nobody_else(served):
    _, headers, page = served.ask(served.path)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert "connect-src 'self';" in policy and "base-uri 'none'; form-action 'none'" in policy
    assert headers["content-security-policy"] == "frame-ancestors 'none'" and headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
    assert not re.findall(r"(?:src|href)=", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))


# What it lists.


def all_pages(served, **query):
    first = served.get("groups", **query)[1]
    pages = [first, *(served.get("groups", page=p, **query)[1] for p in range(2, first["pages"] + 1))]
    assert all(len(page["groups"]) == PAGE for page in pages[:-1])
    return first, [group for page in pages for group in page["groups"]]


def test_every_group_is_on_one_page(served, store):
    first, groups = all_pages(served)
    with echolab.open(store.root) as lab:
        stored = lab.sql("SELECT group_id, kind, n_success FROM groups")
    assert first["found"] == first["total"] == len(groups) == stored.height > 2 * PAGE
    assert sorted((g["group_id"], g["kind"], g["n_success"]) for g in groups) == sorted(stored.rows())
    steps = [g["step"] for g in groups]
    assert steps == sorted(steps, key=lambda step: (step is None, -(step or 0)))
    asked = {g["group_id"]: g["asked"] for g in groups if g["run"] == "r"}
    assert set(asked.values()) == {f"What is 7 times {n}?" for n in range(4)}


def test_counts_are_those_of_the_named_query(served, store):
    with echolab.open(store.root) as lab:
        kinds = lab.query("degenerate_by_step", run="r")
    for kind in ("all_fail", "all_success", "mixed"):
        assert served.get("groups", kind=kind, run="r")[1]["found"] == kinds[kind].sum()


CONDITIONS = {
    "": lambda g: True,
    "step > 5 AND n_success = 1": lambda g: (g["step"] or 0) > 5 and g["n_success"] == 1,
    "step IS NULL -- a remark": lambda g: g["step"] is None,
    "kind IN ('mixed', 'all_fail') OR false": lambda g: g["kind"] in ("mixed", "all_fail"),
    "n_tokens > (SELECT avg(n_tokens) FROM groups)": None,
    "group_id IN (SELECT group_id FROM rollouts WHERE completion LIKE '%Step 4%')": None,
}


def length(group):
    """Of its rollouts, on average; in tokens, else in characters."""
    whole = group["n_chars"] if group["n_tokens"] is None else group["n_tokens"]
    return None if whole is None else whole / group["n"]


@pytest.mark.parametrize("sort", SORTS)
def test_a_list_is_sorted_as_it_says(edition, sort):
    for page in (1, 2, 9):
        assert_lists(edition, Query(sort=sort, page=page))


@settings(max_examples=40, deadline=None)
@given(
    where=st.sampled_from(list(CONDITIONS)),
    run=st.sampled_from(["", "r", "gold", "hostile", "bare"]),
    outcome=st.sampled_from(["", *OUTCOMES]),
    kind=st.sampled_from(["", "mixed", "all_fail", "all_success", "single", "unrewarded"]),
)
def test_a_list_is_what_filters_over_all_groups_leave(edition, **filters):
    assert_lists(edition, Query(**filters))


def assert_lists(edition, query):
    """What is found is what plain Python makes of all groups."""
    session = edition.session
    groups = session.sql("SELECT * FROM groups").to_dicts()
    holds = CONDITIONS[query.where]
    if holds is None:
        chosen = set(session.sql(f"SELECT group_id FROM groups WHERE {query.where}")["group_id"])
        holds = lambda g: g["group_id"] in chosen  # noqa: E731
    outcomes = {
        "": True, "right": pl.col("n_success") > 0, "wrong": pl.col("n_rewarded") > pl.col("n_success"),
        "unrewarded": pl.col("n_rewarded") < pl.col("n"),
    }  # fmt: skip
    frame = pl.DataFrame(groups, infer_schema_length=None).filter(outcomes[query.outcome])
    fitting = [g for g in frame.to_dicts() if holds(g) and query.run in ("", g["run"]) and query.kind in ("", g["kind"])]
    order = {
        "newest": lambda g: (g["step"] is None, -(g["step"] or 0)),
        "oldest": lambda g: (g["step"] is None, g["step"] or 0),
        "kind": lambda g: (g["kind"], g["step"] is None, -(g["step"] or 0)),
        "lowest": lambda g: (g["mean"] is None, g["mean"] or 0, g["step"] is None, -(g["step"] or 0)),
        "highest": lambda g: (g["mean"] is None, -(g["mean"] or 0), g["step"] is None, -(g["step"] or 0)),
        "longest": lambda g: (length(g) is None, -(length(g) or 0)),
    }[query.sort]
    fitting.sort(key=lambda g: (order(g), g["group_id"]))
    found = find(edition, session, query)
    pages = max(1, -(-len(fitting) // PAGE))
    at = min(query.page, pages)
    assert (found["found"], found["pages"], found["page"], found["total"]) == (len(fitting), pages, at, len(groups))
    assert [g["group_id"] for g in found["groups"]] == [g["group_id"] for g in fitting[(at - 1) * PAGE : at * PAGE]]


@pytest.mark.parametrize("words", ["SEVEN times 1", "step 4: 7", "日本語", "onerror=ALERT", "%", "_'_", "nowhere to be found"])
@pytest.mark.parametrize("where", ["", "step BETWEEN 3 AND 9"])
def test_a_search_finds_words_in_prompts_and_completions_whatever_their_case(edition, words, where):
    rows = edition.session.sql(f"SELECT group_id, prompt, completion FROM rollouts WHERE {where or 'true'}").rows()
    expected = {id for id, *texts in rows if any(words.lower() in text.lower() for text in texts)}
    found = find(edition, edition.session, Query(words=words, where=where))
    assert found["found"] == len(expected) and {g["group_id"] for g in found["groups"]} <= expected


def test_runs_that_were_not_asked_for_are_not_listed(store):
    made = Edition.of(store.snapshot(), Wanted(runs=("hostile",)))
    assert {g["run"] for g in find(made, made.session, Query())["groups"]} == {"hostile"}
    assert made.index["groups"] == len(told.HOSTILE) and made.index["runs"] == ["hostile"]
    made.session.close()
    with pytest.raises(EcholabError, match="no run 'x' in this store"):
        Edition.of(store.snapshot(), Wanted(runs=("x",)))


def test_a_verifiers_word_takes_the_place_of_rewards(make_store):
    made = make_store(told.steps(2))
    with echolab.open(made.root) as lab:
        lab.verify("exact")
        wrong = lab.query("degenerate_by_step", verifier="exact")["all_fail"].sum()
    edition = Edition.of(made.snapshot(), Wanted(verifier="exact"))
    listed = find(edition, edition.session, Query(kind="all_fail"))
    assert listed["found"] == wrong == 8
    read = group(edition, edition.session, listed["groups"][0]["group_id"])
    assert {(r["status"], r["success"]) for r in read["rollouts"]} == {("no_answer", False)}
    edition.session.close()


@pytest.mark.parametrize(
    ("query", "said"),
    [({"page": "x"}, "a page is a number"), ({"page": "²"}, "a page is a number"), ({"sort": "n; DROP"}, "no sort"),
     ({"kind": "x"}, "no kind"), ({"outcome": "x"}, "no outcome"), ({"limit": "9"}, "unknown: limit")],
)  # fmt: skip
def test_what_is_not_known_is_a_clear_error(served, query, said):
    status, answer = served.get("groups", **query)
    assert status == 400 and said in answer["error"]


# Conditions in SQL.


@pytest.mark.parametrize(
    "where",
    ["n_success =", "no_such_column > 1", "'", "true) UNION SELECT * FROM groups --", "1; DROP TABLE kept.groups",
     "count(*) > 1",
     "true); DELETE FROM kept.groups; SELECT (true", "EXISTS (DELETE FROM kept.groups RETURNING 1)", "$those = 1", "? = 1",
     "(SELECT count(*) FROM read_text('/etc/passwd')) > 0", "(SELECT count(*) FROM read_csv('/proc/self/environ')) > 0",
     "(SELECT count(*) FROM glob('/*')) > 0", "true) TO '/tmp/x' --", "getenv('HOME') = 'x'"],
)  # fmt: skip
def test_a_condition_can_neither_write_nor_look_elsewhere(served, where):
    status, answer = served.get("groups", where=where)
    assert status == 400 and set(answer) == {"error"} and "\n" not in answer["error"] and len(answer["error"]) < 500
    assert served.get("groups")[0] == 200


def ask_endlessly(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    where = "(SELECT count(*) FROM range(10000000000) a, range(1000) b WHERE a.range * b.range = 7) > 0"
    connection.request("GET", f"{served.path}groups?{urlencode({'where': where})}")
    time.sleep(0.05)
    return connection


def test_a_request_that_nobody_waits_for_is_given_up(served):
    for _ in range(6):  # more than are answered at once
        ask_endlessly(served).close()
    began = time.monotonic()
    assert served.get("groups")[0] == 200 and time.monotonic() - began < 10


# Groups.


def test_a_group_is_as_the_store_has_it(edition):
    session = edition.session
    texts = dict(session.sql("SELECT rollout_id, completion FROM rollouts").rows())
    entropies = dict(session.sql("SELECT rollout_id, entropies FROM scores").rows())
    for known in session.sql("SELECT * FROM groups WHERE step IN (1, 7) OR run <> 'r'").to_dicts():
        read = group(edition, session, known["group_id"])
        expert = known["role"] == "policy" and known["problem_id"] in edition.experts
        assert [r["role"] for r in read["rollouts"]] == ["expert"] * expert + [known["role"]] * known["n"]
        for rollout in read["rollouts"]:
            assert rollout["text"] == texts[rollout["id"]]
            assert unpack(rollout["entropy"]) == pytest.approx([min(e, 16.376) for e in entropies[rollout["id"]]], abs=0.0021)


def test_what_models_wrote_is_json_and_nothing_else(served):
    for entry in served.get("groups", run="hostile")[1]["groups"]:
        status, headers, body = served.ask(f"{served.path}group/{entry['group_id']}")
        assert status == 200 and headers["content-type"] == "application/json" and "<" not in body
        read = json.loads(body)
        assert {r["text"] for r in read["rollouts"]} == {read["prompt"]} and read["prompt"] in told.HOSTILE.values()
    overview = served.until(lambda said: said, "overview")
    assert "<img" not in "".join(overview["parts"].values())


def test_a_group_that_is_not_there_is_a_clear_error(served):
    for id in ("f" * 32, "%27%20OR%20true", "..%2f..%2fetc"):
        status, _, body = served.ask(f"{served.path}group/{id}")
        assert status in (400, 404) and ("no group" in body or status == 404)


def test_a_long_rollout_is_cut_and_can_be_had_whole(make_store):
    long, rng = "".join(f"{i:05d}\n" for i in range(100_000)), random.Random(0)
    rows = [{"problem": "p", "completion": long if n == 7 else f"{rng.random()}", "sample": n} for n in range(40)]
    made = make_store(rows)
    told.score(made, where="sample < 9")
    edition = Edition.of(made.snapshot(), Wanted())
    (id,) = edition.session.sql("SELECT group_id FROM groups")["group_id"]
    some = group(edition, edition.session, id)
    assert len(some["rollouts"]) == 16 and some["n"] == 40
    (cut,) = [r for r in some["rollouts"] if r.get("n_tokens") == 200_000]
    assert long.startswith(cut["text"]) and 0 < cut["tokens_left_out"] < 200_000
    whole = group(edition, edition.session, id, rollout=cut["id"])
    assert whole["text"] == long and whole["tokens_left_out"] == 0
    everyone = group(edition, edition.session, id, everyone=True)
    assert len({r["id"] for r in everyone["rollouts"]}) == 40
    with pytest.raises(EcholabError, match="has no rollout"):
        group(edition, edition.session, id, rollout="x")
    edition.session.close()


def test_numbers_of_the_overview_are_those_of_the_named_queries(served, store):
    overview = served.until(lambda said: said, "overview")
    rows = [r for spec in overview["charts"].values() for data in spec["datasets"].values() for r in data]
    drawn = sorted((r["step"], r["mean"]) for r in rows if "success_rate" in r and r.get("run") == "r")
    with echolab.open(store.root) as lab:
        assert drawn == lab.query("reward_by_step", run="r").select("step", "mean").rows()
    assert "of the groups taught nothing" in overview["parts"]["top"]
    assert "with a dot" not in overview["parts"]["rest"]  # every group can be read


# A store that changes.


def test_the_next_edition_takes_the_place_of_the_last_which_those_who_read_it_keep(make_store, add_reading):
    store, rows = make_store(), told.steps(2)
    editions = Editions(store, Wanted())
    with editions.use() as first, first.asking(lambda: None) as session:
        add_reading(store, rows)
        began = time.monotonic()
        while editions.newest is first and time.monotonic() - began < 60:
            editions.look()
            time.sleep(0.02)
        assert find(first, session, Query())["found"] == 0
        with editions.use() as second, second.asking(lambda: None) as other:
            assert second.number == 2 and find(second, other, Query())["found"] == 8
    with pytest.raises(Exception, match="closed"):
        first.session.sql("SELECT 1")
    editions.close()


@pytest.mark.slow
def test_it_follows_a_store_that_is_written_breaks_and_comes_back(serve, make_store, add_reading):
    store = make_store()
    served = serve(store.root, "--no-browser")
    assert served.get("state")[1]["groups"] == 0 and served.get("groups")[1]["groups"] == []
    empty = served.until(lambda said: said, "overview")
    assert "echolab ingest PATH --run NAME" in empty["parts"]["top"]
    rows = told.steps(3)
    add_reading(store, [row for row in rows if row["step"] == 1])
    one = served.until(lambda said: said["groups"] == 4)
    assert one["edition"] == 2 and one["runs"] == ["r"] and one["scale"]["entropy"] == 0
    add_reading(store, [row for row in rows if row["step"] > 1])
    told.score(store)
    more = served.until(lambda said: said["groups"] == 12 and said["scale"]["entropy"] > 0)
    served.until(lambda said: said["overview"] == more["edition"])
    assert served.get("groups")[1]["found"] == 12
    away = store.root.with_name("away")
    store.root.rename(away)
    broken = served.until(lambda said: said["trouble"])
    assert "no such folder" in broken["trouble"] and broken["groups"] == 12
    listed = served.get("groups")[1]["groups"]
    status, said = served.get(f"group/{listed[0]['group_id']}")
    assert len(listed) == 12 and status == 400 and "\n" not in said["error"]
    away.rename(store.root)
    served.until(lambda said: said["trouble"] is None)
    assert served.get(f"group/{listed[0]['group_id']}")[0] == 200
    assert served.stop() == (130, "", "echolab: interrupted\n")


@pytest.mark.slow
def test_a_lost_table_is_trouble_and_no_empty_store(serve, make_store):
    store = make_store(told.steps(2))
    served = serve(store.root)
    served.until(lambda said: said["overview"])
    store.folder("rollouts").rename(store.root / "_gone")
    assert served.until(lambda said: said["trouble"])["trouble"].endswith("the table rollouts is gone")
    assert served.get("groups")[1]["found"] == 8


# The command.


def test_a_clear_error_where_something_is_wrong(make_store, monkeypatch, served):
    from pipelines.cli import app

    root = str(make_store(told.steps(1)).root)
    for options, message in (
        (["--run", "x"], "no run 'x'"), (["--verifier", "x"], "no verifier 'x'"),
        (["--port", str(served.port)], "cannot be used"), (["--store", root + "x"], "no such folder"),
    ):  # fmt: skip
        with pytest.raises(EcholabError, match=message):
            app(["view", "--store", root, *options], standalone_mode=False)
    monkeypatch.delitem(sys.modules, "echolab.view.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(EcholabError, match=re.escape("pip install 'echolab[view]'")):
        app(["view", "--store", root], standalone_mode=False)


@pytest.mark.slow
def test_it_ends_at_once_though_it_is_answering(serve, store):
    served = serve(store.root)
    asking = [ask_endlessly(served) for _ in range(6)]
    time.sleep(1)
    began = time.monotonic()
    assert served.stop() == (130, "", "echolab: interrupted\n") and time.monotonic() - began < 10
    assert {connection.getresponse().status for connection in asking} == {400}


@pytest.mark.slow
def test_a_terminal_gets_the_address_and_what_there_is(make_store):
    code = "from pipelines.cli import main; main()"
    command = [sys.executable, "-c", code, "view", "--store", str(make_store(told.steps(1)).root), "--no-browser"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "DISPLAY": ""}
    )
    assert process.stdout is not None
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/\n", process.stdout.readline())
    process.send_signal(signal.SIGINT)  # at once
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and out == ""
    assert re.fullmatch(r".*: 4 groups to browse until Ctrl-C\necholab: interrupted\n", errors)
