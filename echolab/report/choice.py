"""What a report shows where a store has several scorers, segmenters or clip sets, and nobody said which."""

from __future__ import annotations

from dataclasses import dataclass

from echolab.named import find
from echolab.sql import Options, Session
from echolab.store import Snapshot
from echolab.views import text


@dataclass(frozen=True)
class Choice:
    """The views to read, the clip set to mark, and a note for each choice that was not the only one."""

    options: Options
    clipset: str | None
    notes: tuple[str, ...]


def choose(snapshot: Snapshot, clipset: str | None, verifier: str | None, scorer: str | None, segmenter: str | None) -> Choice:
    """Of clip sets the newest; of scorers and segmenters those of the clip set, else the ones with most rollouts."""
    notes = []
    sets = snapshot.registry("clipsets").values()
    if clipset is not None:
        clipset = find(snapshot, "clipset", clipset).label
    elif sets:
        clipset = max(sets, key=lambda e: (e["created_at"], e["id"]))["id"]
        if len(sets) > 1:
            notes.append(f"Of {len(sets)} clip sets, the reader marks the clips of the newest, {clipset}: `--clipset` chooses.")
    with Session(snapshot, Options(verifier=verifier)) as session:
        mined = f"SELECT scorer, segmenter FROM clips WHERE clipset = {text(clipset or '')} LIMIT 1"
        by = next(session.sql(mined).iter_rows(named=True), {})
        if scorer is None:
            found = session.sql("SELECT scorer AS id, count(*) AS n FROM scores GROUP BY scorer").rows()
            scorer, note = _of(snapshot, "scorer", dict(found), by.get("scorer"))
            notes += note
        if segmenter is None:
            of = f"WHERE scorer = {text(scorer)}" if scorer in snapshot.registry("scorers") else ""
            found = session.sql(f"SELECT segmenter AS id, count(*) AS n FROM segmentations {of} GROUP BY segmenter").rows()
            segmenter, note = _of(snapshot, "segmenter", dict(found), by.get("segmenter"))
            notes += note
    return Choice(Options(verifier=verifier, scorer=scorer, segmenter=segmenter), clipset, tuple(notes))


def _of(snapshot: Snapshot, kind: str, found: dict[str, int], preferred: str | None) -> tuple[str | None, list[str]]:
    if len(found) < 2:
        return None, []  # a session shows the only one
    chosen = preferred if preferred in found else max(found, key=lambda id: (found[id], id))
    why = "that of the clip set" if chosen == preferred else "the one with most rollouts"
    entry = snapshot.registry(f"{kind}s").get(chosen)
    name = f"{entry['name']}@{entry['version']}" if entry else chosen
    return chosen, [f"Of {len(found)} {kind}s this page shows {name}, {why}: `--{kind}` chooses."]
