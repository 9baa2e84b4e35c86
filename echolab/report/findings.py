"""What a report says in words and in tables; its numbers are those of named queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from echolab.chartdata import FEW_SEEDS, NO_REWARDS, NO_ROLLOUTS, Answers, Missing
from echolab.words import THIN, count, listed, percent, short

FILES = 30  # of the ledger that are listed one by one
DEGENERATE = ("all_fail", "constant", "all_success")


@dataclass(frozen=True)
class Finding:
    """The headline, the sentences below it, and figures: (value, what it is)."""

    headline: str
    lead: tuple[str, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()


def finding(answers: Answers) -> Finding:
    """Of the largest run, in its largest split that is no evaluation."""
    if not answers.runs:
        return Finding("There is no policy rollout here", (f"A report needs {NO_ROLLOUTS}.",))
    main = _Main(answers, answers.runs[0])
    if not main.judged:
        return Finding(main.begin("No rollout has a reward to compare"), (f"What is missing: {NO_REWARDS}.",))
    lead = (main.reasons(), main.problems(), main.costs())
    headline = main.begin(main.headline())
    if told := experiment(answers):
        headline, lead = told[0], (f"{told[1]}.", f"{headline}.", *lead)
    return Finding(headline, tuple(filter(None, lead)), tuple(main.figures()))


def experiment(answers: Answers) -> tuple[str, str] | None:
    """What the arms of an experiment came to, over all sources of questions: in words, and in figures. None where there is
    no experiment."""
    try:
        rows = answers.arms()
    except Missing:
        return None
    together = rows.filter(pl.col("source").is_null())
    rows = together if together.height else rows
    base, seeds = rows["base"][0], min(rows["n_seeds"].to_list())
    arms = [row for row in rows.to_dicts() if row["arm"] != base]
    unit = f"Against {base}, in points of evaluated samples that are right"
    if seeds < FEW_SEEDS:
        told, of = (
            listed([f"{row['arm']} {_points(row['gain'])}" for row in arms]),
            "one seed" if seeds == 1 else f"{seeds} seeds",
        )
        said = f"An anecdote of {of}: {told} points against {base}"
        return said, f"{unit}: {told}; how sure that is, so few seeds cannot say"
    better = [row["arm"] for row in arms if row["gain_low"] > 0]
    worse = [row["arm"] for row in arms if row["gain_high"] < 0]
    unclear = [row["arm"] for row in arms if row["arm"] not in (*better, *worse)]
    told = [f"{listed(better)} helped"] if better else []
    told += [f"{listed(worse)} did harm"] if worse else []
    told += [f"{listed(unclear)} cannot be told from it"] if unclear else []
    figures = [f"{r['arm']} {_points(r['gain'])} ({_points(r['gain_low'])} to {_points(r['gain_high'])})" for r in arms]
    return f"Against {base}, over {seeds} seeds: {', '.join(told)}", f"{unit}, with 95{THIN}% intervals: {listed(figures)}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


class _Main:
    """The run and split that a report is about, first of all."""

    def __init__(self, answers: Answers, run: str):
        self.answers, self.run = answers, run
        kinds = answers.ask("degenerate_by_step").filter(pl.col("run") == run)
        sizes = kinds.group_by("split").agg(pl.sum("n_groups"), trains=pl.col("split").first() != "eval")
        sizes = sizes.sort("trains", "n_groups", "split", descending=[True, True, False])
        self.split = sizes["split"][0]
        self.kinds, self.cost = self.ask("degenerate_by_step"), self.ask("wasted_tokens")
        self.judged = int(self.kinds["n_judged"].sum())
        self.degenerate = sum(int(self.kinds[kind].sum()) for kind in DEGENERATE)
        self.upstream = any("upstream" in (note or "") for note in self.kinds["note"])
        self.wasted, self.total = int(self.cost["wasted"].sum()), int(self.cost["total"].sum())  # 0 where unknown
        self.unit = "tokens" if self.cost["unit"][0] == "tokens" else "characters"

    def ask(self, query: str) -> pl.DataFrame:
        rows = self.answers.ask(query).filter((pl.col("run") == self.run) & (pl.col("split") == self.split))
        return rows.sort("step", nulls_last=True) if "step" in rows.columns else rows

    def begin(self, sentence: str) -> str:
        return f"In {self.run}, {sentence[0].lower()}{sentence[1:]}" if len(self.answers.runs) > 1 else sentence

    def headline(self) -> str:
        if self.upstream:
            return (
                f"At least {count(self.degenerate, 'group')} taught nothing; which share is unknown, as the dump left some out"
            )
        if not self.degenerate:
            return "Every judged group had something to teach"
        since, share = since_when(self.kinds, 0.5)
        spent = self.cost if since is None else self.cost.filter(pl.col("step") >= since)
        when = "" if since is None else f" since step {since:,}"
        cost = f"; they cost {short(int(spent['wasted'].sum()))} {self.unit}" if self.total else ""
        return f"{percent(share)} of the groups taught nothing{when}{cost}"

    def reasons(self) -> str:
        words = {"all_fail": "all wrong", "all_success": "all right", "constant": "all given the same partial reward"}
        found = [f"{int(self.kinds[kind].sum()):,} were {word}" for kind, word in words.items() if self.kinds[kind].sum()]
        said = f"Of {count(self.judged, 'judged group')}, {listed(found)}." if found else ""
        since, share = since_when(self.kinds, 0.9)
        if since is not None and not self.upstream:
            said += f" Since step {since:,}, {percent(share)} taught nothing."
        taught = self.ask("all_fail_with_expert").height
        return said + (f" To {taught:,} of the all-wrong ones an expert in this store has the answer." if taught else "")

    def problems(self) -> str:
        found = dict(self.ask("degenerate_prompts")["status"].value_counts().iter_rows())
        words = {"saturated": "solved for good", "never_solved": "never solved", "forgotten": "solved and lost again"}
        said = [f"{found[status]:,} {word}" for status, word in words.items() if status in found]
        return f"Problems: {listed(said)}." if said else ""

    def costs(self) -> str:
        wasted, total = int(self.cost["wasted"].sum() or 0), int(self.cost["total"].sum() or 0)
        if not total:
            return ""
        part = (
            f"at least {short(wasted)}" if self.upstream else f"{percent(wasted / total)} ({short(wasted)} of {short(total)})"
        )
        return f"Of all completion {self.unit}, {part} went into groups whose advantages are all zero."

    def figures(self) -> list[tuple[str, str]]:
        share = "unknown" if self.upstream else percent(self.degenerate / self.judged)
        found = [(share, "of groups taught nothing")]
        if self.total:
            found.append((short(self.wasted), f"{self.unit} spent on them"))
        found.append((_move(self.ask("reward_by_step").filter(pl.col("mean").is_not_null()), "mean", 3), "mean reward"))
        entropies = self.ask("entropy_by_step").filter(pl.col("median").is_not_null())
        entropies = entropies.filter(pl.col("scorer") == self.answers.scorer) if entropies.height else entropies
        if entropies.height:
            found.append((_move(entropies, "median", 2), "nats, median entropy"))
        problems = self.ask("problem_visits")
        if problems["step"].n_unique() > 1:
            forgotten = problems.filter(pl.col("status") == "forgotten")["problem_id"].n_unique()
            found.append((f"{forgotten:,} of {problems['problem_id'].n_unique():,}", "problems failed after a success"))
        return found


def _move(rows: pl.DataFrame, column: str, digits: int) -> str:
    ends = [f"{rows[column][i]:.{digits}f}" for i in (0, -1)]
    return ends[0] if rows.height == 1 else " → ".join(ends)


def since_when(kinds: pl.DataFrame, most: float) -> tuple[int | None, float]:
    """The first step from which on this share of the judged groups is degenerate, and their share from there. No step, and
    the share of all, where that holds of all, or begins in the last tenth of the steps."""
    rows = kinds.filter(pl.col("n_judged") > 0).sort("step", nulls_last=True)
    lost = rows.select(n=pl.sum_horizontal(DEGENERATE))["n"]
    share = int(lost.sum()) / int(rows["n_judged"].sum())
    if share < most and not rows["step"].null_count():
        tails = lost.cum_sum(reverse=True) / rows["n_judged"].cum_sum(reverse=True)
        for i in range(1, rows.height - max(2, rows.height // 10) + 1):
            if tails[i] >= most:
                return rows["step"][i], tails[i]
    return None, share


def runs_table(answers: Answers) -> list[dict[str, Any]]:
    """One row a run and split of a policy, the largest run first."""
    by = ["run", "split"]
    rewarded = pl.col("n_rewarded").sum()
    kinds = answers.ask("degenerate_by_step").group_by(by).agg(
        first=pl.min("step"), last=pl.max("step"), n_groups=pl.sum("n_groups"), n_judged=pl.sum("n_judged"),
        n_degenerate=sum(pl.col(kind).sum() for kind in DEGENERATE), note=pl.col("note").drop_nulls().first(),
    )  # fmt: skip
    rewards = answers.ask("reward_by_step").group_by(by).agg(
        n=pl.sum("n"), n_rewarded=rewarded, reward=(pl.col("mean") * pl.col("n_rewarded")).sum() / rewarded,
        right=(pl.col("success_rate") * pl.col("n_rewarded")).sum() / rewarded,
    )  # fmt: skip
    costs = answers.ask("wasted_tokens").group_by(by).agg(unit=pl.first("unit"), wasted=pl.sum("wasted"), total=pl.sum("total"))
    problems = answers.ask("problem_visits").group_by(by).agg(problems=pl.n_unique("problem_id"))
    frame = kinds.join(rewards, on=by, how="left").join(costs, on=by, how="left").join(problems, on=by, how="left")
    return sorted(frame.to_dicts(), key=lambda row: (answers.runs.index(row["run"]), row["split"]))


def experts_table(answers: Answers) -> list[dict[str, Any]]:
    """One row a run of experts, with how many of the policies' problems they solve."""
    problems = set(answers.ask("problem_visits")["problem_id"])
    found = answers.session.sql(
        """SELECT run, count(*) AS n, count(reward) AS n_rewarded, count(*) FILTER (WHERE success) AS n_right,
            list(DISTINCT problem_id) FILTER (WHERE success) AS solved
        FROM rollouts WHERE role = 'expert' GROUP BY run ORDER BY run"""
    )
    return [
        {**row, "solved": len(problems.intersection(row["solved"] or ())), "problems": len(problems)}
        for row in found.iter_rows(named=True)
    ]


def ledger_table(answers: Answers) -> list[dict[str, Any]]:
    """One row a live reading; many of them put together by run and format."""
    rows = answers.session.sql(
        """SELECT run, source_path AS file, format, n_rows, n_shared, n_quarantined, group_source, completeness
        FROM ingests WHERE live ORDER BY run, source_path, created_at, ingest_id"""
    )
    if rows.height > FILES:
        rows = rows.group_by("run", "format", "group_source", "completeness", maintain_order=True).agg(
            file=pl.format("{} files, {} to {}", pl.len(), pl.first("file"), pl.last("file")),
            n_rows=pl.sum("n_rows"), n_shared=pl.sum("n_shared"), n_quarantined=pl.sum("n_quarantined"),
        )  # fmt: skip
    return rows.to_dicts()
