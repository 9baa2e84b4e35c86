"""DuckDB over the exact files of a table, for maintenance: bounded memory, no extensions, typed by the schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb

from echolab.errors import EcholabError
from echolab.schema import Table, duckdb_type

MEMORY = "1GB"


@contextmanager
def scratch(folder: Path | None = None, memory: str = MEMORY) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that spills to a temporary folder, inside `folder` if one is given."""
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as spill:
        con = duckdb.connect(
            config={
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
                "memory_limit": memory,
                "temp_directory": spill,
                "preserve_insertion_order": "false",
            }
        )
        try:
            con.execute("SET TimeZone = 'UTC'")
            yield con
        except duckdb.Error as e:
            raise EcholabError(f"the store's files cannot be read: {str(e).splitlines()[0]}") from None
        finally:
            con.close()


def text(value: object) -> str:
    """An SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def parquet(files: Sequence[Path], options: str = "", *, alike: bool = False) -> str:
    """`read_parquet` over these files, and over nothing else: brackets and stars in a name are no pattern. `alike`: all have
    the same columns; else each query opens all of them only to learn which they have."""
    return f"read_parquet({_names(files)}, union_by_name = {not alike}, hive_partitioning = false{options})"


def _names(files: Sequence[Path]) -> str:
    return f"[{', '.join(text(escape(f)) for f in files)}]"


def escape(path: Path) -> str:
    """A path in which DuckDB sees no pattern: of a folder `a[1]` it would read `a1` instead."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in str(path))


def relation(
    con: duckdb.DuckDBPyConnection, spec: Table, files: Sequence[Path], constants: Mapping[str, str] | None = None
) -> str:
    """A SELECT of all rows with the schema's columns and types; columns that no file has are NULL. `constants` are columns
    of which all files hold one value: a query then need not read them, nor group by them."""
    if not files:
        columns = ", ".join(f'NULL::{duckdb_type(c.type)} AS "{c.name}"' for c in spec.columns)
        return f"SELECT {columns} WHERE false"
    source = parquet(files, alike=_alike(con, files))
    there = {row[0] for row in con.sql(f"DESCRIBE SELECT * FROM {source}").fetchall()}

    def column(name: str, type: str) -> str:
        value = text(constants[name]) if constants and name in constants else f'"{name}"' if name in there else "NULL"
        return f'CAST({value} AS {type}) AS "{name}"'

    columns = ", ".join(column(c.name, duckdb_type(c.type)) for c in spec.columns)
    return f"SELECT {columns} FROM {source}"


def _alike(con: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> bool:
    """All files have the same columns, of the same types."""
    column = "{'name': name, 'type': type, 'logical': logical_type::VARCHAR}"
    columns = f"SELECT list({column} ORDER BY name, type) AS columns FROM parquet_schema({_names(files)}) GROUP BY file_name"
    return con.sql(f"SELECT count(DISTINCT columns) = 1 FROM ({columns})").fetchall()[0][0]
