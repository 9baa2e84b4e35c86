"""A DuckDB session over one snapshot of a store.

On the ground of echolab/views.py stand the views of sql/views, which users see; sql/queries holds the named queries. A
session reads and never writes, and sees no file outside its store.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import polars as pl

from echolab.errors import EcholabError
from echolab.queries import find_query, list_queries, markdown, view_files
from echolab.store import Snapshot, Store
from echolab.views import VIEWS, Base, Options, text

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Options", "Session", "check", "list_queries", "views_markdown"]

T = TypeVar("T")
MAX_TEXT = 1 << 20  # bytes of one query
REFUSED = "only one SELECT is allowed here (also WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE and EXPLAIN of one)"


class Session:
    """`with Session(store.snapshot()) as s: s.sql("SELECT ...")`. What is committed later does not show."""

    def __init__(
        self,
        snapshot: Snapshot,
        options: Options | None = None,
        *,
        memory_limit: str | None = None,
        threads: int | None = None,
        keep: Mapping[str, str] | None = None,
        beside: int = 0,
    ):
        """`keep` are SELECTs by name whose answers are held as tables; one that is named as a view takes its place. `beside`
        are further sessions over the same views, for other threads."""
        self.snapshot = snapshot
        self.beside: list[Session] = []
        self.give_up: Callable[[], str | None] | None = None  # asked while a query runs: why it should end
        self._scratch = tempfile.TemporaryDirectory(prefix="echolab-", ignore_cleanup_errors=True)
        limits = {k: v for k, v in (("memory_limit", memory_limit), ("threads", threads)) if v is not None}
        self._con = duckdb.connect(config=_CONFIG | {"temp_directory": self._scratch.name} | limits)
        try:
            with _clear_errors():
                self._set(remember=beside > 0)
                Base(self._con, snapshot, options or Options()).build()
                for name in VIEWS:
                    self._con.execute(f"CREATE VIEW {name} AS {view_files()[name].sql}")
                if keep:
                    self._keep(keep)
                self.beside = [self._another() for _ in range(beside)]
                self._lock()
        except BaseException:
            self.close()
            raise

    def _set(self, remember: bool) -> None:
        """What each connection has to be told. A session that lives long remembers the footers of files."""
        self._con.execute("SET TimeZone = 'UTC'")
        self._con.execute(f"SET parquet_metadata_cache = {remember}")

    def _keep(self, tables: Mapping[str, str]) -> None:
        self._con.execute("CREATE SCHEMA kept")
        for name, query in tables.items():
            self._con.execute(f"CREATE TABLE kept.{name} AS {query}")
            self._con.execute(f"CREATE OR REPLACE VIEW {name} AS FROM kept.{name}")

    def _another(self) -> Session:
        other = copy(self)
        other._con, other.beside = self._con.cursor(), []
        other._set(remember=True)
        return other

    def _lock(self) -> None:
        """No file outside the store, no setting, no write. The transaction is what refuses a DELETE inside a WITH."""
        self._con.execute(f"SET allowed_directories = [{text(str(self.snapshot.store.root) + '/')}]")
        self._con.execute("SET enable_external_access = false")
        self._con.execute("SET lock_configuration = true")
        for session in (self, *self.beside):
            session._con.execute("START TRANSACTION READ ONLY")

    def sql(self, query: str, params: Mapping[str, Any] | Sequence[Any] | None = None) -> pl.DataFrame:
        """The answer to one SELECT."""
        check(query)
        return self._frame(query, params)

    def query(self, name: str, /, **params: Any) -> pl.DataFrame:
        """The answer of a named query. Parameters may be given as text, as they are on the command line."""
        query = find_query(name)
        values = query.bind(params)
        self._require_runs(name, values)
        return self._frame(query.sql, values)

    def batches(self, query: str, rows: int = 2048) -> Iterator[pa.RecordBatch]:
        """The answer to one SELECT in pieces, for what does not fit into memory. Ask nothing else until it has ended."""
        check(query)
        with self._guard(query):
            yield from self._relation(query, None).to_arrow_reader(rows)

    def close(self) -> None:
        for other in self.beside:
            other._con.close()
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
        with self._guard(query):
            table = self._wait(lambda: self._relation(query, params).to_arrow_table())
        try:
            frame = pl.DataFrame(pl.from_arrow(table))
        except pl.exceptions.PolarsError as e:
            raise EcholabError(f"the result has a type that a frame cannot hold, cast it to VARCHAR: {_one_line(e)}") from None
        return frame.with_columns(_integer(frame[c]) for c, t in frame.schema.items() if t == pl.Decimal(38, 0))

    def _wait(self, work: Callable[[], T]) -> T:
        """Work in a thread, and look for Ctrl-C meanwhile: DuckDB may look only when the query has ended, and after
        Polars is imported a signal no longer ends a wait."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                while not future.done():
                    wait([future], 0.1)
                    if self.give_up and not future.done() and (why := self.give_up()):
                        raise EcholabError(why)
            except (KeyboardInterrupt, EcholabError):
                while not future.done():  # again, should the query only now begin
                    self._con.interrupt()
                    wait([future], 0.05)
                raise
            return future.result()

    @contextmanager
    def _guard(self, query: str) -> Iterator[None]:
        """After an error or an interrupt the transaction is spent; the next query gets a fresh one."""
        try:
            with _clear_errors(query):
                yield
        except BaseException:
            self._con.execute("ROLLBACK")
            self._con.execute("START TRANSACTION READ ONLY")
            raise

    def _require_runs(self, query: str, values: Mapping[str, Any]) -> None:
        """A mistyped run is an error, not an empty answer."""
        runs = sorted({r.run for r in self.snapshot.ledger.live})
        for name in ("a", "b") if query == "compare_runs" else ("run",):
            if (run := values.get(name)) is not None and run not in runs:
                raise EcholabError(f"no run {run!r} in this store" + _hint(run, runs))


def check(query: str) -> None:
    """Refuse what is not exactly one SELECT. `COPY` to a file inside the store would pass DuckDB's own sandbox."""
    with _clear_errors():
        size = len(query.encode())
    if size > MAX_TEXT:
        raise EcholabError(f"the query is {size / 1e6:.1f} MB long: at most {MAX_TEXT / 1e6:.0f} MB of SQL is read")
    with _clear_errors():
        statements = duckdb.extract_statements(query)
    if not statements:
        raise EcholabError("there is no query: give one SELECT")
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


def _integer(column: pl.Series) -> pl.Series:
    """DuckDB sums integers into 128 bits; nearly every sum fits into 64."""
    narrow = column.cast(pl.Int64, strict=False)
    return narrow if narrow.null_count() == column.null_count() else column


def _hint(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known) or 'none'}"


@contextmanager
def _clear_errors(query: str = "") -> Iterator[None]:
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
        raise EcholabError(_one_line(e, query)) from None


def _one_line(error: Exception, query: str = "") -> str:
    """What DuckDB says before it quotes the query, with its hints."""
    text = re.split(r"\n+LINE \d+:", str(error), maxsplit=1)[0]
    if (column := re.search(r'Referenced column "([^"]+)" ', text)) and f'"{column[1]}"' in query:
        text += f"; texts stand in single quotes: '{column[1]}'"
    if missing := re.search(r'with name "?(\w+)"? is not in the catalog, but it exists in the (\w+) extension', text):
        return f"Catalog Error: {missing[1]} needs the extension {missing[2]}: extensions are switched off"
    text = " ".join(text.removeprefix("Invalid Input Error: ").split())
    return text if len(text) <= 400 else text[:400] + " ..."
