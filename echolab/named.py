"""Named, immutable results of a store: clip sets, profiles, exports. `name@2` is one of them, a bare name the newest.

A draft is made under a lock of its name. Its rows are committed first and its registry entry last: without an entry there is
no result, and rows that a crash left behind are replaced by the next draft of that version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echolab.errors import Busy, EcholabError, WrongUsage
from echolab.schema import TABLES
from echolab.store import Snapshot, Staged, Store
from echolab.views import resolve

KINDS = {"clipset": "clip set", "cohort": "profile", "export": "export"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Named:
    """One result, as its registry has it."""

    name: str
    version: int
    config: dict[str, Any]
    parents: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


def find(snapshot: Snapshot, kind: str, word: str) -> Named:
    """The result that `name` or `name@version` means; an error that lists what there is."""
    try:
        entry = snapshot.registry(f"{kind}s")[resolve(snapshot, kind, word)]
    except EcholabError as e:
        raise EcholabError(str(e).replace(f"no {kind} ", f"no {KINDS[kind]} ", 1)) from None
    return Named(entry["name"], entry["version"], entry["config"], entry["parents"])


def unchanged(snapshot: Snapshot, kind: str, name: str, config: Mapping[str, Any], versions: Mapping[str, int]) -> Named | None:
    """The newest result of this name, if it was made by the same configuration from the same table versions."""
    newest = _newest(snapshot, kind, name)
    if newest is None or newest.config != json.loads(json.dumps(config)):
        return None
    return newest if newest.parents.get("versions") == dict(versions) else None


def _newest(snapshot: Snapshot, kind: str, name: str) -> Named | None:
    entries = [e for e in snapshot.registry(f"{kind}s").values() if e["name"] == name]
    if not entries:
        return None
    entry = max(entries, key=lambda e: e["version"])
    return Named(name, entry["version"], entry["config"], entry["parents"])


@dataclass(frozen=True)
class Draft:
    """The next version of a name, while it is made. Stage its rows with `store.stage(table, rows, draft.folder)`; their
    partition value is `draft.label`."""

    store: Store
    kind: str
    name: str
    version: int
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    def publish(self, staged: Mapping[str, Sequence[Staged]], config: Mapping[str, Any], parents: Mapping[str, Any]) -> Named:
        """Rows first, the entry last. `parents["versions"]` are the table versions that it was made from: vacuum keeps them."""
        with self.store.lock():
            snapshot = self.store.snapshot()
            for table, files in staged.items():
                partition = TABLES[table].partition
                left = [f for f in snapshot.files(table) if partition and f.partition[partition] == self.label]
                if files or left:
                    self.store.commit(table, files, replaces=left)
            self.store.register(f"{self.kind}s", self.label, self.name, config, parents, self.version)
        return find(self.store.snapshot(), self.kind, self.label)


@contextmanager
def draft(store: Store, kind: str, name: str) -> Iterator[Draft]:
    """`with draft(store, "clipset", "hard") as d:` ... `d.publish(...)`. Without `publish` nothing is left."""
    if not _NAME.fullmatch(name):
        raise WrongUsage(f"{name!r} is no name of a {KINDS[kind]}: use letters, digits, dots, dashes and underscores")
    with ExitStack() as held:
        try:
            held.enter_context(store.lock(0, f"{kind}-{name}"))
        except Busy:
            raise Busy(f"another process makes {KINDS[kind]} {name} at this moment") from None
        newest = _newest(store.snapshot(), kind, name)
        folder = held.enter_context(store.job(kind))
        yield Draft(store, kind, name, 1 + (newest.version if newest else 0), folder)
