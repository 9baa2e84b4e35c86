"""Cohorts -> profiles: how segment entropy runs along the trajectories that a condition on `rollouts` chooses.

A profile is a named result, `name@1`. `profiles` holds its numbers and `profile_members` its trajectories. Each trajectory
counts once in every number: means, quantiles and bands are over trajectories, never over tokens or segments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import field_validator

from echolab import ids
from echolab.clips.ngrams import exact
from echolab.config import Config
from echolab.coverage import Chosen, choose, how_to_cut, how_to_score, label, select
from echolab.curves import Axes, Progress, Trajectories, trajectories
from echolab.errors import EcholabError
from echolab.named import Draft, Named, draft, find, unchanged
from echolab.schema import PROFILES
from echolab.significance import band, means
from echolab.sql import Options, Session
from echolab.store import Snapshot, Store
from echolab.views import resolve, text

MEMORY = "2GB"  # of DuckDB while trajectories are read; more goes to disk
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
TOP_SHARE = 0.2  # of the tokens: those of `top20`
WHOLE = ("mean", "se", "lo", "hi", *QUANTILES, "segments", "tokens", "length", "peak_position", "top20")  # as they are shown
READS = ("ingests", "rollouts", "runs", "verdicts", "scores", "segmentations")


class ProfileConfig(Config):
    """What the numbers of a profile depend on, beside its trajectories."""

    where: str
    bins: int = 48  # three for each of the 16 that `match` compares
    segments: int = 64
    bootstrap: int = 1000
    seed: int = 0

    @field_validator("where")
    @classmethod
    def _something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("a condition on rollouts, such as role = 'expert' AND success")
        return value

    @field_validator("bins", "segments")
    @classmethod
    def _some(cls, value: int) -> int:
        if not 1 <= value <= 1000:
            raise ValueError("from 1 to 1000")
        return value

    @field_validator("bootstrap", "seed")
    @classmethod
    def _not_negative(cls, value: int) -> int:
        if value < 0:
            raise ValueError("at least 0")
        return value


@dataclass(frozen=True)
class Profile:
    """A profile as its store has it. `facts` count what was found: `rollouts` of the cohort, those `unscored`, `uncut` and
    `blank` (without a counted token), the `trajectories` that are left, their `problems`, and the `longer` ones, whose last
    segments the absolute axis does not show. `slices` has a record for each slice, with the mean curve."""

    label: str
    config: dict[str, Any]
    facts: dict[str, int]
    scorer: str
    segmenter: str
    verifier: str | None
    notes: list[str]
    slices: list[dict[str, Any]]
    new: bool = False


def profile(
    store: Store,
    name: str,
    where: str,
    *,
    verifier: str | None = None,
    scorer: str | None = None,
    segmenter: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Profile:
    """Make the next version of a profile from the rollouts for which `where` holds, SQL over the view `rollouts`. The newest
    one is given back where nothing would be new. Options are those of `ProfileConfig`."""
    config = ProfileConfig.make(where=where, **options)
    with draft(store, "cohort", name) as d:
        snapshot = store.snapshot()
        views = Options(verifier=verifier, scorer=scorer, segmenter=segmenter)
        with Session(snapshot, views, memory_limit=MEMORY) as session:
            chosen = choose(session, where)
            cohort = select(session, chosen, where, "problem_id, source, success")
            members = _covered(snapshot, chosen, config, cohort)
            settings = {
                **config.model_dump(),
                "verifier": None if verifier is None else resolve(snapshot, "verifier", verifier),
                **chosen.__dict__,
                "members": ids.config_id("members", [*members["rollout_id"], *map(str, members["success"])]),
            }
            versions = {table: v for table, v in snapshot.versions.items() if table in READS}
            if same := unchanged(snapshot, "cohort", name, settings, versions):
                return _profile(session, same)
            found = _read(session, chosen, config, members, progress)
        facts = _facts(cohort, found)
        made = _publish(d, found, config, settings, {"versions": versions, "facts": facts})
    with Session(store.snapshot()) as session:
        return _profile(session, made, new=True)


def stored(snapshot: Snapshot, word: str) -> Profile:
    """The profile that `name` or `name@version` means."""
    with Session(snapshot) as session:
        return _profile(session, find(snapshot, "cohort", word))


def _covered(snapshot: Snapshot, chosen: Chosen, config: ProfileConfig, cohort: pl.DataFrame) -> pl.DataFrame:
    """The rollouts that have segments, or an error that says how they come to have them."""
    n, scored, cut = cohort.height, int(cohort["scored"].sum()), int(cohort["cut"].sum())
    if not n:
        raise EcholabError(f"no rollout fits the condition: {' '.join(config.where.split())}")
    if not scored:
        how = how_to_score(snapshot, chosen.scorer, config.where)
        raise EcholabError(f"{n:,} of {n:,} rollouts lack a score of {label(snapshot, 'scorer', chosen.scorer)}: {how}")
    if not cut:
        how = how_to_cut(snapshot, chosen.scorer, chosen.segmenter)
        raise EcholabError(f"{scored:,} of {scored:,} scored rollouts are not cut into segments: {how}")
    return cohort.filter("scored", "cut")


def _read(
    session: Session, chosen: Chosen, config: ProfileConfig, members: pl.DataFrame, progress: Progress | None
) -> Trajectories:
    inside = f"{chosen.cut} AND rollout_id IN (SELECT rollout_id FROM rollouts WHERE ({config.where}\n))"
    found = trajectories(session, members, inside, Axes(config.bins, config.segments), TOP_SHARE, progress)
    known = ~np.isnan(found.entropy[:, -1])
    if not known.any():
        raise EcholabError(f"none of {members.height:,} trajectories has a token that its loss mask counts: nothing to profile")
    return found.take(known)


def _facts(cohort: pl.DataFrame, found: Trajectories) -> dict[str, int]:
    scored, cut = int(cohort["scored"].sum()), int(cohort["cut"].sum())
    return {
        "rollouts": cohort.height,
        "unscored": cohort.height - scored,
        "uncut": scored - cut,
        "blank": cut - found.frame.height,
        "trajectories": found.frame.height,
        "problems": found.frame["problem_id"].drop_nulls().n_unique(),
        "longer": int((found.n_segments > found.axes.segments).sum()),
    }


def _publish(d: Draft, found: Trajectories, config: ProfileConfig, settings: dict[str, Any], parents: dict[str, Any]) -> Named:
    frames = [_statistics(found.take(some), config).with_columns(slice=pl.lit(name)) for name, some in _slices(found)]
    numbers = pl.concat(frames).with_columns(profile=pl.lit(d.label)).select(PROFILES.arrow.names).to_arrow()
    members = found.frame.select(pl.lit(d.label).alias("profile"), "rollout_id", "problem_id").to_arrow()
    tables: dict[str, pa.Table] = {"profiles": numbers, "profile_members": members}
    return d.publish({t: d.store.stage(t, rows, d.folder) for t, rows in tables.items()}, settings, parents)


def _slices(found: Trajectories) -> Iterator[tuple[str, np.ndarray]]:
    """The parts of a cohort, and which trajectories each holds: `all`, `source=NAME`, `length=short`, `middle` and `long`
    (thirds by tokens), `outcome=success`, `failure` and `unrewarded`. Empty ones are left out."""
    low, high = np.quantile(found.n_tokens, [1 / 3, 2 / 3])
    length = np.where(found.n_tokens <= low, "short", np.where(found.n_tokens <= high, "middle", "long"))
    outcome = found.frame["success"].replace_strict({True: "success", False: "failure"}, default="unrewarded")
    yield "all", np.ones(len(length), bool)
    for kind, values in {"source": found.frame["source"], "length": pl.Series(length), "outcome": outcome}.items():
        for value in values.drop_nulls().unique().sort():
            yield f"{kind}={value}", (values == value).fill_null(False).to_numpy()


def _statistics(found: Trajectories, config: ProfileConfig) -> pl.DataFrame:
    """Rows of `profiles` for one slice. Columns that no trajectory reaches have none."""
    mean, n = means(found.entropy)
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.sqrt(np.nansum((found.entropy - mean) ** 2, axis=0, dtype=np.float64) / np.where(n > 1, n - 1, np.nan))
        numbers = {"mean": (mean, n), "se": (deviation / np.sqrt(n), n)}
    quantiles = np.full((len(QUANTILES), len(n)), np.nan)
    for i in np.flatnonzero(n):
        column = found.entropy[:, i]
        quantiles[:, i] = np.quantile(column[~np.isnan(column)].astype(np.float64), list(QUANTILES.values()))
    numbers |= {name: (row, n) for name, row in zip(QUANTILES, quantiles, strict=True)}
    if config.bootstrap:
        low, high = band(found.entropy, config.bootstrap, config.seed)
        numbers |= {"lo": (low, n), "hi": (high, n)}
    numbers |= {"tokens": means(found.tokens), "top20": means(found.top), "peaks": means(found.peaks)}
    axis, bin = zip(*found.axes.columns, strict=True)
    columns = pl.DataFrame({"axis": axis, "bin": pl.Series(bin, dtype=pl.Int32)})
    frames = [
        columns.with_columns(statistic=pl.lit(name), value=pl.Series(values).fill_nan(None), n=pl.Series(count))
        for name, (values, count) in numbers.items()
    ]
    rows = pl.concat(f.filter(pl.Series(n > 0)) for f in frames)
    at_peak = pl.when(axis="whole", statistic="peaks").then(pl.lit("peak_position")).otherwise("statistic")
    rows = rows.with_columns(statistic=at_peak)
    whole = {"segments": found.n_segments, "length": found.n_tokens}
    more = [("whole", 0, name, float(values.mean()), len(values)) for name, values in whole.items()]
    return pl.concat([rows, pl.DataFrame(more, schema=rows.schema, orient="row")])


def _profile(session: Session, named: Named, new: bool = False) -> Profile:
    """A profile from what the store holds of it."""
    rows = session.sql(
        f"""SELECT slice, axis, statistic, value, n FROM profiles
        WHERE profile = {text(named.label)} AND (axis = 'whole' OR axis = 'relative' AND statistic = 'mean') ORDER BY bin"""
    )
    slices = []
    for part in sorted(rows["slice"].unique(), key=_place):
        whole, curve = (rows.filter(slice=part, axis=axis) for axis in ("whole", "relative"))
        numbers = dict(whole.select("statistic", "value").iter_rows())
        n = whole.filter(statistic="mean")["n"].item()
        there = {name: numbers[name] for name in WHOLE if name in numbers}
        slices.append({"slice": part, "n": n, **there, "curve": curve["value"].to_list()})
    facts, snapshot = named.parents["facts"], session.snapshot
    scorer, segmenter = (label(snapshot, kind, named.config[kind]) for kind in ("scorer", "segmenter"))
    judge = named.config["verifier"]
    verifier = label(snapshot, "verifier", judge) if judge else None
    return Profile(named.label, named.config, facts, scorer, segmenter, verifier, _notes(snapshot, named), slices, new)


def _place(part: str) -> tuple[int, str, int, str]:
    """The whole first, lengths from short to long."""
    kind, _, value = part.partition("=")
    return part != "all", kind, ["short", "middle", "long"].index(value) if kind == "length" else 0, value


def _notes(snapshot: Snapshot, named: Named) -> list[str]:
    """What a reader of the numbers should know of them."""
    facts, config = named.parents["facts"], named.config
    scorer, n = label(snapshot, "scorer", config["scorer"]), facts["rollouts"]
    notes = []
    if facts["unscored"]:
        how = how_to_score(snapshot, config["scorer"], config["where"])
        notes.append(f"{facts['unscored']:,} of {n:,} rollouts lack a score of {scorer} and were left out: {how}")
    if facts["uncut"]:
        how = how_to_cut(snapshot, config["scorer"], config["segmenter"])
        notes.append(f"{facts['uncut']:,} of {n:,} rollouts are scored but not cut into segments and were left out: {how}")
    if facts["blank"]:
        notes.append(f"{facts['blank']:,} of {n:,} rollouts have no token that counts and were left out")
    if facts["longer"]:
        notes.append(
            f"{facts['longer']:,} of {facts['trajectories']:,} trajectories have more than {config['segments']} segments:"
            " the absolute axis ends there"
        )
    return notes


@dataclass(frozen=True)
class Overlap:
    """Problems of a profile that are also among given texts."""

    profile: str
    problems: int
    texts: int
    shared: tuple[str, ...]  # their problem_ids


def overlap(snapshot: Snapshot, word: str, texts: Iterable[str]) -> Overlap:
    """Which problems of the profile that `name` or `name@version` means are among these texts: by problem_id, by all that
    the user said, or by a line of it, as `exact` compares them."""
    named = find(snapshot, "cohort", word)
    texts = [*texts]
    known, keys = {ids.problem_id(t) for t in texts}, {exact(t) for t in texts} - {""}
    members = f"FROM profile_members WHERE profile = {text(named.label)}"
    with Session(snapshot, memory_limit=MEMORY) as session:
        problems = set(session.sql(f"SELECT DISTINCT problem_id {members} AND problem_id IS NOT NULL")["problem_id"])
        shared = problems & known
        for batch in session.batches(
            f"""SELECT any_value(problem_id) AS problem_id, any_value(prompt) AS prompt, any_value(messages) AS messages
            FROM rollouts WHERE problem_id IS NOT NULL AND rollout_id IN (SELECT rollout_id {members}) GROUP BY prompt_id"""
        ):
            shared |= {row["problem_id"] for row in batch.to_pylist() if not keys.isdisjoint(_asked(row))}
    return Overlap(named.label, len(problems), len(texts), tuple(sorted(shared)))


def _asked(row: Mapping[str, Any]) -> set[str]:
    messages = json.loads(row["messages"]) if row["messages"] else None
    said = ids.problem_text(row["prompt"], messages if isinstance(messages, list) else None) or ""
    return {exact(t) for t in (said, *said.splitlines())}
