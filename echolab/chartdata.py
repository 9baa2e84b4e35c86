"""What charts and the report show: named queries over chosen runs, each asked once, in as many rows as a chart takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from echolab.errors import EcholabError
from echolab.sql import Session
from echolab.words import count

ROWS = 1900  # of one chart at most
CLIPSETS = 12
SERIES = 6  # runs in one report, lines in one chart
COLUMNS, PROBLEMS = 60, 48  # of the problems' heat-map
FEW_SEEDS = 3  # fewer are no ground for a claim, whatever their interval
STATUSES = {
    "solved": "solved", "mixed": "mixed", "constant": "constant", "failed": "failed", "forgotten": "forgotten",
    "single": "one sample", "unrewarded": "unrewarded",
}  # fmt: skip

NO_ROLLOUTS = "rollouts of a policy: `echolab ingest PATH --run NAME` reads dumps of any trainer"
NO_REWARDS = "rewards: `echolab verify --verifier math` judges answers where the ground truth is known"
NO_LENGTHS = "lengths: `echolab ingest` counts them where a dump has texts or token ids"
NO_STEPS = "training steps to compare: `echolab ingest --step N` gives a step to dumps that do not hold it"
NO_SCORES = "token entropies: `echolab score --model MODEL` computes them"
NO_EXPERTS = "expert rollouts: `echolab ingest PATH --run NAME --role expert` reads golden solutions"
NO_PROFILES = "profiles: `echolab profile --name NAME --where \"role = 'expert' AND success\"` makes one"
NO_ARMS = "arms to compare: `echolab train` with runs named NAME-s0, NAME-s1, ... that are evaluated at the same steps"
NO_CLIPS = "clip sets: `echolab mine --name NAME` makes one from what is scored"


class Missing(EcholabError):
    """There is nothing to show. `what` is missing, and the command that provides it."""

    def __init__(self, what: str):
        self.what = what
        super().__init__(f"this store has no {what}")


@dataclass
class Answers:
    """Answers of named queries. `runs` are the chosen ones that have a policy, the largest first."""

    session: Session
    runs: tuple[str, ...]
    kept: dict[tuple[str, Any], pl.DataFrame] = field(default_factory=dict)

    @classmethod
    def of(cls, session: Session, runs: Sequence[str] | None = None) -> Answers:
        """Over these runs, else over all."""
        stored = sorted({r.run for r in session.snapshot.ledger.live})
        if unknown := sorted(set(runs or ()) - set(stored)):
            raise EcholabError(f"no run {unknown[0]!r} in this store; there are: {', '.join(stored) or 'none'}")
        policies = session.sql("SELECT run FROM rollouts WHERE role = 'policy' GROUP BY run ORDER BY count(*) DESC, run")
        return cls(session, tuple(r for r in policies["run"] if runs is None or r in runs))

    def ask(self, query: str, **params: Any) -> pl.DataFrame:
        """Of the chosen runs' policies."""
        only = {"run": self.runs[0]} if len(self.runs) == 1 else {}
        frame = self.ask_once(query, **params, **only)
        return frame.filter(pl.col("run").is_in(self.runs))

    def experts(self, query: str) -> pl.DataFrame:
        """Of the experts of all runs: they solve problems, not steps of a run."""
        return self.ask_once(query, role="expert")

    @property
    def scorer(self) -> str:
        """The one that the session shows."""
        scorer = self.session.sql("SELECT chosen_scorer() AS scorer")["scorer"][0]
        if scorer is None:
            raise Missing(NO_SCORES)
        return scorer

    def profiles(self) -> pl.DataFrame:
        """The newest version of each profile, with a column `line` that names it; the last made ones."""
        newest = self.session.sql("SELECT arg_max(id, version) AS id FROM cohorts GROUP BY name ORDER BY max(created_at) DESC")
        if not newest.height:
            raise Missing(NO_PROFILES if self.session.sql("SELECT 1 FROM scores LIMIT 1").height else NO_SCORES)
        found = [self.ask_once("entropy_profile", profile=id) for id in sorted(newest["id"].head(SERIES))]
        return pl.concat(found).with_columns(line="profile")

    def clipsets(self) -> pl.DataFrame:
        """The last made clip sets, in numbers."""
        rows = self.ask_once("clip_stats")
        if not rows.height:
            raise Missing(NO_CLIPS)
        return rows.tail(CLIPSETS)

    def arms(self) -> pl.DataFrame:
        """Arms of an experiment against its base, which comes first; the rows without a source are all sources."""
        rows = self.ask_once("arms")
        chosen = pl.col("runs").list.set_intersection(list(self.runs)).list.len() > 0
        rows = rows.filter(chosen | (pl.col("arm") == pl.col("base")))
        if rows["arm"].n_unique() < 2:
            raise Missing(NO_ARMS)
        return rows

    def ask_once(self, query: str, **params: Any) -> pl.DataFrame:
        """Of the whole store."""
        key = query, tuple(sorted(params.items()))
        if key not in self.kept:
            frame = self.session.query(query, **params)
            numbers = [c for c, t in frame.schema.items() if t.is_float()]
            self.kept[key] = frame.with_columns(pl.when(pl.col(c).is_finite()).then(c).alias(c) for c in numbers)
        return self.kept[key]

    def each(self, query: str, evaluations: bool = False) -> Iterator[tuple[str, pl.DataFrame]]:
        """Run by run, the first ones only; where a run has several splits, each of them. The split eval is left out where a
        run has others: nothing is learnt from evaluations, and none of their tokens is wasted."""
        frame = self.ask(query)
        if not self.runs:
            raise Missing(NO_ROLLOUTS)
        for run in self.runs[:SERIES]:
            of_run = frame.filter(pl.col("run") == run)
            splits = of_run["split"].unique().sort().to_list()
            splits = [s for s in splits if evaluations or s != "eval"] or splits
            for split in splits:
                yield (f"{run}, {split}" if len(splits) > 1 else run), of_run.filter(pl.col("split") == split)

    def lines(self, query: str) -> pl.DataFrame:
        """Rows that have a step, with a column `line` that names run and split; the first lines only."""
        labelled = [rows.with_columns(line=pl.lit(label)) for label, rows in self.each(query, evaluations=True)]
        frame = pl.concat(labelled) if labelled else self.ask(query).with_columns(line=pl.lit(""))
        frame = frame.filter(pl.col("step").is_not_null())
        return frame.filter(pl.col("line").is_in(frame["line"].unique(maintain_order=True).head(SERIES).to_list()))


def thin(frame: pl.DataFrame, rows: int = ROWS) -> tuple[pl.DataFrame, str]:
    """Few enough rows for a chart: every k-th step, counted from the last. With a sentence that says so."""
    steps = frame["step"].unique().sort(descending=True)
    shown, every = frame, 1
    while shown.height > rows and every < len(steps):
        every += 1
        shown = frame.filter(pl.col("step").is_in(steps.gather_every(every).to_list()))
    return shown, f" Drawn: one of {every} steps." if every > 1 else ""


def problem_cells(rows: pl.DataFrame, readable: frozenset[str] = frozenset()) -> tuple[pl.DataFrame, str]:
    """The answer of `problem_visits` as cells of a heat-map, and a sentence that says what they leave out. Many steps are
    put together, and the newest visit counts; of many problems those that were forgotten are shown, and others evenly
    along their success rate."""
    steps = rows["step"].unique().drop_nulls().sort()
    width = -(-len(steps) // COLUMNS) or 1
    last = {step: steps[min((i // width + 1) * width, len(steps)) - 1] for i, step in enumerate(steps)}
    rows = rows.with_columns(
        here=pl.col("group_id").is_in(list(readable)), column=pl.col("step").replace_strict(last, return_dtype=pl.Int64)
    )
    rows = rows.sort("here", "step", "group_id").unique(["problem_id", "column"], keep="last", maintain_order=True)
    told = f" Of {width} steps together the newest visit counts." if width > 1 else ""
    rows, left_out = _some_problems(rows)
    rows = rows.join(_names(rows), on="problem_id").sort("problem", "column")
    newest, oldest = (pl.col("success_rate").sort_by("column").get(i) for i in (-1, 0))
    cells = rows.select(
        "problem",
        "group_id",
        "here",
        step="column",
        status=pl.col("status").replace_strict(STATUSES),
        right=pl.format("{} of {}", "n_success", "n_rewarded"),
        rate="problem_success_rate",
        newest=newest.over("problem_id"),
        change=(newest - oldest).over("problem_id"),
    )
    return cells, told + left_out


def _some_problems(rows: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    forgotten = (pl.col("status") == "forgotten").any().alias("forgotten")
    problems = rows.group_by("problem_id").agg(forgotten, pl.first("problem_success_rate").alias("rate"), pl.len())
    problems = problems.sort("rate", "problem_id", nulls_last=True)
    room = min(PROBLEMS, max(1, ROWS * problems.height // rows.height))
    if problems.height <= room:
        return rows, ""
    lost = problems.filter("forgotten").head(room // 2)
    rest = problems.join(lost, on="problem_id", how="anti")
    n = room - lost.height
    kept = pl.concat([lost, rest[[i * rest.height // n for i in range(n)]]])
    told = f" {count(room, 'problem')} shown, "
    told += f"{lost.height} of them forgotten ones, the others evenly" if lost.height else "evenly"
    return rows.join(kept, on="problem_id", how="semi").head(ROWS), told + " along their success rate."


def _names(rows: pl.DataFrame) -> pl.DataFrame:
    """Problems by the begin of their prompt, numbered where that is the same."""
    named = rows.select("problem_id", text=pl.col("prompt").fill_null("(no prompt)")).unique().sort("text", "problem_id")
    nth = pl.col("problem_id").rank("ordinal").over("text")
    return named.select("problem_id", problem=pl.when(nth > 1).then(pl.format("{} · {}", "text", nth)).otherwise("text"))
