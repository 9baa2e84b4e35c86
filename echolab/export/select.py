"""Which rows of the store an export takes, in SQL: its clips, rollouts or prompts, in an order that no rewriting of files
changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from echolab.export.base import Shape
from echolab.export.prompts import BARE
from echolab.schema import BOOL, CLIPS, FLOAT64, INT64, ROLLOUTS, STRING, TOKEN_IDS
from echolab.sql import Session
from echolab.views import text

_PAIRS = pa.list_(pa.struct([("key", STRING), ("value", FLOAT64)]))  # `datasets` knows no maps
_KNOWN = [("source", STRING), ("model", STRING), ("messages", STRING), ("ground_truth", STRING), ("reward", FLOAT64)]
_JUDGED = [
    ("success", BOOL), ("kind", STRING), ("success_threshold", FLOAT64), ("failure_reward", FLOAT64), ("completeness", STRING),
]  # fmt: skip
_PROMPTS = [
    ("prompt_id", STRING), ("problem_id", STRING), ("run", STRING), ("split", STRING), ("role", STRING), ("source", STRING),
    ("prompt", STRING), ("messages", STRING), ("prompt_format", STRING), ("ground_truth", STRING), ("tokenizer", STRING),
    ("prompt_ids", TOKEN_IDS), ("first_step", INT64), ("last_step", INT64), ("visits", INT64), ("n", INT64),
    ("n_rewarded", INT64), ("n_success", INT64), ("success_rate", FLOAT64), ("kind", STRING),
]  # fmt: skip


def _fields(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return [(f.name, _PAIRS if pa.types.is_map(f.type) else f.type) for f in schema]


# Rows as they are: exactly these columns.
ROWS = {
    "clips": pa.schema(_fields(CLIPS.arrow) + _KNOWN),
    "rollouts": pa.schema(_fields(ROLLOUTS.arrow) + _JUDGED),
    "prompts": pa.schema(_PROMPTS),
}


def plain(what: str) -> Shape:
    """Rows as they are."""
    return Shape(ROWS[what], tuple(ROWS[what].names), {}, lambda rows, job: rows)


_CLIPS = """
SELECT c.*, c.clip AS completion, c.clip_ids AS completion_ids, c.clip_mask AS loss_mask,
  r.source, r.model, r.messages, r.prompt_format, r.ground_truth, r.reward, r.sampling, coalesce(c.split, 'train') AS _split
FROM clips c LEFT JOIN rollouts r ON r.rollout_id = c.rollout_id WHERE c.clipset = {label}"""

_ROLLOUTS = "SELECT r.*, {split} AS _split FROM rollouts r{of_clips}"

# The view's row of a prompt, with its text and answer from one of its rollouts: the first by id that has an answer.
_PROMPT_ROWS = """
SELECT p.*, r.rollout_id, r.source, r.prompt, r.messages, r.prompt_format, r.ground_truth, r.tokenizer, r.prompt_ids, r.model,
  r.sampling, t.n_truths, {split} AS _split
FROM prompts p
JOIN (
  SELECT prompt_id, run, split, role, arg_min(rollout_id, {{'none': ground_truth IS NULL, 'id': rollout_id}}) AS rollout_id,
    count(DISTINCT ground_truth) AS n_truths
  FROM rollouts GROUP BY prompt_id, run, split, role
) t ON t.prompt_id = p.prompt_id AND t.run = p.run AND t.split = p.split AND t.role = p.role
JOIN rollouts r ON r.rollout_id = t.rollout_id{of_clips}"""

# Rows of a clip set keep its split.
_KEYS = "(SELECT {key}, coalesce(max(split), 'train') AS split FROM clips WHERE clipset = {label} GROUP BY {key})"

_BEST = """
SELECT * FROM ({chosen}) WHERE rollout_id IN (
  SELECT rollout_id FROM (
    SELECT rollout_id, dense_rank() OVER (
      PARTITION BY group_id, role
      ORDER BY CASE WHEN isfinite(reward) THEN reward END DESC NULLS LAST, sample NULLS LAST,
        CASE WHEN sample IS NULL THEN rollout_id END  -- the parts of a sample share its place
    ) AS place FROM ({chosen})
  ) WHERE place <= {n}
)"""

# Of a prompt that several runs or splits have, the one that is not for training, else the first run's.
_ONCE = """
SELECT * FROM ({chosen}) QUALIFY row_number() OVER (
  PARTITION BY prompt_id ORDER BY role DESC, split = 'train', split, run
) = 1"""

_BASE = {"clips": _CLIPS, "rollouts": _ROLLOUTS, "prompts": _PROMPT_ROWS}
_KEY = {"clips": ("c", "clip_id"), "rollouts": ("r", "rollout_id"), "prompts": ("p", "prompt_id")}
ORDER = {
    "clips": "clip_id",
    "rollouts": "run, step NULLS LAST, group_id, sample NULLS LAST, part NULLS LAST, rollout_id",
    "prompts": "prompt_id",
}


@dataclass(frozen=True)
class Selection:
    """Chosen rows: `sql` is a SELECT of all their columns, `base` the one that they were chosen from, and `counts` says how
    many were left out by which rule."""

    session: Session
    what: str
    base: str
    sql: str
    counts: dict[str, Any]

    def lacking(self, needs: Mapping[str, str]) -> dict[str, int]:
        """By reason, how many rows do not fulfil a condition that all must."""
        if not needs:
            return {}
        columns = ", ".join(f"count(*) FILTER (NOT ({good}))" for good in needs.values())
        return dict(zip(needs, self.session.sql(f"SELECT {columns} FROM ({self.sql})").row(0), strict=True))

    def query(self, shape: Shape) -> str:
        """What is exported, as one SELECT."""
        return f"SELECT {', '.join(shape.reads)} FROM ({self.sql}) ORDER BY _split, {ORDER[self.what]}"


def select(
    session: Session, what: str, clipset: str | None, where: str | None, best: int | None, source: str | None
) -> Selection:
    """The chosen rows, counted rule by rule. `source` names the dataset of rows that have none."""
    row, key = _KEY[what]
    keys = _KEYS.format(key=key, label=text(clipset)) if clipset and what != "clips" else None
    sql = _BASE[what].format(
        label=text(clipset or ""),
        split="c.split" if keys else f"{row}.split",
        of_clips=f"\nJOIN {keys} c ON c.{key} = {row}.{key}" if keys else "",
    )
    if source is not None:
        sql = f"SELECT * REPLACE (coalesce(source, {text(source)}) AS source) FROM ({sql})"
    rules: list[tuple[str, str]] = []
    if where:
        rules.append(("where", f"SELECT * FROM ({{chosen}}) WHERE ({where.replace('{', '{{').replace('}', '}}')}\n)"))
    if best:
        rules.append(("best", _BEST.replace("{n}", str(best))))
    if what == "prompts":
        rules.append(("repeated", _ONCE))
    gone = _count(session, f"SELECT * FROM {keys} ANTI JOIN ({sql}) USING ({key})") if keys else 0
    dropped = {"gone": gone} if gone else {}  # of rollouts that the store no longer shows
    n = _count(session, sql)
    base, first = sql, n + gone
    for rule, template in rules:
        sql = template.format(chosen=sql)
        left = _count(session, sql)
        dropped[rule], n = n - left, left
    return Selection(session, what, base, sql, {"stage": "export", "in": first, "dropped": dropped, "out": n})


def _count(session: Session, sql: str) -> int:
    return session.sql(f"SELECT count(*) FROM ({sql})").item()


_LISTS = {
    "runs": "run", "models": "model", "sources": "source", "samplings": "sampling", "tokenizers": "tokenizer",
    "systems": "try(CASE WHEN messages->>'$[0].role' = 'system' THEN messages->>'$[0].content' END)",
}  # fmt: skip
_LENGTHS = "sum({0})::BIGINT AS tokens, count({0}) AS counted, min({0}) AS fewest, max({0}) AS most"
_OF = {
    "clips": f"""{_LENGTHS.format("n_tokens")}, min(step) AS first_step, max(step) AS last_step,
        list_sort(list(DISTINCT scorer) FILTER (scorer IS NOT NULL)) AS scorers, count(*) FILTER (weight <> 1) AS weighted""",
    "rollouts": f"""{_LENGTHS.format("n_completion_tokens")}, min(step) AS first_step, max(step) AS last_step,
        count(*) FILTER (NOT coalesce(success, false)) AS failures""",
    "prompts": """min(first_step) AS first_step, max(last_step) AS last_step,
        count(*) FILTER (ground_truth IS NULL) AS unanswered, count(*) FILTER (n_truths > 1) AS disputed""",
}


def facts(chosen: Selection) -> dict[str, Any]:
    """What a card says of the rows, and what decides how they are written. What does not apply is None."""
    lists = ", ".join(f"list_sort(list(DISTINCT {c}) FILTER ({c} IS NOT NULL)) AS {name}" for name, c in _LISTS.items())
    found = chosen.session.sql(
        f"""SELECT {lists}, {_OF[chosen.what]},
        count(*) FILTER (prompt_format = 'chat') AS chats,
        count(*) FILTER (prompt_format = 'rendered') AS rendered,
        count(*) FILTER (prompt_format = 'rendered' AND regexp_matches(prompt, {text(BARE)})) AS bare
        FROM ({chosen.sql})"""
    ).row(0, named=True)
    known = dict.fromkeys(("tokens", "weighted", "failures", "unanswered", "disputed"))
    return {**known, "n": chosen.counts["out"], **found, **{k: found.get(k) or [] for k in (*_LISTS, "scorers")}}
