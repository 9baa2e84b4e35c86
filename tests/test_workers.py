"""Worker processes: whatever one item does, it costs that item only, and nobody stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import psutil
import pytest

from echolab import EcholabError, workers
from echolab.workers import Outcome, Pool, Task, run

DOUBLING = Task("worker_functions:doubling")


def outcomes(items, **limits) -> list[tuple]:
    return list(run(DOUBLING, items, **limits))


def family() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def nobody_stays_behind():
    before = family()
    yield
    assert family() == before


def test_every_item_comes_back_once_with_its_value():
    found = outcomes(range(20_000), workers=2)
    assert sorted(i for i, _ in found) == list(range(20_000))
    assert all(o == Outcome("ok", i * 2) for i, o in found)


def test_nothing_starts_for_nothing():
    started = time.monotonic()
    assert outcomes([]) == [] and time.monotonic() - started < 0.02


@pytest.mark.parametrize(
    ("what", "status", "reason"),
    [
        ("sleep", "timeout", "no result after 1 s"),
        ("loop", "timeout", "no result after 1 s"),
        ("power", "timeout", "no result after 1 s"),
        ("child", "timeout", "no result after 1 s"),
        ("memory", "error", "out of memory"),
        ("kill", "error", "its worker was killed by SIGKILL (out of memory?)"),
        ("crash", "error", "its worker was killed by SIGSEGV"),
        ("leave", "error", "its worker ended with exit code 3"),
        ("exit", "error", "SystemExit: enough"),
        ("raise", "error", "ValueError: bad thing"),
        ("lambda", "error", None),
        ("print", "ok", ""),
    ],
)
def test_harm_costs_its_own_item_and_no_other(what, status, reason, capfd):
    items = [*range(300), what, *range(300, 600)]
    found = dict(run(DOUBLING, items, workers=2, timeout=1, memory_gb=2))
    harmed = found.pop(what)
    assert harmed.status == status and reason in (None, harmed.reason)
    assert found == {i: Outcome("ok", i * 2) for i in range(600)}
    assert "noise" not in capfd.readouterr().out


def test_hangs_run_beside_the_normal_work():
    """One after the other the sleeps would take 20 s."""
    started = time.monotonic()
    found = outcomes([*["sleep"] * 10, *range(2_000)], workers=2, timeout=2)
    assert [o.status for i, o in found if i == "sleep"] == ["timeout"] * 10
    assert found[0][0] != "sleep" and sum(o.status == "ok" for _, o in found) == 2_000
    assert time.monotonic() - started < 12


def test_more_hangs_than_places_for_them_end_all_the_same(monkeypatch):
    monkeypatch.setattr("echolab.workers.LATE", 1)
    found = outcomes([*["sleep"] * 6, *range(50)], workers=2, timeout=0.6)
    assert sorted(o.status for _, o in found) == ["ok"] * 50 + ["timeout"] * 6


def test_a_late_item_that_ends_in_time_is_no_timeout():
    found = dict(outcomes(["late", *range(100)], workers=1, timeout=30))
    assert found.pop("late") == Outcome("ok", "late") and len(found) == 100


def test_an_item_that_a_busy_machine_gives_no_processor_has_more_time_but_not_for_ever(monkeypatch):
    monkeypatch.setattr("echolab.workers._processor", lambda pid: ("R", 0.0))
    found = dict(outcomes(["late", "sleep"], workers=2, timeout=0.3))
    assert found["late"] == Outcome("ok", "late") and found["sleep"].status == "timeout"


def test_an_item_that_kills_is_not_tried_again_and_workers_are_replaced_for_as_long_as_it_takes():
    found = outcomes(["kill"] * 30 + [1], workers=2)
    assert sorted(o.status for _, o in found) == ["error"] * 30 + ["ok"]


def test_items_are_read_only_as_far_as_workers_have_room():
    read = count()
    results = run(DOUBLING, (next(read) for _ in range(10**9)), workers=2)
    assert len(list(islice(results, 1_000))) == 1_000
    results.close()
    assert next(read) < 1_000 + 4 * 256


def test_items_that_raise_end_the_run():
    def items():
        yield 1
        raise KeyError("broken source")

    with pytest.raises(KeyError):
        outcomes(items())


def test_a_function_that_cannot_be_loaded_is_one_clear_error():
    for factory in ("worker_functions:nothing_to_run", "worker_functions:absent", "no_such_module:f"):
        with pytest.raises(EcholabError) as e:
            list(run(Task(factory), [1]))
        assert "\n" not in str(e.value)


def test_several_workers_work_at_once():
    found = list(run(Task("worker_functions:process_id"), [0.2] * 8, workers=4))
    assert len({o.value for _, o in found}) > 1 and os.getpid() not in {o.value for _, o in found}


ENDLESS = """
import sys
from echolab.workers import Task, run
sys.path.append(sys.argv[1])
print("started", flush=True)
for item, outcome in run(Task("worker_functions:doubling"), [*range(100), "loop", "child", "sleep", "power"], timeout=1000):
    print(item, flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_however_the_program_ends_its_workers_end_with_it(how):
    """A plain script, which needs no main guard. Ctrl-C is sent to the whole group, as a terminal does."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    try:
        for _ in range(101):
            assert process.stdout.readline()
        parent, until = psutil.Process(process.pid), time.monotonic() + 60
        while len(workers := parent.children(recursive=True)) < 5 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(workers) >= 5, "a server, workers, and what a worker started"
        os.killpg(process.pid, how)
        process.wait(timeout=20)
        gone, alive = psutil.wait_procs(workers, timeout=20)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], alive
    finally:
        process.kill()  # should the test have failed: what hangs would go on
        process.wait()


def test_a_module_that_hangs_as_it_is_imported_is_an_error_in_one_line(monkeypatch):
    monkeypatch.setattr(workers, "LOAD_SECONDS", 1.0)
    with pytest.raises(EcholabError, match="no worker is ready after 1 s"):
        list(run(Task("worker_functions:slow_to_load"), range(3)))


def test_a_pool_stays_for_several_calls_and_replaces_who_died_in_one():
    pool = Pool(DOUBLING, 2)
    try:
        assert dict(pool.results(iter([1, 2]))) == {1: Outcome("ok", 2), 2: Outcome("ok", 4)}
        before = {w.pid for w in pool.workers.values()}
        second = dict(pool.results(iter([3, "kill", 4])))
        assert (second[3], second[4], second["kill"].status) == (Outcome("ok", 6), Outcome("ok", 8), "error")
        assert dict(pool.results(iter([]))) == {}
        assert dict(pool.results(iter(range(100)))) == {i: Outcome("ok", 2 * i) for i in range(100)}
        assert before & {w.pid for w in pool.workers.values()}
    finally:
        pool.close()
