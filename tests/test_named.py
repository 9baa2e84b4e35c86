"""Named results: versions, what is the same, crashes between rows and entry, and two makers at once."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from echolab.errors import Busy, EcholabError, WrongUsage
from echolab.lab import Lab
from echolab.named import draft, find, unchanged
from echolab.schema import TABLES


def profile(store, name, *problems, config=None, versions=None):
    with draft(store, "cohort", name) as d:
        rows = [{"profile": d.label, "rollout_id": f"r{i}", "problem_id": p} for i, p in enumerate(problems)]
        table = pa.Table.from_pylist(rows, schema=TABLES["profile_members"].arrow)
        staged = {"profile_members": store.stage("profile_members", table, d.folder)}
        return d.publish(staged, config or {}, {"versions": versions or {"rollouts": 1}})


def members(store, label):
    with Lab(store) as lab:
        return lab.sql(f"SELECT problem_id FROM profile_members WHERE profile = '{label}' ORDER BY 1")["problem_id"].to_list()


def test_a_bare_name_means_the_newest_version_and_older_ones_stay(make_store):
    store = make_store()
    assert [profile(store, "p", "a").label, profile(store, "p", "b", "c").label, profile(store, "q", "d").label] == [
        "p@1",
        "p@2",
        "q@1",
    ]
    assert find(store.snapshot(), "cohort", "p").label == "p@2" and find(store.snapshot(), "cohort", "p@1").version == 1
    assert members(store, "p@1") == ["a"] and members(store, "p@2") == ["b", "c"]


def test_unchanged_compares_configuration_and_versions_of_the_newest_only(make_store):
    store = make_store()
    profile(store, "p", "a", config={"where": "x", "pair": (1, 2)}, versions={"rollouts": 3})
    snapshot = store.snapshot()
    same = unchanged(snapshot, "cohort", "p", {"where": "x", "pair": [1, 2]}, {"rollouts": 3})
    assert same is not None and same.label == "p@1"
    assert unchanged(snapshot, "cohort", "p", {"where": "y", "pair": [1, 2]}, {"rollouts": 3}) is None
    assert unchanged(snapshot, "cohort", "p", {"where": "x", "pair": [1, 2]}, {"rollouts": 4}) is None
    assert unchanged(snapshot, "cohort", "q", {"where": "x", "pair": [1, 2]}, {"rollouts": 3}) is None


def test_rows_that_a_crash_left_without_an_entry_are_replaced(make_store, monkeypatch):
    store = make_store()
    with monkeypatch.context() as m:
        m.setattr(type(store), "register", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            profile(store, "p", "a", "b")
    with pytest.raises(EcholabError, match="no profile 'p'"):
        find(store.snapshot(), "cohort", "p")
    assert profile(store, "p", "c").label == "p@1"
    assert members(store, "p@1") == ["c"]
    assert not list(store.job_folder("").iterdir())


def test_one_maker_of_a_name_at_a_time(make_store):
    store = make_store()
    with draft(store, "cohort", "p"), pytest.raises(Busy, match="another process makes profile p"), draft(store, "cohort", "p"):
        pass
    assert profile(store, "p", "a").label == "p@1"


@pytest.mark.parametrize("name", ["", "a@1", "a/b", "../x", ".hidden", "a b", "x" * 101])
def test_names_that_could_be_no_file_or_label_are_refused(make_store, name):
    with pytest.raises(WrongUsage, match="is no name of a clip set"), draft(make_store(), "clipset", name):
        pass


def test_what_it_was_made_from_is_pinned(make_store):
    store = make_store([{"reward": 1.0}])
    versions = dict(store.snapshot().versions)
    profile(store, "p", "a", versions=versions)
    with Lab(store) as lab:
        assert [(p["name"], json.dumps(p["tables"])) for p in lab.info()["pins"]] == [("p", json.dumps(versions))]
