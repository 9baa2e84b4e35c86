"""The ledger's rules as pure functions over rows of `ingests`: which readings are live, which rows of them show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Reading:
    """One row of `ingests`."""

    ingest_id: str
    run: str
    source_path: str
    attempt: int
    start_step: int | None
    bytes_read: int
    sha256: str
    format: str
    reader_version: int
    options: dict[str, Any]
    n_rows: int
    n_shared: int
    n_quarantined: int
    group_source: str | None
    completeness: str
    supersedes: tuple[str, ...] = ()
    created_at: datetime | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Reading:
        return cls(**{**row, "options": json.loads(row["options"]), "supersedes": tuple(row["supersedes"] or ())})

    def row(self) -> dict[str, Any]:
        return {**self.__dict__, "options": json.dumps(self.options, sort_keys=True), "supersedes": list(self.supersedes)}


@dataclass(frozen=True)
class Ledger:
    """All readings in the order of their commits, and what follows from them."""

    readings: tuple[Reading, ...] = ()
    live: tuple[Reading, ...] = field(init=False)

    def __post_init__(self) -> None:
        dead = {i for r in self.readings for i in r.supersedes}
        object.__setattr__(self, "live", tuple(r for r in self.readings if r.ingest_id not in dead))

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> Ledger:
        return cls(tuple(Reading.of(row) for row in sorted(rows, key=lambda r: (r["created_at"], r["ingest_id"]))))

    def chain(self, run: str, source_path: str) -> tuple[Reading, ...]:
        """The live readings of one source, oldest first."""
        return tuple(r for r in self.live if r.run == run and r.source_path == source_path)

    @cached_property
    def _first_steps(self) -> dict[str, dict[int, int]]:
        """The lowest step of each attempt of each run."""
        first: dict[str, dict[int, int]] = {}
        for r in self.live:
            if r.start_step is not None:
                attempts = first.setdefault(r.run, {})
                attempts[r.attempt] = min(attempts.get(r.attempt, r.start_step), r.start_step)
        return first

    def attempt_at(self, run: str, step: int | None) -> int:
        """The attempt that a file belongs to which does not say: the newest that had begun at its first step."""
        attempts = [r.attempt for r in self.live if r.run == run] or [1]
        if step is None:
            return max(attempts)
        begun = [attempt for attempt, first in self._first_steps.get(run, {}).items() if first <= step]
        return max(begun, default=min(attempts))

    def first_step(self, run: str, attempt: int) -> int | None:
        return self._first_steps.get(run, {}).get(attempt)

    def cutoff(self, reading: Reading) -> int | None:
        """Rows of this reading from this step on are hidden, because a later attempt sampled them again."""
        attempts = self._first_steps.get(reading.run, {})
        return min((step for attempt, step in attempts.items() if attempt > reading.attempt), default=None)

    def options_of_run(self, run: str, format: str) -> dict[str, Any]:
        """What the first reading of this format found for the run (the group size, say)."""
        return next((r.options.get("found", {}) for r in self.readings if r.run == run and r.format == format), {})

    def tails(self) -> frozenset[str]:
        """Readings whose unfinished last line was quarantined and has been read since."""
        read_on = {r.options.get("continues") for r in self.live}
        return frozenset(r.ingest_id for r in self.live if r.options.get("tail") and r.ingest_id in read_on)

    def n_quarantined(self, readings: Sequence[Reading] | None = None) -> int:
        """Rows in quarantine now: an unfinished line that a later reading completed no longer counts."""
        done = self.tails()
        return sum(r.n_quarantined - (r.ingest_id in done) for r in (self.live if readings is None else readings))
