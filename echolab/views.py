"""The ground that the views stand on: macros, and the schema `base` of a session.

`base.<table>` reads exactly the files of a snapshot, typed by the schema; `base.rollouts` keeps the rows that count and
judges them; `base.samples` joins the parts of a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from echolab.errors import EcholabError
from echolab.ledger import Ledger
from echolab.scan import relation
from echolab.schema import REGISTRIES, TABLES
from echolab.store import DataFile, Snapshot

# The views of sql/views, each after those that it reads.
VIEWS = ("ingests", "verdicts", "groups", "rollouts", "prompts", "problems", "segments", "tokens")


@dataclass(frozen=True)
class Options:
    """How a session judges and what it shows. Verifier, scorer and segmenter are ids, `name@version`, or names: then the
    newest version."""

    tol: float = 1e-6
    success_threshold: float | None = None  # None: that of each run
    verifier: str | None = None
    scorer: str | None = None
    segmenter: str | None = None


class Base:
    """Makes the macros and the base views of a session. Whatever is the same for all rows becomes a literal, so that the
    common store (all readings live, one threshold, no parts) pays for none of the rules below."""

    def __init__(self, con: duckdb.DuckDBPyConnection, snapshot: Snapshot, options: Options):
        self.con = con
        self.snapshot = snapshot
        self.ledger = snapshot.ledger
        self.options = options
        self.files = {name: snapshot.files(name) for name in TABLES}
        live = {r.ingest_id for r in self.ledger.live}
        self.files["rollouts"] = [f for f in self.files["rollouts"] if not _only_dead(f, live)]
        self.runs = sorted({r.run for r in self.ledger.live})
        entries = snapshot.registry("runs").values()
        self.configs: dict[str, dict[str, Any]] = {e["name"]: e["config"] for e in entries}

    def build(self) -> None:
        self.con.execute("CREATE SCHEMA base")
        for name, table in TABLES.items():
            files = self.files[name]
            constants = _constants(files) if name == "rollouts" else {}
            self.view("stored" if name == "rollouts" else name, relation(self.con, table, [f.path for f in files], constants))
        for name in TABLES.keys() - VIEWS:
            body = f"SELECT * FROM base.{name}"
            if any(name == r.name for r in REGISTRIES):
                body += " QUALIFY row_number() OVER (PARTITION BY id ORDER BY created_at DESC) = 1"
            self.con.execute(f"CREATE VIEW {name} AS {body}")
        self.make_live()
        self.make_macros()
        self.view("visible", self.visible())
        self.view("rollouts", self.judged())
        self.macro("failure_reward(run)", _lookup("run", self.failure_rewards(), "0.0::DOUBLE"))
        # Without a verifier the lowest reward decides: one aggregate less where nobody asks for n_success.
        all_success = "low >= success_threshold(run) - tol()" if self.options.verifier is None else "n_success = n_rewarded"
        self.macro("group_kind(run, n_rewarded, n_success, low, high)", _GROUP_KIND.format(all_success=all_success))
        self.view("samples", self.samples())

    def view(self, name: str, body: str) -> None:
        self.con.execute(f"CREATE VIEW base.{name} AS {body}")

    def macro(self, head: str, body: str) -> None:
        self.con.execute(f"CREATE MACRO {head} AS {body}")

    def make_live(self) -> None:
        """The live readings, oldest first, and from which step on a later attempt hides them."""
        self.con.execute("CREATE TABLE base.live (ingest_id VARCHAR, place INTEGER, cutoff BIGINT, shares BOOLEAN)")
        rows = (
            f"({text(r.ingest_id)}, {i}, {'NULL' if cut is None else cut}, {r.n_shared > 0})"
            for i, (r, cut) in enumerate(zip(self.ledger.live, _cutoffs(self.ledger), strict=True))
        )
        if self.ledger.live:  # as text: values from Python make DuckDB import pandas, where there is pandas
            self.con.execute(f"INSERT INTO base.live VALUES {', '.join(rows)}")

    def make_macros(self) -> None:
        given = self.options.success_threshold
        usual = 1.0 if given is None else given
        thresholds = dict.fromkeys(self.runs, _number(usual))
        if given is None:
            kept = {run: c.get("success_threshold") for run, c in self.configs.items()}
            thresholds |= {run: _number(t) for run, t in kept.items() if t is not None and run in thresholds}
        completeness = {r.ingest_id: text(r.completeness) for r in self.ledger.live}
        self.macro("tol()", _number(self.options.tol))
        self.macro("success_threshold(run)", _lookup("run", thresholds, _number(usual)))
        self.macro("completeness(ingest_id)", _lookup("ingest_id", completeness, "'all'"))
        # An aggregate: filtered if any is, else effective if any is (in the order of the words). A literal where all agree.
        self.macro("worst(c)", next(iter(completeness.values()), "'all'") if len(set(completeness.values())) < 2 else "max(c)")
        self.macro("degenerate(kind)", "kind IN ('all_success', 'all_fail', 'constant')")
        self.macro("truncated(reason)", _TRUNCATED)
        self.macro("judged(kind)", "kind IN ('all_success', 'all_fail', 'constant', 'mixed')")
        self.macro("upstream_note(c)", _UPSTREAM_NOTE)
        self.macro("excerpt(prompt, chars)", _EXCERPT)
        self.make_choices()

    def make_choices(self) -> None:
        """What `segments` and `tokens` show. Where a choice is missing, the error waits until a view is read."""
        scorer, scorer_id = self.choose("scorer", "scores", self.options.scorer)
        segmenter, _ = self.choose("segmenter", "segmentations", self.options.segmenter, scorer_id)
        config = self.snapshot.registry("scorers").get(scorer_id or "", {}).get("config", {})
        tokenizer = config.get("vocabulary") or config.get("tokenizer")  # a recorded scorer's may have come later
        verifier = self.options.verifier
        self.macro(
            "chosen_verifier()", "NULL::VARCHAR" if verifier is None else text(resolve(self.snapshot, "verifier", verifier))
        )
        self.macro("chosen_scorer()", scorer)
        self.macro("chosen_segmenter()", segmenter)
        self.macro("chosen_tokenizer()", "NULL::VARCHAR" if tokenizer is None else text(str(tokenizer)))

    def choose(self, kind: str, table: str, word: str | None, scorer: str | None = None) -> tuple[str, str | None]:
        """SQL of the chosen id, and the id where there is one: the word's, else the only one with rows."""
        if word is not None:
            id = resolve(self.snapshot, kind, word)
            return text(id), id
        files = [f for f in self.files[table] if scorer is None or f.partition["scorer"] == scorer]
        if kind == TABLES[table].partition:
            ids = {f.partition[kind] for f in files}
        else:
            where = f"WHERE scorer = {text(scorer)}" if scorer else ""
            ids = {row[0] for row in self.con.execute(f"SELECT DISTINCT {kind} FROM base.{table} {where}").fetchall()}
        found = sorted(i for i in ids if i is not None)
        if not found:
            return "NULL::VARCHAR", None
        if len(found) == 1:
            return text(found[0]), found[0]
        entries = self.snapshot.registry(f"{kind}s")
        names = ", ".join(_label(entries[i]) if i in entries else i for i in found)
        return f"error({text(f'there are several {kind}s: {names}; choose with --{kind}')})", None

    def visible(self) -> str:
        """Rows of live readings, without what a later attempt sampled again, each id once."""
        if _all_visible(self.files["rollouts"], self.ledger):
            return "SELECT * FROM base.stored"
        self.view(
            "seen",
            "SELECT s.*, l.place, l.shares FROM base.stored s JOIN base.live l ON l.ingest_id = s.ingest_id"
            " WHERE l.cutoff IS NULL OR s.step IS NULL OR s.step < l.cutoff",
        )
        if not any(r.n_shared for r in self.ledger.live):
            return "SELECT * EXCLUDE (place, shares) FROM base.seen"
        # Only a reading that shares ids can hold one that an older reading shows.
        self.view(
            "first",
            "SELECT rollout_id, min(place) AS place FROM base.seen"
            " WHERE rollout_id IN (SELECT rollout_id FROM base.seen WHERE shares) GROUP BY rollout_id",
        )
        return (
            "SELECT * EXCLUDE (place, shares) FROM base.seen WHERE NOT shares UNION ALL "
            "SELECT s.* EXCLUDE (place, shares) FROM base.seen s"
            " JOIN base.first f ON f.rollout_id = s.rollout_id AND f.place = s.place WHERE s.shares"
        )

    def judged(self) -> str:
        """Visible rows with `score` (the reward, NULL unless finite), success and completeness. A chosen verifier's
        silence is NULL, never the recorded reward."""
        if self.options.verifier is None:
            return (
                "SELECT *, CASE WHEN isfinite(reward) THEN reward END AS score,"
                " CASE WHEN isfinite(reward) THEN reward >= success_threshold(run) - tol() END AS success,"
                " completeness(ingest_id) AS completeness FROM base.visible"
            )
        verifier = text(resolve(self.snapshot, "verifier", self.options.verifier))
        self.view(
            "words",
            f"""SELECT rollout_id,
                CASE word.status WHEN 'ok' THEN coalesce(word.score, word.success::INTEGER) WHEN 'no_answer' THEN 0 END::DOUBLE
                  AS score,
                CASE word.status WHEN 'ok' THEN word.success WHEN 'no_answer' THEN false END AS success
            FROM (
                SELECT rollout_id, arg_max({{'status': status, 'score': score, 'success': success}}, created_at) AS word
                FROM base.verdicts WHERE verifier = {verifier} GROUP BY rollout_id
            )""",
        )
        return (
            "SELECT r.* REPLACE (w.score AS reward), CASE WHEN isfinite(w.score) THEN w.score END AS score,"
            " CASE WHEN isfinite(w.score) THEN w.success END AS success, completeness(r.ingest_id) AS completeness"
            " FROM base.visible r LEFT JOIN base.words w ON w.rollout_id = r.rollout_id"
        )

    def failure_rewards(self) -> dict[str, str]:
        """Of each run: as configured, else 0 where no reward is negative, else its lowest."""
        rewards: dict[str, float] = dict.fromkeys(self.runs, 0.0)
        tol = self.options.tol
        if self.options.verifier is None:
            suspects = {str(f.partition["run"]) for f in self.files["rollouts"] if _may_fall_below(f, "reward", -tol)}
            given = {r: float(c["failure_reward"]) for r, c in self.configs.items() if c.get("failure_reward") is not None}
        else:  # a verifier has a scale of its own
            negative = any(_may_fall_below(f, "score", -tol) for f in self.files["verdicts"])
            suspects, given = (set(self.runs) if negative else set()), {}
        if suspects := sorted(suspects - given.keys()):
            wanted = ", ".join(text(r) for r in suspects)
            lowest = f"SELECT run, min(score) FROM base.rollouts WHERE run IN ({wanted}) GROUP BY run"
            rewards |= {run: low for run, low in self.con.execute(lowest).fetchall() if low is not None and low < -tol}
        return {run: _number(value) for run, value in (rewards | given).items() if run in self.runs}

    def samples(self) -> str:
        """One row a sample. Rows are samples already, but in runs whose rollouts have parts: there a sample has the reward
        of its lowest part, the sum of its lengths, and the end of its last."""
        plain = f"SELECT {', '.join(_SAMPLE)} FROM base.rollouts"
        parted = sorted({str(f.partition["run"]) for f in self.files["rollouts"] if _has_parts(f)})
        if not parted:
            return plain
        runs = ", ".join(text(r) for r in parted)
        place = "{'part': coalesce(part, -1), 'rollout_id': rollout_id}"
        lengths = {
            c: f"CASE WHEN count({c}) = count(*) THEN sum({c})::BIGINT END AS {c}" for c in ("n_completion_tokens", "n_chars")
        }
        other = {
            **{c: f"min({c}) AS {c}" for c in ("source", "prompt_id", "problem_id")},
            **{c: f"arg_min({c}, {place}) AS {c}" for c in ("score", "success")},
            **lengths,
            "finish_reason": f"arg_max(finish_reason, {place}) AS finish_reason",
            "completeness": "worst(completeness) AS completeness",
        }
        columns = ", ".join(other.get(c, c) for c in _SAMPLE)
        return (
            f"{plain} WHERE run NOT IN ({runs}) UNION ALL SELECT {columns} FROM base.rollouts WHERE run IN ({runs})"
            " GROUP BY run, split, step, group_id, role, coalesce(sample::VARCHAR, rollout_id)"
        )


_GROUP_KIND = """
CASE
    WHEN n_rewarded = 0 THEN 'unrewarded'
    WHEN n_rewarded = 1 THEN 'single'
    WHEN high - low > tol() THEN 'mixed'
    WHEN {all_success} THEN 'all_success'
    WHEN abs(low - failure_reward(run)) <= tol() THEN 'all_fail'
    ELSE 'constant'
END"""

# What the user asked, on one line, without the template before it.
_ASKED = r"(?s)^.*(?:(?:^|\n|\|>|of_turn>)user(?:<\|end_header_id\|>)?\s*\n|<｜User｜>|\[INST\])"
_ANSWERED = r"(?s)(?:<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<｜Assistant｜>|\[/INST\]|\nassistant\s*$).*$"
_BARE = f"regexp_replace(regexp_replace(prompt, '{_ASKED}', ''), '{_ANSWERED}', '')"
_EXCERPT = rf"""left(trim(regexp_replace({_BARE}, '\s+', ' ', 'g')), chars)"""
_TRUNCATED = "coalesce(lower(reason) IN ('length', 'max_tokens', 'max_length', 'truncated'), false)"
_UPSTREAM_NOTE = """
CASE c WHEN 'filtered' THEN 'filtered upstream' WHEN 'effective' THEN 'filtered upstream: effective rollouts only' END"""

_SAMPLE = (
    "run", "split", "step", "group_id", "role", "source", "prompt_id", "problem_id", "score", "success",
    "n_completion_tokens", "n_chars", "finish_reason", "completeness",
)  # fmt: skip


def _constants(files: Sequence[DataFile]) -> dict[str, str]:
    """Columns that groups are made by, and that have one value in all files."""
    found = {"run": {f.partition["run"] for f in files}}
    for name in ("split", "role"):
        found[name] = {v for f in files for v in (f.low.get(name), f.high.get(name))}
        if any(f.nulls.get(name) != 0 for f in files):
            found[name].add(None)
    return {name: str(next(iter(values))) for name, values in found.items() if len(values) == 1 and None not in values}


def _only_dead(file: DataFile, live: set[str]) -> bool:
    low = file.low.get("ingest_id")
    return low is not None and low == file.high.get("ingest_id") and low not in live


def _cutoffs(ledger: Ledger) -> list[int | None]:
    """`Ledger.cutoff` of each live reading, asked only where a run has several attempts."""
    attempts: dict[str, set[int]] = {}
    for r in ledger.live:
        attempts.setdefault(r.run, set()).add(r.attempt)
    return [ledger.cutoff(r) if len(attempts[r.run]) > 1 else None for r in ledger.live]


def _all_visible(files: Sequence[DataFile], ledger: Ledger) -> bool:
    """Every row of these files counts: then no query needs to ask."""
    counted = sum(f.rows for f in files) == sum(r.n_rows for r in ledger.live)
    return counted and not any(r.n_shared for r in ledger.live) and not any(c is not None for c in _cutoffs(ledger))


def _may_fall_below(file: DataFile, column: str, value: float) -> bool:
    if file.nulls.get(column) == file.rows:
        return False
    low = file.low.get(column)
    return low is None or low < value


def _has_parts(file: DataFile) -> bool:
    high = file.high.get("part")
    return high > 0 if high is not None else file.nulls.get("part") != file.rows


def resolve(snapshot: Snapshot, kind: str, word: str) -> str:
    """The id behind an id, `name@version`, or a bare name."""
    entries = snapshot.registry(f"{kind}s")
    if word in entries:
        return word
    named = [e for e in entries.values() if word in (e["name"], _label(e))]
    if not named:
        there = ", ".join(sorted(_label(e) for e in entries.values())) or "none"
        raise EcholabError(f"no {kind} {word!r} in this store; there are: {there}")
    return max(named, key=lambda e: (e["version"], e["created_at"]))["id"]


def _label(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']}@{entry['version']}"


def _lookup(key: str, values: Mapping[str, str], default: str) -> str:
    """SQL of a map from keys to SQL values: a literal where all agree."""
    if len(set(values.values())) <= 1:
        return next(iter(values.values()), default)
    keys: dict[str, list[str]] = {}
    for k, v in values.items():
        keys.setdefault(v, []).append(text(k))
    cases = (f"WHEN {key} IN ({', '.join(ks)}) THEN {v}" for v, ks in keys.items())
    return f"CASE {' '.join(cases)} ELSE {default} END"


def text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _number(value: float) -> str:
    return f"'{float(value)!r}'::DOUBLE"  # in quotes, as NaN and infinity have to be
