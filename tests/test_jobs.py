"""The job runner, with work that needs no model: what it stores does not depend on where it was stopped."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab import jobs
from echolab.errors import Busy
from echolab.jobs import Done, Job
from echolab.maintenance import OWN_JOBS
from echolab.schema import SCORES
from echolab.sql import Session
from echolab.store import Store

COLUMNS = ("rollout_id", "run", "step", "completion")


def work(rows: pa.Table) -> Done:
    """A score that follows from the rollout: the lengths of its words."""
    made = []
    for row in rows.to_pylist():
        words = [float(len(w)) for w in row["completion"].split()]
        numbers = {"entropies": words, "mean_entropy": sum(words) / len(words), "n_tokens": len(words)}
        known = {name: row[name] for name in ("rollout_id", "run", "step")}
        made.append({**known, "scorer": "words", "token_ids": list(range(len(words))), **numbers})
    return Done({"scores": pa.Table.from_pylist(made, schema=SCORES.arrow)}, tokens=sum(m["n_tokens"] for m in made))


def planned(store: Store, bound: int = 30) -> Job:
    with Session(store.snapshot()) as session:
        found = session.sql("SELECT rollout_id, group_id, run, step FROM rollouts ORDER BY step, group_id, sample, rollout_id")
    tokens = [10] * len(found)
    plan = found.drop("group_id").to_arrow()
    plan = plan.append_column("tokens", pa.array(tokens)).append_column(
        "item", pa.array(jobs.items(found["group_id"].to_list(), tokens, bound))
    )
    return Job.create(store, "score-words", {}, plan, ["scores"])


def rollouts(n: int = 60) -> list[dict]:
    return [
        {"step": i // 20, "group": f"g{i // 4}", "sample": i % 4, "completion": "word " * (i % 7 + 1) + f"w{i}"}
        for i in range(n)
    ]


def stored(store: Store) -> list[tuple]:
    with Session(store.snapshot()) as session:
        return sorted(
            session.sql("SELECT rollout_id, run, step, token_ids, entropies, mean_entropy, n_tokens FROM scores").rows()
        )


def run(job: Job, backend=None) -> jobs.Report:
    with job.lock():
        return jobs.run(job, backend or jobs.serial(work), COLUMNS)


@pytest.fixture
def expected(make_store) -> list[tuple]:
    """What one run without a stop stores. Rollout ids are random: what follows from the content is compared."""
    store = make_store(rollouts())
    assert run(planned(store)).done == planned_items(store)
    return contents(store)


def planned_items(store: Store) -> int:
    job = Job.open(store, "score-words")
    assert job
    return job.n_items


def contents(store: Store) -> list[tuple]:
    return sorted(row[1:] for row in stored(store))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=40), st.integers(1, 100))
def test_items_are_contiguous_whole_groups_and_hold_no_more_than_the_bound_unless_one_group_does(rows, bound):
    groups = [g for i, (g, n) in enumerate(sorted(rows, key=lambda r: r[0]))]
    tokens = [n for _, n in sorted(rows, key=lambda r: r[0])]
    numbers = jobs.items(groups, tokens, bound)
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(len(set(numbers))))
    assert all(len({i for g, i in zip(groups, numbers, strict=True) if g == group}) == 1 for group in groups)
    for item in set(numbers):
        inside = [(g, n) for g, n, i in zip(groups, tokens, numbers, strict=True) if i == item]
        assert sum(n for _, n in inside) <= bound or len({g for g, _ in inside}) == 1


def test_every_rollout_is_worked_on_once_and_the_job_says_so(make_store, expected):
    store = make_store(rollouts())
    job = planned(store)
    report = run(job)
    assert (report.items, report.done, report.rows, report.failed) == (job.n_items, job.n_items, 60, {})
    assert contents(store) == expected
    assert (job.status["state"], job.status["done"], job.pending(), job.staged) == ("done", job.n_items, [], [])
    run(job)
    assert contents(store) == expected


def test_a_stop_in_the_middle_keeps_what_is_finished_and_goes_on_from_there(make_store, expected):
    store = make_store(rollouts())
    job, seen = planned(store), []

    def stopped(payloads):
        for number, rows in payloads:
            if number == 3:
                raise KeyboardInterrupt
            yield number, work(rows)

    with pytest.raises(KeyboardInterrupt):
        run(job, stopped)
    assert (job.status["state"], job.status["done"], job.staged) == ("stopped", 3, [])

    def counted(payloads):
        for number, rows in payloads:
            seen.append(number)
            yield number, work(rows)

    run(job, counted)
    assert seen == list(range(3, job.n_items))
    assert contents(store) == expected


def test_progress_counts_one_thing_begins_where_a_stopped_job_stood_and_ends_with_all(make_store):
    store, shown = make_store(rollouts()), []
    job = planned(store)

    def show(done: int, total: int, rate: float) -> None:
        shown.append((done, total, rate))
        if len(shown) == 5:
            raise KeyboardInterrupt

    with job.lock(), pytest.raises(KeyboardInterrupt):
        jobs.run(job, jobs.serial(work), COLUMNS, show)
    for _ in range(2):  # the second time there is nothing left to do
        with job.lock():
            jobs.run(job, jobs.serial(work), COLUMNS, show)
    done, totals, rates = zip(*shown, strict=True)
    sizes = list(job.sizes.values())
    before, after = sum(sizes[:4]), [sum(sizes[:n]) for n in range(4, job.n_items + 1)]
    assert set(totals) == {600} == {sum(sizes)}
    assert list(done) == [0, *(sum(sizes[:n]) for n in range(1, 5)), *after, 600]
    assert after[0] == before and after[-1] == 600
    assert [rate == 0 for rate in rates] == [True] + [False] * 4 + [True] + [False] * (len(after) - 1) + [True]


def test_a_failing_item_is_tried_again_then_listed_and_the_others_are_stored(make_store, expected):
    store = make_store(rollouts())
    job, tries = planned(store), []

    def poisoned(rows: pa.Table) -> Done:
        if rows["completion"][0].as_py().endswith("w0"):
            tries.append(1)
            raise ValueError("no good")
        return work(rows)

    report = run(job, jobs.serial(poisoned))
    assert len(tries) == jobs.TRIES
    [(item, reason)] = report.failed.items()
    assert reason == "ValueError: no good"
    assert (job.status["state"], job.status["failed"]) == ("failed", {str(item): reason})
    assert 0 < len(stored(store)) < 60
    assert run(job).failed == {}
    assert contents(store) == expected


def test_what_an_item_cannot_use_is_listed_with_its_reason(make_store):
    store = make_store(rollouts(8))

    def picky(rows: pa.Table) -> Done:
        bad = [(r, "odd") for r in rows["rollout_id"].to_pylist()[::2]]
        return Done({}, bad)

    job = planned(store)
    assert run(job, jobs.serial(picky)).skipped == {"odd": 4}
    assert job.status["skipped"] == {"odd": 4}


def test_one_process_at_a_time_works_on_a_job(make_store):
    job = planned(make_store(rollouts(8)))
    with job.lock(), pytest.raises(Busy, match="another process works on job score-words"), Job(job.store, job.name).lock():
        pass


def test_keys_that_stand_already_are_not_stored_twice(make_store, expected):
    store = make_store(rollouts())
    job = planned(store)
    run(job)
    job.remove()
    run(planned(store))  # as a second job that knows nothing of the first
    assert contents(store) == expected


def test_an_item_that_was_committed_but_not_forgotten_is_not_committed_again(make_store, expected, monkeypatch):
    store = make_store(rollouts())
    job = planned(store)
    monkeypatch.setattr(Job, "_forget", stop)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    monkeypatch.undo()
    run(job)
    assert contents(store) == expected


def test_a_kill_in_the_middle_of_forgetting_an_item_leaves_a_job_that_goes_on(make_store, expected, monkeypatch):
    store = make_store(rollouts())
    job, rmtree = planned(store), shutil.rmtree

    def half(folder: Path | str, **options: Any) -> None:
        facts = Path(folder) / "facts.json"
        if facts.exists():
            facts.unlink()
            raise KeyboardInterrupt
        rmtree(folder, **options)

    monkeypatch.setattr(jobs.shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    monkeypatch.undo()
    assert run(job).failed == {}
    assert contents(store) == expected


def picky(rows: pa.Table) -> Done:
    """It can do nothing with one rollout of each item."""
    return replace(work(rows.slice(1)), skipped=[(rows["rollout_id"][0].as_py(), "odd")])


def test_a_torn_last_line_of_the_skipped_ones_is_no_obstacle_and_spoils_no_other(make_store):
    job = planned(make_store(rollouts()))
    (job.folder / "skipped.jsonl").write_text('{"item": 0, "rollout')
    assert job.skipped() == []
    assert run(job, jobs.serial(picky)).skipped == {"odd": job.n_items}
    assert len(job.skipped()) == job.n_items


def test_a_kill_while_a_job_is_removed_leaves_no_job_and_nothing_that_a_new_one_takes_over(make_store, expected, monkeypatch):
    store = make_store(rollouts())
    job = planned(store)
    run(job, jobs.serial(picky))
    assert job.skipped()
    with monkeypatch.context() as patch:
        patch.setattr(jobs.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            job.remove()
    assert (Job.open(store, job.name), jobs.jobs(store, "score")) == (None, [])
    [left] = store.job_folder("").iterdir()
    assert left.name.startswith(OWN_JOBS)
    job.folder.mkdir()
    (job.folder / "skipped.jsonl").write_text('{"item": 0, "rollout_id": "x", "reason": "old"}\n')  # of a half-made job
    assert run(planned(store)).skipped == {}
    assert contents(store) == expected


def test_delta_is_asked_once_for_each_item_that_stands_and_twice_for_none(make_store, monkeypatch):
    asked: list[list[int]] = []
    committed = Job.committed

    def counted(self, table, numbers):
        asked.append(list(numbers))
        return committed(self, table, asked[-1])

    monkeypatch.setattr(Job, "committed", counted)
    monkeypatch.setattr(jobs, "COMMIT_ITEMS", 2)
    job = planned(make_store(rollouts()))
    run(job)
    assert sorted(i for numbers in asked for i in numbers) == list(range(job.n_items))
    asked.clear()
    run(job)
    assert asked == [list(range(job.n_items))]


def test_only_live_readings_are_worked_on_the_oldest_first(make_store, add_reading):
    first = [{"rollout_id": "a", "completion": "one", "group": "g"}, {"rollout_id": "b", "completion": "one", "group": "g"}]
    store = make_store(first)
    dead = store.snapshot().ledger.live[0].ingest_id
    add_reading(store, [{**r, "completion": "one two"} for r in first], supersedes=[dead])
    add_reading(store, [{**r, "completion": "one two three"} for r in first])
    run(planned(store))
    with Session(store.snapshot()) as session:
        assert session.sql("SELECT rollout_id, n_tokens FROM scores ORDER BY 1").rows() == [("a", 2), ("b", 2)]


def test_rollouts_that_the_store_has_lost_are_skipped_with_their_reason_and_the_others_scored(make_store, add_reading):
    store = make_store(rollouts(8))
    lost = store.snapshot().files("rollouts")
    add_reading(store, [{**r, "completion": "some more"} for r in rollouts(8)])
    job = planned(store)
    with store.lock():
        store.commit("rollouts", [], replaces=lost)
    report = run(job)
    assert (report.done, report.rows, report.skipped, report.failed) == (job.n_items, 8, {jobs.LOST: 8}, {})
    assert job.status["state"] == "done"


def test_a_store_that_has_lost_all_rollouts_of_a_job_ends_it(make_store):
    store = make_store(rollouts(8))
    job = planned(store)
    with store.lock():
        store.commit("rollouts", [], replaces=store.snapshot().files("rollouts"))
    report = run(job)
    assert (report.rows, report.skipped, report.failed) == (0, {"no longer in the store": 8}, {})
    assert (job.status["state"], job.pending()) == ("done", [])


def test_an_item_that_never_comes_back_is_a_failed_one(make_store):
    job = planned(make_store(rollouts()))

    def forgetful(payloads):
        return (result for result in jobs.serial(work)(payloads) if result[0] != 2)

    report = run(job, forgetful)
    assert report.failed == {2: "nothing came back"}
    assert (job.status["state"], report.done) == ("failed", job.n_items - 1)
    assert run(job).failed == {}


def test_any_error_of_an_item_is_its_own_and_a_stop_is_none(make_store):
    class Odd(Exception):
        pass

    def poisoned(rows: pa.Table) -> Done:
        raise Odd("no good")

    job = planned(make_store(rollouts(8)))
    assert set(run(job, jobs.serial(poisoned)).failed.values()) == {"Odd: no good"}
    with pytest.raises(KeyboardInterrupt):
        run(job, jobs.serial(stop))  # type: ignore[arg-type]


def test_another_lock_that_is_held_is_not_taken_for_the_jobs_own(make_store):
    job = planned(make_store(rollouts(8)))
    with pytest.raises(Busy, match="the store"), job.lock():
        raise Busy("the store is written by another process")
    assert not job.is_locked
    with job.lock():
        assert job.is_locked


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from test_jobs import COLUMNS, work
from echolab import jobs
from echolab.jobs import Job
from echolab.store import Store
jobs.COMMIT_ITEMS = 2
job = Job.open(Store.open({store!r}), "score-words")
def slow(rows):
    time.sleep(0.03)
    return work(rows)
print("go", flush=True)
with job.lock():
    jobs.run(job, jobs.serial(slow), COLUMNS)
"""


def stop(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("seed", range(3))
def test_a_job_that_is_killed_again_and_again_stores_what_an_undisturbed_one_does(make_store, expected, seed):
    store, rng = make_store(rollouts()), random.Random(seed)
    job = planned(store)
    code = CHILD.format(tests=str(Path(__file__).parent), store=str(store.root))
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout and child.stdout.readline() == "go\n"
        time.sleep(rng.uniform(0.0, 0.5))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    run(job)
    assert contents(store) == expected
