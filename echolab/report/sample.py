"""Which groups the reader of a report holds: degenerate, mixed and surprising ones, as many as fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from echolab.report.rollouts import FACTS, experts, read_groups, spelling
from echolab.report.tokens import unpack
from echolab.sql import Session
from echolab.views import text

# Why a group is worth reading; of several reasons the first one counts. Taken in turn.
REASONS = {
    "disputed": "a verifier and the recorded rewards differ here",
    "forgotten": "all wrong, though an earlier step solved this problem",
    "teachable": "all wrong, and an expert has the answer",
    "lone_success": "one right among many wrong",
    "lone_failure": "one wrong among many right",
    "all_fail": "all wrong",
    "all_success": "all right",
    "constant": "all have the same reward",
    "mixed": "right and wrong",
    "unrewarded": "without rewards",
}
KINDS = {
    "all_fail": "all wrong", "all_success": "all right", "constant": "all the same", "mixed": "mixed", "single": "one sample",
    "unrewarded": "without rewards",
}  # fmt: skip
GROUPS, EACH = 240, 40  # in a report; of one run and reason
FAIR = 10  # groups that have a place, however long their rollouts are
SIZES = (
    (8, 1_800_000),
    (4, 1_800_000),
    (3, 1_800_000),
    (2, 1_800_000),
    (1, 300_000),
    (1, 40_000),
)  # rollouts of a group, bytes of each: tried in turn


@dataclass
class Sample:
    """The groups that were taken: what the reader's list says of each, and its payload as JSON by its id."""

    n_groups: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    payloads: dict[str, str] = field(default_factory=dict)
    entropies: list[np.ndarray] = field(default_factory=list)
    surprises: list[np.ndarray] = field(default_factory=list)
    segments: list[float] = field(default_factory=list)

    def add(self, payload: dict[str, Any], why: str = "", written: str | None = None) -> None:
        self.entries.append({**entry(payload), "why": why})
        self.payloads[payload["group_id"]] = written or as_json(payload)
        for rollout in payload["rollouts"]:
            self.entropies.append(unpack(rollout.get("entropy", "")))
            self.surprises.append(unpack(rollout.get("surprise", "")))
            self.segments += [e for e in rollout.get("segment_entropies", ()) if e is not None]

    def scale(self) -> dict[str, float]:
        """Where colours and bars end, in nats: the 99th percentile of what is here; where the top fifth begins."""
        entropies, surprises = _known(self.entropies), _known(self.surprises)
        of = {"entropy": (entropies, 99), "surprise": (surprises, 99), "fork": (entropies, 80), "segment": (self.segments, 99)}
        return {name: round(float(np.percentile(v, q)), 3) if len(v) else 0 for name, (v, q) in of.items()}


def _known(arrays: list[np.ndarray]) -> np.ndarray:
    together = np.concatenate([np.array([]), *arrays])
    return together[np.isfinite(together)]


def sample(session: Session, runs: Sequence[str], clipset: str | None, room: int) -> Sample:
    """Groups whose payloads take at most `room` bytes together."""
    if not runs:
        return Sample()
    there = ", ".join(map(text, runs))
    n_groups = session.sql(f"SELECT count(*) AS n FROM groups WHERE role = 'policy' AND run IN ({there})")["n"][0]
    candidates = session.sql(_candidates(there, clipset)).to_dicts()
    beside = experts(session, sorted({c["problem_id"] for c in candidates if c["problem_id"]}))
    found = Sample(n_groups=n_groups)
    reasons = {c["group_id"]: c.pop("reason") for c in candidates}
    pieces = spelling(session)
    fair = room // min(FAIR, len(candidates) or 1)
    for group in read_groups(session, candidates, clipset, rollouts=SIZES[0][0], experts=beside, pieces=pieces):
        if len(found.entries) == GROUPS or room < fair // 4:
            break
        for rollouts, size in SIZES:
            payload = group.payload(rollouts, size)
            written = as_json(payload)
            if (taken := len(written.encode())) <= (min(room, fair) if rollouts > 2 else room):
                room -= taken
                found.add(payload, REASONS[reasons[payload["group_id"]]], written)
                break
    return found


def entry(payload: dict[str, Any]) -> dict[str, Any]:
    """What the reader's list says of a group."""
    return {
        **{key: payload[key] for key in ("group_id", "run", "split", "step", "kind", "n", "n_rewarded", "n_success")},
        "asked": payload["asked"],
        "outcomes": sorted({_outcome(r) for r in payload["rollouts"] if r["role"] == payload["role"]}),
    }


def _outcome(rollout: dict[str, Any]) -> str:
    return {True: "right", False: "wrong"}.get(rollout.get("success"), "unrewarded")  # type: ignore[arg-type]


def as_json(document: Any) -> str:
    """JSON that can stand in a page: nothing in it ends a script or opens a comment. Keys are sorted."""
    written = json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c")


def _candidates(runs: str, clipset: str | None) -> str:
    """Facts and reason of the groups to take, the first ones first. Scores and clips go before: they can be shown."""
    reasons = "".join(f"WHEN {_IS[reason]} THEN '{reason}' " for reason in REASONS)
    order = ", ".join(f"'{reason}'" for reason in REASONS)
    return f"""
    WITH scored AS (
      SELECT DISTINCT group_id FROM rollouts SEMI JOIN (
        SELECT rollout_id FROM scores WHERE scorer = chosen_scorer()
      ) USING (rollout_id) WHERE role = 'policy'
    ),
    clipped AS (SELECT DISTINCT group_id FROM clips WHERE clipset = {text(clipset or "")}),
    solvable AS (SELECT DISTINCT problem_id FROM rollouts WHERE role = 'expert' AND success AND problem_id IS NOT NULL),
    solved AS (
      SELECT run, split, problem_id, min(step) FILTER (WHERE n_success > 0) AS since
      FROM groups WHERE role = 'policy' AND problem_id IS NOT NULL GROUP BY run, split, problem_id
    ),
    disputed AS (
      SELECT DISTINCT r.group_id FROM verdicts w JOIN base.visible r ON r.rollout_id = w.rollout_id
      WHERE isfinite(r.reward) AND w.status IN ('ok', 'no_answer')
        AND (r.reward >= success_threshold(r.run) - tol()) <> (w.status = 'ok' AND w.success)
    ),
    judged AS (
      SELECT g.*, CASE {reasons}ELSE 'mixed' END AS reason, c.group_id IS NOT NULL AS has_clip,
        s.group_id IS NOT NULL AS has_scores
      FROM groups g
      LEFT JOIN scored s ON s.group_id = g.group_id
      LEFT JOIN clipped c ON c.group_id = g.group_id
      LEFT JOIN disputed d ON d.group_id = g.group_id
      LEFT JOIN solvable e ON e.problem_id = g.problem_id
      LEFT JOIN solved o ON o.run = g.run AND o.split = g.split AND o.problem_id = g.problem_id
      WHERE g.role = 'policy' AND g.run IN ({runs})
    ),
    ranked AS (
      SELECT *, row_number() OVER (
        PARTITION BY run, reason
        ORDER BY has_clip DESC, has_scores DESC, step DESC NULLS LAST,
          abs(coalesce(n_success / nullif(n_rewarded, 0), 0) - 0.5), group_id
      ) AS place
      FROM judged
    )
    SELECT {FACTS}, reason FROM ranked WHERE place <= {EACH}
    ORDER BY has_scores DESC, place, list_position([{order}], reason), run"""


_IS = {
    "disputed": "d.group_id IS NOT NULL",
    "forgotten": "g.kind = 'all_fail' AND o.since < g.step",
    "teachable": "g.kind = 'all_fail' AND e.problem_id IS NOT NULL",
    "lone_success": "g.kind = 'mixed' AND g.n_success = 1 AND g.n_rewarded >= 4",
    "lone_failure": "g.kind = 'mixed' AND g.n_success = g.n_rewarded - 1 AND g.n_rewarded >= 4",
    "all_fail": "g.kind = 'all_fail'",
    "all_success": "g.kind = 'all_success'",
    "constant": "g.kind = 'constant'",
    "mixed": "g.kind IN ('mixed', 'single')",
    "unrewarded": "g.kind = 'unrewarded'",
}
