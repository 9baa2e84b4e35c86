"""Where an export comes from: store versions, SQL, configuration, counts, files. `created` is its only time stamp."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import echolab
from echolab.export.base import Shape
from echolab.export.select import Selection
from echolab.named import Named, find
from echolab.store import Snapshot

NAME = "provenance.json"
DERIVED = ("clips", "clipsets", "cohorts", "exports")  # tables of named results
FORMAT = 1


def provenance(
    snapshot: Snapshot,
    settings: Mapping[str, Any],
    chosen: Selection,
    shape: Shape,
    clipsets: Sequence[Named],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """All but the files and `created`. The same input gives the same document."""
    scorers = snapshot.registry("scorers")
    return {
        "format": FORMAT,
        "echolab": code(),
        "store": {"uri": str(snapshot.store.root), "versions": versions(snapshot)},
        "config": dict(settings),
        "query": chosen.query(shape),
        "clipsets": [{"name": c.label, "config": c.config, "facts": c.parents.get("facts", {})} for c in clipsets],
        "selector": next((s for c in clipsets if (s := c.config.get("selector"))), None),
        "scorer": [{"id": id, "name": _label(e), **e["config"]} for id in facts["scorers"] if (e := scorers.get(id))],
        "seeds": sorted(set(_seeds([c.config for c in clipsets]))),
        "counts": [*(n for c in clipsets for n in _counts(c)), chosen.counts],
        "decontamination": [d for c in clipsets for d in c.parents.get("facts", {}).get("decontamination", [])],
        "parents": [
            *({"clipset": c.label, "sha256": _hash(c)} for c in clipsets),
            *({"profile": profile} for c in clipsets if (profile := c.parents.get("profile"))),
        ],
    }


def pinned(snapshot: Snapshot, clipset: Named) -> Snapshot:
    """The table versions that a clip set was mined from: what its rollouts said then. Now, where they are not kept."""
    versions = clipset.parents.get("versions")
    if not versions or clipset.parents.get("unpinned"):
        return snapshot
    others = {table: v for table, v in snapshot.versions.items() if table not in versions}
    return Snapshot(snapshot.store, {**versions, **others})


def versions(snapshot: Snapshot) -> dict[str, int]:
    """Of the tables that rows come from. Named results have versions of their own."""
    return {table: v for table, v in snapshot.versions.items() if table not in DERIVED}


def lineage(snapshot: Snapshot, clipset: Named | None) -> list[Named]:
    """A clip set after all those that it was made from."""
    if clipset is None:
        return []
    before = [n for label in clipset.parents.get("clipsets", ()) for n in lineage(snapshot, find(snapshot, "clipset", label))]
    return [*before, clipset]


def _label(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']}@{entry['version']}"


def _counts(clipset: Named) -> list[dict[str, Any]]:
    """In, left out by rule, and out: of mining in groups, of curation in clips."""
    facts = clipset.parents.get("facts", {})
    if outcomes := facts.get("outcomes"):
        dropped = {why: n for why, n in outcomes.items() if why != "clip"}
        return [{"stage": "mine, groups", "in": sum(outcomes.values()), "dropped": dropped, "out": outcomes.get("clip", 0)}]
    return facts.get("counts", [])


def code() -> dict[str, Any]:
    """The version of echolab; in a checkout also its commit, and whether files differ from it."""
    root = Path(echolab.__file__).resolve().parents[1]
    known = {"version": echolab.__version__, "commit": None, "dirty": None}
    if not (root / ".git").exists():
        return known
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=60
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return known
    return known | {"commit": commit, "dirty": bool(status)}


def _seeds(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "seed" and isinstance(item, int):
                yield item
            else:
                yield from _seeds(item)
    elif isinstance(value, list):
        for item in value:
            yield from _seeds(item)


def _hash(named: Named) -> str:
    text = json.dumps({"name": named.label, "config": named.config, "parents": named.parents}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
