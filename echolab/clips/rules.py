"""The rules of curation, in the order in which they are applied. Each looks at the clips that those before it left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Literal, get_args

import numpy as np
from pydantic import Field, model_validator

from echolab.clips.benchmarks import Benchmark
from echolab.clips.decontaminate import Hit
from echolab.clips.dedup import leaders
from echolab.clips.facts import LOOP, Facts
from echolab.clips.ngrams import mix
from echolab.config import Config

VERSION = 1  # of what the rules mean: part of what a clip set keeps of its curation
BINS = 10  # of success rates

Capped = Literal["problem", "source", "step"]


class Rules(Config):
    """What to do with a clip set. Nothing is done that is not asked for; what is asked for is done in this order.

    1. `min_tokens`, `max_tokens`: shorter and longer clips go.
    2. `max_repetition`: clips go of whose 16-token n-grams a larger share repeats an earlier one. Up to 0.25 is common in
       sound solutions; a loop comes near 1.
    3. `drop_cut_off`: whole completions go that end because sampling was stopped, not because the model had ended.
    4. `against`: clips go that share text with a benchmark, see `decontaminate`.
    5. `dedup`: of clips with equal prompt and equal tokens one stays.
    6. `near_dedup`: of clips whose word 5-grams have at least this Jaccard similarity one stays, if they are of one problem,
       or of problems whose prompts are as similar. (Of prompts, 5-grams that many problems share do not count.)
    7. `difficulty_temperature` T: problems are put into 10 bins by their success rate p in their run, [0, 0.1) to [0.9, 1].
       Of a bin with n clips n^(1/T) m^(1 - 1/T), rounded, stay, m being the size of the smallest bin: all of them for
       T = 1, m of each for a large T. They are drawn by `seed`. Clips of problems without a success rate stay.
    8. `cap`: of each problem, source (the dataset) or step (of one run) so many clips stay. Unknown ones are not capped.

    Where one of several stays (5, 6, 8) it is that of the newest step, then of the highest peak entropy, then of the lowest id.

    Then what is left is marked:

    - `validation`: the share of problems that go into the validation split. A hash of the problem's id decides, and nothing
      else: a problem never moves as a set grows, and a larger share only adds to it.
    - `weights`: `uniform`: 1. `entropy`: the peak entropy. `staleness`: 2^(-age / `half_life`), age being the steps from the
      clip's to the newest of its run in the set. Each is divided by its mean over the split; a clip for which it is unknown
      weighs 1. Without it weights stay what they were."""

    min_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_repetition: float | None = Field(default=None, ge=0, lt=1)
    drop_cut_off: bool = False
    against: tuple[str, ...] = ()
    ngram: int | None = Field(default=None, ge=2)
    dedup: bool = False
    near_dedup: float | None = Field(default=None, ge=0.1, le=1)
    difficulty_temperature: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    cap: dict[Capped, int] = Field(default_factory=dict)
    seed: int | None = None
    validation: float | None = Field(default=None, ge=0, lt=1)
    weights: Literal["uniform", "entropy", "staleness"] | None = None
    half_life: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits(self) -> Rules:
        if self == type(self).model_construct():
            raise ValueError("nothing to do: name a rule, such as --dedup or --against FILE")
        if any(n < 1 for n in self.cap.values()):
            raise ValueError("a cap is at least 1, as in problem=4")
        if (self.min_tokens or 1) > (self.max_tokens or self.min_tokens or 1):
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        for given, of, name in (
            (self.ngram, self.against, "ngram is an option of against"),
            (self.seed, self.difficulty_temperature, "seed is an option of difficulty_temperature"),
            (self.half_life, self.weights == "staleness", "half_life is an option of weights staleness"),
        ):
            if given is not None and not of:
                raise ValueError(name)
        if self.weights == "staleness" and self.half_life is None:
            raise ValueError("weights staleness needs a half_life in steps")
        return self


@dataclass(frozen=True)
class Dropped:
    """The clips that one rule drops. `why` says it of each of them; `stays` is the clip that stays in its place."""

    rule: str
    clips: np.ndarray
    why: Callable[[int], str]
    stays: dict[int, int] = field(default_factory=dict)


def apply(rules: Rules, facts: Facts, benchmarks: Sequence[Benchmark]) -> Iterator[Dropped]:
    """What each rule that is asked for drops, in order."""
    asked: list[Callable[[np.ndarray], Dropped]] = []
    if rules.min_tokens is not None or rules.max_tokens is not None:
        asked.append(lambda alive: _length(facts, alive, rules.min_tokens or 1, rules.max_tokens))
    if (most := rules.max_repetition) is not None:
        asked.append(lambda alive: _repetition(facts, alive, most))
    if rules.drop_cut_off:
        asked.append(lambda alive: _cut_off(facts, alive))
    if rules.against:
        asked.append(lambda alive: _contaminated(facts, alive, benchmarks))
    if rules.dedup:
        asked.append(lambda alive: _duplicate(facts, alive))
    if (threshold := rules.near_dedup) is not None:
        asked.append(lambda alive: _near_duplicate(facts, alive, threshold))
    if (temperature := rules.difficulty_temperature) is not None:
        asked.append(lambda alive: _difficulty(facts, alive, temperature, rules.seed or 0))
    for what in get_args(Capped):
        if what in rules.cap:
            asked.append(partial(_cap, facts, what=what, most=rules.cap[what]))
    left = np.ones(len(facts), bool)
    for rule in asked:
        dropped = rule(np.flatnonzero(left))
        left[dropped.clips] = False
        yield dropped


def _length(facts: Facts, alive: np.ndarray, least: int, most: int | None) -> Dropped:
    n = facts.n_tokens[alive]
    wrong = (n < least) | (n > (np.inf if most is None else most))
    return Dropped("length", alive[wrong], lambda clip: f"{facts.n_tokens[clip]} tokens")


def _repetition(facts: Facts, alive: np.ndarray, most: float) -> Dropped:
    said = f"of its {LOOP}-token n-grams repeat an earlier one"
    loops = alive[facts.repetition[alive] > most]
    return Dropped("repetition", loops, lambda clip: f"{facts.repetition[clip]:.3f} {said}")


def _cut_off(facts: Facts, alive: np.ndarray) -> Dropped:
    return Dropped("cut_off", alive[facts.cut_off[alive]], lambda _: "the whole of a completion that did not end by itself")


def _contaminated(facts: Facts, alive: np.ndarray, benchmarks: Sequence[Benchmark]) -> Dropped:
    def why(clip: int) -> str:
        where, hit = next(hits_of(facts, clip))
        found = "the whole problem" if hit.kind == "exact" else repr(hit.shared)
        return f"its {where} holds {found} of {benchmarks[hit.benchmark].file} row {hit.text.row} ({hit.text.column})"

    hit = np.array([any(True for _ in hits_of(facts, clip)) for clip in alive.tolist()], bool)
    return Dropped("contaminated", alive[hit], why)


def hits_of(facts: Facts, clip: int) -> Iterator[tuple[str, Hit]]:
    """What prompt and clip share with benchmarks."""
    yield from (("prompt", hit) for hit in facts.prompt_hits.get(int(facts.prompt[clip]), ()))
    yield from (("clip", hit) for hit in facts.clip_hits.get(clip, ()))


def _duplicate(facts: Facts, alive: np.ndarray) -> Dropped:
    ranked = _ranked(facts, alive)
    _, first, which = np.unique(facts.content[ranked], return_index=True, return_inverse=True)
    stays = ranked[first[which]]
    gone = ranked != stays
    return _replaced("duplicate", facts, ranked[gone], stays[gone], lambda _: "the same prompt and tokens as")


def _near_duplicate(facts: Facts, alive: np.ndarray, threshold: float) -> Dropped:
    assert facts.clip_grams is not None
    ranked = _ranked(facts, alive)
    keys = facts.clip_grams.keys(threshold) ^ mix(_alike(facts, threshold)[facts.problem])[:, None]
    leader, likeness = leaders(facts.clip_grams, keys, ranked, threshold, facts.group)
    gone = leader != ranked
    like = dict(zip(ranked[gone].tolist(), likeness[gone].tolist(), strict=True))
    return _replaced("near_duplicate", facts, ranked[gone], leader[gone], lambda clip: f"{like[clip]:.3f} like")


def _alike(facts: Facts, threshold: float) -> np.ndarray:
    """For each problem a number that it shares with those whose prompts are like its own. Problems lead in the order of
    their ids; one without a prompt's text is alone."""
    assert facts.prompt_grams is not None
    order = facts.first_prompt[np.argsort(np.array(facts.problems))]
    grams = facts.prompt_grams.without(facts.prompt_grams.templates(order))
    leader, _ = leaders(grams, grams.keys(threshold), order, threshold)
    leader_of = dict(zip(order.tolist(), leader.tolist(), strict=True))
    return np.array([leader_of[c] if grams.sizes[c] else -1 - p for p, c in enumerate(facts.first_prompt.tolist())], np.int64)


def _difficulty(facts: Facts, alive: np.ndarray, temperature: float, seed: int) -> Dropped:
    known = alive[~np.isnan(facts.success_rate[alive])]
    bins = np.minimum(np.floor(facts.success_rate[known] * BINS + 1e-9), BINS - 1)
    drawn = [blake2b(f"{seed} {facts.id_of(clip)}".encode(), digest_size=16).digest() for clip in known.tolist()]
    order = np.lexsort((np.array(drawn, "S16"), bins))
    _, which, sizes = np.unique(bins[order], return_inverse=True, return_counts=True)
    smallest = sizes.min(initial=len(known))
    stay = np.floor(sizes ** (1 / temperature) * smallest ** (1 - 1 / temperature) + 0.5)
    gone = _place(which) >= stay[which]

    def why(clip: int) -> str:
        return f"not drawn among clips of problems with a success rate of {facts.success_rate[clip]:.3f}"

    return Dropped("difficulty", known[order[gone]], why)


def _cap(facts: Facts, alive: np.ndarray, what: Capped, most: int) -> Dropped:
    value = {"problem": facts.problem, "source": facts.source, "step": _steps(facts)}[what]
    ranked = _ranked(facts, alive)
    ranked = ranked[value[ranked] >= 0]
    ranked = ranked[np.argsort(value[ranked], kind="stable")]
    gone = _place(value[ranked]) >= most
    return Dropped(f"cap_{what}", ranked[gone], lambda _: f"its {what} has {most} clips that are preferred")


def _steps(facts: Facts) -> np.ndarray:
    """Codes of steps, each of its run; -1 where unknown."""
    _, step = np.unique(facts.step, return_inverse=True)
    return np.where(np.isnan(facts.step), -1, facts.run * (len(facts) + 1) + step)


def _ranked(facts: Facts, alive: np.ndarray) -> np.ndarray:
    """These clips, the preferred first."""
    left = np.zeros(len(facts), bool)
    left[alive] = True
    return facts.order[left[facts.order]]


def _place(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each, where equal values stand together."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else np.empty(0, np.int64)
    return np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))


def _replaced(rule: str, facts: Facts, gone: np.ndarray, stays: np.ndarray, said: Callable[[int], str]) -> Dropped:
    instead = dict(zip(gone.tolist(), stays.tolist(), strict=True))
    return Dropped(rule, gone, lambda clip: f"{said(clip)} {facts.id_of(instead[clip])}", instead)


def validation(facts: Facts, share: float) -> np.ndarray:
    """Whether each clip's problem goes into the validation split."""
    digests = [blake2b(b"split1 " + p.encode(), digest_size=8).digest() for p in facts.problems]
    chosen = np.array([int.from_bytes(d, "little") < share * 2**64 for d in digests], bool)
    return chosen[facts.problem]


def weights(rules: Rules, facts: Facts, clips: np.ndarray) -> np.ndarray:
    """Weights of these clips, those of one split: their mean is 1."""
    if rules.weights == "uniform" or not len(clips):
        return np.ones(len(clips))
    if rules.weights == "entropy":
        weight = facts.peak_entropy[clips]
    else:
        newest = np.full(facts.run.max() + 1, -np.inf)
        np.fmax.at(newest, facts.run[clips], facts.step[clips])
        weight = np.exp2((facts.step[clips] - newest[facts.run[clips]]) / (rules.half_life or np.inf))
    known = np.isfinite(weight)
    mean = weight[known].mean() if known.any() else 0.0
    return np.where(known, weight / mean, 1.0) if mean > 0 else np.ones(len(clips))
