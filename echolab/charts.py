"""Charts of a store, each drawn from a named query: `lab.chart("degenerate_by_step")`, and those of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import polars as pl

from echolab.chartdata import (
    FEW_SEEDS,
    NO_LENGTHS,
    NO_REWARDS,
    NO_SCORES,
    NO_STEPS,
    ROWS,
    STATUSES,
    Answers,
    Missing,
    problem_cells,
    thin,
)
from echolab.drawing import (
    NO_STEP,
    Style,
    alt,
    colour,
    curve,
    dress,
    gains,
    lines,
    lines_colour,
    parts_colour,
    ranges,
    stack,
)
from echolab.errors import EcholabError
from echolab.words import THIN, count, listed, percent, short

KINDS = {
    "all_fail": "all wrong", "constant": "all the same", "all_success": "all right", "mixed": "mixed", "other": "other groups",
}  # fmt: skip
OUTCOMES = {"success": "right", "failure": "wrong", "unrewarded": "unrewarded"}
BINS = 10  # of entropy_by_position


@dataclass(frozen=True)
class Figure:
    """One chart, and what it shows in words. `about` is the run, where each run has its own."""

    name: str
    about: str
    title: str
    caption: str
    chart: Any


def degenerate_by_step(answers: Answers, style: Style) -> list[Figure]:
    """Kinds of groups: shares of the judged ones, or counts where the dump left groups out."""
    figures = []
    for label, rows in answers.each("degenerate_by_step"):
        if not rows["n_judged"].sum():
            continue
        upstream = _upstream(rows)
        shown, left_out = thin(rows, ROWS // 4)
        long = _long(shown, [(kind, kind, f"share_{kind}") for kind in ("all_fail", "constant", "all_success", "mixed")])
        share = (pl.col("all_success") + pl.col("all_fail") + pl.col("constant")) / pl.col("n_judged")
        ends = _ends(rows.filter(pl.col("n_judged") > 0).with_columns(share=share), "share", percent)
        caption = f"Of the groups{' in the dump' if upstream else ''}, these taught nothing: {ends}{upstream}."
        title = "Groups by kind, " + ("as the dump has them" if upstream else "share of each step")
        figures.append(
            Figure("degenerate_by_step", label, title, caption + left_out, stack(long, style, not upstream, "groups"))
        )
    return figures or _missing(NO_REWARDS)


def wasted_tokens(answers: Answers, style: Style) -> list[Figure]:
    """Completion tokens (or characters) by the kind of their group."""
    figures = []
    for label, rows in answers.each("wasted_tokens"):
        if not rows["total"].sum() or (rows["note"].fill_null("") == "no group has rewards to compare").all():
            continue
        wasted, total = int(rows["wasted"].sum()), int(rows["total"].sum())
        unit = "completion tokens" if rows["unit"][0] == "tokens" else "characters"
        shown, left_out = thin(rows.with_columns(other=pl.col("total") - pl.col("wasted")), ROWS // 4)
        parts = [(kind, f"wasted_{kind}", None) for kind in ("all_fail", "constant", "all_success")]
        long = _long(shown, [*parts, ("other", "other", None)])
        caption = f"{short(wasted)} of {short(total)} {unit} ({percent(wasted / total)}) went into groups that taught nothing"
        caption += f"; a lower bound{_upstream(rows)}." if _upstream(rows) else "."
        title = f"{unit.capitalize()} by kind of group"
        figures.append(Figure("wasted_tokens", label, title, caption + left_out, stack(long, style, False, unit)))
    rewarded = answers.ask("degenerate_by_step")["n_judged"].sum()
    return figures or _missing(NO_LENGTHS if rewarded else NO_REWARDS)


def reward_by_step(answers: Answers, style: Style) -> list[Figure]:
    """Mean reward, a line for each run."""
    rows = answers.lines("reward_by_step").filter(pl.col("mean").is_not_null())
    if not rows.height:
        _missing(NO_STEPS if answers.ask("reward_by_step")["n_rewarded"].sum() else NO_REWARDS)
    shown, left_out = thin(rows)
    chart = lines(shown, style, "mean", ["success_rate", "n_rewarded", "n_groups"], lines_colour(shown, style))
    return [Figure("reward_by_step", "", "Mean reward", _moves(rows, "mean", "{:.3f}") + left_out, chart)]


def entropy_by_step(answers: Answers, style: Style) -> list[Figure]:
    """Median over rollouts, with its band from the 10th to the 90th percentile, under the chosen scorer."""
    shown = pl.col("median").is_not_null() & (pl.col("scorer") == answers.scorer)
    rows = answers.lines("entropy_by_step").filter(shown)
    if not rows.height:
        _missing(NO_STEPS if answers.ask("entropy_by_step").filter(shown).height else NO_SCORES)
    shown, left_out = thin(rows)
    line = lines(shown, style, "median", ["p10", "p90", "mean_of_tokens", "n"], lines_colour(shown, style))
    band = line.mark_area(fillOpacity=0.18).encode(y=alt.Y("p10:Q").title(None), y2="p90:Q")
    caption = f"{_moves(rows, 'median', '{:.2f}')} The band holds the middle 80{THIN}% of rollouts."
    return [Figure("entropy_by_step", "", "Mean token entropy of a rollout (median), nats", caption + left_out, band + line)]


def length_by_outcome(answers: Answers, style: Style) -> list[Figure]:
    """Mean length of right and wrong completions."""
    figures = []
    for label, rows in answers.each("length_by_outcome"):
        rows = rows.filter(pl.col("step").is_not_null())
        in_tokens = (rows["n_tokens_known"] == rows["n"]).all()
        column, unit = ("tokens_mean", "tokens") if in_tokens else ("chars_mean", "characters")
        rows = rows.filter(pl.col(column).is_not_null()).with_columns(line=pl.col("outcome").replace_strict(OUTCOMES))
        if not rows.height:
            continue
        shown, left_out = thin(rows)
        others = ["n", column.replace("mean", "median"), column.replace("mean", "p90")]
        chart = lines(shown, style, column, others, parts_colour(shown, "line", style, [*OUTCOMES.values()]))
        caption = _moves(rows, column, "{:,.0f}") + left_out
        caption = caption[0].upper() + caption[1:]
        figures.append(Figure("length_by_outcome", label, f"Mean length of a completion, {unit}", caption, chart))
    return figures or _missing(NO_STEPS)


def problem_visits(answers: Answers, style: Style, readable: frozenset[str] = frozenset()) -> list[Figure]:
    """How problems fare over the steps. Cells whose group can be read in the same page carry a dot."""
    figures = []
    for label, rows in answers.each("problem_visits"):
        if rows["step"].n_unique() < 2:
            continue
        cells, left_out = problem_cells(rows, readable)
        steps = alt.Axis(labelExpr=NO_STEP, labelAngle=0, labelOverlap=True, title="step", ticks=False, domain=False)
        base = alt.Chart(cells).encode(
            x=alt.X("step:O", axis=steps),
            y=alt.Y("problem:N").title(None).sort(field="rate", op="min").axis(labelLimit=250, ticks=False, domain=False),
            tooltip=["problem", "step", "status", "right"],
        )
        chart = base.mark_rect(cursor="pointer", stroke=style.paper, strokeWidth=1).encode(
            color=parts_colour(cells, "status", style, [*STATUSES.values()])
        )
        if readable:
            dots = base.transform_filter("datum.here")
            chart += dots.mark_point(
                size=9, filled=True, color=style.paper, stroke=style.ink, strokeWidth=0.8, cursor="pointer"
            )
        visits = dict(rows["status"].value_counts().iter_rows())
        said = ", ".join(f"{visits[status]:,} {word}" for status, word in STATUSES.items() if status in visits)
        caption = f"{count(rows['problem_id'].n_unique(), 'problem')}; of {count(rows.height, 'visit')}: {said}.{left_out}"
        widest = 290 + 48 * cells["step"].n_unique()  # where there are few steps
        chart = chart.properties(height=14 * cells["problem"].n_unique(), usermeta={"width": widest})
        figures.append(Figure("problem_visits", label, "Problems over steps", caption, chart))
    return figures or _missing(NO_STEPS)


def entropy_by_position(answers: Answers, style: Style) -> list[Figure]:
    """Segment entropy along a completion, the policy's beside the experts'."""
    error = 1.96 * pl.col("se")
    caption = f"Mean over the segments in each tenth of a completion, with bands of 95{THIN}% from their standard errors."
    figures = []
    for label, rows in _by_position(answers):
        rows = rows.with_columns(
            mean=pl.col("mean_entropy"), lo=pl.col("mean_entropy") - error, hi=pl.col("mean_entropy") + error
        )
        chart = curve(rows, "mean", _cohorts(rows, style), ["n_segments", "n_rollouts"], band=True)
        figures.append(Figure("entropy_by_position", label, "Segment entropy along a completion, nats", caption, chart))
    return figures or _missing(NO_SCORES)


def entropy_profile(answers: Answers, style: Style) -> list[Figure]:
    """Segment entropy along the trajectories of stored profiles."""
    rows = answers.profiles()
    caption = f"Mean over trajectories, each counted once, with bands of 95{THIN}% by a bootstrap over them: "
    sizes = rows.group_by("line", maintain_order=True).agg(pl.col("n").max())
    caption += ", ".join(f"{line} (n = {n:,})" for line, n in sizes.iter_rows())
    chart = curve(rows, "mean", lines_colour(rows, style), ["n", "q05", "q50", "q95"], band=True)
    return [Figure("entropy_profile", "", "Profiles: segment entropy along a completion, nats", caption + ".", chart)]


def peak_positions(answers: Answers, style: Style) -> list[Figure]:
    """Where the segment of highest entropy lies."""
    caption = "The tenth of a completion in which its segment of highest entropy lies, where a peak EchoClip ends."
    figures = []
    for label, rows in _by_position(answers):
        rows = rows.with_columns(peaks=pl.col("share_of_peaks") * pl.col("n_segments"))
        rows = rows.with_columns(share=pl.col("peaks") / pl.col("peaks").sum().over("line"))
        chart = curve(rows, "share", _cohorts(rows, style), ["peaks", "n_segments"])
        figures.append(Figure("peak_positions", label, "Position of the peak, share of rollouts", caption, chart))
    return figures or _missing(NO_SCORES)


def clip_stats(answers: Answers, style: Style) -> list[Figure]:
    """Clip sets side by side: how long their clips are, and how much of their completions they take."""
    rows = answers.clipsets()
    caption = f"From the 5th to the 95th percentile, with the median: {listed([_clips(row) for row in rows.to_dicts()])}."
    return [
        Figure("clip_stats", "", "Length of clips, tokens", caption, ranges(rows, style, "clipset", "tokens")),
        Figure(
            "clip_stats", "", "Share of the completion that a clip takes", _whole(rows),
            ranges(rows, style, "clipset", "fraction", "%"),
        ),
    ]  # fmt: skip


def arms(answers: Answers, style: Style) -> list[Figure]:
    """Gains over the base of an experiment, with intervals over seeds: of samples, and of questions solved at all."""
    rows = answers.arms()
    base, figures = rows["base"][0], []
    for (source,), of_source in rows.group_by("source", maintain_order=True):
        told = of_source.row(0, named=True)
        for column, low, high, at in (
            ("gain", "gain_low", "gain_high", "success_rate"),
            ("solved_gain", "solved_low", "solved_high", "solved"),
        ):
            others = of_source.filter(pl.col("arm") != base).select(
                "arm", n_seeds="n_seeds", gain=column, low=low, high=high, of=at, word=_verdict(low, high)
            )
            what = "Samples that are right" if column == "gain" else "Questions solved at least once"
            caption = (
                f"Difference to {base} ({percent(told[at])}) on the same seeds, {count(told['n_groups'], 'question')} each, "
            )
            caption += (
                f"with 95{THIN}% intervals over {told['n_seeds']:,} seeds."
                if told["n_seeds"] > 1
                else "of one seed: an anecdote."
            )
            about = "all sources" if source is None else source
            figures.append(Figure("arms", about if rows["source"].n_unique() > 1 else "", what, caption, gains(others, style)))
    return figures


def _verdict(low: str, high: str) -> pl.Expr:
    return (
        pl.when(pl.col("n_seeds") < FEW_SEEDS)
        .then(pl.lit("not told apart"))
        .when(pl.col(low) > 0)
        .then(pl.lit("better"))
        .when(pl.col(high) < 0)
        .then(pl.lit("worse"))
        .otherwise(pl.lit("not told apart"))
    )


CHARTS: dict[str, Callable[[Answers, Style], list[Figure]]] = {
    draw.__name__: draw
    for draw in (
        degenerate_by_step, wasted_tokens, reward_by_step, entropy_by_step, length_by_outcome, problem_visits,
        entropy_by_position, entropy_profile, peak_positions, clip_stats, arms,
    )
}  # fmt: skip


def figures(answers: Answers, name: str, style: Style) -> list[Figure]:
    """The figures of a chart: one, or one for each run."""
    if name not in CHARTS:
        raise EcholabError(f"no chart {name!r}: there are {', '.join(CHARTS)}")
    return CHARTS[name](answers, style)


def chart(answers: Answers, name: str, style: Style | None = None) -> alt.TopLevelMixin:
    """One chart that stands alone, with its title and caption; runs below each other."""
    style = style or Style()
    titled = []
    for figure in figures(answers, name, style):
        title = figure.title + (f" · {figure.about}" if figure.about else "")
        titled.append(
            figure.chart.properties(title=alt.TitleParams(title, subtitle=_wrapped(figure.caption)), width=style.width)
        )
    return dress(titled[0] if len(titled) == 1 else alt.vconcat(*titled).resolve_scale(color="independent"), style)


def _wrapped(text: str, chars: int = 90) -> list[str]:
    rows = [""]
    for word in text.split(" "):
        if len(rows[-1]) + len(word) > chars:
            rows.append(word)
        else:
            rows[-1] += f" {word}" if rows[-1] else word
    return rows


def _clips(row: dict[str, Any]) -> str:
    return f"{row['clipset']} ({row['selector']}) has {count(row['n_clips'], 'clip')}"


def _whole(rows: pl.DataFrame) -> str:
    said = [f"{percent(row['share_whole'])} in {row['clipset']}" for row in rows.to_dicts() if row["share_whole"] is not None]
    return f"Clips that are the whole completion: {listed(said)}." if said else "Unknown: their segments are not in this store."


def _missing(what: str) -> NoReturn:
    raise Missing(what)


def _upstream(rows: pl.DataFrame) -> str:
    notes = [n for n in rows["note"].drop_nulls().unique().sort() if "upstream" in n]
    return f" ({', '.join(notes)})" if notes else ""


def _ends(rows: pl.DataFrame, column: str, say: Callable[[Any], str]) -> str:
    """`32 % at step 1, 94 % at step 60`."""
    rows = rows.select(column, "step").sort("step", nulls_last=True)
    ends = dict.fromkeys((rows.row(0), rows.row(-1)))
    return ", ".join(say(value) + ("" if step is None else f" at step {step:,}") for value, step in ends)


def _moves(rows: pl.DataFrame, column: str, format: str) -> str:
    """How each line begins and ends, of three lines at most."""
    several = rows["line"].n_unique() > 1
    said = [
        (f"{name}: " if several else "") + _ends(of_line, column, format.format)
        for (name,), of_line in rows.group_by("line", maintain_order=True)
    ]
    return "; ".join(said[:3]) + "."


def _long(rows: pl.DataFrame, parts: Sequence[tuple[str, str, str | None]]) -> pl.DataFrame:
    """One row a step and kind, from columns of counts and of shares. Kinds that never occur are left out."""
    found = []
    for order, (kind, column, share) in enumerate(parts):
        if rows[column].sum():
            of_kind = pl.lit(None, pl.Float64) if share is None else pl.col(share)
            found.append(rows.select("step", part=pl.lit(KINDS[kind]), n=column, share=of_kind, order=pl.lit(order)))
    return pl.concat(found)


def _by_position(answers: Answers) -> Iterator[tuple[str, pl.DataFrame]]:
    """Of each run: the bins of its right and wrong completions, then those of experts' right ones."""
    experts = answers.experts("entropy_by_position").filter(pl.col("outcome") != "failure")
    experts = experts.with_columns(line=pl.format("{} (expert)", "run"))
    experts = experts.filter(pl.col("line").is_in(experts["line"].unique(maintain_order=True).head(3).to_list()))
    for label, rows in answers.each("entropy_by_position"):
        if rows.height:
            policy = rows.with_columns(line=pl.format("policy, {}", pl.col("outcome").replace_strict(OUTCOMES)))
            yield label, pl.concat([policy, experts]).with_columns(position=(pl.col("bin") + 0.5) / BINS)


def _cohorts(rows: pl.DataFrame, style: Style) -> alt.Color:
    colours = {f"policy, {word}": style.part(word) for word in OUTCOMES.values()}
    experts = [line for line in rows["line"].unique(maintain_order=True) if line not in colours]
    return colour(rows, "line", colours | dict(zip(experts, (style.expert, *style.series[1:]), strict=False)))
