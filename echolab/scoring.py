"""`echolab score`: which rollouts need scores of a model, the job that makes them, and other cuts of what is scored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from echolab import jobs
from echolab.errors import EcholabError
from echolab.files import pc
from echolab.jobs import PLAN, Backend, Job, Progress, Report
from echolab.keys import without_known
from echolab.scan import parquet, scratch
from echolab.segment import Segmenter, segmentations
from echolab.sql import Session
from echolab.store import Snapshot, Store
from echolab.views import resolve, text
from echolab.vocab import Vocab, load_tokenizer

if TYPE_CHECKING:
    from echolab.entropy.scorer import Scorer, ScorerConfig

TABLES = ("scores", "segmentations")
CHUNK_ROWS, COMMIT_ROWS = 1024, 50_000
FINGERPRINT = re.compile("[0-9a-f]{32}")  # dumps may name their tokenizer in any other way

# About the tokens of a rollout, where they are not counted: most texts have between three and five bytes a token.
_TOKENS = """coalesce(n_prompt_tokens, strlen(coalesce(prompt, messages, '')) // 3)
    + coalesce(n_completion_tokens, n_chars // 3, 0) + 1"""


def score(
    store: Store,
    config: ScorerConfig,
    where: str | None = None,
    progress: Progress | None = None,
    backend: Callable[[ScorerConfig, Scorer], Backend] | None = None,
) -> tuple[Report, str]:
    """Scores for every rollout that has none of this scorer; the report, and the scorer's id. A job that was stopped goes
    on first. Give a `backend` to work elsewhere than in this process."""
    from echolab.entropy.scorer import COLUMNS, Scorer

    check_where(store, where)
    scorer = Scorer.load(config)
    name = f"score-{scorer.id[:16]}"
    work = backend(config, scorer) if backend else jobs.serial(scorer)
    settings = {"scorer": config.model_dump(mode="json"), "where": where}
    segmenters = list(config.segmenters)
    with Job(store, name).lock():
        _register(store, scorer)
        if backend:
            scorer.release()
        job, report = Job.open(store, name), Report(0)
        if job and job.status["state"] != "done":
            stopped = [Segmenter.make(**s) for s in job.facts["config"]["scorer"]["segmenters"]]
            segmenters += [s for s in stopped if s not in segmenters]
            report = jobs.run(job, work, COLUMNS, progress)
            plan = _after(job, report, store.snapshot(), scorer.id, settings)
        else:
            plan = _plan(store.snapshot(), scorer.id, where)
        if plan.num_rows:
            if job:
                job.remove()
            job = Job.create(store, name, settings, plan, TABLES)
            report = report.plus(jobs.run(job, work, COLUMNS, progress))
    for segmenter in segmenters:
        resegment(store, scorer.id, segmenter)
    return report, scorer.id


def _after(job: Job, report: Report, snapshot: Snapshot, scorer: str, settings: dict[str, Any]) -> pa.Table:
    """What is missing besides the job that just ran. If there is something, the job makes way for one that has its failed
    items behind the rest; they leave its report, which then speaks of each rollout once."""
    failed = job.rollouts_of(report.failed)
    skipped = {s["rollout_id"]: s["reason"] for s in job.skipped()}
    settled = failed["rollout_id"].to_pylist()
    if job.facts["config"]["scorer"] == settings["scorer"]:  # other options may take what these could not
        settled += skipped
    plan = _plan(snapshot, scorer, settings["where"], settled)
    if not plan.num_rows:
        return plan
    again = set(plan["rollout_id"].to_pylist())
    report.skipped = Counter(why for rollout, why in skipped.items() if rollout not in again)
    report.items -= len(report.failed)
    first = 1 + pc.max(plan["item"]).as_py()
    numbers = {item: first + i for i, item in enumerate(sorted(report.failed))}
    items = pa.array([numbers[i] for i in failed["item"].to_pylist()], pa.int32())
    failed = failed.set_column(failed.column_names.index("item"), "item", items)
    return pa.concat_tables([t.select(PLAN.names).cast(PLAN) for t in (plan, failed)])


def check_where(store: Store, where: str | None) -> None:
    """Before a model is loaded: can the rollouts be chosen so?"""
    with Session(store.snapshot()) as session:
        session.sql(f"SELECT rollout_id FROM rollouts WHERE {where or 'true'} LIMIT 0")


def _plan(snapshot: Snapshot, scorer: str, where: str | None, without: Sequence[str] = ()) -> pa.Table:
    """The rollouts without a score, in the order of their groups, cut into work items."""
    with Session(snapshot) as session:
        found = session.sql(
            f"""SELECT rollout_id, group_id, run, step, ({_TOKENS})::BIGINT AS tokens FROM rollouts
            WHERE ({where or "true"}) AND rollout_id NOT IN (SELECT rollout_id FROM scores WHERE scorer = {text(scorer)})
            ORDER BY run, split, step, group_id, sample NULLS LAST, rollout_id"""
        )
    table = found.to_arrow()
    table = table.filter(pc.invert(pc.is_in(table["rollout_id"], pa.array(without, pa.string()))))
    numbers = jobs.items(table["group_id"].to_pylist(), table["tokens"].to_pylist())
    return table.drop("group_id").append_column("item", pa.array(numbers, pa.int32()))


def _register(store: Store, scorer: Scorer) -> None:
    """The scorer, its segmenters and its vocabulary are in the store before the first score is."""
    with store.lock():
        entries = store.snapshot().registry("scorers")
        if scorer.id not in entries:
            version = 1 + max((e["version"] for e in entries.values() if e["name"] == scorer.name), default=0)
            settings = {**scorer.settings, "model": scorer.config.model, "tokenizer_source": scorer.config.tokenizer}
            store.register("scorers", scorer.id, scorer.name, settings, version=version)
        for segmenter in scorer.config.segmenters:
            _register_segmenter(store, segmenter, scorer.vocab.tokenizer)
    scorer.vocab.keep(store)


def _register_segmenter(store: Store, segmenter: Segmenter, tokenizer: str) -> str:
    """Under the lock."""
    id = segmenter.id(tokenizer)
    entries = store.snapshot().registry("segmenters")
    if id not in entries:
        version = 1 + max((e["version"] for e in entries.values() if e["name"] == segmenter.mode), default=0)
        store.register("segmenters", id, segmenter.mode, segmenter.resolved(tokenizer), version=version)
    return id


def resegment(store: Store, scorer: str, segmenter: Segmenter, tokenizer: str | None = None) -> int:
    """Cut what a scorer has scored by another rule, without its model. A scorer whose vocabulary the store does not have
    (the entropies are of a dump) needs its tokenizer once. Returns how many rollouts were cut anew."""
    snapshot = store.snapshot()
    scorer = resolve(snapshot, "scorer", scorer)
    entry = snapshot.registry("scorers")[scorer]
    vocab = _stored_vocab(snapshot, entry) if tokenizer is None else _given_vocab(store, snapshot, entry, tokenizer)
    eos = entry["config"].get("eos", vocab.special)  # a dump does not say which token ends a completion
    with store.lock():
        id = _register_segmenter(store, segmenter, vocab.tokenizer)
    done, held = 0, []
    with store.job("resegment") as folder:
        for scores in _uncut(snapshot, scorer, id, folder):
            held.append(segmentations(scores, vocab, segmenter, eos))
            if sum(t.num_rows for t in held) >= COMMIT_ROWS:
                done += _commit(store, held, folder)
        return done + _commit(store, held, folder)


def _stored_vocab(snapshot: Snapshot, entry: dict[str, Any]) -> Vocab:
    """Of the tokenizer that a scorer names, or that was given for it before."""
    named = entry["config"].get("vocabulary") or entry["config"].get("tokenizer")
    if all(f.partition["tokenizer"] != named for f in snapshot.files("vocab")):
        whose = f"of tokenizer {named}, scorer {entry['name']}'s" if named else f"for scorer {entry['name']}"
        raise EcholabError(f"the store has no vocabulary {whose}: give the tokenizer itself, --tokenizer FOLDER")
    return Vocab.stored(snapshot, named)


def _given_vocab(store: Store, snapshot: Snapshot, entry: dict[str, Any], tokenizer: str) -> Vocab:
    """Of this tokenizer, if it fits what the scorer scored; the store keeps it, and that it is the scorer's."""
    vocab, config = Vocab.of(load_tokenizer(tokenizer)), entry["config"]
    named = config.get("tokenizer") or ""
    if FINGERPRINT.fullmatch(named) and named != vocab.tokenizer:
        raise EcholabError(f"{tokenizer} is not the tokenizer of scorer {entry['name']}: it is {vocab.tokenizer}, not {named}")
    with store.job("resegment") as folder:
        lowest, highest = _bounds_of_ids(snapshot, entry["id"], folder)
    if lowest < 0 or highest >= vocab.size:
        said = f"tokenizer {tokenizer} does not fit scorer {entry['name']}: its token ids are {lowest}..{highest}"
        raise EcholabError(f"{said}, the tokenizer's 0..{vocab.size - 1}")
    vocab.keep(store)
    if vocab.tokenizer not in (named, config.get("vocabulary")):
        with store.lock():
            kept = {**config, "vocabulary": vocab.tokenizer}
            store.register("scorers", entry["id"], entry["name"], kept, entry["parents"], entry["version"])
    return vocab


def _bounds_of_ids(snapshot: Snapshot, scorer: str, folder: Path) -> tuple[int, int]:
    """The lowest and the highest token id that a scorer has scored."""
    files = [f.path for f in snapshot.files("scores") if f.partition["scorer"] == scorer]
    if not files:
        return 0, 0
    with scratch(folder) as db:
        query = f"SELECT min(list_min(token_ids)), max(list_max(token_ids)) FROM {parquet(files)}"
        [(lowest, highest)] = db.sql(query).fetchall()
    return lowest or 0, highest or 0


def _commit(store: Store, held: list[pa.Table], folder: Path) -> int:
    tables = [t for t in held if t.num_rows]
    held.clear()
    if not tables:
        return 0
    with store.lock():
        rows = without_known(store.snapshot(), "segmentations", pa.concat_tables(tables), folder)
        if rows.num_rows:
            store.commit("segmentations", store.stage("segmentations", rows, folder))
    return rows.num_rows


def _uncut(snapshot: Snapshot, scorer: str, segmenter: str, folder: Path) -> Iterator[pa.Table]:
    """Scores that have no segmentation of this segmenter, some at a time."""
    files = [f.path for f in snapshot.files("scores") if f.partition["scorer"] == scorer]
    cut = [f.path for f in snapshot.files("segmentations") if f.partition["scorer"] == scorer]
    if not files:
        return
    known = f"ANTI JOIN (SELECT rollout_id FROM {parquet(cut)} WHERE segmenter = {text(segmenter)}) USING (rollout_id)"
    wanted = "rollout_id, scorer, token_ids, loss_mask, entropies"
    with scratch(folder) as db:
        for batch in db.sql(f"SELECT {wanted} FROM {parquet(files)} {known if cut else ''}").to_arrow_reader(CHUNK_ROWS):
            yield pa.Table.from_batches([batch])


@dataclass(frozen=True)
class Status:
    """One job, as `echolab score status` shows it."""

    job: str
    scorer: str
    facts: dict[str, Any]


def statuses(store: Store) -> Sequence[Status]:
    return [Status(job.name, job.facts["config"]["scorer"]["model"], _facts(job)) for job in jobs.jobs(store, "score")]


def _facts(job: Job) -> dict[str, Any]:
    """Its status; a process that was killed could not say so."""
    facts = job.status
    return {**facts, "state": "stopped"} if facts["state"] == "running" and not job.is_locked else facts


def unfinished(store: Store, name: str | None = None) -> dict[str, Any]:
    """The settings of the job that is to go on: the named one, or the only one that has not ended."""
    found = [j for j in jobs.jobs(store, "score") if j.status["state"] != "done" and name in (None, j.name)]
    if not found:
        raise EcholabError("no unfinished job" + (f" {name}" if name else "") + ": `echolab score status` lists them")
    if len(found) > 1:
        raise EcholabError(f"several jobs are unfinished, say which: {', '.join(j.name for j in found)}")
    return found[0].facts["config"]
