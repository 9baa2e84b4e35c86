"""The chosen rows in their order, piece by piece. To sort whole rows would take memory for all of them: what is sorted are
their ids, and each piece then fetches its rows, from the few row groups that they lie in."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echolab.export.base import Shape
from echolab.export.select import ORDER, Selection
from echolab.scan import parquet
from echolab.schema import INT64, STRING
from echolab.views import text

PIECE_BYTES = 256 << 20  # of whole rows, about
BATCH_ROWS = 1024

_ID = {"clips": "clip_id", "rollouts": "rollout_id", "prompts": "rollout_id"}
_PROMPT = "3 * coalesce(strlen(prompt), strlen(messages), 0)"  # its text, messages and ids
_BYTES = {
    "clips": f"1024 + {_PROMPT} + 12 * n_tokens",
    "rollouts": f"""1024 + {_PROMPT} + 2 * coalesce(n_chars, 0) + 12 * coalesce(n_completion_tokens, 0)
        + coalesce(strlen(extra), 0)""",
    "prompts": f"1024 + {_PROMPT}",
}
_PLACES = pa.schema([("id", STRING), ("place", INT64)])


@dataclass(frozen=True)
class Piece:
    """Rows of one split, from place `first` up to `end`. `near` is a condition on the columns that files are sorted by."""

    split: str
    first: int
    end: int
    near: str


def plan(chosen: Selection, file: Path) -> list[Piece]:
    """The pieces; the ids with their places go to `file`, inside the store."""
    what = chosen.what
    step = "NULL::BIGINT" if what == "prompts" else "step"
    query = f"""SELECT {_ID[what]} AS id, _split AS split, run, {step} AS step, ({_BYTES[what]})::BIGINT AS bytes
        FROM ({chosen.sql}) ORDER BY _split, {ORDER[what]}"""
    pieces: list[Piece] = []
    held: list[dict[str, Any]] = []
    place = size = 0
    with pq.ParquetWriter(file, _PLACES) as writer:
        for batch in chosen.session.batches(query):
            rows = batch.to_pylist()
            writer.write_table(_places(rows, place))
            for row in rows:
                if held and (size + row["bytes"] > PIECE_BYTES or row["split"] != held[0]["split"]):
                    pieces.append(_piece(what, held, place))
                    held, size = [], 0
                held.append(row)
                size, place = size + row["bytes"], place + 1
    return [*pieces, _piece(what, held, place)] if held else pieces


def _places(rows: Sequence[dict[str, Any]], first: int) -> pa.Table:
    return pa.table([[r["id"] for r in rows], range(first, first + len(rows))], schema=_PLACES)


def _piece(what: str, rows: Sequence[dict[str, Any]], end: int) -> Piece:
    return Piece(rows[0]["split"], end - len(rows), end, _near(what, rows))


def _near(what: str, rows: Sequence[dict[str, Any]]) -> str:
    if what == "prompts":
        return "true"
    if what == "clips":  # in the order of their ids
        return f"rows.clip_id BETWEEN {text(rows[0]['id'])} AND {text(rows[-1]['id'])}"
    steps = {r["step"] for r in rows}
    known = steps - {None}
    span = [f"rows.step BETWEEN {min(known)} AND {max(known)}"] if known else []
    unknown = ["rows.step IS NULL"] if None in steps else []
    runs = ", ".join(sorted(text(r) for r in {r["run"] for r in rows}))
    return f"rows.run IN ({runs}) AND ({' OR '.join(span + unknown)})"


def fetch(chosen: Selection, shape: Shape, piece: Piece, file: Path) -> Generator[pa.Table, None, None]:
    """The rows of a piece, some at a time."""
    columns = ", ".join(_column(c, chosen.what) for c in shape.reads)
    places = f"SELECT id, place FROM {parquet([file])} WHERE place >= {piece.first} AND place < {piece.end}"
    query = f"""SELECT {columns} FROM ({chosen.base}) rows JOIN ({places}) places ON places.id = rows.{_ID[chosen.what]}
        WHERE {piece.near} ORDER BY places.place"""
    for batch in chosen.session.batches(query, BATCH_ROWS):
        yield pa.Table.from_batches([batch])


def _column(name: str, what: str) -> str:
    pairs = what == "rollouts" and name == "rewards"
    return f"map_entries(rows.{name}) AS {name}" if pairs else f"rows.{name}"
