"""A group as the reader takes it: its rollouts with tokens, segments, verdict and clip, and an expert of its problem."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from echolab.errors import EcholabError
from echolab.report.tokens import pack, pack_lengths, spell
from echolab.sql import Session
from echolab.views import text

FACTS = "group_id, run, split, step, role, kind, problem_id, n, n_rewarded, n_success, mean"
PROMPT_CHARS = 20_000
TOKEN_BYTES = 5  # of a packed token: one for its length, two for each number
AT_ONCE = 8  # groups in one query
CUTS = """SELECT rollout_id, segment_ends, segment_entropies, peak_segment FROM segmentations
    WHERE scorer = chosen_scorer() AND segmenter = chosen_segmenter()"""


def facts(session: Session, group_id: str) -> dict[str, Any]:
    """What `groups` says of one group, which may be named by the first characters of its id."""
    found = session.sql(f"SELECT {FACTS} FROM groups WHERE starts_with(group_id, {text(group_id)}) ORDER BY role DESC LIMIT 3")
    rows = found.to_dicts()
    if not rows:
        raise EcholabError(f"no group {group_id!r} in this store: `SELECT group_id FROM groups` lists them")
    if len({r["group_id"] for r in rows}) > 1:
        raise EcholabError(f"several groups begin with {group_id!r}: give more of the id")
    return rows[0]


def experts(session: Session, problems: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Of each problem (of these, or all) the expert rollout to show, with its run and step: a right one before others, then
    a scored one, then the shortest."""
    those = "" if problems is None else f" AND problem_id IN ({_list(problems)})"
    found = session.sql(
        f"""SELECT problem_id, unnest(arg_min({{'rollout_id': rollout_id, 'run': run, 'step': step}}, {{
                'wrong': CASE success WHEN true THEN 0 WHEN false THEN 2 ELSE 1 END,
                'unscored': rollout_id NOT IN (SELECT rollout_id FROM scores WHERE scorer = chosen_scorer()),
                'chars': coalesce(n_chars, 0), 'rollout_id': rollout_id}}))
        FROM rollouts WHERE role = 'expert'{those} AND problem_id IS NOT NULL GROUP BY problem_id"""
    )
    return {row.pop("problem_id"): row for row in found.to_dicts()}


def spelling(session: Session, ids: Sequence[int] | None = None) -> dict[int, bytes]:
    """The bytes of these tokens of the chosen scorer, or of all."""
    if ids is not None and not ids:
        return {}
    those = "" if ids is None else f" AND token_id IN ({', '.join(map(str, ids))})"
    found = session.sql(
        f"SELECT token_id, coalesce(bytes, encode(text)) AS bytes FROM vocab WHERE tokenizer = chosen_tokenizer(){those}"
    )
    return dict(found.iter_rows())


@dataclass(frozen=True)
class Group:
    """A group that was read. `facts` are those of `groups`; `beside` is the expert's rollout, or nothing."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    beside: list[dict[str, Any]]
    pieces: Mapping[int, bytes]

    def payload(self, rollouts: int | None = None, size: int | None = None) -> dict[str, Any]:
        """As reader.js takes it, with at most so many rollouts, each cut to about `size` bytes."""
        first = self.rows[0] if self.rows else {}
        prompt = first.get("prompt") or ""
        return {
            **self.facts,
            "asked": first.get("asked") or "",
            "prompt": prompt[:PROMPT_CHARS],
            "prompt_left_out": max(0, len(prompt) - PROMPT_CHARS),
            "gold": first.get("ground_truth"),
            "rollouts": [_rollout(row, self.pieces, size) for row in self.beside + pick(self.rows, rollouts)],
        }


def read_groups(
    session: Session,
    groups: Sequence[Mapping[str, Any]],
    clipset: str | None = None,
    *,
    rollouts: int | None = None,
    experts: Mapping[str, Mapping[str, Any]] | None = None,
    pieces: Mapping[int, bytes] | None = None,
    cuts: str = f"({CUTS})",
) -> Iterator[Group]:
    """Groups by their facts, some at a time, with at most so many `rollouts` of each (else all). `experts` are those that
    the function of this name found. Who reads many groups gives the `pieces` of all tokens, and where the session
    keeps the answer to CUTS."""
    for start in range(0, len(groups), AT_ONCE):
        some = groups[start : start + AT_ONCE]
        beside = {g["group_id"]: (experts or {}).get(g["problem_id"] or "") for g in some}
        found = [expert for expert in beside.values() if expert]
        there = around(found)
        those = _those(expert["rollout_id"] for expert in found)
        of_experts = {r["rollout_id"]: r for r in (_rows(session, f"{there} AND {those}", clipset) if found else ())}
        here = around(some)
        of_groups: dict[str, list[dict[str, Any]]] = {g["group_id"]: [] for g in some}
        for row in _rows(session, f"{here} AND ({' OR '.join(map(_rows_of, some))})", clipset):
            of_groups[row["group_id"]].append(row)
        if rollouts is not None and any(len(rows) > rollouts for rows in of_groups.values()):
            _add_scored(session, [row for rows in of_groups.values() for row in rows], here)
        of_groups = {id: pick(rows, rollouts) for id, rows in of_groups.items()}
        _add_numbers(session, [*of_experts.values()], cuts, there)
        _add_numbers(session, [row for rows in of_groups.values() for row in rows], cuts, here)
        chosen = [*of_experts.values(), *(row for rows in of_groups.values() for row in rows)]
        spelled = pieces or spelling(session, sorted({id for row in chosen for id in _ids(row)}))
        for group in some:
            expert = of_experts.get((beside[group["group_id"]] or {}).get("rollout_id", ""))
            yield Group(dict(group), of_groups[group["group_id"]], [expert] if expert else [], spelled)


def pick(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """All rows of a group, or so many: with a clip, the shortest and the longest, then right and wrong ones in turn."""
    if limit is None or len(rows) <= limit:
        return rows
    by_length = sorted(range(len(rows)), key=lambda i: (rows[i]["n_chars"] or 0, i))
    scored = sorted(range(len(rows)), key=lambda i: (not rows[i]["scored"], i))
    right = [i for i in scored if rows[i]["success"]]
    wrong = [i for i in scored if not rows[i]["success"]]
    turns = [i for pair in zip(right + wrong, wrong + right, strict=True) for i in pair]
    clipped = [i for i in scored if rows[i]["clip_end"] is not None]
    order = dict.fromkeys([*clipped[: limit // 2], by_length[0], by_length[-1], *turns])
    return [rows[i] for i in sorted(list(order)[:limit])]


def around(groups: Sequence[Mapping[str, Any]]) -> str:
    """Holds for all rollouts and scores of the runs and steps of these groups or rollouts. By these the files are sorted,
    and by no id: without it all of them would have to be read."""
    steps = {g["step"] for g in groups}
    known = ", ".join(str(step) for step in sorted(steps - {None})) or "NULL"
    runs = ", ".join(text(run) for run in sorted({g["run"] for g in groups}))
    return f"run IN ({runs}) AND (step IN ({known}){' OR step IS NULL' if None in steps else ''})"


def _rows_of(group: Mapping[str, Any]) -> str:
    return f"(group_id = {text(group['group_id'])} AND role = {text(group['role'])})"


def _rows(session: Session, where: str, clipset: str | None) -> list[dict[str, Any]]:
    """What is known of rollouts but their tokens. `base.rollouts` is the view without the kind of the group, which is known."""
    found = session.sql(
        f"""SELECT rollout_id, group_id, role, run, step, model, sample, part, success, reward, finish_reason, ground_truth,
            coalesce(prompt, messages) AS prompt, excerpt(coalesce(prompt, messages), 160) AS asked, completion, n_chars,
            n_completion_tokens, clip_end
        FROM base.rollouts LEFT JOIN (
            SELECT rollout_id, max(end_token) AS clip_end FROM clips
            WHERE clipset = {text(clipset or "")} AND scorer = chosen_scorer() GROUP BY rollout_id
        ) USING (rollout_id)
        WHERE {where} ORDER BY sample NULLS LAST, part NULLS FIRST, rollout_id"""
    )
    return found.to_dicts()


def _add_scored(session: Session, rows: Sequence[dict[str, Any]], near: str) -> None:
    """Which of them have scores, for those who pick some."""
    those = _those(row["rollout_id"] for row in rows)
    found = session.sql(f"SELECT rollout_id FROM scores WHERE scorer = chosen_scorer() AND {near} AND {those}")
    scored = set(found["rollout_id"])
    for row in rows:
        row["scored"] = row["rollout_id"] in scored


def _add_numbers(session: Session, rows: Sequence[dict[str, Any]], cuts: str, near: str) -> None:
    """Scores, segments and verdict, under the session's choices."""
    if not rows:
        return
    those = _those(row["rollout_id"] for row in rows)
    found = session.sql(
        f"""SELECT r.rollout_id, s.token_ids, s.entropies, s.logprobs, s.loss_mask, s.mean_entropy,
            g.segment_ends, g.segment_entropies, g.peak_segment, v.status, v.extracted
        FROM (SELECT unnest([{_list(row["rollout_id"] for row in rows)}]) AS rollout_id) r
        LEFT JOIN (SELECT * FROM scores WHERE scorer = chosen_scorer() AND {near} AND {those}) s ON s.rollout_id = r.rollout_id
        LEFT JOIN (SELECT * FROM {cuts} WHERE {those}) g ON g.rollout_id = r.rollout_id
        LEFT JOIN (SELECT * FROM verdicts WHERE verifier = chosen_verifier() AND {those}) v ON v.rollout_id = r.rollout_id"""
    )
    places = {id: i for i, id in enumerate(found["rollout_id"])}
    for row in rows:  # lists stay as series: as Python's they would take eight times the memory
        row.update({name: found[name][places[row["rollout_id"]]] for name in found.columns[1:]})
        row["scored"] = row["token_ids"] is not None


def _those(ids: Iterable[str]) -> str:
    return f"rollout_id IN ({_list(ids)})"


def _list(ids: Iterable[str]) -> str:
    return ", ".join(map(text, sorted(ids))) or "NULL"


def _rollout(row: Mapping[str, Any], pieces: Mapping[int, bytes], size: int | None) -> dict[str, Any]:
    ids = _ids(row)
    shown = {
        "id": row["rollout_id"], "role": row["role"], "run": row["run"], "step": row["step"], "model": row["model"],
        "sample": row["sample"], "part": row["part"], "success": row["success"], "reward": row["reward"],
        "finish": row["finish_reason"], "n_tokens": len(ids) or row["n_completion_tokens"], "n_chars": row["n_chars"],
        "status": row["status"], "extracted": row["extracted"], "mean_entropy": row["mean_entropy"],
    }  # fmt: skip
    end = _room(ids, pieces, size)
    written, lengths = spell(ids[:end], pieces)
    if written:
        shown |= {"text": written, "tokens_left_out": len(ids) - end, **_token_numbers(row, lengths)}
    else:  # it has no scores, or the store has no vocabulary that spells its tokens
        whole = row["completion"] or ""
        shown["text"] = whole if size is None else whole.encode()[:size].decode(errors="ignore")
        shown["chars_left_out"] = len(whole) - len(shown["text"])
    return {key: value for key, value in shown.items() if _known(value)}


def _room(ids: Sequence[int], pieces: Mapping[int, bytes], size: int | None) -> int:
    """How many tokens fit into so many bytes."""
    if size is not None and len(ids) * (TOKEN_BYTES + 20) > size:
        for i, id in enumerate(ids):
            size -= len(pieces.get(id, b"")) + TOKEN_BYTES
            if size < 0:
                return i
    return len(ids)


def _token_numbers(row: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """Of tokens that the loss mask leaves out, nothing is told."""
    n, mask, surprise, entropies = len(lengths), row["loss_mask"], row["logprobs"], row["segment_entropies"]
    counted = np.ones(n, bool) if mask is None else mask[:n].fill_null(True).to_numpy()
    surprise = np.full(n, np.nan) if surprise is None else -surprise[:n].to_numpy()
    return {
        "lengths": pack_lengths(lengths),
        "entropy": pack(np.where(counted, row["entropies"][:n].to_numpy(), np.nan)),
        "surprise": pack(np.where(counted, surprise, np.nan)),
        "segment_ends": None if entropies is None else row["segment_ends"].to_list(),
        "segment_entropies": None if entropies is None else [round(e, 4) if _known(e) else None for e in entropies],
        "peak": row["peak_segment"],
        "clip_end": row["clip_end"],
    }


def _ids(row: Mapping[str, Any]) -> list[int]:
    return [] if row["token_ids"] is None else row["token_ids"].to_list()


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
