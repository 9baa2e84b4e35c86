"""Is a store sound? Every check looks at one snapshot, in its own way: nothing here asks the code that it checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from echolab import scan
from echolab.errors import EcholabError
from echolab.ledger import Ledger
from echolab.schema import TABLES, Table, duckdb_type
from echolab.store import DataFile, Snapshot

AGAIN = "ingest their source again with --replace"
REMAKE = "make them anew"

# Conditions of a damaged row. Where a side is NULL there is nothing to compare, and no damage.
ROW_CHECKS: dict[str, list[tuple[str, str]]] = {
    "rollouts": [
        ("len(logprobs) <> len(completion_ids)", "logprobs and completion_ids differ in length"),
        ("len(loss_mask) <> len(completion_ids)", "loss_mask and completion_ids differ in length"),
        ("n_completion_tokens <> len(completion_ids)", "n_completion_tokens is not the length of completion_ids"),
        ("n_completion_tokens <> len(logprobs)", "n_completion_tokens is not the length of logprobs"),
        ("n_prompt_tokens <> len(prompt_ids)", "n_prompt_tokens is not the length of prompt_ids"),
        ("n_prompt_tokens < 0 OR n_completion_tokens < 0 OR n_chars < 0", "a count is negative"),
    ],
    "scores": [
        ("len(entropies) <> len(token_ids)", "entropies and token_ids differ in length"),
        ("len(logprobs) <> len(token_ids)", "logprobs and token_ids differ in length"),
        ("len(loss_mask) <> len(token_ids)", "loss_mask and token_ids differ in length"),
        ("n_tokens NOT BETWEEN len(token_ids) - 1 AND len(token_ids)", "n_tokens is not the number of tokens"),
    ],
    "segmentations": [
        ("len(segment_ends) <> n_segments", "n_segments is not the length of segment_ends"),
        ("len(segment_entropies) <> n_segments", "n_segments is not the length of segment_entropies"),
        (
            "segment_ends[1] <= 0 OR len(list_filter(range(2, len(segment_ends) + 1),"
            " lambda i: segment_ends[i] <= segment_ends[i - 1])) > 0",
            "segment_ends do not increase",
        ),
        ("peak_segment < 0 OR peak_segment >= n_segments", "peak_segment is no segment"),
    ],
    "clips": [
        ("len(clip_ids) <> n_tokens", "n_tokens is not the length of clip_ids"),
        ("len(clip_mask) <> n_tokens", "n_tokens is not the length of clip_mask"),
    ],
}  # fmt: skip

# Columns whose values are ids (or name@version) of a registry.
REGISTRY_OF = {
    "verdicts": {"verifier": "verifiers"},
    "scores": {"scorer": "scorers"},
    "segmentations": {"scorer": "scorers", "segmenter": "segmenters"},
    "clips": {"clipset": "clipsets", "scorer": "scorers", "segmenter": "segmenters"},
    "profiles": {"profile": "cohorts"},
    "profile_members": {"profile": "cohorts"},
}
OF_ROLLOUTS = ("verdicts", "scores", "segmentations", "clips", "profile_members")

# Rows that a user sees: of live readings, not sampled again by a later attempt.
SHOWN = """
WITH live AS (
  SELECT * FROM ingests WHERE ingest_id NOT IN (SELECT unnest(supersedes) FROM ingests)
), attempts AS (
  SELECT run, attempt, min(start_step) AS first FROM live GROUP BY ALL
), readings AS (
  SELECT l.ingest_id, min(later.first) AS cutoff
  FROM live l LEFT JOIN attempts later ON later.run = l.run AND later.attempt > l.attempt GROUP BY ALL
)
SELECT r.{columns} FROM rollouts r JOIN readings USING (ingest_id) WHERE (r.step >= cutoff) IS NOT TRUE
"""


@dataclass
class _Look:
    """A snapshot under examination."""

    snapshot: Snapshot
    con: duckdb.DuckDBPyConnection
    problems: list[str] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)  # tables all of whose files can be read

    def rows(self, query: str) -> list[tuple]:
        return self.con.sql(query).fetchall()

    def report(self, table: str, what: str, todo: str) -> None:
        self.problems.append(f"{table}: {what}: {todo}")


def validate(snapshot: Snapshot, deep: bool = True) -> list[str]:
    """The problems of a store, one line each with what to do; empty for a sound one. Not `deep`: files, types and
    registries only, without reading the rows of large tables."""
    with scan.scratch() as con:
        look = _Look(snapshot, con)
        for spec in TABLES.values():
            _check_table(look, spec)
        if "ingests" in look.whole:
            _check_ledger(look, deep)
        if deep:
            for spec in TABLES.values():
                _check_rows(look, spec)
            _check_unique(look)
            _check_references(look)
        return look.problems


def leftovers(snapshot: Snapshot) -> list[str]:
    """What is no damage, but worth knowing: rows that nobody sees any more, and what was derived from them."""
    with scan.scratch() as con:
        look = _Look(snapshot, con)
        for name in ("ingests", "rollouts", *OF_ROLLOUTS):
            _check_table(look, TABLES[name])
        unfinished, replaced = look.rows("""
            SELECT count(*) FILTER (ingest_id NOT IN (SELECT ingest_id FROM ingests)),
                   count(*) FILTER (ingest_id IN (SELECT unnest(supersedes) FROM ingests)) FROM rollouts""")[0]
        notes = []
        if unfinished:
            notes.append(f"rollouts: {unfinished} rows of unfinished readings, never shown: `echolab store compact` drops them")
        if replaced:
            notes.append(f"rollouts: {replaced} rows of replaced readings, not shown: `echolab store compact` drops them")
        for name in OF_ROLLOUTS if _was_replaced(look) else ():
            count = _without_rollout(look, name)[0]
            if count:
                notes.append(f"{name}: {count} rows belong to rollouts that were replaced: they stay, and are not counted")
        return notes


# Files and types.


def _check_table(look: _Look, spec: Table) -> None:
    name = spec.name
    try:
        files = look.snapshot.files(name)
        if name in look.snapshot.versions:
            delta = look.snapshot.store.delta(name, look.snapshot.versions[name])
            for what, todo in _differences(spec, pa.schema(delta.schema().to_arrow())):
                look.report(name, what, todo)
    except EcholabError as e:
        look.problems.append(f"{name}: {e}")
        files = []
    else:
        look.whole.add(name)
    sound = []
    for f in files:
        bad = _file_problem(spec, f)
        if bad:
            look.report(name, f"file {f.name} {bad}", "restore it from a backup; its rows cannot be shown")
            look.whole.discard(name)
        else:
            sound.append(f.path)
    _view(look, spec, sound)


def _view(look: _Look, spec: Table, files: Sequence[Path]) -> None:
    look.con.execute(f'CREATE VIEW "{spec.name}" AS {scan.relation(look.con, spec, files)}')


def _differences(spec: Table, there: pa.Schema) -> Iterator[tuple[str, str]]:
    ours = spec.arrow
    for f in ours:
        if f.name not in there.names:
            yield f"column {f.name} is missing", "run `echolab store migrate`"
        elif type_name(there.field(f.name).type) != type_name(f.type):
            yield (
                f"column {f.name} is {type_name(there.field(f.name).type)}, not {type_name(f.type)}",
                "was it written by other software?",
            )
        elif there.field(f.name).nullable != f.nullable:
            yield f"column {f.name} {'may' if not f.nullable else 'may not'} be NULL", "was it written by other software?"
    for column in there.names:
        if column not in ours.names:
            yield f"column {column} is unknown", "update echolab"


def type_name(type: pa.DataType) -> str:
    """A type as DuckDB names it, whatever Arrow calls the fields inside."""
    try:
        return duckdb_type(type)
    except KeyError:
        return str(type)


def _file_problem(spec: Table, file: DataFile) -> str | None:
    if not file.path.exists():
        return "is missing"
    if file.path.stat().st_size != file.size:
        return f"has {file.path.stat().st_size} bytes, not {file.size}"
    try:
        footer = pq.read_metadata(file.path)
        there = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as e:
        return f"cannot be read ({str(e).splitlines()[0][:100]})"
    if footer.num_rows != file.rows:
        return f"has {footer.num_rows} rows, not {file.rows}"
    for what, _ in _differences(spec, there):
        if "missing" not in what and "NULL" not in what:  # old files lack new columns; NULLs are looked for in the rows
            return f"does not fit: {what}"
    wrong = _wrong_partition(spec, file, footer)
    return f"lies in the partition of {file.partition} and holds {wrong!r}" if wrong is not None else None


def _wrong_partition(spec: Table, file: DataFile, footer: pq.FileMetaData) -> str | None:
    if spec.partition is None:
        return None
    paths = [footer.schema.column(i).path for i in range(len(footer.schema))]
    if spec.partition not in paths:
        return None
    leaf = paths.index(spec.partition)
    for i in range(footer.num_row_groups):
        stats = footer.row_group(i).column(leaf).statistics
        if stats is not None and stats.has_min_max:
            for value in (stats.min, stats.max):
                if value != file.partition[spec.partition]:
                    return str(value)
    return None


# The ledger.


def _check_ledger(look: _Look, deep: bool) -> None:
    ledger = Ledger.of(look.snapshot.table("ingests").to_pylist())
    known = {r.ingest_id for r in ledger.readings}
    for r in ledger.readings:
        for other in r.supersedes:
            if other not in known or other == r.ingest_id:
                look.report("ingests", f"reading {r.ingest_id} replaces {other}, which is no other reading", AGAIN)
    by_id = {r.ingest_id: r for r in ledger.readings}
    for r in ledger.live:
        before = by_id.get(r.options.get("continues", ""))
        if before and (before.run, before.source_path) != (r.run, r.source_path) or before and r.bytes_read < before.bytes_read:
            look.report(
                "ingests", f"reading {r.ingest_id} of {r.source_path} in run {r.run} does not continue the one before", AGAIN
            )
        _check_quarantine(look, r.ingest_id, r.n_quarantined)
    if deep and "rollouts" in look.whole:
        _check_readings(look, ledger)


def _check_quarantine(look: _Look, ingest_id: str, n: int) -> None:
    path = look.snapshot.store.quarantine / f"{ingest_id}.jsonl"
    if n and not path.exists():
        look.report("ingests", f"the quarantine file {path.name} is missing ({n} rows)", "restore it from a backup")
    elif path.exists():
        with path.open("rb") as f:
            lines = sum(1 for _ in f)
        if lines != n:
            look.report("ingests", f"the quarantine file {path.name} has {lines} lines, not {n}", "restore it from a backup")


def _check_readings(look: _Look, ledger: Ledger) -> None:
    found = {
        row[0]: row[1:]
        for row in look.rows("SELECT ingest_id, count(*), min(step), min(run), max(run) FROM rollouts GROUP BY ingest_id")
    }
    for r in ledger.live:
        rows, first, low_run, high_run = found.get(r.ingest_id, (0, None, r.run, r.run))
        name = f"reading {r.ingest_id} of {r.source_path}"
        if rows != r.n_rows:
            look.report("ingests", f"{name} has {rows} rows, not {r.n_rows}", AGAIN)
        elif first != r.start_step:
            look.report("ingests", f"{name} starts at step {first}, not {r.start_step}", AGAIN)
        if (low_run, high_run) != (r.run, r.run):
            look.report("ingests", f"{name} has rows of run {low_run if low_run != r.run else high_run}, not {r.run}", AGAIN)


# Rows.


def _check_rows(look: _Look, spec: Table) -> None:
    """All conditions on the rows of one table, in one pass."""
    checks = [(f'"{c.name}" IS NULL', f"{c.name} is NULL") for c in spec.columns if c.required]
    checks += ROW_CHECKS.get(spec.name, [])
    example = f'"{spec.key[0]}"'
    counts = ", ".join(f"count(*) FILTER ({when}), min({example}) FILTER ({when})" for when, _ in checks)
    row = look.rows(f'SELECT {counts} FROM "{spec.name}"')[0]
    todo = AGAIN if spec.name == "rollouts" else REMAKE
    for (_, what), count, first in zip(checks, row[::2], row[1::2], strict=True):
        if count:
            look.report(spec.name, f"{what} in {count} rows (the first: {first})", todo)


def _check_unique(look: _Look) -> None:
    for spec in TABLES.values():
        key = ", ".join(f'"{k}"' for k in spec.key)
        source = f'"{spec.name}"'
        if spec.name == "rollouts":  # a rollout of two readings is shown once; of one reading it would be shown twice
            key, source = "rollout_id, ingest_id", f"({SHOWN.format(columns='rollout_id, ingest_id')})"
        twice = f'SELECT "{spec.key[0]}" AS k FROM {source} GROUP BY {key}, k HAVING count(*) > 1'
        count, first = look.rows(f"SELECT count(*), min(k) FROM ({twice})")[0]
        if count:
            todo = AGAIN if spec.name == "rollouts" else REMAKE
            look.report(spec.name, f"{count} keys ({', '.join(spec.key)}) stand twice (the first: {first})", todo)


def _check_references(look: _Look) -> None:
    replaced = _was_replaced(look)
    for name in OF_ROLLOUTS:
        count, first = _without_rollout(look, name)
        if count and not replaced and "rollouts" in look.whole:
            look.report(name, f"{count} rows have no rollout (the first: {first})", REMAKE)
    for name, columns in REGISTRY_OF.items():
        for column, registry in columns.items():
            entry = "name || '@' || version" if registry in ("clipsets", "cohorts") else "id"
            missing = look.rows(f"""
                SELECT DISTINCT "{column}" FROM "{name}"
                WHERE "{column}" IS NOT NULL AND "{column}" NOT IN (SELECT {entry} FROM {registry}) ORDER BY ALL LIMIT 3""")
            if missing and registry in look.whole:
                look.report(name, f"{column} {', '.join(m for (m,) in missing)} is not in {registry}", REMAKE)
    count, first = look.rows("""
        SELECT count(*), min(s.rollout_id) FROM segmentations s ANTI JOIN scores USING (rollout_id, scorer)""")[0]
    if count and "scores" in look.whole:
        look.report("segmentations", f"{count} rows have no score (the first: {first})", REMAKE)
    count, first = look.rows("""
        SELECT count(*), min(s.rollout_id) FROM segmentations s JOIN scores c USING (rollout_id, scorer)
        WHERE s.segment_ends[-1] > len(c.token_ids)""")[0]
    if count:
        look.report("segmentations", f"segment_ends pass the last token in {count} rows (the first: {first})", REMAKE)


def _was_replaced(look: _Look) -> bool:
    return look.rows("SELECT count(*) FROM ingests WHERE len(supersedes) > 0")[0][0] > 0


def _without_rollout(look: _Look, name: str) -> tuple[int, str | None]:
    query = f'SELECT count(*), min(d.rollout_id) FROM "{name}" d ANTI JOIN rollouts USING (rollout_id)'
    count, first = look.rows(query)[0]
    return count, first
