"""Frames as people and programs want them: an aligned table, CSV, JSON, Markdown, Parquet."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from echolab.errors import WrongUsage

if TYPE_CHECKING:
    import polars as pl

FORMATS = ("table", "csv", "json", "md", "parquet")
SUFFIXES = {"": "table", ".txt": "table", ".csv": "csv", ".json": "json", ".md": "md", ".parquet": "parquet"}
SHOWN_ROWS = 50
CELL_CHARS = 60
SAFE_INTEGER = 2**53  # above it, readers of JSON lose digits


def write(frame: pl.DataFrame, format: str | None, out: Path | None, rows: int = SHOWN_ROWS) -> None:
    """Write a frame to a file, by its suffix where no format is given, or to stdout. Only a table on stdout leaves
    something out, and says so."""
    suffix = out.suffix.lower() if out else ""
    if format is None and suffix not in SUFFIXES:
        raise WrongUsage(f"{out}: its suffix names no format; use {', '.join(s for s in SUFFIXES if s)}, or give --format")
    format = format or SUFFIXES[suffix]
    if format not in FORMATS:
        raise WrongUsage(f"unknown format {format!r}: use {', '.join(FORMATS)}")
    if format == "parquet":
        if out is None:
            raise WrongUsage("Parquet goes to a file: give --out FILE")
        frame.write_parquet(out)
        return
    if out is None:
        try:
            _text(frame, format, rows, sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        with out.open("w", encoding="utf-8", newline="") as f:
            _text(frame, format, 0, f)


def _text(frame: pl.DataFrame, format: str, rows: int, out: TextIO) -> None:
    if format == "json":
        _json(frame, out)
    elif format == "csv":
        _csv(frame, out)
    elif format == "md":
        out.write(markdown(frame))
    else:
        out.write(table(frame, rows))


def _json(frame: pl.DataFrame, out: TextIO) -> None:
    """{"columns": [{name, type}], "rows": [{...}]}, all rows, written in slices."""
    import orjson

    columns = [{"name": n, "type": _type(t)} for n, t in frame.schema.items()]
    out.write('{"columns": ' + orjson.dumps(columns).decode() + ', "rows": [')
    for start in range(0, frame.height, 4096):
        for i, row in enumerate(frame.slice(start, 4096).iter_rows(named=True)):
            comma = "" if start == i == 0 else ",\n"
            out.write(comma + orjson.dumps({k: plain(v) for k, v in row.items()}, option=orjson.OPT_NON_STR_KEYS).decode())
    out.write("]}\n")


def _type(dtype: Any) -> str:
    """A type by its SQL name."""
    import polars as pl

    names = {
        pl.String: "VARCHAR", pl.Boolean: "BOOLEAN", pl.Int8: "TINYINT", pl.Int16: "SMALLINT", pl.Int32: "INTEGER",
        pl.Int64: "BIGINT", pl.UInt64: "UBIGINT", pl.Float32: "FLOAT", pl.Float64: "DOUBLE", pl.Binary: "BLOB", pl.Date: "DATE",
    }  # fmt: skip
    if isinstance(dtype, pl.List):
        return _type(dtype.inner) + "[]"
    if isinstance(dtype, pl.Struct):
        return "STRUCT(" + ", ".join(f'"{f.name}" {_type(f.dtype)}' for f in dtype.fields) + ")"
    if isinstance(dtype, pl.Datetime):
        return "TIMESTAMP WITH TIME ZONE" if dtype.time_zone else "TIMESTAMP"
    return names.get(dtype.base_type(), str(dtype).upper())


def plain(value: Any) -> Any:
    """A value as JSON can say it: no NaN or infinity, large integers and bytes as strings, times in ISO 8601."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if -SAFE_INTEGER <= value <= SAFE_INTEGER else str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value) if value.is_finite() else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value)


def _csv(frame: pl.DataFrame, out: TextIO) -> None:
    import orjson

    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(frame.columns)
    for row in frame.iter_rows():
        cells = [orjson.dumps(plain(v)).decode() if isinstance(v, list | dict) else v for v in row]
        writer.writerow(["" if v is None else v.isoformat() if isinstance(v, datetime | date) else v for v in cells])


def table(frame: pl.DataFrame, rows: int = SHOWN_ROWS) -> str:
    """Aligned columns. Rows beyond `rows` are left out and long texts cut; 0 shows all."""
    if frame.columns == ["explain_key", "explain_value"]:
        return "\n".join(frame["explain_value"]) + "\n"
    shown = frame.head(rows) if rows else frame
    chars = CELL_CHARS if rows else None
    numeric = [t.is_numeric() for t in frame.dtypes]
    cells = [[cell(v, chars) for v in row] for row in shown.iter_rows()]
    widths = [max([len(n), *(len(r[i]) for r in cells)]) for i, n in enumerate(frame.columns)]

    def line(values: list[str]) -> str:
        parts = [v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip() + "\n"

    out = io.StringIO()
    out.write(line(list(frame.columns)))
    out.write("  ".join("-" * w for w in widths) + "\n")
    out.writelines(line(row) for row in cells)
    if shown.height < frame.height:
        out.write(f"({frame.height:,} rows, {shown.height:,} shown: --rows 0 shows all)\n")
    elif frame.height == 0:
        out.write("(no rows)\n")
    return out.getvalue()


def markdown(frame: pl.DataFrame) -> str:
    lines = [list(frame.columns), ["--:" if t.is_numeric() else "---" for t in frame.dtypes]]
    lines += [[cell(v).replace("|", "\\|") for v in row] for row in frame.iter_rows()]
    return "".join("| " + " | ".join(row) + " |\n" for row in lines)


def cell(value: Any, chars: int | None = None) -> str:
    """One value on one line. Control characters of a model's text do not reach the terminal."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value.isoformat(sep=" ", timespec="seconds") if isinstance(value, datetime) else str(value)
    text = "".join(c if c.isprintable() else "·" for c in " ".join(text.split()))
    return text if chars is None or len(text) <= chars else text[: chars - 1] + "…"


def facts(document: dict[str, Any], indent: int = 0) -> str:
    """A nested document as indented lines; like records, in a list or by their names, as a table."""
    out = io.StringIO()
    for key, value in document.items():
        name = " " * indent + str(key).replace("_", " ")
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            value = [{str(key).removesuffix("s"): k} | v for k, v in value.items()]  # runs: run, rollouts, ...
        if isinstance(value, dict):
            out.write(f"{name}:\n{facts(value, indent + 2)}" if value else "")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            import polars as pl

            records = [{k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in r.items()} for r in value]
            lines = table(pl.DataFrame(records, infer_schema_length=None), 0).splitlines()
            out.write(f"{name}:\n" + "".join(" " * (indent + 2) + line + "\n" for line in lines))
        elif isinstance(value, list):
            out.write(f"{name}: {', '.join(map(str, value)) or 'none'}\n")
        else:
            out.write(f"{name}: {f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else value}\n")
    return out.getvalue()
