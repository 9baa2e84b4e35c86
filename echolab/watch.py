"""A live run's dumps, followed: what is new or longer is read, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from echolab.ingest import Progress, ingest
from echolab.plan import IngestConfig, IngestReport, find_files
from echolab.readers import COMPANIONS, ONLY_SCORES
from echolab.store import Store

SETTLED = 1.0  # seconds that a file must stay as it is before it is read, where it cannot be read by lines
BY_LINES = (".jsonl", ".ndjson")  # what is unfinished at their end waits for the next look

Stamp = tuple[tuple[int, int, int], ...]


def watch(
    store: Store,
    paths: Sequence[str | Path],
    config: IngestConfig,
    every: float = 10.0,
    wait: Callable[[float], object] = time.sleep,
    progress: Progress | None = None,
) -> Iterator[IngestReport]:
    """Look at the paths every so many seconds, for as long as the caller goes on; a report each time that something was
    read or newly failed. What cannot be read, or is not there yet, is no end: it is tried again as soon as it changes."""
    look = _Look()
    while True:
        there = [p for p in paths if Path(p).expanduser().exists()]
        found = look.at(there, config)
        if found:
            report = ingest(store, there, config, progress, only=found.__contains__)
            look.done(found, report)
            report.files = [f for f in report.files if f.status != "unchanged"]
            if report.files:
                yield report
        wait(min(every, SETTLED) if look.unsettled else every)


@dataclass
class _Look:
    """What was seen of each file, and what was read of it."""

    seen: dict[Path, tuple[Stamp, float]] = field(default_factory=dict)  # and since when
    read: dict[Path, Stamp] = field(default_factory=dict)
    waiting: set[Path] = field(default_factory=set)  # token numbers whose rollouts were not there yet
    unsettled: bool = False

    def at(self, paths: Sequence[str | Path], config: IngestConfig) -> dict[Path, tuple[str, Stamp]]:
        """The files that are to be read now, with their names in the store."""
        now: dict[Path, tuple[Stamp, float]] = {}
        found: dict[Path, tuple[str, Stamp]] = {}
        self.unsettled = False
        for path, rel, _ in find_files(paths, config.rename, IngestReport(config.run)):
            try:
                stamp = _stamp(path)
            except OSError:  # gone meanwhile
                continue
            before, since = self.seen.get(path, (None, 0.0))
            now[path] = stamp, since if stamp == before else time.monotonic()
            if self.read.get(path) == stamp:
                continue
            if path.suffix in BY_LINES or time.monotonic() - now[path][1] >= SETTLED:
                found[path] = (rel, stamp)
            else:
                self.unsettled = True
        self.seen = now
        return found

    def done(self, found: dict[Path, tuple[str, Stamp]], report: IngestReport) -> None:
        self.read |= {path: stamp for path, (_, stamp) in found.items()}
        if report.rows:  # of these rollouts there may be numbers already
            for path in self.waiting:
                self.read.pop(path, None)
            self.waiting.clear()
        unmatched = {f.file for f in report.files if f.format in ONLY_SCORES and f.quarantined}
        self.waiting |= {path for path, (rel, _) in found.items() if rel in unmatched}


def _stamp(path: Path) -> Stamp:
    """Size, time and identity of a file and of those that are read along with it."""
    files = [path, *(f for beside in COMPANIONS.values() for f in beside(path))]
    stats = [f.stat() for f in files]
    return tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats)
