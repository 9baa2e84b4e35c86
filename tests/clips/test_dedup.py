"""Exact and near duplicates: one rule from the other end of the text, the pairs of all texts compared one by one."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from generators.mined import clip, mined
from hypothesis import given
from hypothesis import strategies as st

from echolab.clips.dedup import Shingles, bands, jaccard, leaders
from echolab.clips.ngrams import Said, words
from echolab.lab import Lab

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
MATH = DATA / "rollouts" / "qwen25math_rm_maj_example_math_100x8.jsonl"
WORDS = [f"w{i}" for i in range(400)]


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Sets of 5-grams, as the module describes them."""
    found = "".join(c for c in unicodedata.normalize("NFKD", text).lower() if c.isalnum() or c.isspace()).split()
    return frozenset(tuple(found[i : i + 5]) for i in range(max(len(found) - 4, min(len(found), 1))))


def similarity(a: str, b: str) -> float:
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other) if one and other else 0.0


def edited(rng: random.Random, text: str, changes: int) -> str:
    changed = text.split()
    for _ in range(changes):
        changed[rng.randrange(len(changed))] = rng.choice(WORDS)
    return " ".join(changed)


def kept(store, rows, **rules) -> list[dict]:
    """What curation leaves of these clips, in the order they were given."""
    full = mined(store, rows)
    with Lab(store) as lab:
        label = lab.curate("mined", "curated", **rules).clipset
        left = set(lab.sql(f"SELECT clip_id FROM clips WHERE clipset = '{label}'")["clip_id"])
    return [row for row in full if row["clip_id"] in left]


def preferred(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda r: (-r["step"], -r["peak_entropy"], r["clip_id"]))


# Words and n-grams.


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), max_size=6), st.integers(2, 5))
def test_n_grams_are_equal_where_the_words_are_and_do_not_reach_into_the_next_text(texts, n):
    grams, text, place = Said([" ".join(t) for t in texts]).grams(n)
    expected = [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in texts]
    assert list(zip(text, place, strict=True)) == [(i, j) for i, e in enumerate(expected) for j in range(len(e))]
    flat = [g for e in expected for g in e]
    assert [grams[i] == grams[j] for i in range(len(flat)) for j in range(i)] == [
        flat[i] == flat[j] for i in range(len(flat)) for j in range(i)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("$x^{2}$ and x^2", ["x2", "and", "x2"]), ("Ｆｕｌｌ ﬁ ² É", ["full", "fi", "2", "e"]), ("a_1 -- + b", ["a1", "b"]),
     ("\\frac{1}{2}\u00a0m", ["frac12", "m"]), ("", []), ("你好 世界。", ["你好", "世界"])],
)  # fmt: skip
def test_words_are_what_is_left_of_case_accents_and_marks(text, expected):
    assert words(text) == expected


# Near duplicates.


@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20)))
def test_jaccard_is_that_of_the_sets(a, b):
    expected = len(a & b) / len(a | b) if a and b else 0.0
    assert jaccard(np.array(sorted(a), np.uint64), np.array(sorted(b), np.uint64)) == expected


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_miss_less_than_one_in_a_hundred_at_the_threshold(threshold):
    n, size = bands(threshold)
    assert n * size <= 128 and (1 - threshold**size) ** n < 0.01


def test_bands_find_what_they_promise(tmp_path):
    """600 pairs that are just alike enough, among texts that are like no other: at most 1 in 100 is missed."""
    rng, pairs = random.Random(1), []
    while len(pairs) < 600:
        text = " ".join(rng.choices(WORDS, k=60))
        other = edited(rng, text, 1)
        if 0.8 <= similarity(text, other) < 0.9:
            pairs.append((text, other))
    texts = [t for pair in pairs for t in pair]
    grams = Shingles(tmp_path / "grams")
    for start in range(0, len(texts), 7):
        grams.add(Said(texts[start : start + 7]))
    grams.read()
    leader, likeness = leaders(grams, grams.keys(0.8), np.arange(len(texts)), 0.8)
    found = [i for i in range(0, len(texts), 2) if leader[i + 1] == i]
    assert len(found) >= 0.99 * len(pairs)
    assert all(likeness[i + 1] == pytest.approx(similarity(*pairs[i // 2])) for i in found)
    others = [i for i in range(len(texts)) if not (i % 2 and i - 1 in found)]
    assert (leader[others] == others).all()
    # Within a group all are compared: none is missed, though bands that look for 0.99 find but half of them.
    few, groups = grams.keys(0.99), np.arange(len(texts)) // 2
    firsts = np.arange(0, len(texts), 2)
    assert np.count_nonzero(leaders(grams, few, np.arange(len(texts)), 0.8)[0][1::2] == firsts) < 500
    assert (leaders(grams, few, np.arange(len(texts)), 0.8, groups)[0][1::2] == firsts).all()


def brute(rows: list[dict], threshold: float, same_problem) -> list[dict]:
    """In the order of preference each clip goes that is like enough to one that stays."""
    stay: list[dict] = []
    for row in preferred(rows):
        if not any(same_problem(row, o) and similarity(row["clip"], o["clip"]) >= threshold for o in stay):
            stay.append(row)
    return [r for r in rows if r in stay]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.75, 1.0])
def test_within_each_of_100_groups_exactly_the_greedy_choice_stays(threshold, make_store):
    rng = random.Random(int(threshold * 100))
    rows = [
        {"prompt": f"P{g}", "clip": " ".join(rng.choices(["a", "b", "c.", "D"], k=rng.randrange(10))), "clip_ids": [1],
         "step": rng.randrange(2), "peak_entropy": rng.choice([1.0, 2.0])}
        for g in range(100) for _ in range(rng.randrange(12))
    ]  # fmt: skip
    left = kept(make_store(), rows, near_dedup=threshold)
    full = [clip(n, "x", row) for n, row in enumerate(rows)]
    expected = brute(full, threshold, lambda a, b: a["prompt"] == b["prompt"])
    assert [r["clip_id"] for r in left] == [r["clip_id"] for r in expected]


def test_across_groups_and_problems_clips_go_whose_prompts_are_alike_too(make_store):
    rng = random.Random(2)
    problems = [" ".join(rng.choices(WORDS, k=40)) for _ in range(12)]
    problems += [edited(rng, p, 1) for p in problems[:6]]
    bodies = [" ".join(rng.choices(WORDS, k=80)) for _ in range(8)]
    rows = []
    for i in range(300):
        prompt, said = rng.choice(problems), edited(rng, rng.choice(bodies), rng.choice([0, 1, 1, 6]))
        rows.append(
            {"prompt": prompt, "clip": said, "group_id": f"g{i}", "step": rng.randrange(4), "peak_entropy": float(i % 7)}
        )
    left = kept(make_store(), rows, near_dedup=0.8)
    full = [clip(n, "x", row) for n, row in enumerate(rows)]
    expected = brute(full, 0.8, lambda a, b: similarity(a["prompt"], b["prompt"]) >= 0.8)
    missed = len(left) - len(expected)
    assert {r["clip_id"] for r in expected} <= {r["clip_id"] for r in left} and missed <= 2
    assert len(left) < 250


def test_a_template_that_all_prompts_share_does_not_make_their_problems_alike(make_store):
    template = " ".join(WORDS[:200])
    opening = "First of all let us look at what we are given here.\n"
    rows = [{"prompt": f"{template} How many are {'x' * (i + 1)} {'y' * (i + 1)} ?", "clip": opening} for i in range(12)]
    assert len(kept(make_store(), rows, near_dedup=0.8)) == 12
    rows = [{"prompt": WORDS[i] + " " + template, "clip": opening} for i in range(3)]  # too few to know a template
    assert len(kept(make_store(), rows, near_dedup=0.8)) == 1


def test_problems_without_a_prompt_are_like_no_other(make_store):
    rows = [
        {"prompt": None, "problem": None, "group_id": g, "clip": "one two three", "clip_ids": [i]} for i, g in enumerate("abb")
    ]
    assert len(kept(make_store(), rows, near_dedup=0.5)) == 2


def test_clips_without_words_are_like_no_other(make_store):
    rows = [{"prompt": "P", "clip": c, "clip_ids": [i]} for i, c in enumerate(["", "$$", "+", None])]
    assert len(kept(make_store(), rows, near_dedup=0.5)) == 4


# Exact duplicates.


def test_of_equal_prompt_and_tokens_the_preferred_stays(make_store):
    rng = random.Random(4)
    values = {
        "prompt": ["P", "Q", None], "prompt_ids": [[7], [7, 1], None], "clip": ["a", "b"], "clip_ids": [[1], [1, 2], [], None],
        "tokenizer": ["t", "u", None], "step": [1, 2], "peak_entropy": [1.0, 2.0],
    }  # fmt: skip
    rows = [{name: rng.choice(v) for name, v in values.items()} for _ in range(1500)]

    def content(r):
        """Ids where they are known, with their tokenizer, else texts."""
        prompt = r["prompt"] if r["prompt_ids"] is None else tuple(r["prompt_ids"])
        tokens = r["clip"] if r["clip_ids"] is None else tuple(r["clip_ids"])
        return prompt, tokens, r["tokenizer"] if isinstance(prompt, tuple) or isinstance(tokens, tuple) else None

    first = {}
    for row in preferred([clip(n, "x", row) for n, row in enumerate(rows)]):
        first.setdefault(content(row), row["clip_id"])
    assert {r["clip_id"] for r in kept(make_store(), rows, dedup=True)} == set(first.values())


@pytest.mark.skipif(not MATH.is_file(), reason="../shared/data not found: real-data test skipped")
def test_76_of_800_real_answers_say_again_what_was_said_in_their_group(make_store):
    raw = [json.loads(line) for line in MATH.read_text().splitlines()]
    rows = [{"prompt": r["question"], "clip": c, "group_id": str(r["idx"])} for r in raw for c in r["response"]]
    assert len(kept(make_store(), rows, dedup=True)) == 724
    left = kept(make_store(), rows, near_dedup=0.9)
    assert len(left) == len(
        brute([clip(n, "x", row) for n, row in enumerate(rows)], 0.9, lambda a, b: a["prompt"] == b["prompt"])
    )


def test_clips_of_which_nothing_is_known_equal_none(make_store):
    rows = [{"prompt": "P", "clip": None, "clip_ids": None, "n_tokens": 3} for _ in range(3)]
    assert len(kept(make_store(), rows, dedup=True)) == 3


def test_the_order_of_files_and_rows_changes_nothing(make_store, monkeypatch):
    monkeypatch.setattr("echolab.clips.facts.BATCH", 7)
    rng = random.Random(3)
    rows = [
        {"prompt": rng.choice("PQ"), "clip": " ".join(rng.choices("abc", k=6)), "step": rng.randrange(2), "rollout_id": f"r{i}"}
        for i in range(120)
    ]
    # Problems with two prompts, of which one is like that of another problem.
    for i in range(20):
        one, other, said = (" ".join(rng.choices(WORDS, k=30)) for _ in range(3))
        rows += [{"prompt": p, "problem": f"{i} a", "clip": said} for p in (one, other)]
        rows.append({"prompt": one + " indeed", "problem": f"{i} b", "clip": said})
    found = []
    for shuffled, files in ((False, 1), (True, 5)):
        store = make_store()
        full = [{k: v for k, v in clip(n, "x", row).items() if k != "clipset"} for n, row in enumerate(rows)]
        if shuffled:
            rng.shuffle(full)
        mined(store, full, "set", files=files)
        with Lab(store) as lab:
            label = lab.curate("set", "curated", dedup=True, near_dedup=0.6, cap={"problem": 20}).clipset
            found.append(sorted(lab.sql(f"SELECT clip_id FROM clips WHERE clipset = '{label}'")["clip_id"]))
    assert found[0] == found[1] and 40 < len(found[0]) < 81


def test_the_folder_of_n_grams_is_gone_afterwards(make_store):
    store = make_store()
    kept(store, [{"clip": f"{i} a b c d e f"} for i in range(5)], near_dedup=0.9)
    assert not list(Path(store.job_folder("")).iterdir())
