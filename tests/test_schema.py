"""The schema and what is generated from it."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from echolab import schema
from echolab.schema import TABLES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_the_ddl_makes_a_table_of_these_types(table):
    con = duckdb.connect()
    con.execute(schema.ddl(table))
    described = [(name, type, null == "YES") for name, type, null, *_ in con.sql(f"DESCRIBE {table.name}").fetchall()]
    plain = {c.name: schema.duckdb_type(c.type).replace('"', "") for c in table.columns}  # DuckDB quotes where it must
    assert [(n, t.replace('"', ""), null) for n, t, null in described] == [
        (c.name, plain[c.name], not c.required) for c in table.columns
    ]


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_duckdb_reads_back_the_types_that_arrow_writes(table):
    con = duckdb.connect()
    con.register("empty", table.arrow.empty_table())
    con.execute(schema.ddl(table))
    types = [[row[1] for row in con.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()] for source in ("empty", table.name)]
    assert types[0] == types[1]


def test_every_column_is_documented_and_every_key_exists():
    for table in TABLES.values():
        names = [c.name for c in table.columns]
        assert len(set(names)) == len(names)
        assert all(c.doc for c in table.columns) and table.doc
        assert set(table.key) | set(table.sort) | ({table.partition} if table.partition else set()) <= set(names)
        assert all(table.column(k).required for k in table.key)


def test_the_tables_are_those_of_the_design():
    assert list(TABLES)[:9] == [
        "ingests", "rollouts", "verdicts", "scores", "segmentations", "clips", "profiles", "profile_members", "vocab",
    ]  # fmt: skip
    assert list(TABLES)[9:] == ["runs", "scorers", "segmenters", "verifiers", "clipsets", "cohorts", "exports"]


def fits(value, kind: dict) -> bool:
    """Enough of JSON schema for our own."""
    types = kind["type"] if isinstance(kind["type"], list) else [kind["type"]]
    if value is None:
        return "null" in types
    of = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
    if not any(t != "null" and isinstance(value, of[t]) and (t == "boolean" or not isinstance(value, bool)) for t in types):
        return False
    if isinstance(value, list):
        return all(fits(v, kind["items"]) for v in value)
    if isinstance(value, dict):
        known, rest = kind.get("properties", {}), kind.get("additionalProperties", True)
        if any(r not in value for r in kind.get("required", [])):
            return False
        return all(fits(v, known[k]) if k in known else rest is True or (rest and fits(v, rest)) for k, v in value.items())
    return True


ROW = {
    "rollout_id": "a",
    "ingest_id": "b",
    "run": "r",
    "split": "train",
    "step": 3,
    "role": "policy",
    "group_id": "g",
    "group_source": "explicit",
    "prompt_format": "raw",
    "completion_ids": [1, 2],
    "logprobs": [-0.5, None],
    "loss_mask": [True, False],
    "reward": 1.0,
    "rewards": {"format": 0.5, "accuracy": None},
    "origin": {"file": "f.jsonl", "row": 0},
    "extra": None,
}


@pytest.mark.parametrize(
    ("change", "good"),
    [({}, True), ({"step": None}, True), ({"run": None}, False), ({"step": "3"}, False), ({"completion_ids": [1.5]}, False),
     ({"unknown": 1}, False), ({"rewards": {"x": "y"}}, False), ({"success_recorded": 1}, False)],
)  # fmt: skip
def test_the_json_schema_takes_a_row_and_refuses_a_wrong_one(change, good):
    kind = json.loads(schema.render("json"))["rollouts"]
    assert fits({**ROW, **change}, kind) == good
    assert not fits({k: v for k, v in ROW.items() if k != "run"}, kind)


def test_the_page_of_tables_is_the_generated_one():
    assert (ROOT / "docs" / "tables.md").read_text() == schema.markdown(), (
        "run: echolab store schema --format md > docs/tables.md"
    )


def test_an_unknown_rendering_is_refused():
    with pytest.raises(ValueError, match="ddl, json or md"):
        schema.render("xml")
    assert schema.render("ddl").count("CREATE TABLE") == len(TABLES)
    assert isinstance(TABLES["rollouts"].arrow, pa.Schema)
