"""Which rollouts of a selection have the segments of the chosen scorer and segmenter, and the command that makes the rest."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import polars as pl

from echolab.errors import EcholabError
from echolab.sql import Session
from echolab.store import Snapshot
from echolab.views import text


@dataclass(frozen=True)
class Chosen:
    """The scorer and the segmenter that a session shows, by their ids."""

    scorer: str
    segmenter: str

    @property
    def cut(self) -> str:
        """Holds for their rows of `segmentations`."""
        return f"scorer = {text(self.scorer)} AND segmenter = {text(self.segmenter)}"


def choose(session: Session, where: str | None) -> Chosen:
    """The ones that were asked for, else the only ones there are; an error that says what to do where there is none."""
    scorer, segmenter = session.sql("SELECT chosen_scorer() AS scorer, chosen_segmenter() AS segmenter").row(0)
    if scorer is None and not session.snapshot.files("rollouts"):
        raise EcholabError("the store holds no rollouts: `echolab ingest PATH --run NAME` reads dumps into it")
    if scorer is None:
        raise EcholabError(f"nothing is scored in this store: echolab score --model MODEL{_where(where)}")
    if segmenter is None:
        raise EcholabError(f"nothing is cut into segments: {how_to_cut(session.snapshot, scorer)}")
    return Chosen(scorer, segmenter)


def select(session: Session, chosen: Chosen, where: str | None, columns: str) -> pl.DataFrame:
    """Rollouts for which `where` holds, in the order of their ids: `columns`, and whether they are scored and cut."""
    condition = f" WHERE ({where}\n)" if where else ""  # the line ends where a comment in it would
    return session.sql(
        f"""SELECT *,
            rollout_id IN (SELECT rollout_id FROM scores WHERE scorer = {text(chosen.scorer)}) AS scored,
            rollout_id IN (SELECT rollout_id FROM segmentations WHERE {chosen.cut}) AS cut
        FROM (SELECT rollout_id, {columns} FROM rollouts{condition}) ORDER BY rollout_id"""
    )


def how_to_score(snapshot: Snapshot, scorer: str, where: str | None) -> str:
    """The command that gives rollouts a score of this scorer."""
    config = snapshot.registry("scorers").get(scorer, {}).get("config", {})
    if config.get("kind") == "sampling":
        return f"ingest the dump with the entropies of run {config.get('run')}"
    limit = config.get("max_tokens")  # there is one where longer rollouts were cut
    options = {
        "model": config.get("model") or "MODEL",
        "tokenizer": config.get("tokenizer_source"),
        "dtype": config.get("dtype"),
        "temperature": config.get("temperature") if config.get("temperature") != 1.0 else None,
        "template": config.get("rendering") if config.get("rendering") != "auto" else None,
        "too-long": "truncate" if limit else None,
        "max-tokens": limit,
    }
    given = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)
    return f"echolab score{given}{_where(where)}"


def how_to_cut(snapshot: Snapshot, scorer: str, segmenter: str | None = None) -> str:
    """The command that cuts what a scorer has scored."""
    mode = snapshot.registry("segmenters").get(segmenter or "", {}).get("config", {}).get("mode", "newline")
    return f"echolab score resegment --scorer {label(snapshot, 'scorer', scorer)} --mode {shlex.quote(mode)}"


def label(snapshot: Snapshot, kind: str, id: str) -> str:
    """`name@version` of a registry entry."""
    entry = snapshot.registry(f"{kind}s").get(id)
    return f"{entry['name']}@{entry['version']}" if entry else id


def _where(where: str | None) -> str:
    if where is None:
        return ""
    plain = not set(where) & set('"$`\\!')
    return f' --where "{where}"' if plain else f" --where {shlex.quote(where)}"
