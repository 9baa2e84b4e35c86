"""`echolab mine`: clip sets out of scored successes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from echolab.errors import WrongUsage
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
)
from pipelines.profile_command import overlaps, say_overlaps

if TYPE_CHECKING:
    from echolab.clips.mine import Mined


def mine(
    name: Annotated[str, option("Name of the clip set.", "--name", "-n")],
    selector: Annotated[
        str | None, option("peak (default), match, random, length_matched, uniform, lowest, first_k or full.")
    ] = None,
    run: Annotated[str | None, option("Only this run.")] = None,
    split: Annotated[str | None, option("Only this split: train, eval, ...")] = None,
    where: Annotated[str | None, option("Only these rollouts: a condition on the view `rollouts`.", metavar="SQL")] = None,
    scope: Annotated[str | None, option("group (default: one choice a group), or rollout (one for each success).")] = None,
    gate: Annotated[str | None, option("all groups (default), or degenerate ones only.")] = None,
    top_k: Annotated[int | None, option("Of peak and lowest: so many segments, each a clip (1).")] = None,
    k: Annotated[int | None, option("Of first_k: segments of the clip (1).", "--k")] = None,
    min_segment_tokens: Annotated[int | None, option("Shorter segments are not chosen (1).")] = None,
    region: Annotated[str | None, option("all (default), or think: only what begins before </think>.")] = None,
    seed: Annotated[int | None, option("Of random, length_matched and uniform (0).")] = None,
    against: Annotated[str | None, option("Of match: a profile; without it the problem's own experts.")] = None,
    distance: Annotated[str | None, option("Of match: mse (default), dtw or pearson.")] = None,
    normalise: Annotated[str | None, option("Of match: none (default) or zscore.")] = None,
    unit: Annotated[str | None, option("Of match: each prefix (default), or the whole rollout.")] = None,
    bins: Annotated[int | None, option("Of match: points of a curve (16).")] = None,
    min_segments: Annotated[int | None, option("Of match: a prefix has at least so many segments (3).")] = None,
    check: Annotated[
        list[str] | None,
        option("Of match with --against: is a problem of the profile in this benchmark?", metavar="FILE[:COLUMN]"),
    ] = None,
    verifier: VerifierOption = None,
    scorer: ScorerOption = None,
    segmenter: SegmenterOption = None,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Clips worth learning again, of each group. `peak` takes the prefix of a success up to its most uncertain segment.

    echolab mine --name hard --selector peak --run my-run --store store
    """
    options: dict[str, Any] = {
        "selector": selector, "scope": scope, "gate": gate, "top_k": top_k, "k": k, "min_segment_tokens": min_segment_tokens,
        "region": region, "seed": seed, "against": against, "distance": distance, "normalise": normalise, "unit": unit,
        "bins": bins, "min_segments": min_segments,
    }  # fmt: skip
    if check and against is None:
        raise WrongUsage("--check looks at the problems of the profile that --against names; curate looks at those of clips")
    with open_lab(store) as lab, Progress("mining", enabled=not json_, unit="rollouts") as show:
        mined = lab.mine(
            name, run=run, split=split, where=where, verifier=verifier, scorer=scorer, segmenter=segmenter, progress=show,
            **{option: value for option, value in options.items() if value is not None},
        )  # fmt: skip
        checks = overlaps(lab, mined.config["selector"]["against"], check) if check else {}
    if json_:
        print_json({**asdict(mined), "checks": {file: asdict(o) for file, o in checks.items()}})
    else:
        _print(mined)
    say_overlaps(checks)


def _print(mined: Mined) -> None:
    from echolab.clips.mine import without_clip

    s, facts = mined.statistics, mined.facts
    clips = f"{count(s['n_clips'], 'clip')} of {count(s['n_groups'], 'group')}, {s['n_tokens']:,} tokens"
    stands = "" if mined.new else " (nothing new: as it stands)"
    how = f"selector {mined.config['selector']['selector']}, scorer {mined.scorer}, segmenter {mined.segmenter}"
    print(f"{mined.label}: {clips}, {how}{stands}")
    groups, with_clip = facts["groups"], f"{facts['outcomes']['clip']:,} with a clip"
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in groups.items())
    print(f"groups      {sum(groups.values()):,}: {kinds}")
    print(f"            {', '.join([with_clip, *without_clip(facts)])}")
    successes = facts["successes"]
    states = ", ".join(f"{n:,} {state.replace('_', ' ')}" for state, n in successes.items() if state != "all")
    print(f"successes   {successes['all']:,}: {states}")
    if experts := facts.get("experts"):
        print(f"experts     {experts['all'] - experts['unscored']:,} of {count(experts['problems'], 'problem')}")
    print(f"tokens      {_spread(s, 'tokens', '.0f')}")
    print(f"fraction    {_spread(s, 'fraction', '.2f')} of the completion; {s['share_whole']:.0%} of the clips are all of it")
    print(f"position    {_spread(s, 'position', '.2f')} of the chosen segment, 0 to 1")
    print(f"entropy     {_spread(s, 'entropy', '.3f')} of the chosen segment, in nats")
    if s["mean_distance"] is not None:
        print(f"distance    {s['mean_distance']:.4g} on average")
    for note in mined.notes:
        print(note)


def _spread(statistics: dict[str, Any], name: str, format: str) -> str:
    """The mean, and between which values nine of ten lie."""
    mean, low, high = (statistics[f"{part}"] for part in (f"mean_{name}", f"{name}_q05", f"{name}_q95"))
    return "unknown" if mean is None else f"{mean:{format}} on average, {low:{format}} to {high:{format}} (5 % to 95 %)"
