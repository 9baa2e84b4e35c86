"""The sections of a report's page, as HTML. Everything that comes from a store is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import polars as pl

from echolab.chartdata import Answers, Missing
from echolab.charts import Figure
from echolab.report.findings import Finding, experts_table, ledger_table, runs_table
from echolab.report.html import table, words
from echolab.words import count, percent, short

# Of each: its id, heading, what to know before reading its charts, and the charts.
CHARTED = (
    (
        "arms",
        "What helped",
        "Runs that were trained in different ways, compared seed by seed on the same questions.",
        ("arms",),
    ),
    (
        "groups",
        "What taught nothing",
        "A group whose rollouts all get the same reward has only advantages of zero: it costs its tokens and teaches nothing.",
        ("degenerate_by_step", "wasted_tokens"),
    ),
    ("course", "Reward, entropy, length", "", ("reward_by_step", "entropy_by_step", "length_by_outcome")),
    (
        "problems",
        "Problem by problem",
        "Click a cell to read its group.",
        ("problem_visits",),
    ),
    (
        "positions",
        "Where along a completion",
        "",
        ("entropy_profile", "entropy_by_position", "peak_positions"),
    ),
    ("clips", "Clip sets", "", ("clip_stats",)),
)
MOST_RUNS = 40  # of the table
SORTS = (("rate", "success rate"), ("newest", "newest visit"), ("change", "change"), ("problem", "name"))


def top(finding: Finding, kicker: str) -> str:
    numbers = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for value, what in finding.figures)
    return (
        f'<header class="top"><p class="kicker">{escape(kicker)}</p>'
        '<button id="theme" type="button" title="light or dark" aria-label="light or dark">◐</button>'
        f'<h1>{escape(finding.headline)}.</h1><p class="lead">{words(" ".join(finding.lead))}</p>'
        + (f'<dl class="numbers">{numbers}</dl>' if numbers else "")
        + "<noscript><p>The charts and the reader of this page need JavaScript.</p></noscript>"
        "</header>"
    )


def section(id: str, heading: str, about: str, *content: str, wide: bool = False) -> str:
    return (
        f'<section id="{id}"{" class=wide" if wide else ""}><h2>{escape(heading)}</h2>'
        + (f"<p>{words(about)}</p>" if about else "")
        + "".join(content)
        + "</section>"
    )


def runs(answers: Answers) -> str:
    head = [
        ("run", ""), ("split", ""), ("steps", "n"), ("groups", "n"), ("rollouts", "n"), ("problems", "n"), ("mean reward", "n"),
        ("right", "n"), ("taught nothing", "n"), ("spent on them", "n"), ("remark", ""),
    ]  # fmt: skip
    rows = runs_table(answers)
    if not any(row["note"] for row in rows):
        head = head[:-1]
    content = table(head, [_run(row)[: len(head)] for row in rows[:MOST_RUNS]])
    if len(rows) > MOST_RUNS:
        content += f"<p>The {MOST_RUNS} largest of {len(rows):,} runs and splits.</p>"
    experts = experts_table(answers)
    if experts:
        head = [("experts", ""), ("rollouts", "n"), ("right", "n"), ("of the problems above, solved", "n")]
        content += table(head, [_expert(row) for row in experts])
    return section("runs", "Runs", "", content)


def _run(row: Mapping[str, Any]) -> list[str]:
    upstream = "upstream" in (row["note"] or "")
    judged = row["n_judged"] and not upstream
    trains = row["split"] != "eval"
    spent = trains and row["n_judged"] and row["total"]
    unit = "tokens" if row["unit"] == "tokens" else "characters"
    return [
        row["run"], row["split"], _steps(row["first"], row["last"]), f"{row['n_groups']:,}", f"{row['n']:,}",
        f"{row['problems']:,}" if row["problems"] else "–", "–" if not row["n_rewarded"] else f"{row['reward']:.3f}",
        percent(row["right"]) if row["n_rewarded"] else "–",
        "–" if not trains else percent(row["n_degenerate"] / row["n_judged"]) if judged else "unknown",
        f"{'at least ' if upstream else ''}{short(row['wasted'])} {unit}" if spent else "–",
        row["note"] or "",
    ]  # fmt: skip


def _expert(row: Mapping[str, Any]) -> list[str]:
    right = percent(row["n_right"] / row["n_rewarded"]) if row["n_rewarded"] else "–"
    return [row["run"], f"{row['n']:,}", right, f"{row['solved']:,} of {row['problems']:,}"]


def _steps(first: int | None, last: int | None) -> str:
    return "–" if first is None else f"{first:,}" if first == last else f"{first:,} – {last:,}"


def clip_sets(answers: Answers) -> str:
    """The clip sets in numbers; nothing where there are none."""
    head = [
        ("clip set", ""), ("selector", ""), ("clips", "n"), ("rollouts", "n"), ("problems", "n"), ("tokens", "n"),
        ("median share", "n"), ("median position", "n"), ("mean entropy", "n"),
    ]  # fmt: skip
    try:
        rows = answers.clipsets().to_dicts()
    except Missing:
        return ""
    lines = [
        [
            row["clipset"], row["selector"], *(f"{row[n]:,}" for n in ("n_clips", "n_rollouts", "n_problems", "n_tokens")),
            percent(row["fraction_q50"]), percent(row["position_q50"]),
            "–" if row["mean_entropy"] is None else f"{row['mean_entropy']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, lines) + _overlap(answers.ask_once("clip_overlap"))


def _overlap(rows: pl.DataFrame) -> str:
    """Of the last two clip sets."""
    if not rows.height:
        return ""
    found = rows.row(0, named=True)
    sets = f"{found['a']} ({count(found['clips_a'], 'clip')}) and {found['b']} ({found['clips_b']:,})"
    tokens = "" if found["jaccard_tokens"] is None else f"; of all their tokens {percent(found['jaccard_tokens'])} are in both"
    both = f"{sets} have {count(found['clips_both'], 'clip')} in common{tokens}."
    return f"<p>{escape(both)}</p>"


def charted(
    drawn: Mapping[str, Sequence[Figure]], absent: Mapping[str, str], tables: Mapping[str, str], dots: bool
) -> tuple[str, dict[str, tuple[str, int]]]:
    """The sections of charts, and which chart (its name and number) stands where. What is absent is said in its place.
    `tables` stand before the charts of their section; `dots` are in the heat-map of problems."""
    content, places = [], {}
    for id, heading, about, names in CHARTED:
        shown = [(figure, name, i) for name in names for i, figure in enumerate(drawn.get(name, ()))]
        gone = dict.fromkeys(absent[name] for name in names if name in absent)
        boxes = []
        for figure, name, i in shown:
            place = f"chart-{len(places)}"
            places[place] = name, i
            boxes.append(_figure(place, figure))
        grid = f'<div class="charts">{"".join(boxes)}</div>' if boxes else ""
        notes = "".join(f'<p class="absent">{words(f"No {what}.")}</p>' for what in gone)
        if grid or notes:
            if id == "problems" and dots:
                about += " Those with a dot are in this page."
            content.append(section(id, heading, about if grid else "", tables.get(id, ""), grid, notes))
    return "".join(content), places


def _figure(place: str, figure: Figure) -> str:
    run = f" · {figure.about}" if figure.about else ""
    sort = ""
    if figure.name == "problem_visits":
        buttons = "".join(
            f'<button type="button" data-sort="{field} {"descending" if field == "change" else "ascending"}"'
            f' aria-pressed="{"true" if field == "rate" else "false"}">{name}</button>'
            for field, name in SORTS
        )
        sort = f'<div class="sort">by {buttons}</div>'
    return (
        f"<figure><figcaption><b>{escape(figure.title)}{escape(run)}</b>{words(figure.caption)}</figcaption>{sort}"
        f'<div class="chart" id="{place}"></div></figure>'
    )


def reader(about: str) -> str:
    return section("read", "Read", about, '<div id="reader"></div>', wide=True)


def sources(answers: Answers) -> str:
    head = [
        ("run", ""), ("file", ""), ("format", ""), ("rollouts", "n"), ("known before", "n"), ("quarantined", "n"),
        ("groups by", ""), ("completeness", ""),
    ]  # fmt: skip
    rows = ledger_table(answers)
    told = {
        "all": "all", "effective": "what the trainer kept", "filtered": "zero-spread groups dropped upstream",
    }  # fmt: skip
    lines = [
        [
            row["run"], row["file"], row["format"], f"{row['n_rows']:,}", f"{row['n_shared'] or 0:,}",
            f"{row['n_quarantined'] or 0:,}", (row["group_source"] or "–").replace("_", " "), told[row["completeness"]],
        ]
        for row in rows
    ]  # fmt: skip
    about = f"{count(sum(row['n_rows'] for row in rows), 'rollout')} were read from these files."
    return section("sources", "Where this comes from", about, table(head, lines))


def missing(what: Sequence[str]) -> str:
    items = "".join(f"<li>{words(w)}</li>" for w in what)
    return section("missing", "Not in this store", "What this page could also show:", f"<ul>{items}</ul>") if what else ""


def foot(notes: Sequence[str], provenance: Mapping[str, Any]) -> str:
    said = "".join(f"<p>{words(note)}</p>" for note in notes)
    block = json.dumps(provenance, indent=2, sort_keys=True, ensure_ascii=False)
    return (
        f'<footer class="foot">{said}<details><summary>How this page was made</summary>'
        f'<pre id="provenance">{escape(block, quote=False)}</pre></details></footer>'
    )
