"""`echolab curate`: from one clip set the next, by rules. The set is read twice, in pieces: once to decide, once to write what
stays. What the rules ask of rollouts is read from the versions of the tables that the clips were mined from, or as they are
now where these have been released."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from echolab.clips.benchmarks import Benchmark, load
from echolab.clips.decontaminate import LONG_NGRAM, NGRAM, Contamination
from echolab.clips.facts import Facts, Progress, batches, from_rollouts, read
from echolab.clips.rules import VERSION, Dropped, Rules, apply, hits_of, validation, weights
from echolab.errors import EcholabError, WrongUsage
from echolab.named import Draft, Named, draft, find, unchanged
from echolab.schema import CLIPS
from echolab.store import Snapshot, Staged, Store

DERIVED = ("clips", "clipsets", "cohorts", "exports")  # tables that no rule looks at
STAGED_BYTES = 64 << 20  # of clips, then they are written
HITS_KEPT = 200  # of each benchmark, in the registry; all are in the listing


@dataclass(frozen=True)
class CurateReport:
    """`facts`, which the registry keeps: `counts` of each rule in order, `decontamination` with hits, `splits`, `notes`."""

    clipset: str
    parent: str
    made: bool  # False: it was there, made by the same rules
    facts: dict[str, Any]

    @property
    def n_in(self) -> int:
        return self.facts["counts"][0]["in"]

    @property
    def n_out(self) -> int:
        return self.facts["counts"][-1]["out"]


def curate(
    store: Store, clipset: str, name: str, rules: Rules, *, listing: str | Path | None = None, progress: Progress | None = None
) -> CurateReport:
    """The next version of clip set `name`, from `clipset`. `listing` gets a line of JSON for each clip that was dropped: its
    rule, the reason, and the hits or the clip that stays in its place."""
    snapshot = store.snapshot()
    parent = find(snapshot, "clipset", clipset)
    if name == parent.name:
        raise WrongUsage(f"{name} is the clip set that is curated: give the new one a name of its own")
    listed = None if listing is None else Path(listing).expanduser().absolute()
    if listed and not listed.parent.is_dir():
        raise EcholabError(f"{listed.parent}: no such folder")
    benchmarks = [load(word) for word in dict.fromkeys(rules.against)]
    config = _resolved(parent, rules, benchmarks)
    held = {} if parent.parents.get("unpinned") else parent.parents.get("versions", {})
    versions = held or {t: v for t, v in snapshot.versions.items() if t not in DERIVED}
    same = unchanged(snapshot, "clipset", name, config, versions)
    if same and not listed:
        return CurateReport(same.label, parent.label, False, same.parents["facts"])
    with draft(store, "clipset", name) as made:
        contamination = Contamination(benchmarks, rules.ngram or NGRAM) if benchmarks else None
        near = made.folder if rules.near_dedup is not None else None
        facts = read(snapshot, parent.label, contamination, near, rules.max_repetition is not None, progress)
        _ask_rollouts(facts, snapshot, parent, versions, rules)
        dropped = list(apply(rules, facts, benchmarks))
        keep = np.ones(len(facts), bool)
        for d in dropped:
            keep[d.clips] = False
        if listed:
            _list(listed, facts, dropped, benchmarks)
        if same:
            return CurateReport(same.label, parent.label, False, same.parents["facts"])
        split = validation(facts, rules.validation) if rules.validation is not None else None
        weight = _weights(rules, facts, keep, split)
        found = {
            "counts": _counts(len(facts), dropped),
            "decontamination": _hits(rules, facts, dropped, benchmarks, contamination.left_out if contamination else []),
            "splits": {} if split is None else _splits(keep, split),
            "notes": list(_notes(rules, facts, keep)),
        }
        staged = list(_written(snapshot, parent.label, made, keep, split, weight))
        parents = {"versions": dict(versions), "clipsets": [parent.label], "facts": found}
        return CurateReport(made.publish({"clips": staged}, config, parents).label, parent.label, True, found)


def _resolved(parent: Named, rules: Rules, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """What the registry keeps: enough to tell whether the same was done before."""
    asked = rules.model_dump(exclude_defaults=True, exclude={"against"})
    if rules.against:
        asked["ngram"] = rules.ngram or NGRAM
    if rules.difficulty_temperature is not None:
        asked["seed"] = rules.seed or 0
    files = [{"file": b.file, "column": b.column, "sha256": b.sha256} for b in benchmarks]
    verifier = parent.config.get("verifier")
    return {"clipset": parent.label, "verifier": verifier, "rules": asked, "against": files, "version": VERSION}


def _ask_rollouts(facts: Facts, snapshot: Snapshot, parent: Named, versions: Mapping[str, int], rules: Rules) -> None:
    now = {t: v for t, v in snapshot.versions.items() if t in DERIVED or t not in versions}
    from_rollouts(
        facts, Snapshot(snapshot.store, {**versions, **now}), parent.label, parent.config.get("verifier"),
        source="source" in rules.cap, cut_off=rules.drop_cut_off, success_rate=rules.difficulty_temperature is not None,
    )  # fmt: skip


def _weights(rules: Rules, facts: Facts, keep: np.ndarray, split: np.ndarray | None) -> np.ndarray | None:
    if rules.weights is None:
        return None
    found = np.ones(len(facts))
    for members in (keep,) if split is None else (keep & split, keep & ~split):
        clips = np.flatnonzero(members)
        found[clips] = weights(rules, facts, clips)
    return found


def _counts(n: int, dropped: Sequence[Dropped]) -> list[dict[str, Any]]:
    """Of each rule what came in, what it dropped, and what it left."""
    counts = []
    for d in dropped:
        counts.append({"stage": d.rule, "in": n, "dropped": {d.rule: len(d.clips)}, "out": n - len(d.clips)})
        n -= len(d.clips)
    return counts or [{"stage": "curate", "in": n, "dropped": {}, "out": n}]


def _splits(keep: np.ndarray, split: np.ndarray) -> dict[str, int]:
    chosen = int(np.count_nonzero(keep & split))
    return {"train": int(np.count_nonzero(keep)) - chosen, "validation": chosen}


def _hits(
    rules: Rules, facts: Facts, dropped: Sequence[Dropped], benchmarks: Sequence[Benchmark], left_out: Sequence[int]
) -> list[dict[str, Any]]:
    """For each benchmark what was compared, and what was found in how many clips."""
    found: list[Counter[tuple[Any, ...]]] = [Counter() for _ in benchmarks]
    clips = [0] * len(benchmarks)
    for clip in (c for d in dropped if d.rule == "contaminated" for c in d.clips.tolist()):
        hits = list(hits_of(facts, clip))
        for b in {hit.benchmark for _, hit in hits}:
            clips[b] += 1
        for where, hit in hits:
            found[hit.benchmark][hit.text.row, hit.text.column, where, hit.kind, hit.shared] += 1
    n = rules.ngram or NGRAM
    return [
        {
            "file": b.file, "column": b.column, "sha256": b.sha256, "texts": len(b.texts),
            "ngram": n, "long_ngram": max(n, LONG_NGRAM), "left_out": left, "clips": clips[i],
            "rows": len({row for row, *_ in found[i]}), "n_hits": len(found[i]),
            "hits": [
                {"row": row, "column": column, "in": where, "kind": kind, "shared": shared, "clips": count}
                for (row, column, where, kind, shared), count in sorted(found[i].items())[:HITS_KEPT]
            ],
        }
        for i, (b, left) in enumerate(zip(benchmarks, left_out, strict=True))
    ]  # fmt: skip


def _notes(rules: Rules, facts: Facts, keep: np.ndarray) -> Iterator[str]:
    """What rules could not see."""
    unseen = [
        (bool(rules.against) or rules.near_dedup is not None, ~facts.has_text, "have no text: it was compared with nothing"),
        (rules.max_repetition is not None, np.isnan(facts.repetition), "have no token ids: their repetition is unknown"),
        (rules.difficulty_temperature is not None, np.isnan(facts.success_rate), "stay: their problems have no success rate"),
        ("source" in rules.cap, facts.source < 0, "are not capped: their source is unknown"),
        ("step" in rules.cap, np.isnan(facts.step), "are not capped: their step is unknown"),
        (rules.weights == "entropy", keep & ~np.isfinite(facts.peak_entropy), "weigh 1: their peak entropy is unknown"),
        (rules.weights == "staleness", keep & np.isnan(facts.step), "weigh 1: their step is unknown"),
    ]
    for asked, which, said in unseen:
        if asked and (n := int(np.count_nonzero(which))):
            yield f"{n:,} clips {said}"
    if not keep.any():
        yield "no clip is left: there is nothing to export"


def _written(
    snapshot: Snapshot, parent: str, made: Draft, keep: np.ndarray, split: np.ndarray | None, weight: np.ndarray | None
) -> Iterator[Staged]:
    held: list[pa.Table] = []
    start = 0
    for rows in batches(snapshot, parent):
        mine = slice(start, start + rows.num_rows)
        start = mine.stop
        new = {"clipset": pa.array([made.label] * rows.num_rows)}
        if weight is not None:
            new["weight"] = pa.array(weight[mine])
        if split is not None:
            new["split"] = pa.array(np.where(split[mine], "validation", "train").tolist())
        for name, values in new.items():
            rows = rows.set_column(rows.column_names.index(name), CLIPS.arrow.field(name), values)
        held.append(rows.filter(pa.array(keep[mine])))
        if sum(t.nbytes for t in held) > STAGED_BYTES:
            yield from made.store.stage("clips", pa.concat_tables(held), made.folder)
            held = []
    if any(t.num_rows for t in held):
        yield from made.store.stage("clips", pa.concat_tables(held), made.folder)


def _list(path: Path, facts: Facts, dropped: Sequence[Dropped], benchmarks: Sequence[Benchmark]) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8", errors="backslashreplace") as f:
        for d in dropped:
            for clip in d.clips.tolist():
                line: dict[str, Any] = {"clip_id": facts.id_of(clip), "rule": d.rule, "reason": d.why(clip)}
                if clip in d.stays:
                    line["stays"] = facts.id_of(d.stays[clip])
                if d.rule == "contaminated":
                    line["hits"] = [
                        {"benchmark": benchmarks[hit.benchmark].file, "row": hit.text.row, "column": hit.text.column,
                         "in": where, "kind": hit.kind, "shared": hit.shared}
                        for where, hit in hits_of(facts, clip)
                    ]  # fmt: skip
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished.replace(path)
