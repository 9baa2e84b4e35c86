"""One export, from the choice of rows to the folder under its name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from echolab.errors import EcholabError
from echolab.export.base import IDS, Job, Shape
from echolab.export.config import ExportConfig
from echolab.export.files import File, unfinished, write_split, write_text
from echolab.export.pieces import Piece, fetch, plan
from echolab.export.provenance import NAME, lineage, pinned, provenance, versions
from echolab.export.select import Selection, facts, select
from echolab.named import Draft, draft, find, unchanged
from echolab.sql import Options, Session
from echolab.store import Snapshot, Store, now
from echolab.vocab import load_tokenizer, tokenizer_fingerprint

MEMORY, THREADS = "2GB", 4  # of DuckDB; more goes to disk

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportReport:
    """What was written. `counts` are those of every stage, the export's own last; `notes` what should be known of it."""

    name: str
    out: str
    to: str
    what: str
    form: str | None
    splits: dict[str, int]
    files: list[dict[str, Any]]
    counts: list[dict[str, Any]]
    notes: list[str]


def export(store: Store, out: str | Path, config: ExportConfig, progress: Progress | None = None) -> ExportReport:
    """Write an export to the new folder `out`, and register it: the store versions that it was made from are kept."""
    given = Path(out).expanduser()
    out = given.absolute()
    name = re.sub(r"[^A-Za-z0-9._-]", "-", out.name).lstrip("-._")[:100] or config.to
    with draft(store, "export", name) as d, unfinished(out) as folder:
        snapshot = store.snapshot()
        clipset = find(snapshot, "clipset", config.clipset) if config.clipset is not None else None
        label = clipset.label if clipset else None
        verifier = config.verifier or (clipset.config.get("verifier") if clipset else None)
        if clipset and config.rows == "clips":
            snapshot = pinned(snapshot, clipset)
        options = Options(verifier=verifier, scorer=config.scorer, segmenter=config.segmenter)
        with Session(snapshot, options, memory_limit=MEMORY, threads=THREADS) as session:
            chosen = select(session, config.rows, label, config.where, config.best, config.source)
            _require_rows(chosen, label)
            found = facts(chosen)
            form = _form(config, found)
            shape: Shape = config.target.shape(config.rows, form)
            _check(snapshot, config, chosen, shape, form, found)
            job = Job(config.ability or "math")
            files = list(_write(folder, d.folder / "places.parquet", config, chosen, shape, job, progress))
        settings = config.model_dump(mode="json")
        settings |= {"what": config.rows, "form": form or None, "clipset": label, "verifier": verifier}
        document = provenance(snapshot, settings, chosen, shape, lineage(snapshot, clipset), found)
        if beside := getattr(config.target, "beside", None):
            files += [write_text(folder, file, text) for file, text in beside(shape, files, document, found).items()]
        document["files"] = [{"path": f.path, "sha256": f.sha256, "bytes": f.bytes, "rows": f.rows} for f in files]
        made = _register(d, snapshot, settings, document)
        write_text(folder, NAME, json.dumps({**document, "created": now().isoformat()}, indent=2) + "\n")
    splits: dict[str, int] = {}
    for f in files:
        if f.split:
            splits[f.split] = splits.get(f.split, 0) + (f.rows or 0)
    notes = [*_notes(config, shape, form, found), *(f"{n:,} {what}" for what, n in sorted(job.notes.items()))]
    return ExportReport(
        made, str(given), config.to, config.rows, form or None, splits, document["files"], document["counts"], notes
    )


def _require_rows(chosen: Selection, clipset: str | None) -> None:
    counts = chosen.counts
    if counts["out"]:
        return
    where = f"clip set {clipset}" if clipset else "the store"
    if not counts["in"]:
        raise EcholabError(f"nothing to export: {where} holds no {chosen.what}")
    raise EcholabError(f"nothing to export: none of the {counts['in']:,} {chosen.what} of {where} fits --where")


def _form(config: ExportConfig, found: Mapping[str, Any]) -> str:
    """How prompts are written: as asked, else as they are."""
    forms = config.target.FORMS
    if config.form is not None or not forms:
        return config.form or ""
    chats = found["chats"] + found["bare"]
    if {"text", "chat"} <= set(forms) and 0 < chats < found["n"]:
        raise EcholabError(
            f"{chats:,} of {found['n']:,} prompts are chats, the others text: choose some by --where, or say --form chat"
        )
    return "chat" if chats and "chat" in forms else forms[0]


def _check(
    snapshot: Snapshot, config: ExportConfig, chosen: Selection, shape: Shape, form: str, found: Mapping[str, Any]
) -> None:
    """Before anything is written: does every row have what the format needs, by the tokenizer that was asked for?"""
    for reason, n in chosen.lacking(shape.needs).items():
        if n:
            others = " or ".join(f"--form {f}" for f in config.target.FORMS if f != form)
            raise EcholabError(
                f'{n:,} of {found["n"]:,} {chosen.what} {reason}: leave them out by --where "{shape.needs[reason]}"'
                + (f", or try {others}" if others else "")
            )
    tokenizers = found["tokenizers"]
    if config.tokenizer is not None:
        asked = config.tokenizer
        if asked not in tokenizers and not re.fullmatch("[0-9a-f]{32}", asked):
            asked = tokenizer_fingerprint(load_tokenizer(Path(asked).expanduser()))
        if tokenizers != [asked]:
            made = ", ".join(_whose(snapshot, t) for t in tokenizers) or "no named one"
            raise EcholabError(f"the {chosen.what} were made with tokenizer {made}, not with {config.tokenizer}")
    elif shape.needs is IDS and len(tokenizers) > 1:
        made = ", ".join(_whose(snapshot, t) for t in tokenizers)
        raise EcholabError(f"the {chosen.what} have ids of several tokenizers ({made}): choose those of one by --where")


def _whose(snapshot: Snapshot, tokenizer: str) -> str:
    models = {e["name"] for e in snapshot.registry("scorers").values() if e["config"].get("tokenizer") == tokenizer}
    return f"{tokenizer} (of {', '.join(sorted(models))})" if models else tokenizer


def _write(
    folder: Path, places: Path, config: ExportConfig, chosen: Selection, shape: Shape, job: Job, progress: Progress | None
) -> Iterator[File]:
    done, total = 0, chosen.counts["out"]

    def rows(pieces: Iterable[Piece]) -> Generator[pa.Table, None, None]:
        nonlocal done
        for piece in pieces:
            with closing(fetch(chosen, shape, piece, places)) as batches:  # before the session is, whatever happens
                for batch in batches:
                    done += batch.num_rows
                    yield shape.convert(batch, job).select(shape.schema.names).cast(shape.schema)
                    if progress:
                        progress("", done, total)

    for split, pieces in groupby(plan(chosen, places), key=lambda piece: piece.split):
        job.split, job.row = split, 0
        with closing(rows(pieces)) as converted:
            yield from write_split(folder, split, config.target.FILES, shape.schema, converted)
    if done != total:
        raise EcholabError(f"{done:,} of {total:,} rows could be read: see `echolab store validate`")


def _register(d: Draft, snapshot: Snapshot, settings: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """The same export again is the one that is there."""
    parents = {
        "versions": versions(snapshot),
        "clipsets": [settings["clipset"]] if settings["clipset"] else [],
        "facts": {"counts": document["counts"], "files": document["files"]},
    }
    same = unchanged(snapshot, "export", d.name, settings, parents["versions"])
    if same and same.parents["facts"] == json.loads(json.dumps(parents["facts"])):
        return same.label
    return d.publish({}, settings, parents).label


def _notes(config: ExportConfig, shape: Shape, form: str, found: Mapping[str, Any]) -> Iterator[str]:
    n, tokens = found["n"], "tokens" in config.target.FORMS
    if form and found["failures"]:
        yield f'{found["failures"]:,} of {n:,} rollouts are no successes: --where "success" leaves them out'
    if shape.ends and config.rows == "clips":
        yield f"{config.to} ends every completion with an end token, also a clip that stops midway" + (
            ": --form tokens trains the clip alone" if tokens else ""
        )
    if found["weighted"] and "weight" not in shape.reads:
        yield f"{found['weighted']:,} of {n:,} clips have a weight, for which {config.to} has no column"
    if form == "text" and found["bare"]:
        yield f"{found['bare']:,} of {n:,} prompts are chats whose special tokens were lost: --form chat takes them apart"
    if form == "chat" and found["rendered"]:
        yield f"{found['rendered']:,} of {n:,} rendered prompts were taken apart into messages, which your trainer renders anew"
    if form and found["unanswered"]:
        yield f"{found['unanswered']:,} of {n:,} prompts have no ground truth"
    if found["disputed"]:
        yield f"{found['disputed']:,} of {n:,} prompts have several ground truths in the store: one of them was taken"
