"""Clips as our own trainer replays them: token ids, with the mask and weight of each clip."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute

from echolab.export.base import IDS, Job, Shape
from echolab.files import pc
from echolab.schema import BOOLS, FLOAT64, INT64, STRING, TOKEN_IDS

NAME, TAKES, FILES = "replay", ("clips",), "{split}.parquet"
FORMS = ()

SCHEMA = pa.schema(
    [("prompt_ids", TOKEN_IDS), ("clip_ids", TOKEN_IDS), ("clip_mask", BOOLS), ("weight", FLOAT64), ("problem_id", STRING),
     ("step", INT64), ("tokenizer", STRING), ("temperature", FLOAT64), ("clip_id", STRING)]
)  # fmt: skip


def shape(what: str, form: str) -> Shape:
    return Shape(SCHEMA, tuple(SCHEMA.names), IDS, _explicit)


def _explicit(rows: pa.Table, job: Job) -> pa.Table:
    """No mask means that all tokens count, no weight means 1: here both are written out."""
    masks = rows["clip_mask"].combine_chunks()
    lengths = pc.list_value_length(rows["clip_ids"].combine_chunks())
    if masks.null_count:
        all_of = pa.array([[True] * n for n in lengths.to_pylist()], BOOLS)
        masks = pc.if_else(pc.is_valid(masks), masks, all_of)
    weights = pc.coalesce(rows["weight"], pa.scalar(1.0))
    for name, values in (("clip_mask", masks), ("weight", weights)):
        rows = rows.set_column(rows.column_names.index(name), name, values)
    return rows
