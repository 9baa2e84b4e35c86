"""What the store knows already of the rollouts that a reading brings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from echolab.ledger import Reading
from echolab.plan import IngestConfig
from echolab.rows import Stored
from echolab.scan import parquet, scratch
from echolab.store import DataFile, Snapshot, Staged

if TYPE_CHECKING:
    from echolab.ingest import Open


def stored_before(snapshot: Snapshot, beginning: Sequence[Reading], config: IngestConfig, folder: Path) -> Stored:
    """What the file's beginning brought, so that counting of equal content and of group members goes on."""
    readings = [r.ingest_id for r in beginning]
    files = [f for f in snapshot.files("rollouts") if f.partition["run"] == config.run]
    if not files:
        return Stored()
    with scratch(folder) as db:
        rows = f"(SELECT * FROM {parquet([f.path for f in files])} WHERE list_contains($readings, ingest_id))"
        found = db.execute(f"SELECT rollout_id FROM {rows}", {"readings": readings})
        known: set[bytes] = set()
        while some := found.fetchmany(100_000):
            known.update(bytes.fromhex(r) for (r,) in some)
        members = f"SELECT split, step, prompt_id, ground_truth, count(*) FROM {rows} GROUP BY ALL"
        counts = db.execute(members, {"readings": readings}).fetchall() if config.group_size else []
    return Stored(frozenset(known), {(s, t, p, g): n for s, t, p, g, n in counts})


def shared(snapshot: Snapshot, staged: Sequence[Staged], readings: Sequence[Open], folder: Path) -> dict[str, tuple[int, int]]:
    """For each new reading: its rollouts that an older live reading holds too, and those of them with another reward.

    Equal ids have equal run, split and step, so that only files whose steps overlap are looked at."""
    steps = [s for s in staged if s.rows]
    if not steps:
        return {}
    low, high = (_extreme(steps, end) for end in ("minValues", "maxValues"))
    unknown = any(s.stats["nullCount"].get("step") for s in steps)
    old = [
        f for f in snapshot.files("rollouts") if f.partition["run"] == steps[0].partition and _overlaps(f, low, high, unknown)
    ]
    if not old and (len(readings) == 1 or not unknown and _disjoint(readings)):
        return {}
    winners = [r.ingest_id for r in readings]
    gone = {i for r in readings for i in r.plan.supersedes}
    order = [*(r.ingest_id for r in snapshot.ledger.live if r.ingest_id not in gone), *winners]
    files = parquet([*(f.path for f in old), *(s.path for s in steps)])
    with scratch(folder) as db:
        db.execute("CREATE TABLE ledger AS SELECT unnest($ids) AS ingest_id, unnest(range(len($ids))) AS age", {"ids": order})
        db.execute(
            f"""CREATE VIEW held AS SELECT rollout_id, reward, age, ledger.ingest_id FROM ledger JOIN
            {files} USING (ingest_id)"""
        )
        rows = db.execute(
            """
            WITH oldest AS (
              SELECT rollout_id, min(age) AS age, arg_min({'r': reward}, age).r AS reward
              FROM held GROUP BY rollout_id HAVING count(*) > 1
            )
            SELECT held.ingest_id, count(*), count(*) FILTER (WHERE held.reward IS DISTINCT FROM oldest.reward)
            FROM held JOIN oldest USING (rollout_id) WHERE held.age > oldest.age GROUP BY ALL
            """
        ).fetchall()
    return {i: (n, conflicts) for i, n, conflicts in rows if i in set(winners)}


def _disjoint(readings: Sequence[Open]) -> bool:
    """No two readings have a step in common, so none can hold a rollout of another."""
    found = [r for r in readings if r.report.rows]
    ranges = sorted((r.start_step, r.end_step) for r in found if r.start_step is not None and r.end_step is not None)
    return len(ranges) == len(found) and all(a[1] < b[0] for a, b in pairwise(ranges))


def _extreme(staged: Sequence[Staged], end: str) -> int | None:
    values = [s.stats[end]["step"] for s in staged if "step" in s.stats[end]]
    return (min if end == "minValues" else max)(values, default=None)


def _overlaps(file: DataFile, low: int | None, high: int | None, unknown: bool) -> bool:
    if unknown and file.nulls.get("step"):
        return True
    first, last = file.low.get("step"), file.high.get("step")
    if low is None or high is None or first is None or last is None:
        return False
    return first <= high and last >= low
