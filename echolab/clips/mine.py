"""`echolab mine`: a named set of clips out of the scored successes of a store.

The store is read twice. First the segments of all successes pass by, whole groups at a time in their order, and the choices
go into a small file; then the texts and tokens of what was chosen. An interrupted mining leaves nothing, and begins anew: it
costs seconds where the scores that it needs have cost hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from echolab import ids
from echolab.clips.match import Experts
from echolab.clips.selectors import Selection, Selector, select, thinking
from echolab.coverage import Chosen, choose, how_to_cut, how_to_score, label
from echolab.errors import EcholabError
from echolab.files import conform, pc
from echolab.named import Draft, Named, draft, find, unchanged
from echolab.scan import parquet
from echolab.schema import CLIPS
from echolab.sql import Options, Session
from echolab.store import Snapshot, Staged, Store
from echolab.views import resolve, text
from echolab.vocab import Vocab, load_tokenizer, tokenizer_fingerprint

MEMORY = "2GB"  # of DuckDB; more goes to disk
SEGMENT_ROWS, CLIP_ROWS = 4096, 256  # read at once
STAGED_BYTES = 128 << 20  # of clips, then they are written
READS = ("ingests", "rollouts", "runs", "scores", "segmentations", "vocab")
Progress = Callable[[str, int, int], None]

CHOICE = pa.schema(
    [("rollout_id", pa.string()), ("kind", pa.string()), ("segment", pa.int32()), ("end_token", pa.int32()),
     ("whole", pa.bool_()), ("entropy", pa.float64()), ("distance", pa.float64())]
)  # fmt: skip


@dataclass(frozen=True)
class Mined:
    """A mined clip set. `facts` are counts: `groups` by kind, `outcomes` of the groups (see `selectors.OUTCOMES`),
    `successes` by what became of them, `splits` of the clips. `statistics` are those of the query `clip_stats`."""

    label: str
    config: dict[str, Any]
    scorer: str
    segmenter: str
    facts: dict[str, Any]
    statistics: dict[str, Any]
    notes: list[str]
    new: bool = False


def mine(
    store: Store,
    name: str,
    *,
    run: str | None = None,
    split: str | None = None,
    where: str | None = None,
    verifier: str | None = None,
    scorer: str | None = None,
    segmenter: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Mined:
    """Make the next version of a clip set from the policy's rollouts for which `where` holds, SQL over the view `rollouts`.
    The newest one is given back where nothing would be new. Options are those of `Selector`."""
    config = Selector.make(**options)
    with draft(store, "clipset", name) as d:
        snapshot = store.snapshot()
        with Session(snapshot, Options(verifier=verifier, scorer=scorer, segmenter=segmenter), memory_limit=MEMORY) as session:
            task = _task(session, config, run, split, where, verifier)
            versions = {t: v for t, v in snapshot.versions.items() if t in task.reads}
            if same := unchanged(snapshot, "clipset", name, task.settings, versions):
                return _mined(snapshot, same)
            facts = _groups(session, task)
            experts = _experts(session, task, facts) if config.selector == "match" else None
            chosen = _choose(session, task, experts, facts, d.folder / "chosen.parquet", progress)
            staged = list(_stage(session, task, chosen, facts, d, progress))
        parents = {"versions": versions, "facts": facts, **({"profile": task.profile.label} if task.profile else {})}
        made = d.publish({"clips": staged}, task.settings, parents)
    return _mined(store.snapshot(), made, new=True)


# What is to be done.


@dataclass(frozen=True)
class _Task:
    snapshot: Snapshot
    config: Selector
    chosen: Chosen  # scorer and segmenter
    verifier: str | None
    given: Mapping[str, str | None]  # run, split and where, as they were asked for
    profile: Named | None

    @property
    def condition(self) -> str:
        return _condition(self.given)

    @property
    def settings(self) -> dict[str, Any]:
        """What the registry keeps: all that the clips depend on, beside the store."""
        selector = self.config.resolved() | ({"against": self.profile.label} if self.profile else {})
        return {"selector": selector, **self.given, "verifier": self.verifier, **self.chosen.__dict__}

    @property
    def reads(self) -> tuple[str, ...]:
        return (*READS, *(["verdicts"] if self.verifier else []), *(["profiles"] if self.profile else []))

    @property
    def scorer(self) -> dict[str, Any]:
        return self.snapshot.registry("scorers").get(self.chosen.scorer, {}).get("config", {})


def _condition(given: Mapping[str, Any]) -> str:
    """Which rollouts: of the policy, of the run and split, and as the user says."""
    named = [f"{c} = {text(given[c])}" for c in ("run", "split") if given[c] is not None]
    where = given["where"]
    own = ([f"({where}\n)"] if "--" in where else [f"({where})"]) if where else []  # a comment ends with its line
    return " AND ".join(["role = 'policy'", *named, *own])


def _task(
    session: Session, config: Selector, run: str | None, split: str | None, where: str | None, verifier: str | None
) -> _Task:
    snapshot = session.snapshot
    if run is not None and run not in (runs := sorted({r.run for r in snapshot.ledger.live})):
        raise EcholabError(f"no run {run!r} in this store; there are: {', '.join(runs) or 'none'}")
    if where is not None and not where.strip():
        raise EcholabError("an empty --where: give a condition on rollouts such as step >= 100, or leave it out")
    verifier = None if verifier is None else resolve(snapshot, "verifier", verifier)
    given = {"run": run, "split": split, "where": where}
    profile = find(snapshot, "cohort", config.against) if config.against else None
    return _Task(snapshot, config, choose(session, where), verifier, given, profile)


def _groups(session: Session, task: _Task) -> dict[str, Any]:
    """The groups that were asked for, by kind, and their successes."""
    found = session.sql(
        f"""SELECT kind, count(*) AS groups, sum(successes)::BIGINT AS successes FROM (
            SELECT run, split, group_id, any_value(kind) AS kind, count(*) FILTER (WHERE success) AS successes
            FROM rollouts WHERE {task.condition} GROUP BY run, split, group_id
        ) GROUP BY kind ORDER BY kind"""
    )
    groups, successes = dict(found.select("kind", "groups").iter_rows()), int(found["successes"].sum())
    if not groups:
        raise EcholabError(f"no rollout fits the condition: {' '.join(task.condition.split())}")
    if not successes:
        raise EcholabError(
            f"none of {sum(groups.values()):,} groups has a success: clips come from successes alone"
            " (--verifier NAME judges by verdicts, ingest --success-threshold by another reward)"
        )
    return {"groups": groups, "successes": {"all": successes}}


def _experts(session: Session, task: _Task, facts: dict[str, Any]) -> Experts:
    """The curves to match: those of a profile, or of all experts with a problem that are not known to be wrong."""
    if task.profile:
        means = session.sql(
            f"""SELECT value FROM profiles WHERE profile = {text(task.profile.label)} AND axis = 'relative' AND slice = 'all'
            AND statistic = 'mean' ORDER BY bin"""
        )
        return Experts.profile(means["value"].to_list(), task.config.bins)
    cut = f"(SELECT rollout_id, segment_entropies FROM segmentations WHERE {task.chosen.cut})"
    golden = f"FROM rollouts LEFT JOIN {cut} USING (rollout_id) WHERE {EXPERTS}"
    n, scored, problems = session.sql(
        f"""SELECT count(*), count(segment_entropies), count(DISTINCT problem_id) FILTER (WHERE segment_entropies IS NOT NULL)
        {golden}"""
    ).row(0)
    facts["experts"] = {"all": n, "unscored": n - scored, "problems": problems}
    if not scored:
        how = how_to_score(task.snapshot, task.chosen.scorer, EXPERTS)
        why = f"{n:,} experts have no segments of this scorer: {how}" if n else "there are no rollouts of role expert"
        raise EcholabError(f"nothing to match with: {why}; or give a profile with --against")
    return Experts.of(
        session.batches(f"SELECT problem_id, segment_entropies {golden} AND segment_entropies IS NOT NULL"), task.config.bins
    )


EXPERTS = "role = 'expert' AND problem_id IS NOT NULL AND success IS NOT false AND NOT truncated(finish_reason)"


# First: which clips.


def _choose(
    session: Session, task: _Task, experts: Experts | None, facts: dict[str, Any], file: Path, progress: Progress | None
) -> Path:
    """A file of the chosen clips, without their tokens; `facts` learn what became of groups and successes."""
    outcomes: Counter[str] = Counter()
    successes: Counter[str] = Counter(facts["successes"])
    done, vocab = 0, _vocab(task) if task.config.region == "think" else None
    with pq.ParquetWriter(file, CHOICE) as writer:
        for rows in _whole_groups(session.batches(_segments(task), SEGMENT_ROWS)):
            if vocab:
                rows = rows.append_column("n_thinking", pa.array(thinking(rows["token_ids"], vocab)))
            found = select(rows, task.config, experts)
            uncut = pc.and_(pc.is_null(rows["segment_ends"]), pc.and_not(rows["scored"], rows["truncated"]))
            if task.config.gate == "degenerate":
                uncut = pc.and_(uncut, rows["degenerate"])
            successes.update(found.successes, uncut=pc.sum(uncut).as_py())
            outcomes.update(found.groups)
            writer.write_table(_choices(rows, found))
            done += rows.num_rows
            if progress:
                progress("segments", done, successes["all"])
    successes["unscored"] -= successes["uncut"]
    successes["candidates"] = successes.pop("no_segment", 0)
    outcomes["no_success"] += sum(facts["groups"].values()) - outcomes.total()  # they did not pass by
    facts["outcomes"], facts["successes"] = dict(+outcomes), dict(+successes)
    if not outcomes["clip"]:
        raise EcholabError(
            f"no clip: {', '.join(without_clip(facts)) or 'no group passed by'}{_cure(task.snapshot, task.settings, facts)}"
        )
    return file


def _segments(task: _Task) -> str:
    """The successes in the order of their groups, with their segments where they have some."""
    tokens = ", token_ids" if task.config.region == "think" else ""
    return f"""
        SELECT r.*, s.segment_ends, s.segment_entropies, t.scored IS NOT NULL AS scored{tokens}
        FROM (
            SELECT run, split, step, group_id, sample, rollout_id, problem_id, kind, degenerate(kind) AS degenerate, success,
                truncated(finish_reason) AS truncated
            FROM rollouts WHERE {task.condition} AND success
        ) r
        LEFT JOIN (SELECT rollout_id, segment_ends, segment_entropies FROM segmentations WHERE {task.chosen.cut}) s
            ON s.rollout_id = r.rollout_id
        LEFT JOIN (SELECT rollout_id, true AS scored{tokens} FROM scores WHERE scorer = {text(task.chosen.scorer)}) t
            ON t.rollout_id = r.rollout_id
        ORDER BY r.run, r.split, r.step, r.group_id, r.sample NULLS LAST, r.rollout_id"""


def _whole_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows, cut only between groups."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        groups = batch["group_id"]
        cut = pc.index(pc.equal(groups, groups[-1]), True).as_py()  # the last group may go on
        if held and (cut or held[-1]["group_id"][-1] != groups[-1]):
            yield pa.Table.from_batches([*held, batch.slice(0, cut)])
            held = []
        elif cut:
            yield pa.Table.from_batches([batch.slice(0, cut)])
        held.append(batch.slice(cut))
    if held:
        yield pa.Table.from_batches(held)


def _choices(rows: pa.Table, found: Selection) -> pa.Table:
    unknown = np.isnan(found.entropy), np.isnan(found.distance)
    columns = (
        rows["rollout_id"].take(found.row),
        rows["kind"].take(found.row),
        pa.array(found.segment, pa.int32()),
        pa.array(found.end_token, pa.int32()),
        pa.array(found.whole),
        pa.array(found.entropy, mask=unknown[0]),
        pa.array(found.distance, mask=unknown[1]),
    )
    return pa.table(list(columns), schema=CHOICE)


# Then: their texts and tokens.


def _stage(
    session: Session, task: _Task, chosen: Path, facts: dict[str, Any], d: Draft, progress: Progress | None
) -> Iterator[Staged]:
    """Files of `clips`; `facts` learn what the clips are."""
    vocab, prompts = _vocab(task), _Prompts(task)
    held, done, total = [], 0, pq.read_metadata(chosen).num_rows
    splits: Counter[str] = Counter()
    for batch in session.batches(_contents(task, chosen), CLIP_ROWS):
        rows = batch.to_pylist()
        splits.update(r["rollout_split"] for r in rows)
        held.append(_clips(batch, rows, [prompts(r) for r in rows], vocab, task, d.label))
        if sum(t.nbytes for t in held) > STAGED_BYTES:
            yield from d.store.stage("clips", pa.concat_tables(held), d.folder)
            held = []
        done += len(rows)
        if progress:
            progress("texts", done, total)
    if held:
        yield from d.store.stage("clips", pa.concat_tables(held), d.folder)
    facts |= {"splits": dict(splits), "without_prompt_ids": dict(prompts.problems)}


def _contents(task: _Task, chosen: Path) -> str:
    """Of each chosen clip its rollout and its tokens, with the EOS where the clip is whole."""
    return f"""
        SELECT c.*, r.group_id, r.prompt_id, r.problem_id, r.run, r.step, r.prompt,
            r.split AS rollout_split, r.messages, r.prompt_format, r.completion,
            s.token_ids[:c.end_token + c.whole::INTEGER] AS clip_ids,
            s.loss_mask[:c.end_token + c.whole::INTEGER] AS clip_mask,
            CASE WHEN r.completion_ids[:len(s.token_ids)] = s.token_ids THEN r.prompt_ids END AS own_prompt_ids
        FROM {parquet([chosen])} c
        JOIN rollouts r ON r.rollout_id = c.rollout_id
        JOIN (SELECT rollout_id, token_ids, loss_mask FROM scores WHERE scorer = {text(task.chosen.scorer)}) s
            ON s.rollout_id = c.rollout_id"""


def _clips(
    batch: pa.RecordBatch,
    rows: list[dict[str, Any]],
    prompt_ids: list[list[int] | None],
    vocab: Vocab,
    task: _Task,
    clipset: str,
) -> pa.Table:
    """Rows of `clips`: a batch, also as records, and the prompt's ids of each."""
    same = {
        "clipset": clipset, "scorer": task.chosen.scorer, "segmenter": task.chosen.segmenter, "tokenizer": vocab.tokenizer,
        "selector": task.config.selector, "temperature": task.scorer.get("temperature"), "weight": 1.0,
    }  # fmt: skip
    columns = {
        **{name: [value] * len(rows) for name, value in same.items()},
        **{name: batch[name] for name in batch.schema.names if name in CLIPS.arrow.names},
        "clip_id": [ids.clip_id(r["rollout_id"], vocab.tokenizer, r["end_token"]) for r in rows],
        "group_kind": batch["kind"],
        "n_tokens": pc.list_value_length(batch["clip_ids"]),
        "peak_segment": batch["segment"],
        "peak_entropy": batch["entropy"],
        "clip": [_text(r, vocab) for r in rows],
        "prompt_ids": prompt_ids,
    }
    return conform(pa.table(columns), CLIPS.arrow)


def _text(row: dict[str, Any], vocab: Vocab) -> str:
    """The clip's text, without a final EOS: the beginning of the completion's, where a dump has left special tokens or a
    first space out of it. A character of which the clip has only a part is U+FFFD."""
    tokens = row["clip_ids"][: row["end_token"]]
    whole = b"".join(vocab.pieces.get(t, b"") for t in tokens)
    if row["completion"] is not None:
        completion = row["completion"].encode()
        bare = b"".join(vocab.pieces.get(t, b"") for t in tokens if t not in vocab.special)
        for content in (whole, bare, whole.removeprefix(b" "), bare.removeprefix(b" ")):
            if completion.startswith(content):
                return content.decode(errors="replace")
    return whole.decode(errors="replace")


def _vocab(task: _Task) -> Vocab:
    return Vocab.stored(task.snapshot, task.scorer.get("vocabulary") or task.scorer.get("tokenizer") or "without a name")


class _Prompts:
    """Token ids of prompts: those of the dump, where the scorer took them, else as it rendered the prompt."""

    def __init__(self, task: _Task):
        self.scorer = task.scorer
        self.problems: Counter[str] = Counter()  # why clips have none
        self.rendered = lru_cache(maxsize=1 << 12)(self._rendered)

    def __call__(self, row: dict[str, Any]) -> list[int] | None:
        found = row["own_prompt_ids"] or self.rendered(row["prompt"], row["messages"], row["prompt_format"])
        if isinstance(found, str):
            self.problems[found] += 1
            return None
        return found

    def _rendered(self, prompt: str | None, messages: str | None, format: str) -> list[int] | str:
        """The ids, or why there are none."""
        from echolab.entropy.render import Unfit, prompt_ids

        try:
            row = {"prompt": prompt, "messages": messages, "prompt_format": format}
            return prompt_ids(self.tokenizer, self.scorer["rendering"], row)
        except (EcholabError, Unfit) as e:
            return str(e)

    @cached_property
    def tokenizer(self) -> Any:
        """The scorer's, if it is still there and still the same."""
        source = self.scorer.get("tokenizer_source") or self.scorer.get("model")
        if not source:
            raise EcholabError("the dump has none, nor a model whose tokenizer could make them")
        tokenizer = load_tokenizer(source)
        if tokenizer_fingerprint(tokenizer) != self.scorer["tokenizer"]:
            raise EcholabError(f"{source} has another tokenizer than the scorer had")
        return tokenizer


# What is said of it.

REASONS = {
    "not_degenerate": "{} not degenerate",
    "no_success": "{} without a success",
    "truncated": "{} with truncated successes only",
    "empty": "{} with empty successes only",
    "unscored": "{} whose successes have no segments",
    "no_expert": "{} without an expert",
    "no_segment": "{} without a segment that may be chosen",
}


def without_clip(facts: Mapping[str, Any]) -> list[str]:
    """How many groups gave no clip, and why."""
    return [said.format(f"{facts['outcomes'][why]:,}") for why, said in REASONS.items() if why in facts["outcomes"]]


def _cure(snapshot: Snapshot, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The command after which there may be clips."""
    notes = list(_left_out(snapshot, config, facts["successes"]))
    return f"; {'; '.join(notes)}" if notes else ""


def _left_out(snapshot: Snapshot, config: Mapping[str, Any], successes: Mapping[str, int]) -> Iterator[str]:
    """Successes that the scorer or the segmenter does not cover, and the commands that make up for it."""
    scorer = label(snapshot, "scorer", config["scorer"])
    if n := successes.get("unscored"):
        how = how_to_score(snapshot, config["scorer"], _successes(config))
        yield f"{n:,} of {successes['all']:,} successes have no score of {scorer} and were left out: {how}"
    if n := successes.get("uncut"):
        how = how_to_cut(snapshot, config["scorer"], config["segmenter"])
        yield f"{n:,} of {successes['all']:,} successes are scored but not cut into segments and were left out: {how}"


def _successes(config: Mapping[str, Any]) -> str:
    """A condition for `echolab score`, which knows of no verifier."""
    found = _condition(config)
    if config["verifier"] is None:
        return f"{found} AND success"
    return (
        f"{found} AND rollout_id IN (SELECT rollout_id FROM verdicts WHERE verifier = {text(config['verifier'])} AND success)"
    )


def _mined(snapshot: Snapshot, named: Named, new: bool = False) -> Mined:
    """A clip set from what the store holds of it."""
    with Session(snapshot, memory_limit=MEMORY) as session:
        [statistics] = session.query("clip_stats", clipset=named.label).to_dicts()
    config, facts = named.config, named.parents["facts"]
    notes = list(_left_out(snapshot, config, facts["successes"]))
    if n := facts.get("experts", {}).get("unscored"):
        how = how_to_score(snapshot, config["scorer"], EXPERTS)
        notes.append(f"{n:,} of {facts['experts']['all']:,} experts have no segments of this scorer and were left out: {how}")
    if profile := named.parents.get("profile"):
        notes += _other(snapshot, config, find(snapshot, "cohort", profile))
    for why, n in facts["without_prompt_ids"].items():
        notes.append(f"without prompt_ids: {n:,} of the clips ({why})")
    for split, n in facts["splits"].items():
        if split != "train":
            notes.append(
                f"of split {split}: {n:,} of the clips; do not train on what you evaluate with (--split train leaves them out)"
            )
    scorer, segmenter = (label(snapshot, kind, config[kind]) for kind in ("scorer", "segmenter"))
    return Mined(named.label, config, scorer, segmenter, facts, statistics, notes, new)


def _other(snapshot: Snapshot, config: Mapping[str, Any], profile: Named) -> Iterator[str]:
    for kind in ("scorer", "segmenter"):
        if profile.config.get(kind) not in (None, config[kind]):
            ours, theirs = (label(snapshot, kind, c[kind]) for c in (config, profile.config))
            yield f"profile {profile.label} has {kind} {theirs}, the clips {ours}: what is near may be the {kind}"
