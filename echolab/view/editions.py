"""One version of a store made ready for browsing, and who follows a store that is written meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np

from echolab.chartdata import Answers
from echolab.errors import EcholabError
from echolab.report.build import Overview, clips, colours
from echolab.report.choice import Choice, choose
from echolab.report.html import words
from echolab.report.rollouts import CUTS, around, experts, spelling
from echolab.report.sample import KINDS, Sample, as_json
from echolab.schema import TABLES
from echolab.sql import Session
from echolab.store import Snapshot, Store
from echolab.words import count

log = logging.getLogger("echolab")
MEMORY = "2GB"  # of one edition at most; what needs more goes to disk
AT_ONCE = 4  # requests
REST = 0.5  # seconds between two looks at a store that changes, at least
STEPS, OF_A_STEP, TOKENS = 16, 16, 2000  # of how many rollouts of how many steps tokens say where colours end
# What is asked again and again is held in memory: some 300 bytes a group, 100 a rollout and 8 a segment.
KEEP = {
    "groups": "SELECT * FROM groups ORDER BY step DESC NULLS LAST, group_id",
    "asked": "SELECT prompt_id, excerpt(any_value(coalesce(prompt, messages)), 160) AS asked FROM rollouts"
    " WHERE prompt_id IS NOT NULL GROUP BY prompt_id",
    "cuts": CUTS,  # nothing sorts their files as rollouts are sorted: some of them are all over
}


@dataclass(frozen=True)
class Wanted:
    """What the command was told to show."""

    runs: tuple[str, ...] | None = None
    clipset: str | None = None
    verifier: str | None = None
    scorer: str | None = None
    segmenter: str | None = None


@dataclass
class Edition:
    """One version of the store. `index` is what the page has to know of it; `searches` what the last ones have found."""

    number: int
    session: Session
    choice: Choice
    answers: Answers
    index: dict[str, Any]
    experts: dict[str, dict[str, Any]]
    pieces: dict[int, bytes]
    free: SimpleQueue[Session] = field(default_factory=SimpleQueue)
    searches: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    users: int = 0

    @classmethod
    def of(cls, snapshot: Snapshot, wanted: Wanted, number: int = 1) -> Edition:
        choice = choose(snapshot, wanted.clipset, wanted.verifier, wanted.scorer, wanted.segmenter)
        session = Session(snapshot, choice.options, memory_limit=MEMORY, keep=KEEP, beside=AT_ONCE)
        try:
            answers = Answers.of(session, wanted.runs)
            index = {"edition": number, **_index(session, wanted.runs, choice)}
            made = cls(number, session, choice, answers, index, experts(session), spelling(session))
        except BaseException:
            session.close()
            raise
        for other in session.beside:
            made.free.put(other)
        return made

    @contextmanager
    def asking(self, give_up: Callable[[], str | None]) -> Iterator[Session]:
        """A session for one request, which ends when `give_up` says why."""
        session = self.free.get()
        session.give_up = give_up
        try:
            yield session
        finally:
            session.give_up = None
            self.free.put(session)

    def draw(self) -> str:
        """The overview, its findings and charts, as JSON. It takes seconds where a store is large."""
        made = Overview(self.answers, self.choice)
        counted = f"{count(self.index['rollouts'], 'rollout')} in {count(self.index['groups'], 'group')}"
        parts = {"top": made.top(f"echolab view · {counted}"), "rest": made.before() + made.after(), "foot": made.foot()}
        return f'{{"edition":{self.number},"parts":{as_json(parts)},"charts":{made.charts()}}}'


def _index(session: Session, runs: tuple[str, ...] | None, choice: Choice) -> dict[str, Any]:
    counts = session.sql(
        "SELECT run, kind, count(*) AS n, sum(n)::BIGINT AS rollouts FROM groups GROUP BY run, kind"
    ).to_dicts()
    counts = [row for row in counts if runs is None or row["run"] in runs]
    sizes: dict[str, int] = {}
    for row in counts:
        sizes[row["run"]] = sizes.get(row["run"], 0) + row["n"]
    found, scale, n = {row["kind"] for row in counts}, _scale(session), sum(sizes.values())
    about = f"All {count(n, 'group')} can be read here. `?` lists the keys, and the address leads back to what is open."
    return {
        "groups": n,
        "rollouts": sum(row["rollouts"] for row in counts),
        "runs": sorted(sizes, key=lambda run: (-sizes[run], run)),
        "kinds": [[kind, word] for kind, word in KINDS.items() if kind in found],
        "columns": session.sql("SELECT * FROM groups LIMIT 0").columns,
        "scale": scale,
        "about": words(f"{about} {colours(session, scale)} {clips(choice.clipset)}"),
    }


def _scale(session: Session) -> dict[str, float]:
    """As in a report, from rollouts of some steps, evenly chosen."""
    steps = session.sql("SELECT DISTINCT run, step FROM scores WHERE scorer = chosen_scorer() ORDER BY run, step").to_dicts()
    chosen = [steps[i * len(steps) // STEPS] for i in range(STEPS)] if len(steps) > STEPS else steps
    some = " UNION ALL ".join(
        f"""(SELECT rollout_id, entropies, logprobs, loss_mask FROM scores
            WHERE scorer = chosen_scorer() AND {around([step])} ORDER BY rollout_id LIMIT {OF_A_STEP})"""
        for step in chosen
    )
    drawn = Sample()
    if not some:
        return drawn.scale()
    found = session.sql(
        f"SELECT entropies, logprobs, loss_mask, segment_entropies FROM ({some}) LEFT JOIN cuts USING (rollout_id)"
    )
    for entropies, logprobs, mask, segments in found.iter_rows():
        counted = np.array([m is not False for m in mask or [True] * len(entropies)], bool)
        every = slice(None, None, 1 + len(entropies) // TOKENS)
        drawn.entropies.append(np.array(entropies, float)[counted][every])
        if logprobs:
            drawn.surprises.append(-np.array(logprobs, float)[counted][every])
        drawn.segments += [e for e in segments or () if e is not None]
    return drawn.scale()


class Editions:
    """The newest edition of a store, renewed in the background when there is a newer version. Who reads an edition keeps it;
    requests never wait for one that is being made."""

    def __init__(self, store: Store, wanted: Wanted):
        self.store, self.wanted = store, wanted
        self.trouble: str | None = None  # why the store can no longer be followed
        self.undrawn: str | None = None  # why there are no charts
        self._lock = threading.Lock()
        self._renewing = self._closing = False
        self._drawing: threading.Thread | None = None
        self._rest_until = 0.0
        self._marks = _marks(store)
        self.newest = Edition.of(store.snapshot(), wanted)
        self.drawn: str | None = None  # the newest overview there is, and whose it is
        self.drawn_number: int | None = None
        self.draw()

    @contextmanager
    def use(self) -> Iterator[Edition]:
        """The newest edition, which stays open meanwhile."""
        with self._lock:
            edition = self.newest
            edition.users += 1
        try:
            yield edition
        finally:
            with self._lock:
                edition.users -= 1
                left = not edition.users and edition is not self.newest
            if left:
                edition.session.close()

    def look(self) -> None:
        """Has the store changed? Then make the next edition, at most half of the time."""
        with self._lock:
            if self._renewing or time.monotonic() < self._rest_until:
                return
            marks = _marks(self.store)
            if marks == self._marks and self.trouble is None:
                return
            self._renewing = True
        threading.Thread(target=self._renew, args=(marks,), daemon=True).start()

    def _renew(self, marks: dict[str, int]) -> None:
        started = time.monotonic()
        try:
            snapshot = Store.open(self.store.root).snapshot()
            old = self.newest
            if gone := sorted(old.session.snapshot.versions.keys() - snapshot.versions.keys()):
                raise EcholabError(f"{self.store.root}: the table {gone[0]} is gone")
            if snapshot.versions != old.session.snapshot.versions:
                self._take(Edition.of(snapshot, self.wanted, old.number + 1))
            self._marks, self.trouble = marks, None
        except Exception as e:  # whatever it is, the last edition goes on being shown
            self.trouble = f"the store can no longer be read: {_said(e)}"
        finally:
            self._rest_until = time.monotonic() + max(REST, time.monotonic() - started)
            self._renewing = False

    def _take(self, edition: Edition) -> None:
        with self._lock:
            old, self.newest = self.newest, edition
            left = not old.users
        if left:
            old.session.close()
        self.draw()

    def draw(self) -> None:
        """The overview of the newest edition, in the background; one at a time."""
        with self._lock:
            if self._drawing is None and not self._closing:
                self._drawing = threading.Thread(target=self._draw, daemon=True)
                self._drawing.start()

    def _draw(self) -> None:
        while True:
            with self.use() as edition:
                try:
                    self.drawn, self.drawn_number, self.undrawn = edition.draw(), edition.number, None
                except Exception as e:
                    self.undrawn = None if self._closing else f"the charts cannot be drawn: {_said(e)}"
            with self._lock:
                if self.newest is edition or self._closing:
                    self._drawing = None
                    return

    def close(self) -> None:
        with self._lock:
            self._closing, drawing = True, self._drawing
        if drawing is not None:
            self.newest.session.give_up = lambda: "the server ends"
            drawing.join()
        self.newest.session.close()


def _said(error: Exception) -> str:
    if not isinstance(error, EcholabError | OSError):
        log.exception("unexpected")
    return " ".join(str(error).split()) or type(error).__name__


def _marks(store: Store) -> dict[str, int]:
    """What changes with every commit: when the folder of each table's log was written."""
    found = {}
    for table in TABLES:
        try:
            found[table] = (store.folder(table) / "_delta_log").stat().st_mtime_ns
        except OSError:
            continue
    return found
