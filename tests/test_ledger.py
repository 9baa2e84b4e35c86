"""The ledger's rules against brute force."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from echolab.ledger import Ledger, Reading

START = datetime(2026, 1, 1, tzinfo=UTC)


def reading(i: int, **fields) -> Reading:
    known = {
        "ingest_id": f"i{i}",
        "run": "r",
        "source_path": "f",
        "attempt": 1,
        "start_step": 0,
        "bytes_read": 10,
        "sha256": "",
        "format": "x",
        "reader_version": 1,
        "options": {},
        "n_rows": 1,
        "n_shared": 0,
        "n_quarantined": 0,
        "group_source": None,
        "completeness": "all",
        "supersedes": (),
        "created_at": START + timedelta(seconds=i),
    }
    return Reading(**{**known, **fields})


@st.composite
def ledgers(draw) -> list[Reading]:
    out: list[Reading] = []
    for i in range(draw(st.integers(0, 7))):
        tail = draw(st.booleans())
        options = {"tail": {"bytes": 3}} if tail else {}
        if out and draw(st.booleans()):
            options["continues"] = draw(st.sampled_from([r.ingest_id for r in out]))
        out.append(
            reading(
                i,
                run=draw(st.sampled_from("ab")),
                source_path=draw(st.sampled_from("xy")),
                attempt=draw(st.integers(1, 3)),
                start_step=draw(st.none() | st.integers(0, 5)),
                bytes_read=draw(st.integers(0, 4)),
                options=options,
                n_quarantined=draw(st.integers(int(tail), 3)),
                supersedes=tuple(draw(st.lists(st.sampled_from([r.ingest_id for r in out]), max_size=2))) if out else (),
            )
        )
    return out


@given(ledgers(), st.randoms())
def test_live_readings_cutoffs_and_quarantine_follow_from_the_rows_in_any_order(readings, random):
    rows = [r.row() for r in readings]
    random.shuffle(rows)
    ledger = Ledger.of(rows)
    assert list(ledger.readings) == readings
    live = [r for r in readings if not any(r.ingest_id in other.supersedes for other in readings)]
    assert list(ledger.live) == live
    quarantined = 0
    for r in live:
        later = [o.start_step for o in live if o.run == r.run and o.attempt > r.attempt and o.start_step is not None]
        assert ledger.cutoff(r) == (min(later) if later else None)
        completed = "tail" in r.options and any(o.options.get("continues") == r.ingest_id for o in live)
        quarantined += r.n_quarantined - completed
    assert ledger.n_quarantined() == quarantined
    for run in "ab":
        attempts = [r.attempt for r in live if r.run == run] or [1]
        assert ledger.attempt_at(run, None) == max(attempts)
        for step in range(-1, 12):
            begun = [r.attempt for r in live if r.run == run and r.start_step is not None and r.start_step <= step]
            assert ledger.attempt_at(run, step) == (max(begun) if begun else min(attempts))
        assert list(ledger.chain(run, "x")) == [r for r in live if (r.run, r.source_path) == (run, "x")]


def test_a_replaced_reading_stays_dead_when_its_successor_is_replaced_too():
    ledger = Ledger((reading(0), reading(1, supersedes=("i0",)), reading(2, supersedes=("i1",))))
    assert [r.ingest_id for r in ledger.live] == ["i2"]


def test_a_later_attempt_hides_from_its_lowest_step_on_whatever_it_hides_itself():
    ledger = Ledger(
        (
            reading(0),
            reading(1, attempt=3, start_step=7),
            reading(2, attempt=2, start_step=5),
            reading(3, attempt=3, start_step=9),
        )
    )
    assert [ledger.cutoff(r) for r in ledger.readings] == [5, None, 7, None]


def test_the_first_reading_of_a_format_says_what_the_run_has():
    ledger = Ledger((reading(0, options={"found": {"group_size": 8}}), reading(1, options={"found": {"group_size": 4}})))
    assert ledger.options_of_run("r", "x") == {"group_size": 8}
    assert ledger.options_of_run("r", "other") == {}
