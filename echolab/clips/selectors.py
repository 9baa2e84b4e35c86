"""Selectors: of each group of rollouts the clips that are worth learning again.

Pure functions over columns, without I/O: mining calls them on what lies in a store, a trainer on the rollouts of a step.
What they give depends neither on the order of the rows nor on what else is in the table."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from echolab.clips.match import Experts, nearest
from echolab.config import Config
from echolab.errors import EcholabError
from echolab.files import pc
from echolab.vocab import Vocab

VERSION = 1  # of the rules below: part of what a clip set keeps of its selector
THOUGHT_ENDS = b"</think>"

Name = Literal["peak", "match", "random", "length_matched", "uniform", "lowest", "first_k", "full"]
_SEGMENTS = ("peak", "lowest", "random", "length_matched", "match")  # selectors that weigh segments against each other
_ONLY = {  # options that only some selectors have
    "top_k": ("peak", "lowest"),
    "k": ("first_k",),
    "min_segment_tokens": _SEGMENTS,
    "region": (*_SEGMENTS, "uniform"),
    "seed": ("random", "length_matched", "uniform"),
    **dict.fromkeys(("against", "distance", "normalise", "unit", "bins", "min_segments"), ("match",)),
}

# How far the best rollout of a group came. The last one means that the group has a clip.
OUTCOMES = ("not_degenerate", "no_success", "truncated", "empty", "unscored", "no_expert", "no_segment", "clip")
_CANDIDATE = OUTCOMES.index("no_segment")


class Selector(Config):
    """The rule that chooses the clips of a group. Candidates are its successes: not truncated, scored, not empty. A clip is
    the prefix of one of them up to and including the chosen segment.

    - `peak`: the segment of highest entropy among those of all candidates;
    - `match`: the prefix whose segment entropies are nearest to an expert's;
    - `random`: a segment drawn among those of all candidates;
    - `length_matched`: a candidate that is drawn, cut to as many tokens as the group's `peak` has;
    - `uniform`: a candidate that is drawn, cut after a token that is drawn;
    - `lowest`: the segment of lowest entropy;
    - `first_k`: the first `k` segments of the first candidate;
    - `full`: the whole of the first candidate.

    The first is that of lowest sample number (those without one last, by rollout id); so are ties settled, then by the
    earlier segment. A segment of unknown entropy is not chosen by its entropy."""

    selector: Name = Field(default="peak", description="the rule")
    scope: Literal["group", "rollout"] = Field(default="group", description="one choice a group, or one for each candidate")
    gate: Literal["all", "degenerate"] = Field(default="all", description="which groups give clips")
    top_k: int = Field(default=1, ge=1, description="peak, lowest: so many segments, each a clip")
    k: int = Field(default=1, ge=1, description="first_k: segments of the clip")
    min_segment_tokens: int = Field(default=1, ge=1, description="shorter segments are not chosen")
    region: Literal["all", "think"] = Field(
        default="all", description="think: only what begins before `</think>`, where there is one"
    )
    seed: int = Field(default=0, description="of what is drawn, with run, step and group")
    against: str | None = Field(default=None, description="match: a profile; None: the experts of the same problem")
    distance: Literal["mse", "dtw", "pearson"] = Field(default="mse", description="match: between two curves")
    normalise: Literal["none", "zscore"] = Field(default="none", description="match: of both curves, before the distance")
    unit: Literal["prefix", "rollout"] = Field(
        default="prefix", description="match: what is compared: each prefix, or the whole"
    )
    bins: int = Field(default=16, ge=2, description="match: points of a curve")
    min_segments: int = Field(default=3, ge=1, description="match: segments that a prefix has at least")

    @field_validator("selector", mode="before")
    @classmethod
    def _known(cls, name: Any) -> Any:
        names = get_args(Name)
        if name not in names:
            near = difflib.get_close_matches(str(name).replace("-", "_"), names, 1)
            raise ValueError(f"no selector {name!r}" + (f"; did you mean {near[0]}?" if near else f": use {', '.join(names)}"))
        return name

    @model_validator(mode="after")
    def _fits(self) -> Selector:
        for option, selectors in _ONLY.items():
            given = getattr(self, option) != type(self).model_fields[option].default
            if given and option != "seed" and self.selector not in selectors:  # one seed may serve many selectors
                raise ValueError(f"{option} is an option of {', '.join(selectors)}, not of {self.selector}")
        if self.unit == "rollout" and (self.region, self.min_segment_tokens) != ("all", 1):
            raise ValueError("unit rollout compares whole completions: region and min_segment_tokens are of unit prefix")
        return self

    def resolved(self) -> dict[str, Any]:
        """What a clip set keeps of it: the options that its rule has."""
        options = {k: v for k, v in self.model_dump().items() if self.selector in _ONLY.get(k, (self.selector,))}
        return {**options, "version": VERSION}


DEFAULT = Selector()


@dataclass(frozen=True)
class Selection:
    """The chosen clips, and what became of the groups and successes that were looked at."""

    row: np.ndarray  # of each clip: its rollout's row in the table
    segment: np.ndarray  # the chosen segment, from 0; the one that a cut lies in
    end_token: np.ndarray  # exclusive offset of the clip's end in the completion's tokens, without a final EOS
    whole: np.ndarray  # it ends with the last segment: a final EOS belongs to it, and to no other clip
    entropy: np.ndarray  # of the segment; NaN where unknown
    distance: np.ndarray  # of `match`, else NaN
    groups: Counter[str]  # by outcome, see OUTCOMES
    successes: Counter[str]  # by outcome; `no_segment` are the candidates


def select(rollouts: pa.Table, config: Selector = DEFAULT, experts: Experts | None = None) -> Selection:
    """Choose the clips of whole groups, given in any order. Columns:

    - `group_id`, `rollout_id`, `sample` (NULL where there is no number);
    - `success`, `truncated` (NULL counts as no);
    - `segment_ends`, `segment_entropies`: lists as `echolab.segment` makes them; NULL where there is no score;
    - with gate degenerate: `degenerate`, of the rollout's group; with region think: `n_thinking`, see `thinking`;
    - for random, length_matched and uniform: `run` and `step`; for match: `problem_id`, and `experts`."""
    if config.selector == "match":
        if experts is None or len(experts.curves) != config.bins:
            raise EcholabError(f"selector match needs experts with curves of {config.bins} bins")
    else:
        experts = None
    order, group = _order(rollouts)
    state = _states(rollouts, config, experts)[order]
    kept = state == _CANDIDATE
    pool = _Pool.of(rollouts, config, order[kept], group[kept])
    segment, end, distance = _RULES[config.selector](pool, experts)
    candidate = np.searchsorted(pool.start, segment, "right") - 1
    reached = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
    np.maximum.at(reached, group, state)
    reached[pool.group[candidate]] = len(OUTCOMES) - 1
    success = _flags(rollouts, "success")[order]
    return Selection(
        pool.row[candidate],
        segment - pool.start[candidate],
        end,
        end == pool.last[candidate],
        pool.entropies[segment].astype(np.float64),
        distance,
        _counted(reached),
        _counted(state[success]),
    )


def thinking(token_ids: pa.Array | pa.ChunkedArray, vocab: Vocab) -> np.ndarray:
    """Of each completion: how many of its tokens begin before its first `</think>`; all, where there is none."""
    counts = []
    for lists in token_ids.chunks if isinstance(token_ids, pa.ChunkedArray) else [token_ids]:
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
        ends = np.cumsum(lengths)
        place = lists.flatten().to_numpy().view(np.uint32)  # a negative id lies behind the vocabulary, like all that it lacks
        _, offsets, data = vocab.dense.take(pa.array(np.minimum(place, vocab.size))).buffers()
        begins, content = np.frombuffer(offsets, np.int64)[: len(place)], bytes(data or b"")
        found = lengths.copy()
        at = content.find(THOUGHT_ENDS)
        while at >= 0:
            first, last = np.searchsorted(begins, (at, at + len(THOUGHT_ENDS) - 1), "right") - 1  # tokens of the tag
            row = int(np.searchsorted(ends, first, "right"))
            if last < ends[row]:  # not across two completions
                start = ends[row] - lengths[row]
                found[row] = max(np.searchsorted(begins, at) - start, 0)
                at = int(begins[ends[row]]) - 1 if ends[row] < len(begins) else len(content)  # the first one counts
            at = content.find(THOUGHT_ENDS, at + 1)
        counts.append(found)
    return np.concatenate(counts) if counts else np.empty(0, np.int64)


# Candidates.


def _order(rollouts: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The rows in the order of (group, sample, rollout), and of each its group's number."""
    names = rollouts["group_id"].combine_chunks().dictionary_encode()
    codes = names.indices.to_numpy()
    sample = rollouts["sample"].cast(pa.int64())
    keys = pa.table({"group": codes, "sample": sample, "rollout": rollouts["rollout_id"]})
    order = pc.sort_indices(keys, sort_keys=[(c, "ascending", "at_end") for c in keys.column_names]).to_numpy()
    return order.astype(np.int64), codes[order]


def _flags(rollouts: pa.Table, column: str) -> np.ndarray:
    return pc.fill_null(rollouts[column].cast(pa.bool_()), False).to_numpy().astype(bool)


def _states(rollouts: pa.Table, config: Selector, experts: Experts | None) -> np.ndarray:
    """Of each rollout how far it comes, as a number of OUTCOMES: the first reason against it, or that it is a candidate."""
    n_segments = pc.list_value_length(rollouts["segment_ends"])
    reasons = {
        "not_degenerate": ~_flags(rollouts, "degenerate") if config.gate == "degenerate" else None,
        "no_success": ~_flags(rollouts, "success"),
        "truncated": _flags(rollouts, "truncated"),
        "unscored": pc.is_null(n_segments).to_numpy().astype(bool),
        "empty": pc.fill_null(n_segments, 1).to_numpy() == 0,
        "no_expert": _experts_of(rollouts, experts)[1] == 0 if experts else None,
    }
    state = np.full(rollouts.num_rows, _CANDIDATE)
    for reason, holds in reversed(reasons.items()):
        if holds is not None:
            state[holds] = OUTCOMES.index(reason)
    return state


def _experts_of(rollouts: pa.Table, experts: Experts) -> tuple[np.ndarray, np.ndarray]:
    """Of each rollout: first column and number of its problem's expert curves."""
    problems = rollouts["problem_id"].combine_chunks().dictionary_encode()
    found = [experts.of_problem(p) for p in problems.dictionary.to_pylist()] + [experts.of_problem(None)]
    which = pc.fill_null(problems.indices, len(found) - 1).to_numpy()
    columns, numbers = np.array(found, np.int64).T
    return columns[which], numbers[which]


@dataclass(frozen=True)
class _Pool:
    """The candidates in order, and their segments, one after the other."""

    rollouts: pa.Table
    config: Selector
    row: np.ndarray  # of each candidate: its row in the table
    group: np.ndarray  # the number of its group
    start: np.ndarray  # its first segment
    last: np.ndarray  # where its last segment ends
    ends: np.ndarray  # of each segment
    entropies: np.ndarray

    @classmethod
    def of(cls, rollouts: pa.Table, config: Selector, row: np.ndarray, group: np.ndarray) -> _Pool:
        chosen = rollouts.select(["segment_ends", "segment_entropies"]).take(row)
        ends, entropies = (column.combine_chunks() for column in chosen.columns)
        count = pc.list_value_length(ends).to_numpy().astype(np.int64)
        if not pc.all(pc.equal(pc.list_value_length(ends), pc.list_value_length(entropies)), min_count=0).as_py():
            raise EcholabError("rollouts with more segment_ends than segment_entropies, or with fewer")
        after = np.cumsum(count)
        ends, values = ends.flatten().to_numpy(), entropies.flatten()
        entropies = (values.fill_null(np.nan) if values.null_count else values).to_numpy()
        return cls(rollouts, config, row, group, after - count, ends[after - 1].astype(np.int64), ends, entropies)

    @cached_property
    def unit(self) -> np.ndarray:
        """The first candidates of what one choice is made for: a group, or each candidate."""
        return _first(self.group) if self.config.scope == "group" else np.arange(len(self.row))

    @cached_property
    def owner(self) -> np.ndarray:
        """Of each segment: its candidate."""
        return np.repeat(np.arange(len(self.row)), np.diff(self.start, append=len(self.ends)))

    @cached_property
    def region(self) -> np.ndarray:
        """Of each candidate: how many of its tokens a clip may end in."""
        if self.config.region == "all":
            return self.last
        return np.minimum(self.last, self.rollouts["n_thinking"].take(self.row).to_numpy())

    @cached_property
    def may(self) -> np.ndarray:
        """Of each segment: is it long enough, and in the region?"""
        if self.config.region == "all" and self.config.min_segment_tokens == 1:
            return np.ones(len(self.ends), bool)
        begins = np.append(0, self.ends[:-1])
        begins[self.start] = 0
        return (self.ends - begins >= self.config.min_segment_tokens) & (begins < self.region[self.owner])


def _first(groups: np.ndarray) -> np.ndarray:
    """Where each group begins, in an array where those of a group stand together."""
    return np.flatnonzero(np.append(True, groups[1:] != groups[:-1])[: len(groups)])


def _counted(outcomes: np.ndarray) -> Counter[str]:
    return Counter({OUTCOMES[i]: int(n) for i, n in enumerate(np.bincount(outcomes)) if n})


# The rules: of each clip the segment that it ends in, its tokens without EOS, and its distance.

_Choice = tuple[np.ndarray, np.ndarray, np.ndarray]


def _of_segments(pool: _Pool, chosen: np.ndarray, distances: np.ndarray | None = None) -> _Choice:
    """The prefixes that end with these segments."""
    distance = np.full(len(chosen), np.nan) if distances is None else distances[chosen].astype(np.float64)
    return chosen, pool.ends[chosen].astype(np.int64), distance


def _of_candidates(pool: _Pool, candidate: np.ndarray, tokens: np.ndarray) -> _Choice:
    """The first tokens of these candidates, so many of each."""
    before = np.cumsum(pool.last) - pool.last  # tokens of the candidates before
    segment = np.searchsorted(before[pool.owner] + pool.ends, before[candidate] + tokens)
    return segment, tokens, np.full(len(candidate), np.nan)


def _highest(values: np.ndarray, first: np.ndarray, top_k: int = 1) -> np.ndarray:
    """Of each unit, whose first place is given, the places of its `top_k` highest values; of equal ones the first. -inf is
    never among them."""
    if not len(first):
        return first
    counts = np.diff(first, append=len(values))
    if top_k == 1:
        highest = np.maximum.reduceat(values, first)
        equal = np.flatnonzero(values == np.repeat(highest, counts))
        return equal[np.searchsorted(equal, first)][highest > -np.inf]
    some = np.flatnonzero(values > -np.inf)
    units = np.repeat(np.arange(len(first)), counts)[some]
    order = np.lexsort((-values[some], units))
    units, begins = units[order], _first(units[order])
    rank = np.arange(len(some)) - np.repeat(begins, np.diff(begins, append=len(some)))
    return some[order[rank < top_k]]


def _by_entropy(pool: _Pool, _: Experts | None) -> _Choice:
    values = -pool.entropies if pool.config.selector == "lowest" else pool.entropies
    values = np.where(pool.may & np.isfinite(values), values, -np.inf)
    return _of_segments(pool, _highest(values, pool.start[pool.unit], pool.config.top_k))


def _match(pool: _Pool, experts: Experts | None) -> _Choice:
    assert experts is not None  # `select` has seen to it
    config, known = pool.config, np.isfinite(pool.entropies)
    up_to = np.cumsum(known)  # of each segment: the known ones of all candidates up to it
    start = (up_to[pool.start] - known[pool.start])[pool.owner]
    length = up_to - start
    tried = length >= config.min_segments
    if config.unit == "prefix":
        tried &= pool.may & known
    else:
        tried &= np.append(pool.owner[1:] != pool.owner[:-1], True)[: len(tried)]  # the last of each
    column, number = (x[pool.row][pool.owner[tried]] for x in _experts_of(pool.rollouts, experts))
    distances = np.full(len(known), np.inf, np.float32)
    distances[tried] = nearest(
        pool.entropies[known],
        start[tried],
        length[tried],
        experts,
        column,
        number,
        config.distance,
        config.normalise == "zscore",
    )
    return _of_segments(pool, _highest(-distances, pool.start[pool.unit]), distances)


def _random(pool: _Pool, _: Experts | None) -> _Choice:
    drawn = _drawn(pool, np.flatnonzero(pool.may), pool.start[pool.unit], pool.owner)
    return _of_segments(pool, drawn)


def _length_matched(pool: _Pool, _: Experts | None) -> _Choice:
    groups = _first(pool.group)
    peaks = _highest(np.where(pool.may & np.isfinite(pool.entropies), pool.entropies, -np.inf), pool.start[groups])
    tokens = np.zeros(int(pool.group.max(initial=-1)) + 1, np.int64)
    tokens[pool.group[pool.owner[peaks]]] = pool.ends[peaks]
    tokens = tokens[pool.group]
    drawn = _drawn(pool, np.flatnonzero(tokens), pool.unit)
    return _of_candidates(pool, drawn, np.minimum(tokens[drawn], pool.last[drawn]))


def _uniform(pool: _Pool, _: Experts | None) -> _Choice:
    drawn = _drawn(pool, np.flatnonzero(pool.region), pool.unit)
    return _of_candidates(pool, drawn, 1 + _draw(pool, drawn, pool.region[drawn], turn=1))


def _first_k(pool: _Pool, _: Experts | None) -> _Choice:
    count = np.diff(pool.start, append=len(pool.ends))[pool.unit]
    return _of_segments(pool, pool.start[pool.unit] + np.minimum(pool.config.k, count) - 1)


def _full(pool: _Pool, _: Experts | None) -> _Choice:
    return _of_candidates(pool, pool.unit, pool.last[pool.unit])


_RULES: dict[str, Callable[[_Pool, Experts | None], _Choice]] = {
    "peak": _by_entropy,
    "lowest": _by_entropy,
    "match": _match,
    "random": _random,
    "length_matched": _length_matched,
    "uniform": _uniform,
    "first_k": _first_k,
    "full": _full,
}


# Drawing.


def _drawn(pool: _Pool, some: np.ndarray, first: np.ndarray, owner: np.ndarray | None = None) -> np.ndarray:
    """Of each unit, whose first place is given, one of these places; `owner` has their candidates, if they are none."""
    ends = np.searchsorted(some, first)
    counts = np.diff(ends, append=len(some))
    begins, counts = ends[counts > 0], counts[counts > 0]
    candidate = some[begins] if owner is None else owner[some[begins]]
    return some[begins + _draw(pool, candidate, counts)]


def _draw(pool: _Pool, candidate: np.ndarray, n: np.ndarray, turn: int = 0) -> np.ndarray:
    """For each of these candidates a number below n. It depends on seed, run, step and group alone, with scope rollout also
    on the rollout; and on the turn, where several are drawn."""
    names = ["run", "step", "group_id"] + ["rollout_id"] * (pool.config.scope == "rollout")
    drawn = pool.rollouts.select(names).take(pool.row[candidate])
    keys = zip(*(drawn[name].to_pylist() for name in names), strict=True)
    shares = [_share([pool.config.seed, turn, *key]) for key in keys]
    return (np.array(shares, np.float64) * n).astype(np.int64)


def _share(key: list[Any]) -> float:
    """A number from 0 to below 1 out of a stable hash."""
    digest = blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
