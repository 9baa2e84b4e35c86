"""`echolab profile`: make a profile, show it, compare two, and look for its problems in benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from echolab.errors import EcholabError, WrongUsage
from pipelines.options import (
    JsonOption,
    Progress,
    ScorerOption,
    SegmenterOption,
    StoreOption,
    VerifierOption,
    count,
    open_lab,
    option,
    print_json,
    say,
)

if TYPE_CHECKING:
    from echolab.lab import Lab
    from echolab.profile_compare import Comparison, Side
    from echolab.profiles import Overlap, Profile

LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # of a curve
DISTANCES = {"mse": "mean squared difference", "one_minus_pearson": "1 - correlation", "max_abs": "largest difference"}


def profile(
    name: Annotated[str | None, option("The profile; without --where, the one to show.", "--name", "-n")] = None,
    where: Annotated[str | None, option("Its trajectories: a condition on the view `rollouts`.", metavar="SQL")] = None,
    compare: Annotated[tuple[str, str] | None, option("Compare two profiles.", "--compare", metavar="A B")] = None,
    check: Annotated[list[str] | None, option("Is a problem in this benchmark?", "--check", metavar="FILE[:COLUMN]")] = None,
    bins: Annotated[int | None, option("Bins of relative position (48).")] = None,
    segments: Annotated[int | None, option("Segments of the absolute axis (64).")] = None,
    bootstrap: Annotated[int | None, option("Draws of the 95 % bands (1000); 0 makes none.")] = None,
    permutations: Annotated[int | None, option("Draws of the tests of --compare (1000).")] = None,
    seed: Annotated[int | None, option("Of bands and tests (0).")] = None,
    verifier: VerifierOption = None,
    scorer: ScorerOption = None,
    segmenter: SegmenterOption = None,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Where trajectories are uncertain: segment entropy over position. The trajectories are those that a condition chooses;
    the profile is kept under a name.

    echolab profile --name golden --where "role = 'expert' AND success" --store store
    """
    making = {
        "verifier": verifier, "scorer": scorer, "segmenter": segmenter, "segments": segments, "bootstrap": bootstrap,
    }  # fmt: skip
    drawing = {"bins": bins, "seed": seed}
    if compare is not None:
        _refuse("--compare", name=name, where=where, check=check, **making)
        with open_lab(store) as lab:
            found = lab.compare_profiles(*compare, **_given(permutations=permutations, **drawing))
        print_json(asdict(found)) if json_ else _print_comparison(found)
        return
    if name is None:
        raise WrongUsage("which profile? Give --name NAME, or --compare A B")
    _refuse("--name", permutations=permutations)
    with open_lab(store) as lab:
        if where is None:
            _refuse("a profile that is only shown: --where SQL makes one", **making, **drawing)
            shown = _stored(lab, name)
        else:
            with Progress("profiling", enabled=not json_, unit="rollouts") as show:
                progress = (lambda n, total: show("", n, total)) if show else None
                shown = lab.profile(name, where, progress=progress, **_given(**making, **drawing))
        checks = overlaps(lab, shown.label, check)
    if json_:
        print_json({**asdict(shown), "checks": {file: asdict(o) for file, o in checks.items()}})
    else:
        _print_profile(shown, made=where is not None)
    say_overlaps(checks)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(beside: str, **options: Any) -> None:
    if wrong := sorted(_given(**options)):
        raise WrongUsage(f"--{wrong[0]} does nothing beside {beside}")


def _stored(lab: Lab, name: str) -> Profile:
    from echolab.profiles import stored

    try:
        return stored(lab.snapshot, name)
    except EcholabError as e:
        raise EcholabError(f"{e}; --where SQL makes one") from None


def overlaps(lab: Lab, label: str, files: list[str] | None) -> dict[str, Overlap]:
    """Of each benchmark file: which problems of a profile are in it."""
    from echolab.clips.benchmarks import load
    from echolab.profiles import overlap

    return {f: overlap(lab.snapshot, label, (t.text for t in load(f).texts if t.is_problem)) for f in files or []}


def say_overlaps(checks: dict[str, Overlap]) -> None:
    for file, o in checks.items():
        mark = "warning: " if o.shared else ""
        say(f"{mark}{len(o.shared):,} of {count(o.problems, 'problem')} of {o.profile} are among the {o.texts:,} of {file}")


def _print_profile(shown: Profile, made: bool) -> None:
    import polars as pl

    from pipelines.render import table

    facts = shown.facts
    said = f"{count(facts['trajectories'], 'trajectory')} of {count(facts['problems'], 'problem')}".replace(
        "ectorys", "ectories"
    )
    judge = f", verifier {shown.verifier}" if shown.verifier else ""
    stands = " (nothing new: as it stands)" if made and not shown.new else ""
    print(f"{shown.label}: {said}, scorer {shown.scorer}, segmenter {shown.segmenter}{judge}{stands}")
    for note in shown.notes:
        print(note)
    parts = [s for s in shown.slices if s["slice"] == "all" or s["n"] < facts["trajectories"]]  # the others say it again
    low, high = _range([s["curve"] for s in parts])
    rows = [
        {
            "slice": s["slice"],
            "n": s["n"],
            "entropy": f"{s['mean']:.3f}",
            "95 % band": f"{s['lo']:.3f} to {s['hi']:.3f}" if "lo" in s else "",
            "segments": f"{s['segments']:.1f}",
            "tokens": f"{s['length']:.0f}",
            "peak at": f"{s['peak_position']:.2f}",
            "top 20 %": "" if s["top20"] is None else f"{s['top20']:.0%}",
            "curve": sparkline(s["curve"], low, high),
        }
        for s in parts
    ]
    print()
    print(table(pl.DataFrame(rows), 0))
    print(f"entropy, curve: mean segment entropy in nats; ▁ is {low:.3f}, █ is {high:.3f}, from beginning to end")
    print("peak at: where the segment of highest entropy lies, 0 to 1; top 20 %: entropy held by a fifth of the tokens")


def _print_comparison(found: Comparison) -> None:
    import polars as pl

    from pipelines.render import table

    sides = (found.a, found.b)
    low, high = _range([s.curve for s in sides])
    rows = [_side(s, low, high) for s in sides]
    print(table(pl.DataFrame(rows), 0))
    distances = [
        {"distance of the curves": DISTANCES[name], "value": f"{d['value']:.4g}", "p": f"{d['p']:.4f}"}
        for name, d in found.distances.items()
        if d["value"] is not None and d["p"] is not None
    ]
    print(table(pl.DataFrame(distances), 0))
    print(_paired(found))
    for note in found.notes:
        print(note)


def _side(side: Side, low: float, high: float) -> dict[str, Any]:
    return {
        "profile": side.profile,
        "trajectories": side.trajectories,
        "problems": side.problems,
        "entropy": f"{side.mean:.3f}",
        "curve": sparkline(side.curve, low, high),
    }


def _paired(found: Comparison) -> str:
    a, b, paired = found.a.profile, found.b.profile, found.paired
    if paired is None:
        return "no problem has trajectories in both: nothing is paired"
    said = f"paired on {count(paired.problems, 'problem')} that both have: {a} - {b} = {paired.difference:+.4f} nats"
    if paired.p is None or paired.lo is None or paired.hi is None:
        return said
    return f"{said}, 95 % {paired.lo:+.4f} to {paired.hi:+.4f}, p {paired.p:.4f}"


def _range(curves: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    values = [v for curve in curves for v in curve if v is not None]
    return min(values), max(values)


def sparkline(curve: Sequence[float | None], low: float, high: float) -> str:
    """A curve as one line of blocks; a blank where nothing is known."""
    width = min(WIDTH, len(curve))
    out = ""
    for i in range(width):
        some = [v for v in curve[i * len(curve) // width : (i + 1) * len(curve) // width] if v is not None]
        level = (sum(some) / len(some) - low) / (high - low) if some and high > low else 0.0
        out += LEVELS[min(int(level * len(LEVELS)), len(LEVELS) - 1)] if some else " "
    return out
