"""The look of charts: colours, axes, and the marks that several of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from echolab.errors import EcholabError
from echolab.words import percent, short

try:
    import altair as alt
except ImportError:
    raise EcholabError("charts need Altair: pip install 'echolab[report]'") from None

FEW = 8  # steps: fewer than these are bars, not areas
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif"
NO_STEP = "datum.value === null || datum.label === 'null' ? 'no step' : datum.label"


@dataclass(frozen=True)
class Style:
    """Colours and width of a chart that stands alone. In a page they are CSS variables: dark mode and print need no
    drawing anew."""

    ink: str = "#1b1f24"
    muted: str = "#5d6670"
    grid: str = "#e4e7ea"
    solved: str = "#2f6690"
    mixed: str = "#e5bf57"
    failed: str = "#c4503a"
    constant: str = "#8d6a94"
    forgotten: str = "#17181c"
    other: str = "#cfd4d9"
    expert: str = "#1f8a78"
    on_colour: str = "#ffffff"  # words on solved, failed and constant
    on_light: str = "#1b1f24"  # words on mixed and other
    series: tuple[str, ...] = ("#2f6690", "#d07c28", "#1f8a78", "#8d6a94", "#7c868f", "#b5485d")
    paper: str = "#ffffff"
    width: int | str = 560

    def part(self, word: str) -> str:
        """The colour of a kind of group, a status of a problem or an outcome of a rollout."""
        return {
            "all wrong": self.failed, "failed": self.failed, "wrong": self.failed, "all right": self.solved,
            "solved": self.solved, "right": self.solved, "mixed": self.mixed, "all the same": self.constant,
            "constant": self.constant, "forgotten": self.forgotten,
        }.get(word, self.other)  # fmt: skip


def dress(chart: Any, style: Style) -> Any:
    """Fonts, colours and lines that all charts have."""
    text = {"labelColor": style.muted, "titleColor": style.muted, "labelFont": FONT, "titleFont": FONT}
    lines = {"gridColor": style.grid, "domainColor": style.grid, "tickColor": style.grid}
    return (
        chart.configure(background=style.paper, font=FONT)
        .configure_view(stroke=None)
        .configure_axis(**text, **lines, titleFontWeight="normal", titleFontSize=11, labelFontSize=11)
        .configure_legend(**text, orient="top", labelFontSize=12, symbolSize=90, symbolOpacity=1, offset=4)
        .configure_title(
            color=style.ink, subtitleColor=style.muted, anchor="start", fontWeight=600, fontSize=14, subtitleFontSize=12
        )
    )


def stack(long: pl.DataFrame, style: Style, normalised: bool, unit: str) -> Any:
    """Columns step, part, n and share: an area over the steps, or bars where there are few."""
    stacking = "normalize" if normalised else "zero"
    n = {
        "field": "n",
        "type": "quantitative",
        "stack": stacking,
        "axis": alt.Axis(format="%" if normalised else "~s", title=None),
    }
    tooltip = [alt.Tooltip("step"), alt.Tooltip("part", title="groups"), alt.Tooltip("n", format=",", title=unit)]
    if not long["share"].null_count():
        tooltip.append(alt.Tooltip("share", format=".1%"))
    colour = parts_colour(long, "part", style)
    base = alt.Chart(long).encode(order="order:Q")
    if long["step"].n_unique() >= FEW:
        return base.mark_area().encode(x=steps_axis(long), y=alt.Y(**n), color=colour, tooltip=tooltip).properties(height=220)
    base = alt.Chart(_labelled(long, normalised)).encode(
        order="order:Q", y=alt.Y("step:O").title("step").axis(labelExpr=NO_STEP, ticks=False, domain=False)
    )
    light = (alt.datum.part == "mixed") | (alt.datum.part == "other groups")
    words = base.mark_text(fontSize=12).encode(
        x=alt.X(**n, bandPosition=0.5),
        text="label:N",
        color=alt.when(light).then(alt.value(style.on_light)).otherwise(alt.value(style.on_colour)),
    )
    bars = base.mark_bar(height=26).encode(x=alt.X(**n), color=colour, tooltip=tooltip)
    return (bars + words).properties(height=38 * long["step"].n_unique())


def _labelled(long: pl.DataFrame, normalised: bool) -> pl.DataFrame:
    """With the words that stand in bars wide enough for them."""
    whole = pl.col("n").sum().over("step")
    part = pl.col("n") / (whole if normalised else whole.max())
    word = part.map_elements(percent, pl.String) if normalised else pl.col("n").map_elements(short, pl.String)
    return long.with_columns(label=pl.when(part > 0.07).then(word).otherwise(pl.lit("")))


def lines(rows: pl.DataFrame, style: Style, column: str, others: Sequence[str], colour: alt.Color) -> alt.Chart:
    """One column over the steps, a line for each value of the column `line`; the others stand in the tooltip."""
    numbers = [alt.Tooltip(c, format="," if rows.schema[c].is_integer() else ",.4~f") for c in (column, *others)]
    few = rows["step"].n_unique() < 4 * FEW
    return (
        alt.Chart(rows)
        .mark_line(point=alt.OverlayMarkDef(size=30) if few else False, strokeWidth=2)
        .encode(
            x=steps_axis(rows, 8 if few else 0),
            y=alt.Y(f"{column}:Q").title(None).scale(zero=False),
            color=colour,
            tooltip=["line", "step", *numbers],
        )
        .properties(height=200)
    )


def steps_axis(rows: pl.DataFrame, padding: int = 0) -> alt.X:
    steps = rows["step"].drop_nulls().unique().sort()
    values = steps.to_list() if len(steps) < FEW else alt.Undefined
    axis = alt.Axis(format="d", grid=False, title="step", tickMinStep=1, values=values)
    return alt.X("step:Q", axis=axis, scale=alt.Scale(zero=False, nice=False, padding=padding))


def curve(rows: pl.DataFrame, column: str, colour: alt.Color, others: Sequence[str], band: bool = False) -> Any:
    """One column along completions, a line for each value of the column `line`; with the band from `lo` to `hi`."""
    axis = alt.Axis(format="%", grid=False, title="position in the completion")
    base = alt.Chart(rows).encode(x=alt.X("position:Q", axis=axis, scale=alt.Scale(domain=[0, 1])), color=colour)
    numbers = [alt.Tooltip(c, format="," if rows.schema[c].is_integer() else ",.4~f") for c in (column, *others)]
    shown = alt.Axis(title=None) if band else alt.Axis(title=None, format="%")
    few = rows["position"].n_unique() < 4 * FEW
    line = base.mark_line(point=alt.OverlayMarkDef(size=24) if few else False, strokeWidth=2).encode(
        y=alt.Y(f"{column}:Q", axis=shown, scale=alt.Scale(zero=not band)),
        tooltip=["line", alt.Tooltip("position", format=".0%"), *numbers],
    )
    if band:
        line = base.mark_area(fillOpacity=0.18).encode(y=alt.Y("lo:Q", title=None), y2="hi:Q") + line
    return line.properties(height=220)


def ranges(rows: pl.DataFrame, style: Style, name: str, column: str, format: str = "~s") -> Any:
    """A line for each row, from `column`_q05 to `column`_q95, with a point at `column`_q50."""
    low, middle, high = (f"{column}_q{q}" for q in ("05", "50", "95"))
    tooltip = [name, *(alt.Tooltip(c, format=".1%" if format == "%" else ",.0f") for c in (low, middle, high))]
    base = alt.Chart(rows.select(name, low, middle, high)).encode(
        y=alt.Y(f"{name}:N", axis=alt.Axis(title=None, ticks=False, domain=False), sort=None), tooltip=tooltip
    )
    x = alt.X(f"{low}:Q", axis=alt.Axis(format=format, title=None), scale=alt.Scale(zero=True))
    line = base.mark_rule(strokeWidth=3, color=style.solved, opacity=0.45).encode(x=x, x2=f"{high}:Q")
    point = base.mark_point(filled=True, opacity=1, size=70, color=style.solved).encode(x=f"{middle}:Q")
    return (line + point).properties(height=34 * rows.height)


def gains(rows: pl.DataFrame, style: Style) -> Any:
    """A point for each row of arm, gain, low, high and word, with its interval, beside a line at 0."""
    numbers = [alt.Tooltip(c, format="+.1%") for c in ("gain", "low", "high")]
    tooltip = ["arm", "word", *numbers, alt.Tooltip("of", format=".1%"), "n_seeds"]
    words = {"better": style.solved, "worse": style.failed, "not told apart": style.constant}
    base = alt.Chart(rows).encode(
        y=alt.Y("arm:N", axis=alt.Axis(title=None, ticks=False, domain=False), sort=None),
        color=colour(rows, "word", words, "circle"),
        tooltip=tooltip,
    )
    axis = alt.Axis(labelExpr="format(datum.value * 100, '+~r')", tickCount=6, title="points")
    x = alt.X("low:Q", axis=axis, scale=alt.Scale(padding=12))
    zero = alt.Chart(rows).mark_rule(color=style.muted, strokeDash=[3, 3]).encode(x=alt.XDatum(0))
    line = base.mark_rule(strokeWidth=3, opacity=0.55).encode(x=x, x2="high:Q")
    point = base.mark_point(filled=True, opacity=1, size=80).encode(x="gain:Q")
    return (zero + line + point).properties(height=34 * rows.height)


def colour(rows: pl.DataFrame, column: str, colours: Mapping[str, str], symbol: str = "stroke") -> alt.Color:
    """A colour for each word of a column, in the order of `colours`; a legend where there are several."""
    found = set(rows[column])
    names = [name for name in colours if name in found]
    legend = alt.Legend(title=None, symbolType=symbol) if len(names) > 1 else None
    return alt.Color(f"{column}:N", scale=alt.Scale(domain=names, range=[colours[n] for n in names]), legend=legend)


def parts_colour(rows: pl.DataFrame, column: str, style: Style, words: Sequence[str] | None = None) -> alt.Color:
    names = words or rows[column].unique(maintain_order=True).to_list()
    return colour(rows, column, {name: style.part(name) for name in names}, "stroke" if column == "line" else "square")


def lines_colour(rows: pl.DataFrame, style: Style) -> alt.Color:
    return colour(rows, "line", dict(zip(rows["line"].unique(maintain_order=True), style.series, strict=False)))
