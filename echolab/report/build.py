"""`echolab report`: a store as one HTML file, for those who were not there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import echolab
from echolab.chartdata import NO_EXPERTS, SERIES, Answers, Missing
from echolab.charts import CHARTS, Figure, chart, problem_visits
from echolab.coverage import label
from echolab.drawing import Style, dress
from echolab.errors import EcholabError
from echolab.report import sections
from echolab.report.choice import Choice, choose
from echolab.report.findings import experts_table, finding
from echolab.report.html import page, part, reader_index
from echolab.report.sample import KINDS, SIZES, Sample, as_json, sample
from echolab.sql import Session
from echolab.store import Snapshot, now
from echolab.words import count, listed

MOST_BYTES, SPARE = 4_900_000, 250_000  # of the file; for its text and tables
PAGE = Style(
    ink="var(--ink)", muted="var(--muted)", grid="var(--line)", solved="var(--solved)", mixed="var(--mixed)",
    failed="var(--failed)", constant="var(--constant)", forgotten="var(--forgotten)", other="var(--other)",
    expert="var(--expert)", on_colour="var(--on-colour)", on_light="var(--on-light)", paper="var(--paper)", width="container",
    series=("var(--accent)", "var(--orange)", "var(--expert)", "var(--constant)", "var(--grey)", "var(--rose)"),
)  # fmt: skip


@dataclass
class Report:
    """What was written: how many of the groups can be read in it, its charts, what the store does not hold (with the command
    that provides it), and what was chosen unasked. `static` are the images."""

    path: str
    size: int
    groups: int
    n_groups: int
    charts: list[str]
    missing: list[str]
    notes: list[str]
    static: list[str]


def report(
    snapshot: Snapshot,
    out: str | Path,
    *,
    runs: Sequence[str] | None = None,
    clipset: str | None = None,
    verifier: str | None = None,
    scorer: str | None = None,
    segmenter: str | None = None,
    static: str | Path | None = None,
) -> Report:
    """Write the page of a store, of these runs or of all. With `static`, each chart also as SVG and PNG into that folder."""
    library, out = vega(), Path(out)
    choice = choose(snapshot, clipset, verifier, scorer, segmenter)
    with Session(snapshot, choice.options) as session:
        content = _Content(Answers.of(session, runs), choice, MOST_BYTES - SPARE - len(library))
        scripts = [library, part("reader.js"), part("page.js")]
        title = f"echolab: {_named(content.answers)}"
        written = page(title, content.body(), [part("style.css")], scripts, content.data()).encode()
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f"{out.name}.part")
        unfinished.write_bytes(written)
        unfinished.replace(out)
        charts = list(content.drawn)
        images = [] if static is None else write_images(content.answers, charts, Path(static))
    found = content.found
    return Report(str(out), len(written), len(found.entries), found.n_groups, charts, content.missing, content.notes, images)


class Overview:
    """What a page says of a store beside its rollouts: findings, charts and tables. `sampled`: not all groups are in it."""

    def __init__(self, answers: Answers, choice: Choice, sampled: bool = False):
        self.answers, self.clipset, self.notes = answers, choice.clipset, list(choice.notes)
        if len(answers.runs) > SERIES:
            self.notes.append(f"Charts show the {SERIES} largest of {len(answers.runs)} runs: `--run` chooses.")
        self.drawn, self.absent = draw(answers)
        self.specs = {name: list(map(_spec, figures)) for name, figures in self.drawn.items()}
        without = [*self.absent.values(), *([] if experts_table(answers) else [NO_EXPERTS])]
        self.missing = list(dict.fromkeys(without)) if answers.runs else []  # without a policy the headline says enough
        tables = {"clips": sections.clip_sets(answers)}
        self.charted, self.places = sections.charted(self.drawn, self.absent if answers.runs else {}, tables, sampled)

    def mark_readable(self, groups: frozenset[str]) -> None:
        """Dots in the heat-map of problems, where there is something to read."""
        if "problem_visits" in self.drawn:
            self.specs["problem_visits"] = list(map(_spec, problem_visits(self.answers, PAGE, groups)))

    def top(self, kicker: str) -> str:
        return sections.top(finding(self.answers), f"{kicker} · {_named(self.answers)}")

    def before(self) -> str:
        """Runs and charts."""
        return (sections.runs(self.answers) if self.answers.runs else "") + self.charted

    def after(self) -> str:
        """Where all this comes from, and what is not there."""
        live = self.answers.session.snapshot.ledger.live
        return (sections.sources(self.answers) if live else "") + sections.missing(self.missing)

    def foot(self) -> str:
        return sections.foot(self.notes, provenance(self.answers, self.clipset))

    def charts(self) -> str:
        """The specifications by the id of their element, in JSON."""
        return "{" + ",".join(f'"{place}":{self.specs[name][i]}' for place, (name, i) in self.places.items()) + "}"


class _Content(Overview):
    """What stands in a report: the overview, and as many groups as fit into `room` bytes beside it."""

    def __init__(self, answers: Answers, choice: Choice, room: int):
        super().__init__(answers, choice, sampled=True)
        room -= sum(len(spec.encode()) for specs in self.specs.values() for spec in specs)
        self.found = sample(answers.session, answers.runs, self.clipset, room)
        self.mark_readable(frozenset(self.found.payloads))

    def body(self) -> str:
        reader = ""
        if self.found.entries:
            reader = sections.reader(_about_reader(self.answers.session, self.clipset, self.found))
        return f"{self.top('echolab report')}<main>{self.before()}{reader}{self.after()}</main>{self.foot()}"

    def data(self) -> dict[str, str]:
        """JSON by the id of its element."""
        data = {"charts": self.charts()}
        if self.found.entries:
            data["reader-index"] = reader_index(self.found.entries, self.found.scale(), KINDS)
            data |= {f"g-{id}": payload for id, payload in self.found.payloads.items()}
        return data


@cache
def vega() -> str:
    """Vega, Vega-Lite and what embeds them: once for all charts."""
    try:
        import vl_convert
    except ImportError:
        raise EcholabError("a report needs vl-convert: pip install 'echolab[report]'") from None
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def draw(answers: Answers, style: Style = PAGE) -> tuple[dict[str, list[Figure]], dict[str, str]]:
    """The charts by name, and what those lack that cannot be drawn."""
    drawn, absent = {}, {}
    for name, figures in CHARTS.items():
        try:
            drawn[name] = figures(answers, style)
        except Missing as e:
            absent[name] = e.what
    if "entropy_profile" in drawn:
        drawn.pop("entropy_by_position", None)  # a profile shows the same, and its cohort is the user's choice
    absent.pop("arms", None)  # few stores hold an experiment
    return drawn, absent


def _spec(figure: Figure) -> str:
    """As Vega-Lite, in JSON."""
    about = f" · {figure.about}" if figure.about else ""
    chart = figure.chart.properties(
        width=PAGE.width,
        autosize={"type": "fit-x", "contains": "padding"},
        description=f"{figure.title}{about}. {figure.caption}",  # read aloud in place of the picture
    )
    return as_json(dress(chart, PAGE).to_dict())


def _named(answers: Answers) -> str:
    """The runs, or the store where there are none, or many."""
    return listed(list(answers.runs)) if 0 < len(answers.runs) < 4 else answers.session.snapshot.store.root.name


def _about_reader(session: Session, clipset: str | None, found: Sample) -> str:
    """What can be read, how it was sampled, and what the colours are."""
    n = len(found.entries)
    said = f"All {count(n, 'group')} can be read here" if n == found.n_groups else (
        f"{n:,} of {found.n_groups:,} groups can be read here, degenerate, mixed and surprising ones in turn"
    )  # fmt: skip
    said += (
        f", with up to {SIZES[0][0]} rollouts each: the shortest, the longest, right and wrong ones in turn."
        " `?` lists the keys, and the address leads back to what is open."
    )
    return f"{said} {colours(session, found.scale())} {clips(clipset)}"


def colours(session: Session, scale: Mapping[str, float]) -> str:
    """What the colours of tokens are, in words."""
    scorer = session.sql("SELECT chosen_scorer() AS scorer")["scorer"][0]
    if scorer is None or not scale["entropy"]:
        return "Tokens have no colours, as no rollout here has entropies: `echolab score --model MODEL` computes them."
    config = session.snapshot.registry("scorers").get(scorer, {}).get("config", {})
    size = session.sql("SELECT count(*) AS n FROM vocab WHERE tokenizer = chosen_tokenizer()")["n"][0]
    bound = f" (the most is ln {size:,} = {math.log(size):.1f})" if size else ""
    how = "as recorded while sampling" if config.get("kind") == "sampling" else "exact, over the full vocabulary"
    at = "" if config.get("temperature") is None else f" at temperature {config['temperature']:g},"
    return (
        f"Colours are entropies in nats by {label(session.snapshot, 'scorer', scorer)}, {how},{at} of completion tokens only."
        f" Their scale is the same everywhere: 0 to {scale['entropy']:.2f}, the 99th percentile of the tokens here{bound}."
    )


def clips(clipset: str | None) -> str:
    """Which clips are marked, in words."""
    return "" if clipset is None else f"EchoClips are those of {clipset}, underlined up to their end."


def provenance(answers: Answers, clipset: str | None) -> dict[str, Any]:
    """Where the page comes from. It has the page's only time stamp."""
    session = answers.session
    shown = "SELECT chosen_verifier() AS verifier, chosen_scorer() AS scorer, chosen_segmenter() AS segmenter"
    return {
        "echolab": echolab.__version__,
        "created": now().isoformat(timespec="seconds"),
        "store": {"name": session.snapshot.store.root.name, "versions": dict(sorted(session.snapshot.versions.items()))},
        "runs": list(answers.runs),
        "clipset": clipset,
        **session.sql(shown).row(0, named=True),
    }


def write_images(answers: Answers, names: Sequence[str], folder: Path) -> list[str]:
    """Each chart as `NAME.svg` and `NAME.png`."""
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        spec = chart(answers, name).to_dict()
        (folder / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(spec), "utf-8")
        (folder / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
        written += [str(folder / f"{name}.svg"), str(folder / f"{name}.png")]
    return written
