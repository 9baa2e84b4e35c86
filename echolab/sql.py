"""A DuckDB session over one snapshot of a store.

From below: `base.<table>` reads exactly the files of the snapshot, typed by the schema; `base.rollouts` keeps the rows that
count and judges them; `base.samples` joins the parts of a rollout; on these stand the views of sql/views, which users see;
sql/queries holds the named queries. A session reads and never writes, and sees no file outside its store.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa

from echolab.errors import EcholabError
from echolab.ledger import Ledger
from echolab.queries import find_query, list_queries, markdown, view_files
from echolab.schema import REGISTRIES, TABLES, Table, duckdb_type
from echolab.store import DataFile, Snapshot, Store

__all__ = ["Options", "Session", "check", "list_queries", "views_markdown"]

MAX_TEXT = 1 << 20  # bytes of one query
REFUSED = "only one SELECT is allowed here (also WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE and EXPLAIN of one)"

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


class Session:
    """`with Session(store.snapshot()) as s: s.sql("SELECT ...")`. What is committed later does not show."""

    def __init__(
        self, snapshot: Snapshot, options: Options | None = None, *, memory_limit: str | None = None, threads: int | None = None
    ):
        self.snapshot = snapshot
        self._scratch = tempfile.TemporaryDirectory(prefix="echolab-", ignore_cleanup_errors=True)
        limits = {k: v for k, v in (("memory_limit", memory_limit), ("threads", threads)) if v is not None}
        self._con = duckdb.connect(config=_CONFIG | {"temp_directory": self._scratch.name} | limits)
        try:
            with _clear_errors():
                self._con.execute("SET TimeZone = 'UTC'")
                _Base(self._con, snapshot, options or Options()).build()
                for name in VIEWS:
                    self._con.execute(f"CREATE VIEW {name} AS {view_files()[name].sql}")
                self._lock()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        """No file outside the store, no setting, no write. The transaction is what refuses a DELETE inside a WITH."""
        self._con.execute(f"SET allowed_directories = [{_text(str(self.snapshot.store.root) + '/')}]")
        self._con.execute("SET enable_external_access = false")
        self._con.execute("SET lock_configuration = true")
        self._con.execute("START TRANSACTION READ ONLY")

    def sql(self, query: str, params: Mapping[str, Any] | Sequence[Any] | None = None) -> pl.DataFrame:
        """The answer to one SELECT."""
        check(query)
        return self._frame(query, params)

    def query(self, name: str, /, **params: Any) -> pl.DataFrame:
        """The answer of a named query. Parameters may be given as text, as they are on the command line."""
        query = find_query(name)
        values = query.bind(params)
        self._require_runs(values)
        return self._frame(query.sql, values)

    def reader(
        self, query: str, params: Mapping[str, Any] | Sequence[Any] | None = None, rows: int = 100_000
    ) -> Iterator[pa.RecordBatch]:
        """The answer in batches, for results that should not be in memory at once. Another query ends it."""
        check(query)
        with self._guard():
            batches = self._relation(query, params).to_arrow_reader(rows)
        return self._batches(batches)

    def close(self) -> None:
        self._con.close()
        self._scratch.cleanup()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _relation(self, query: str, params: Mapping[str, Any] | Sequence[Any] | None) -> duckdb.DuckDBPyRelation:
        relation = self._con.sql(query, params=params or None)
        if twice := sorted({c for c in relation.columns if relation.columns.count(c) > 1}):
            raise EcholabError(f"two columns are named {twice[0]}: give each its own name with AS")
        return relation

    def _frame(self, query: str, params: Mapping[str, Any] | Sequence[Any] | None) -> pl.DataFrame:
        with self._guard():
            table = self._relation(query, params).to_arrow_table()
        try:
            frame = pl.DataFrame(pl.from_arrow(table))
        except pl.exceptions.PolarsError as e:
            raise EcholabError(f"the result has a type that a frame cannot hold, cast it to VARCHAR: {_one_line(e)}") from None
        return frame.with_columns(_integer(frame[c]) for c, t in frame.schema.items() if t == pl.Decimal(38, 0))

    def _batches(self, batches: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        with self._guard():
            yield from batches

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """After an error or an interrupt the transaction is spent; the next query gets a fresh one."""
        try:
            with _clear_errors():
                yield
        except BaseException:
            self._con.execute("ROLLBACK")
            self._con.execute("START TRANSACTION READ ONLY")
            raise

    def _require_runs(self, values: Mapping[str, Any]) -> None:
        """A mistyped run is an error, not an empty answer."""
        runs = sorted({r.run for r in self.snapshot.ledger.live})
        for name in ("run", "a", "b"):
            if (run := values.get(name)) is not None and run not in runs:
                raise EcholabError(f"no run {run!r} in this store" + _hint(run, runs))


def check(query: str) -> None:
    """Refuse what is not exactly one SELECT. `COPY` to a file inside the store would pass DuckDB's own sandbox."""
    size = len(query.encode(errors="replace"))
    if size > MAX_TEXT:
        raise EcholabError(f"the query is {size / 1e6:.1f} MB long: at most {MAX_TEXT / 1e6:.0f} MB of SQL is read")
    with _clear_errors():
        statements = duckdb.extract_statements(query)
    if len(statements) != 1:
        raise EcholabError(f"{REFUSED}; this holds {len(statements)} statements")
    kind = statements[0].type.name
    if kind == "EXPLAIN":  # EXPLAIN ANALYZE runs what it explains
        inner = re.sub(r"^\s*EXPLAIN\s+(ANALYZE\b)?", "", query, count=1, flags=re.IGNORECASE)
        if inner != query:
            return check(inner)
    if kind != "SELECT":
        raise EcholabError(f"{REFUSED}, not {'a PIVOT without IN (...)' if kind == 'MULTI' else kind}")


def views_markdown() -> str:
    """The whole of docs/views.md, from the headers of the files and the types of an empty store."""
    with Session(Snapshot(Store(Path("/")), {})) as s:
        described = {name: s.sql(f"DESCRIBE {name}").select("column_name", "column_type") for name in VIEWS}
    return markdown({name: dict(frame.iter_rows()) for name, frame in described.items()})


_CONFIG: dict[str, Any] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,  # else a table name that is not found is looked up among Python's variables
}


class _Base:
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
            self.view("stored" if name == "rollouts" else name, _scan(self.con, table, self.files[name]))
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
        self.macro("group_kind(run, n_rewarded, n_success, low, high)", _GROUP_KIND)
        self.view("samples", self.samples())

    def view(self, name: str, body: str) -> None:
        self.con.execute(f"CREATE VIEW base.{name} AS {body}")

    def macro(self, head: str, body: str) -> None:
        self.con.execute(f"CREATE MACRO {head} AS {body}")

    def make_live(self) -> None:
        """The live readings, oldest first, and from which step on a later attempt hides them."""
        self.con.execute("CREATE TABLE base.live (ingest_id VARCHAR, place INTEGER, cutoff BIGINT, shares BOOLEAN)")
        if self.ledger.live:
            rows = [
                (r.ingest_id, i, cut, r.n_shared > 0)
                for i, (r, cut) in enumerate(zip(self.ledger.live, _cutoffs(self.ledger), strict=True))
            ]
            columns = [list(c) for c in zip(*rows, strict=True)]
            self.con.execute("INSERT INTO base.live SELECT unnest(?), unnest(?), unnest(?::BIGINT[]), unnest(?)", columns)

    def make_macros(self) -> None:
        given = self.options.success_threshold
        usual = 1.0 if given is None else given
        thresholds = dict.fromkeys(self.runs, _number(usual))
        if given is None:
            kept = {run: c.get("success_threshold") for run, c in self.configs.items()}
            thresholds |= {run: _number(t) for run, t in kept.items() if t is not None and run in thresholds}
        completeness = {r.ingest_id: _text(r.completeness) for r in self.ledger.live}
        self.macro("tol()", _number(self.options.tol))
        self.macro("success_threshold(run)", _lookup("run", thresholds, _number(usual)))
        self.macro("completeness(ingest_id)", _lookup("ingest_id", completeness, "'all'"))
        self.macro("degenerate(kind)", "kind IN ('all_success', 'all_fail', 'constant')")
        self.macro("judged(kind)", "kind IN ('all_success', 'all_fail', 'constant', 'mixed')")
        self.macro("upstream_note(c)", _UPSTREAM_NOTE)
        self.make_choices()

    def make_choices(self) -> None:
        """What `segments` and `tokens` show. Where a choice is missing, the error waits until a view is read."""
        scorer, scorer_id = self.choose("scorer", "scores", self.options.scorer)
        segmenter, _ = self.choose("segmenter", "segmentations", self.options.segmenter, scorer_id)
        tokenizer = self.snapshot.registry("scorers").get(scorer_id or "", {}).get("config", {}).get("tokenizer")
        self.macro("chosen_scorer()", scorer)
        self.macro("chosen_segmenter()", segmenter)
        self.macro("chosen_tokenizer()", "NULL::VARCHAR" if tokenizer is None else _text(str(tokenizer)))

    def choose(self, kind: str, table: str, word: str | None, scorer: str | None = None) -> tuple[str, str | None]:
        """SQL of the chosen id, and the id where there is one: the word's, else the only one with rows."""
        if word is not None:
            id = _resolve(self.snapshot, kind, word)
            return _text(id), id
        files = [f for f in self.files[table] if scorer is None or f.partition["scorer"] == scorer]
        if kind == TABLES[table].partition:
            ids = {f.partition[kind] for f in files}
        else:
            where = f"WHERE scorer = {_text(scorer)}" if scorer else ""
            ids = {row[0] for row in self.con.execute(f"SELECT DISTINCT {kind} FROM base.{table} {where}").fetchall()}
        found = sorted(i for i in ids if i is not None)
        if not found:
            return "NULL::VARCHAR", None
        if len(found) == 1:
            return _text(found[0]), found[0]
        entries = self.snapshot.registry(f"{kind}s")
        names = ", ".join(_label(entries[i]) if i in entries else i for i in found)
        return f"error({_text(f'there are several {kind}s: {names}; choose with --{kind}')})", None

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
        verifier = _text(_resolve(self.snapshot, "verifier", self.options.verifier))
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
            wanted = ", ".join(_text(r) for r in suspects)
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
        runs = ", ".join(_text(r) for r in parted)
        place = "{'part': coalesce(part, -1), 'rollout_id': rollout_id}"
        lengths = {
            c: f"CASE WHEN count({c}) = count(*) THEN sum({c})::BIGINT END AS {c}" for c in ("n_completion_tokens", "n_chars")
        }
        other = {
            **{c: f"min({c}) AS {c}" for c in ("source", "prompt_id", "problem_id")},
            **{c: f"arg_min({c}, {place}) AS {c}" for c in ("score", "success")},
            **lengths,
            "finish_reason": f"arg_max(finish_reason, {place}) AS finish_reason",
            "completeness": "max(completeness) AS completeness",
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
    WHEN n_success = n_rewarded THEN 'all_success'
    WHEN abs(low - failure_reward(run)) <= tol() THEN 'all_fail'
    ELSE 'constant'
END"""

_UPSTREAM_NOTE = """
CASE c WHEN 'filtered' THEN 'filtered upstream' WHEN 'effective' THEN 'filtered upstream: effective rollouts only' END"""

_SAMPLE = (
    "run", "split", "step", "group_id", "role", "source", "prompt_id", "problem_id", "score", "success",
    "n_completion_tokens", "n_chars", "finish_reason", "completeness",
)  # fmt: skip


def _scan(con: duckdb.DuckDBPyConnection, table: Table, files: Sequence[DataFile]) -> str:
    """Exactly these files, typed by the schema. A column that no file has yet is NULL."""
    if not files:
        columns = (f'NULL::{duckdb_type(c.type)} AS "{c.name}"' for c in table.columns)
        return f"SELECT {', '.join(columns)} WHERE false"
    paths = ", ".join(_text(str(f.path)) for f in files)
    source = f"read_parquet([{paths}], union_by_name = true, hive_partitioning = false)"
    there = {row[0] for row in con.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
    values = {c.name: f'"{c.name}"' if c.name in there else "NULL" for c in table.columns}
    columns = (f'{values[c.name]}::{duckdb_type(c.type)} AS "{c.name}"' for c in table.columns)
    return f"SELECT {', '.join(columns)} FROM {source}"


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


def _resolve(snapshot: Snapshot, kind: str, word: str) -> str:
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
        keys.setdefault(v, []).append(_text(k))
    cases = (f"WHEN {key} IN ({', '.join(ks)}) THEN {v}" for v, ks in keys.items())
    return f"CASE {' '.join(cases)} ELSE {default} END"


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _number(value: float) -> str:
    return f"{float(value)!r}::DOUBLE"


def _integer(column: pl.Series) -> pl.Series:
    """DuckDB sums integers into 128 bits; nearly every sum fits into 64."""
    narrow = column.cast(pl.Int64, strict=False)
    return narrow if narrow.null_count() == column.null_count() else column


def _hint(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known) or 'none'}"


@contextmanager
def _clear_errors() -> Iterator[None]:
    """DuckDB's errors as one line each."""
    try:
        yield
    except duckdb.InterruptException:
        raise KeyboardInterrupt from None
    except duckdb.IOException as e:
        if (name := re.search(r'[^"\s]+\.parquet', str(e))) is None:
            raise EcholabError(_one_line(e)) from None
        raise EcholabError(
            f"{Path(name[0]).name}, a file of this version of the store, cannot be read: was it vacuumed? Open a newer version"
        ) from None
    except (duckdb.Error, UnicodeError) as e:
        raise EcholabError(_one_line(e)) from None


def _one_line(error: Exception) -> str:
    """What DuckDB says before it quotes the query, with its hints."""
    text = re.split(r"\n+LINE \d+:", str(error), maxsplit=1)[0]
    if missing := re.search(r'with name "?(\w+)"? is not in the catalog, but it exists in the (\w+) extension', text):
        return f"Catalog Error: {missing[1]} needs the extension {missing[2]}: extensions are switched off"
    text = " ".join(text.removeprefix("Invalid Input Error: ").split())
    return text if len(text) <= 400 else text[:400] + " ..."
