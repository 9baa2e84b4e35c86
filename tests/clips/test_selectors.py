"""Selectors against loops that are written from the definitions, group by group and token by token."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from itertools import groupby

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from echolab.clips.match import Experts
from echolab.clips.selectors import OUTCOMES, Selector, select, thinking
from echolab.errors import EcholabError, WrongUsage
from echolab.segment import segment, segment_means
from echolab.vocab import Vocab

BINS = 4
SCHEMA = {
    "group_id": pa.string(), "rollout_id": pa.string(), "sample": pa.int32(), "run": pa.string(), "step": pa.int64(),
    "success": pa.bool_(), "truncated": pa.bool_(), "degenerate": pa.bool_(), "problem_id": pa.string(),
    "n_thinking": pa.int64(), "segment_ends": pa.list_(pa.int32()), "segment_entropies": pa.list_(pa.float32()),
}  # fmt: skip


def table(rows):
    return pa.table({name: pa.array([r[name] for r in rows], kind) for name, kind in SCHEMA.items()})


def chosen(rows, config, experts=None):
    """The clips of `select` by group, in its order: (rollout, end, segment, whole)."""
    found = select(table(rows), config, experts)
    clips = {}
    for row, end, seg, whole in zip(found.row, found.end_token, found.segment, found.whole, strict=True):
        r = rows[row]
        clips.setdefault(r["group_id"], []).append((r["rollout_id"], int(end), int(seg), bool(whole)))
    return clips, found


# What the definitions say, as loops.


def in_order(rows):
    """Groups, each with its rollouts in the order of (sample, those without one last; rollout id)."""

    def key(r):
        return r["group_id"], r["sample"] is None, r["sample"] or 0, r["rollout_id"]

    return {g: list(rs) for g, rs in groupby(sorted(rows, key=key), key=lambda r: r["group_id"])}


def candidates(rollouts, config):
    if config.gate == "degenerate" and not rollouts[0]["degenerate"]:
        return []
    return [r for r in rollouts if r["success"] and not r["truncated"] and r["segment_ends"]]


def pieces(r, config):
    """Segments that may be chosen: (number, end, entropy)."""
    begin = 0
    for number, (end, entropy) in enumerate(zip(r["segment_ends"], r["segment_entropies"], strict=True)):
        inside = config.region == "all" or begin < r["n_thinking"]
        if end - begin >= config.min_segment_tokens and inside:
            yield number, end, entropy
        begin = end


def clip(r, number):
    return r["rollout_id"], r["segment_ends"][number], number, number == len(r["segment_ends"]) - 1


def by_entropy(pool, config, sign):
    weighed = [(r, n, sign * e) for r in pool for n, _, e in pieces(r, config) if e is not None and not math.isnan(e)]
    found = []
    for _ in range(config.top_k):
        best = None
        for item in weighed:
            if best is None or item[2] > best[2]:  # strictly: the first wins
                best = item
        if best is not None:
            weighed.remove(best)
            found.append(clip(best[0], best[1]))
    return found


def expected(rows, config):
    """Of the selectors that draw nothing."""
    clips = {}
    for group, rollouts in in_order(rows).items():
        pool = candidates(rollouts, config)
        for part in [pool] if config.scope == "group" else [[r] for r in pool]:
            if not part:
                continue
            if config.selector in ("peak", "lowest"):
                found = by_entropy(part, config, 1 if config.selector == "peak" else -1)
            elif config.selector == "first_k":
                found = [clip(part[0], min(config.k, len(part[0]["segment_ends"])) - 1)]
            else:
                found = [clip(part[0], len(part[0]["segment_ends"]) - 1)]
            if found:
                clips.setdefault(group, []).extend(found)
    return clips


def by_group(clips):
    return {g: sorted(c) for g, c in clips.items()}


# Random groups.

ENTROPIES = st.sampled_from([0.0, 0.25, 0.5, 1.5, None, math.nan])  # few, so that there are ties


@st.composite
def rollouts(draw, group, number):
    n = draw(st.integers(0, 5))
    ends = np.cumsum(draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))).tolist() if n else []
    entropies = draw(st.lists(ENTROPIES, min_size=n, max_size=n))
    scored = draw(st.integers(0, 9)) > 0
    return {
        "group_id": f"g{group}", "rollout_id": f"r{draw(st.integers(0, 99)):02}-{group}-{number}",
        "sample": draw(st.sampled_from([0, 1, 2, 3, None])), "run": "r", "step": group % 3,
        "success": draw(st.sampled_from([True, True, True, False, None])),
        "truncated": draw(st.sampled_from([False, False, False, True, None])),
        "n_thinking": draw(st.integers(0, max(ends, default=0))), "problem_id": f"p{group % 2}",
        "segment_ends": ends if scored else None, "segment_entropies": entropies if scored else None,
    }  # fmt: skip


@st.composite
def groups(draw):
    rows = []
    for g in range(draw(st.integers(1, 4))):
        degenerate = draw(st.booleans())
        rows += [draw(rollouts(g, i)) | {"degenerate": degenerate} for i in range(draw(st.integers(1, 4)))]
    return draw(st.permutations(rows))


SCOPES = {"scope": st.sampled_from(["group", "rollout"]), "gate": st.sampled_from(["all", "degenerate"])}
SEGMENTS = {"min_segment_tokens": st.integers(1, 3), "region": st.sampled_from(["all", "think"])}
OPTIONS = {
    "peak": SCOPES | SEGMENTS | {"top_k": st.integers(1, 4)},
    "lowest": SCOPES | SEGMENTS | {"top_k": st.integers(1, 4)},
    "first_k": SCOPES | {"k": st.integers(1, 4)},
    "full": SCOPES,
    "random": SCOPES | SEGMENTS | {"seed": st.integers(0, 9)},
    "length_matched": SCOPES | SEGMENTS | {"seed": st.integers(0, 9)},
    "uniform": SCOPES | {"region": SEGMENTS["region"], "seed": st.integers(0, 9)},
    "match": SCOPES | SEGMENTS | {
        "distance": st.sampled_from(["mse", "dtw", "pearson"]), "normalise": st.sampled_from(["none", "zscore"]),
        "min_segments": st.integers(1, 3),
    },
}  # fmt: skip


def configs(*names):
    bins = {"match": {"bins": st.just(BINS)}}
    return st.one_of([st.builds(Selector, selector=st.just(n), **OPTIONS[n], **bins.get(n, {})) for n in names or OPTIONS])


EXPERTS = Experts.of(
    [
        pa.table(
            {"problem_id": ["p0", "p1", "p0", None], "segment_entropies": [[0.1, 1.0, 0.2], [0.5], [None, 2.0, 0.0], [1.0]]}
        )
    ],
    BINS,
)


# From tokens to clips.

PIECES = {0: b"a", 1: b" b", 2: b"\n", 3: b".\n\n", 4: b" ", 5: b"\n ", 6: b"<end>"}
VOCAB = Vocab("tiny", PIECES, frozenset({6}))
EOS = 6


def text_segments(tokens):
    """From the spec: a segment ends with a token that holds a newline; one of white space alone joins the one before, at the
    beginning the first with text; a final EOS belongs to none."""
    n = len(tokens)
    while n and tokens[n - 1] == EOS:
        n -= 1
    cuts, begin = [], 0
    for i in range(n):
        if b"\n" in PIECES[tokens[i]] or i == n - 1:
            cuts.append((begin, i + 1))
            begin = i + 1
    merged = []
    for begin, end in cuts:
        blank = not b"".join(PIECES[t] for t in tokens[begin:end]).decode().strip()
        before_is_blank = merged and not b"".join(PIECES[t] for t in tokens[slice(*merged[-1])]).decode().strip()
        if merged and (blank or before_is_blank):
            merged[-1] = merged[-1][0], end
        else:
            merged.append((begin, end))
    return merged


def brute_peak(group):
    """The clip of a group by the paper's rule: of all segments of its verified successes the one of highest mean entropy."""
    best, found = None, None
    for r in group:
        if r["reward"] != 1 or r["finish_reason"] == "length":
            continue
        for a, b in text_segments(r["tokens"]):
            counted = [float(h) for h, m in zip(r["entropies"][a:b], r["mask"][a:b], strict=True) if m]
            if not counted:
                continue
            mean = math.fsum(counted) / len(counted)
            if best is None or mean > best:
                best, found = mean, (r["rollout_id"], b)
    return found


def random_group(rng, number):
    group = []
    kind = rng.choice(["any", "all", "none", "one"])
    n = rng.randrange(1, 9)
    for i in range(n):
        length = rng.randrange(0, 25)
        letters = [0, 1] if rng.random() < 0.2 else [0, 0, 1, 1, 2, 3, 4, 5]  # some without any newline
        tokens = [rng.choice(letters) for _ in range(length)] + [EOS] * rng.choice([0, 1, 1, 2])
        mask = [rng.random() < 0.8 for _ in tokens] if rng.random() < 0.3 else [True] * len(tokens)
        reward = {"any": rng.random() < 0.5, "all": True, "none": False, "one": i == n // 2}[kind]
        group.append(
            {
                "rollout_id": f"{rng.randrange(10**9)}-{number}-{i}", "sample": i, "tokens": tokens, "mask": mask,
                "entropies": [rng.randrange(5) / 4 for _ in tokens], "reward": float(reward),
                "finish_reason": rng.choice(["stop", "stop", "stop", "length", None]),
            }
        )  # fmt: skip
    return group


def test_peak_is_what_a_loop_over_tokens_finds_in_1000_random_groups():
    rng = random.Random(11)
    made = [random_group(rng, g) for g in range(1000)]
    rows = [r | {"group_id": f"g{i:04}"} for i, group in enumerate(made) for r in group]
    rng.shuffle(rows)
    tokens, masks = (pa.array([r[k] for r in rows], pa.list_(t)) for k, t in (("tokens", pa.int32()), ("mask", pa.bool_())))
    entropies = pa.array([r["entropies"] for r in rows], pa.list_(pa.float32()))
    ends = segment(tokens, VOCAB, eos=[EOS])
    columns = {
        "group_id": [r["group_id"] for r in rows], "rollout_id": [r["rollout_id"] for r in rows],
        "sample": [r["sample"] for r in rows], "success": [r["reward"] >= 1 - 1e-6 for r in rows],
        "truncated": [r["finish_reason"] == "length" for r in rows],
        "segment_ends": ends, "segment_entropies": segment_means(entropies, ends, masks),
    }  # fmt: skip
    found = select(pa.table(columns))
    clips = {rows[i]["group_id"]: (rows[i]["rollout_id"], int(end)) for i, end in zip(found.row, found.end_token, strict=True)}
    wanted = {f"g{i:04}": brute_peak(group) for i, group in enumerate(made)}
    assert clips == {g: c for g, c in wanted.items() if c}
    assert found.groups["clip"] == len(clips) and sum(found.groups.values()) == 1000
    for i, end, whole in zip(found.row, found.end_token, found.whole, strict=True):
        assert whole == (end == len(rows[i]["tokens"]) - rows[i]["tokens"].count(EOS))
    assert Counter(wanted.values())[None] > 50 and len(clips) > 500 and 0 < found.whole.sum() < len(clips)


@given(groups(), configs("peak", "lowest", "first_k", "full"))
@settings(max_examples=150, deadline=None)
def test_selectors_that_draw_nothing_are_what_a_loop_finds(rows, config):
    clips, found = chosen(rows, config)
    assert clips == expected(rows, config)
    assert np.isnan(found.distance).all()
    for row, number, entropy in zip(found.row, found.segment, found.entropy, strict=True):
        assert entropy == pytest.approx(
            rows[row]["segment_entropies"][number] or (0.0 if entropy == 0 else math.nan), nan_ok=True
        )


@given(groups(), configs("random"))
@settings(max_examples=150, deadline=None)
def test_random_draws_one_of_the_segments_that_may_be_chosen(rows, config):
    clips, _ = chosen(rows, config)
    for group, of_group in in_order(rows).items():
        pool = candidates(of_group, config)
        may = [[clip(r, n) for n, _, _ in pieces(r, config)] for r in pool]
        parts = [sum(may, [])] if config.scope == "group" else may
        found = clips.get(group, [])
        assert len(found) == sum(bool(p) for p in parts)
        for one, part in zip(found, [p for p in parts if p], strict=True):
            assert one in part


@given(groups(), configs("uniform"))
@settings(max_examples=150, deadline=None)
def test_uniform_cuts_a_candidate_after_one_of_its_tokens(rows, config):
    clips, _ = chosen(rows, config)
    for group, of_group in in_order(rows).items():
        most = {
            r["rollout_id"]: min(r["segment_ends"][-1], r["n_thinking"] if config.region == "think" else 10**9)
            for r in candidates(of_group, config)
        }
        possible = {r: n for r, n in most.items() if n}
        found = clips.get(group, [])
        assert len(found) == (len(possible) if config.scope == "rollout" else bool(possible))
        by_id = {r["rollout_id"]: r for r in of_group}
        for rollout, end, number, whole in found:
            ends = by_id[rollout]["segment_ends"]
            assert 1 <= end <= possible[rollout]
            assert (0, *ends)[number] < end <= ends[number] and whole == (end == ends[-1])


@given(groups(), configs("length_matched"))
@settings(max_examples=150, deadline=None)
def test_length_matched_is_as_long_as_the_peak_of_its_group(rows, config):
    peak = Selector(selector="peak", gate=config.gate, min_segment_tokens=config.min_segment_tokens, region=config.region)
    peaks = expected(rows, peak)
    clips, _ = chosen(rows, config)
    assert clips.keys() == peaks.keys()
    for group, found in clips.items():
        pool = {r["rollout_id"]: r["segment_ends"][-1] for r in candidates(in_order(rows)[group], config)}
        assert len(found) == (len(pool) if config.scope == "rollout" else 1)
        for rollout, end, _, _ in found:
            assert end == min(peaks[group][0][1], pool[rollout])


@given(groups(), configs(), st.randoms())
@settings(max_examples=150, deadline=None)
def test_neither_the_order_of_rows_nor_other_groups_change_a_clip(rows, config, rng):
    whole, found = chosen(rows, config, EXPERTS)
    shuffled = rows[:]
    rng.shuffle(shuffled)
    again, other = chosen(shuffled, config, EXPERTS)
    assert by_group(again) == by_group(whole) and other.groups == found.groups and other.successes == found.successes
    alone = {}
    for group in {r["group_id"] for r in rows}:
        clips, part = chosen([r for r in shuffled if r["group_id"] == group], config, EXPERTS)
        alone |= clips
        distances = sorted(d for d in part.distance if not math.isnan(d))
        assert set(distances) <= set(found.distance.tolist())  # to the last bit
    assert by_group(alone) == by_group(whole)


@given(groups(), configs(), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_group_and_success_is_counted_once(rows, config, _):
    clips, found = chosen(rows, config, EXPERTS)
    assert set(found.groups) | set(found.successes) <= set(OUTCOMES)
    assert sum(found.groups.values()) == len({r["group_id"] for r in rows}) and found.groups["clip"] == len(clips)
    assert sum(found.successes.values()) == sum(bool(r["success"]) for r in rows)
    judged = [r for r in rows if r["success"] and (config.gate == "all" or r["degenerate"])]
    assert found.successes["truncated"] == sum(bool(r["truncated"]) for r in judged)
    left = [r for r in judged if not r["truncated"]]
    assert found.successes["unscored"] == sum(r["segment_ends"] is None for r in left)
    assert found.successes["empty"] == sum(r["segment_ends"] == [] for r in left)


def row(**fields):
    return {
        "group_id": "g", "rollout_id": "r", "sample": 0, "run": "r", "step": 1, "success": True, "truncated": False,
        "degenerate": True, "problem_id": "p0", "n_thinking": 10, "segment_ends": [2, 5], "segment_entropies": [0.5, 0.5],
    } | fields  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"degenerate": False}, "not_degenerate"), ({"success": False}, "no_success"), ({"success": None}, "no_success"),
        ({"truncated": True}, "truncated"), ({"segment_ends": None, "segment_entropies": None}, "unscored"),
        ({"segment_ends": [], "segment_entropies": []}, "empty"), ({"segment_entropies": [None, math.nan]}, "no_segment"),
        ({"truncated": None}, "clip"),
    ],
)  # fmt: skip
def test_a_group_without_a_clip_says_why(fields, outcome):
    found = select(table([row(**fields)]), Selector(gate="degenerate"))
    assert found.groups == {outcome: 1}


def test_a_group_says_how_far_its_best_rollout_came():
    rows = [row(rollout_id="a", success=False), row(rollout_id="b", truncated=True)]
    assert select(table(rows)).groups == {"truncated": 1}
    rows.append(row(rollout_id="c", segment_ends=None, segment_entropies=None))
    assert select(table(rows)).groups == {"unscored": 1}


def test_ties_go_to_the_lowest_sample_then_the_rollout_id_then_the_first_segment():
    rows = [row(rollout_id="a", sample=None), row(rollout_id="z", sample=3), row(rollout_id="b", sample=None)]
    assert chosen(rows, Selector())[0] == {"g": [("z", 2, 0, False)]}
    assert chosen(rows[::2], Selector())[0] == {"g": [("a", 2, 0, False)]}
    top = chosen(rows, Selector(top_k=4))[0]["g"]
    assert top == [("z", 2, 0, False), ("z", 5, 1, True), ("a", 2, 0, False), ("a", 5, 1, True)]


def test_no_rollouts_give_no_clips():
    for name in OPTIONS:
        config = Selector.make(selector=name, **({"bins": BINS} if name == "match" else {}))
        found = select(table([]), config, EXPERTS)
        assert len(found.row) == 0 and not found.groups and not found.successes


def shares(config, count=2000):
    """How often each segment of one group is drawn, over many groups that look alike."""
    rows = []
    for g in range(count):
        rows.append(row(group_id=f"g{g}", rollout_id=f"a{g}", segment_ends=[1, 4, 10], segment_entropies=[0.1, 0.9, 0.2]))
        rows.append(row(group_id=f"g{g}", rollout_id=f"b{g}", sample=1, segment_ends=[2], segment_entropies=[0.5]))
    found = select(table(rows), config)
    picks = Counter((rows[i]["rollout_id"][0], int(e)) for i, e in zip(found.row, found.end_token, strict=True))
    return {k: n / count for k, n in picks.items()}


def test_draws_are_uniform():
    """Within four standard deviations of 2,000 draws."""
    assert shares(Selector(selector="random")) == pytest.approx(
        {("a", 1): 0.25, ("a", 4): 0.25, ("a", 10): 0.25, ("b", 2): 0.25}, abs=0.04
    )
    uniform = shares(Selector(selector="uniform"))
    assert uniform == pytest.approx({**{("a", n): 0.05 for n in range(1, 11)}, ("b", 1): 0.25, ("b", 2): 0.25}, abs=0.04)
    assert shares(Selector(selector="length_matched")) == pytest.approx({("a", 4): 0.5, ("b", 2): 0.5}, abs=0.045)


def test_draws_depend_on_seed_run_step_and_group():
    many = {"segment_ends": list(range(1, 1001)), "segment_entropies": [0.5] * 1000}

    def picks(seed=0, name="g", **fields):
        rows = [row(**many, **fields) | {"group_id": f"{name}{i}"} for i in range(20)]
        return select(table(rows), Selector(selector="random", seed=seed)).end_token.tolist()

    assert picks() == picks() and len(set(picks())) > 15
    for other in (picks(1), picks(name="h"), picks(run="other"), picks(step=2), picks(step=None)):
        assert sum(a == b for a, b in zip(picks(), other, strict=True)) <= 2


def test_with_scope_rollout_each_rollout_draws_for_itself():
    long = {"segment_ends": list(range(1, 1001)), "segment_entropies": [0.5] * 1000}
    rows = [row(rollout_id=f"r{i}", sample=i, **long) for i in range(20)]
    for name in ("random", "uniform"):
        assert len(set(select(table(rows), Selector.make(selector=name, scope="rollout")).end_token.tolist())) > 15


def test_draws_are_the_same_in_another_process():
    """Hashes of Python's own differ from process to process; these do not."""
    code = (
        "import pyarrow as pa\nfrom echolab.clips.selectors import Selector, select\n"
        "n = 300\nlists = lambda v, t: pa.array([v] * n, pa.list_(t))\n"
        "rows = pa.table({'group_id': [str(i) for i in range(n)], 'rollout_id': ['r'] * n, 'sample': [0] * n, 'run': ['r'] * n,"
        " 'step': [1] * n, 'success': [True] * n, 'truncated': [False] * n,"
        " 'segment_ends': lists(list(range(1, 50)), pa.int32()), 'segment_entropies': lists([0.5] * 49, pa.float32())})\n"
        "print(select(rows, Selector(selector='random')).end_token.tolist())"
    )
    one, two = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab")
    assert one == two and len(set(one.split(","))) > 20


# What lies before `</think>`.


@given(
    st.lists(
        st.lists(st.sampled_from([b"a", b"</", b"think", b"</think>", b">", b"x</think", b">b", b""]), max_size=8), max_size=6
    )
)
@example([[b"</", b"think"], [b">", b"a"]])  # across two completions
@example([[b"</think>", b"", b"</think>"], [b"a", b"</think>"]])
@settings(max_examples=150, deadline=None)
def test_thinking_counts_tokens_that_begin_before_the_tag(completions):
    known = sorted({p for c in completions for p in c})
    vocab = Vocab("t", dict(enumerate(known)))
    tokens = pa.array([[known.index(p) for p in c] for c in completions], pa.list_(pa.int32()))
    wanted = []
    for c in completions:
        at = b"".join(c).find(b"</think>")
        begins = [len(b"".join(c[:i])) for i in range(len(c))]
        wanted.append(len(c) if at < 0 else sum(b < at for b in begins))
    assert thinking(tokens, vocab).tolist() == wanted
    assert thinking(pa.chunked_array([tokens, tokens]), vocab).tolist() == wanted * 2


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "peek"}, r"selector: no selector 'peek'; did you mean peak\?"),
        ({"selector": "length-matched"}, "did you mean length_matched"),
        ({"selector": "zzz"}, "no selector 'zzz': use peak, match, random"),
        ({"selector": "full", "top_k": 2}, "top_k is an option of peak, lowest, not of full"),
        ({"k": 2}, "k is an option of first_k, not of peak"),
        ({"distance": "dtw"}, "distance is an option of match, not of peak"),
        ({"selector": "uniform", "min_segment_tokens": 4}, "min_segment_tokens is an option of peak"),
        ({"selector": "match", "unit": "rollout", "region": "think"}, "unit rollout compares whole completions"),
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1"),
        ({"tpo_k": 2}, r"tpo_k: no such option; did you mean top_k\?"),
        ({"scope": "groups"}, "scope: Input should be 'group' or 'rollout'"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(WrongUsage, match=message):
        Selector.make(**options)


def test_a_selector_keeps_the_options_that_its_rule_has():
    assert Selector(seed=3).resolved() == {
        "selector": "peak", "scope": "group", "gate": "all", "top_k": 1, "min_segment_tokens": 1, "region": "all", "version": 1,
    }  # fmt: skip
    assert Selector(selector="full", seed=3).resolved() == {"selector": "full", "scope": "group", "gate": "all", "version": 1}
    assert Selector(selector="uniform", seed=3).resolved()["seed"] == 3


def test_match_without_experts_or_with_other_bins_is_an_error():
    with pytest.raises(EcholabError, match="needs experts with curves of 16 bins"):
        select(table([row()]), Selector(selector="match"))
    with pytest.raises(EcholabError, match="needs experts with curves of 16 bins"):
        select(table([row()]), Selector(selector="match"), EXPERTS)


def test_the_module_needs_no_torch():
    code = "import sys, echolab.clips.selectors; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
