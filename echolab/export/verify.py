"""Is an export still what was written, and does it say what the store says?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from echolab.errors import EcholabError
from echolab.export.files import digest
from echolab.export.provenance import NAME
from echolab.scan import escape, parquet, relation, scratch, text
from echolab.schema import TABLES
from echolab.store import Snapshot, Store

SHOWN = 20  # clips that are named one by one


def verify(folder: str | Path, store: Store | None = None) -> list[str]:
    """Every way in which an export is not sound, one line each: its files and counts; with a store also the clips that are
    not a prefix of their rollout's scored tokens."""
    folder = Path(folder).expanduser()
    document = _read(folder)
    problems = [*_files(folder, document), *_counts(document)]
    if store is not None and document["config"]["what"] == "clips" and not problems:
        problems += _prefixes(folder, document, store)
    return problems


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        document = json.loads(path.read_bytes())
        _ = [document["config"]["what"], document["config"]["clipset"], document["counts"], document["scorer"]]
        _ = [(f["path"], f["sha256"], f["bytes"], f["rows"]) for f in document["files"]]
    except FileNotFoundError:
        raise EcholabError(f"{folder} is no export: it has no {NAME}") from None
    except (ValueError, KeyError, TypeError):
        raise EcholabError(f"{path} is damaged: it is not the provenance of an export") from None
    return document


def _files(folder: Path, document: dict[str, Any]) -> Iterator[str]:
    named = {f["path"] for f in document["files"]}
    for f in document["files"]:
        path = folder / f["path"]
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            yield f"{f['path']}: missing"
        elif path.stat().st_size != f["bytes"]:
            yield f"{f['path']}: {path.stat().st_size:,} bytes, {f['bytes']:,} were written"
        elif digest(path) != f["sha256"]:
            yield f"{f['path']}: its sha256 is not the one that was written"
        elif (rows := _rows(path)) is not None and rows != f["rows"]:
            yield f"{f['path']}: {rows:,} rows, the provenance says {f['rows']:,}"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in named | {NAME}:
            yield f"{name}: not part of the export"


def _rows(path: Path) -> int | None:
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as f:
        return sum(1 for _ in f)


def _counts(document: dict[str, Any]) -> Iterator[str]:
    for c in document["counts"]:
        if c["in"] - sum(c["dropped"].values()) != c["out"]:
            yield f"stage {c['stage']}: {c['in']:,} in, {sum(c['dropped'].values()):,} left out, {c['out']:,} out do not add up"
    written = sum(f["rows"] or 0 for f in document["files"])
    if document["counts"] and document["counts"][-1]["out"] != written:
        yield f"{document['counts'][-1]['out']:,} rows came out of the last stage, the files have {written:,}"


def _prefixes(folder: Path, document: dict[str, Any], store: Store) -> Iterator[str]:
    """Of the clips in the files where these have ids, else of the store's clip set."""
    snapshot, label = store.snapshot(), document["config"]["clipset"]
    clips = [f.path for f in snapshot.files("clips") if f.partition["clipset"] == label]
    if not clips:
        yield f"the store has no clips of {label}"
        return
    written = [folder / f["path"] for f in document["files"] if f["rows"] is not None]
    with scratch() as db:
        stored, scored = (relation(db, TABLES[t], files) for t, files in (("clips", clips), ("scores", _scores(snapshot))))
        bad = db.sql(_PREFIXES.format(exported=_exported(written) or stored, stored=stored, scored=scored)).fetchall()
    for clip_id, why in bad[:SHOWN]:
        yield f"clip {clip_id}: {why}"
    if len(bad) > SHOWN:
        yield f"{len(bad) - SHOWN:,} more clips like these"


_PREFIXES = """
SELECT e.clip_id, CASE
    WHEN c.clip_id IS NULL THEN 'the store''s clip set does not have it'
    WHEN s.rollout_id IS NULL THEN 'its rollout has no scores in the store'
    ELSE 'not a prefix of its rollout''s scored tokens' END
FROM (SELECT clip_id, clip_ids FROM ({exported})) e
LEFT JOIN (SELECT clip_id, rollout_id, scorer FROM ({stored})) c ON c.clip_id = e.clip_id
LEFT JOIN (SELECT rollout_id, scorer, token_ids FROM ({scored})) s ON s.rollout_id = c.rollout_id AND s.scorer = c.scorer
WHERE coalesce(e.clip_ids <> s.token_ids[:len(e.clip_ids)], s.rollout_id IS NULL)
ORDER BY ALL"""


def _scores(snapshot: Snapshot) -> list[Path]:
    return [f.path for f in snapshot.files("scores")]


def _exported(files: list[Path]) -> str | None:
    """Rows of files that hold clips with their ids; None where they hold something else."""
    if files[0].suffix == ".parquet":
        has_ids = {"clip_id", "clip_ids"} <= set(pq.read_schema(files[0]).names)
        return f"SELECT * FROM {parquet(files)}" if has_ids else None
    with files[0].open("rb") as f:
        if b'"clip_ids"' not in f.readline():
            return None
    names = ", ".join(text(escape(f)) for f in files)
    columns = "{clip_id: 'VARCHAR', clip_ids: 'INTEGER[]'}"
    return f"SELECT * FROM read_json([{names}], format = 'newline_delimited', columns = {columns})"
