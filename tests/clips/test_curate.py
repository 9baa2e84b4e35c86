"""Curation: what each rule leaves against loops written from its description, counts that add up, and what is kept of it."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from hashlib import sha256

import polars as pl
import pytest
from generators.mined import clip, mined

from echolab.errors import EcholabError, WrongUsage
from echolab.lab import Lab
from echolab.named import find
from echolab.store import Store


def rows_of(store: Store, label: str) -> pl.DataFrame:
    with Lab(store) as lab:
        return lab.sql(f"SELECT * FROM clips WHERE clipset = '{label}' ORDER BY clip_id")


def curate(store: Store, rows=None, name="curated", clipset="mined", **rules):
    """The report, and the clips that are left as rows by id."""
    if rows is not None:
        mined(store, rows)
    with Lab(store) as lab:
        report = lab.curate(clipset, name, **rules)
    check_counts(report)
    return report, {r["clip_id"]: r for r in rows_of(store, report.clipset).to_dicts()}


def check_counts(report) -> None:
    n = report.n_in
    for stage in report.facts["counts"]:
        assert stage["in"] == n and stage["in"] - sum(stage["dropped"].values()) == stage["out"]
        n = stage["out"]
    assert n == report.n_out


def full(rows) -> list[dict]:
    return [clip(n, "x", row) for n, row in enumerate(rows)]


def preferred(rows: list[dict]) -> list[dict]:
    def last(value):
        return (value is None, -(value or 0))

    return sorted(rows, key=lambda r: (last(r["step"]), last(r["peak_entropy"]), r["clip_id"]))


def random_rows(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"prompt": f"Problem {rng.randrange(1 + n // 6)}", "clip": "".join(rng.choices("ab \n", k=rng.randrange(1, 9))),
         "step": rng.choice([None, 1, 2, 3, 4]), "run": rng.choice("rs"), "peak_entropy": rng.choice([None, 0.5, 1.0, 2.0])}
        for _ in range(n)
    ]  # fmt: skip


# What is kept of it.


@pytest.mark.parametrize(("batch", "staged_bytes"), [(512, 1 << 26), (7, 1)])
def test_what_stays_is_as_it_was_and_the_first_set_is_untouched(batch, staged_bytes, make_store, monkeypatch):
    monkeypatch.setattr("echolab.clips.facts.BATCH", batch)
    monkeypatch.setattr("echolab.clips.curate.STAGED_BYTES", staged_bytes)
    store = make_store()
    mined(store, random_rows(60), files=3)
    before = rows_of(store, "mined@1")
    report, _ = curate(store, dedup=True, cap={"problem": 3})
    after = rows_of(store, "curated@1")
    assert 0 < report.n_out == len(after) < 60 and report.n_in == 60
    assert after.drop("clipset").equals(before.filter(pl.col("clip_id").is_in(after["clip_id"].implode())).drop("clipset"))
    assert rows_of(store, "mined@1").equals(before)


def test_the_registry_keeps_parents_rules_files_and_counts(make_store, tmp_path):
    store = make_store([{"reward": 1.0}])
    benchmark = tmp_path / "b.jsonl"
    benchmark.write_text('{"problem": "What is 1 plus 1?"}\n')
    report, _ = curate(store, [{}] * 4, against=[f"{benchmark}:problem"], dedup=True, validation=0.5, weights="uniform")
    entry = find(store.snapshot(), "clipset", "curated")
    versions = find(store.snapshot(), "clipset", "mined").parents["versions"]
    assert versions and entry.parents == {"versions": versions, "clipsets": ["mined@1"], "facts": report.facts}
    assert entry.config["clipset"] == "mined@1"
    assert entry.config["rules"] == {"dedup": True, "validation": 0.5, "weights": "uniform", "ngram": 8}
    digest = sha256(benchmark.read_bytes()).hexdigest()
    assert entry.config["against"] == [{"file": "b.jsonl", "column": "problem", "sha256": digest}]
    assert [s["stage"] for s in report.facts["counts"]] == ["contaminated", "duplicate"]
    assert report.facts["counts"][0]["dropped"] == {"contaminated": 1}
    found = report.facts["decontamination"][0]
    assert (found["sha256"], found["clips"], found["rows"], found["texts"], found["n_hits"]) == (digest, 1, 1, 1, 1)
    shared = {"row": 0, "column": "problem", "in": "prompt", "kind": "exact", "shared": "What is 1 plus 1?", "clips": 1}
    assert found["hits"] == [shared]
    assert sum(report.facts["splits"].values()) == report.n_out
    with Lab(store) as lab:
        assert {p["name"] for p in lab.info()["pins"]} == {"mined", "curated"}


def test_the_same_again_makes_nothing_new_and_anything_else_does(make_store, tmp_path):
    store, benchmark = make_store(), tmp_path / "b.jsonl"
    benchmark.write_text('{"problem": "a b c d e f g h i"}\n')
    rules = {"dedup": True, "against": [str(benchmark)]}
    first, _ = curate(store, random_rows(20), **rules)
    again, _ = curate(store, **rules, listing=tmp_path / "dropped.jsonl")
    assert (first.made, again.made, again.clipset) == (True, False, "curated@1")
    assert again.facts == first.facts and (tmp_path / "dropped.jsonl").exists()
    assert curate(store, **rules, cap={"problem": 1})[0].clipset == "curated@2"
    assert curate(store, **rules)[0].clipset == "curated@3"  # the newest counts
    benchmark.write_text('{"problem": "a b c d e f g h j"}\n')
    assert curate(store, **rules)[0].clipset == "curated@4"
    mined(store, random_rows(20))
    assert curate(store, **rules)[0].parent == "mined@2"
    assert curate(store, **rules)[0].clipset == "curated@5"
    assert curate(store, clipset="mined@1", name="other", **rules)[0].parent == "mined@1"


def test_what_is_curated_can_be_curated(make_store):
    store = make_store([{"reward": 1.0}])
    mined(store, random_rows(40), verifier="v")
    curate(store, dedup=True)
    report, _ = curate(store, clipset="curated", name="twice", cap={"problem": 1})
    one, two = (find(store.snapshot(), "clipset", name) for name in ("curated", "twice"))
    assert report.parent == "curated@1" and two.parents["clipsets"] == ["curated@1"]
    assert one.parents["versions"] == two.parents["versions"] and one.config["verifier"] == two.config["verifier"] == "v"


def test_a_crash_leaves_neither_rows_nor_entry(make_store, monkeypatch):
    store = make_store()
    mined(store, random_rows(30), files=2)
    with monkeypatch.context() as m:
        m.setattr(Store, "stage", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            curate(store, dedup=True)
    assert not list(store.job_folder("").iterdir())
    assert curate(store, dedup=True)[0].clipset == "curated@1"


def test_every_dropped_clip_is_listed_once_with_its_rule_and_reason(make_store, tmp_path):
    store, path = make_store(), tmp_path / "dropped.jsonl"
    rows = mined(store, [*random_rows(60), {"clip": "x" * 100}])
    report, left = curate(store, max_tokens=50, dedup=True, near_dedup=0.9, cap={"problem": 2, "step": 9}, listing=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted([line["clip_id"] for line in lines] + list(left)) == sorted(r["clip_id"] for r in rows)
    dropped = {rule: n for stage in report.facts["counts"] for rule, n in stage["dropped"].items()}
    assert Counter(line["rule"] for line in lines) == Counter(dropped)
    by_rule = {line["rule"]: line for line in lines}
    assert by_rule["length"]["reason"] == "100 tokens"
    assert by_rule["cap_problem"]["reason"] == "its problem has 2 clips that are preferred"
    double = by_rule["duplicate"]
    assert double["reason"] == f"the same prompt and tokens as {double['stays']}" and double["stays"] != double["clip_id"]


def test_a_set_may_become_empty_and_says_so(make_store):
    store = make_store()
    report, left = curate(store, random_rows(5), min_tokens=1000)
    assert report.n_out == 0 and not left and "no clip is left: there is nothing to export" in report.facts["notes"]
    everything = {"dedup": True, "near_dedup": 0.8, "max_repetition": 0.5, "validation": 0.5, "weights": "staleness"}
    more = {"half_life": 1, "drop_cut_off": True, "difficulty_temperature": 2, "cap": {"problem": 1, "source": 1, "step": 1}}
    report, left = curate(store, clipset="curated", name="again", **everything, **more)
    assert report.n_in == report.n_out == 0 and len(report.facts["counts"]) == 8


# Rules.


def test_length_is_that_of_the_clip_in_tokens(make_store):
    lengths = [1, 2, 3, 4, 5, 9]
    _, left = curate(make_store(), [{"clip": "a" * n} for n in lengths], min_tokens=2, max_tokens=4)
    assert sorted(r["n_tokens"] for r in left.values()) == [2, 3, 4]


def test_repetition_is_the_share_of_16_token_n_grams_that_repeat_an_earlier_one(make_store):
    rng = random.Random(1)
    rows: list[dict] = [{"clip_ids": rng.choices(range(3), k=rng.choice([0, 5, 16, 17, 40]))} for _ in range(40)]
    rows += [{"clip_ids": list(range(rng.randrange(1, 20))) * rng.randrange(1, 9)} for _ in range(60)]

    def share(tokens: list[int]) -> float:
        grams = [tuple(tokens[i : i + 16]) for i in range(len(tokens) - 15)]
        return sum(g in grams[:i] for i, g in enumerate(grams)) / len(grams) if grams else 0.0

    rows.append({"clip_ids": None, "n_tokens": 3})
    report, left = curate(make_store(), rows, max_repetition=0.5)
    known = [r for r in full(rows) if r["clip_ids"] is not None]
    expected = {r["clip_id"] for r in known if share(r["clip_ids"]) <= 0.5}
    assert {i for i, r in left.items() if r["clip_ids"] is not None} == expected and 0 < len(expected) < 100
    assert report.facts["notes"] == ["1 clips have no token ids: their repetition is unknown"]


def test_whole_completions_that_were_cut_off_are_dropped(make_store, add_rows):
    """A clip of 4 of 4 tokens is whole; one of 3 is not, however its rollout ended."""
    cases = [  # finish_reason, tokens that were allowed, tokens of the clip, stays
        ("length", None, 4, False), ("stop", 4, 4, True), ("length", None, 3, True), (None, 4, 4, False), (None, 5, 4, True),
        (None, None, 4, True), ("stop", None, 5, True), ("length", None, 5, False),
    ]  # fmt: skip
    rollouts = [
        {"rollout_id": f"r{i}", "finish_reason": reason, "n_completion_tokens": 4,
         "sampling": json.dumps({"temperature": 1.0} | ({"max_tokens": most} if most else {}))}
        for i, (reason, most, _, _) in enumerate(cases)
    ]  # fmt: skip
    store = make_store(rollouts)
    ends = {5: [1, 2, 3, 4, 0]}  # with an EOS, that n_tokens and end_token leave out
    scored = [ends.get(n, [1, 2, 3, 4]) for _, _, n, _ in cases]
    add_rows(
        store, "scores",
        [{"rollout_id": f"r{i}", "scorer": "s", "token_ids": t, "entropies": [1.0] * len(t), "n_tokens": 4}
         for i, t in enumerate(scored)],
    )  # fmt: skip
    rows = [
        {"rollout_id": f"r{i}", "scorer": "s", "clip_ids": [1, 2, 3, 4, 0][:n], "end_token": min(n, 4)}
        for i, (_, _, n, _) in enumerate(cases)
    ]
    _, left = curate(store, rows, drop_cut_off=True)
    assert sorted(r["rollout_id"] for r in left.values()) == [f"r{i}" for i, case in enumerate(cases) if case[3]]


@pytest.mark.parametrize("what", ["problem", "step", "source"])
def test_a_cap_leaves_the_preferred_of_each(what, make_store):
    rng = random.Random(7)
    rows = random_rows(80)
    sources = {f"rollout{n}": rng.choice([None, "math", "code"]) for n in range(80)}
    store = make_store([{"rollout_id": r, "source": s} for r, s in sources.items()])

    def key(row):
        """Of a step, that of its run; unknown ones have none."""
        of = {"problem": row["problem_id"], "source": sources[row["rollout_id"]],
              "step": None if row["step"] is None else (row["run"], row["step"])}  # fmt: skip
        return of[what]

    count, expected = Counter(), set()
    for row in preferred(full(rows)):
        count[key(row)] += 1
        if key(row) is None or count[key(row)] <= 3:
            expected.add(row["clip_id"])
    report, left = curate(store, rows, cap={what: 3})
    assert set(left) == expected and len(expected) < 80
    if count[None]:
        assert report.facts["notes"] == [f"{count[None]} clips are not capped: their {what} is unknown"]


def sampled(problems: dict[str, tuple[int, int]]) -> list[dict]:
    """Rollouts of problems, of which so many of so many are right."""
    return [
        {"problem": p, "group": p, "rollout_id": f"{p} {i}", "reward": float(i < right)}
        for p, (right, n) in problems.items()
        for i in range(n)
    ]


@pytest.mark.parametrize("temperature", [1, 1.2, 1.5, 2, 3, 1000])
def test_difficulty_evens_out_the_bins_of_success_rates(temperature, make_store):
    problems = {"A": (10, 10), "B": (9, 10), "C": (5, 10), "D": (3, 10), "E": (39, 100), "F": (0, 10)}
    sizes = {"A": 40, "B": 20, "C": 13, "D": 7, "E": 2, "F": 5, "unknown": 3}
    rows = [{"prompt": p, "clip": str(i), "run": "r"} for p, n in sizes.items() for i in range(n)]
    store = make_store(sampled(problems))
    report, left = curate(store, rows, difficulty_temperature=temperature)
    bins: dict[int, int] = Counter()
    for p, (right, n) in problems.items():
        bins[min(right * 10 // n, 9)] += sizes[p]  # A and B share one, D and E another
    smallest = min(bins.values())
    expected = {b: int(n ** (1 / temperature) * smallest ** (1 - 1 / temperature) + 0.5) for b, n in bins.items()}
    found = Counter(min(problems[r["prompt"]][0] * 10 // problems[r["prompt"]][1], 9) for r in left.values()
                    if r["prompt"] in problems)  # fmt: skip
    assert found == expected and sum(r["prompt"] == "unknown" for r in left.values()) == 3
    assert (temperature == 1) == (report.n_in == report.n_out)
    assert report.facts["notes"] == ["3 clips stay: their problems have no success rate"]
    if temperature == 3:
        other = curate(store, name="other", difficulty_temperature=3, seed=1)[1]
        assert len(other) == len(left) and set(other) != set(left)
        assert set(curate(store, name="same", difficulty_temperature=3, seed=0)[1]) == set(left)


def test_success_rates_are_those_of_the_rollouts_that_the_clips_were_mined_from(make_store, add_reading):
    store = make_store(sampled({"A": (10, 10), "B": (0, 10)}))
    mined(store, [{"prompt": p, "clip": str(i)} for p in "AB" for i in range(3 if p == "A" else 1)])
    add_reading(store, [{**r, "rollout_id": f"later {i}"} for i, r in enumerate(sampled({"A": (0, 10), "B": (10, 10)}))])
    report, left = curate(store, difficulty_temperature=1000)
    assert sorted(r["prompt"] for r in left.values()) == ["A", "B"]
    assert find(store.snapshot(), "clipset", "curated").parents["versions"]["rollouts"] < store.snapshot().versions["rollouts"]


def test_rules_act_in_their_order_whatever_the_order_they_are_given_in(make_store, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"problem": "Problem 1"}\n')
    rules = {
        "cap": {"step": 2, "problem": 5}, "near_dedup": 0.9, "dedup": True, "against": [str(tmp_path / "b.jsonl")],
        "max_repetition": 0.9, "max_tokens": 7,
    }  # fmt: skip
    report, _ = curate(make_store(), random_rows(60), **rules)
    stages = ["length", "repetition", "contaminated", "duplicate", "near_duplicate", "cap_problem", "cap_step"]
    assert [s["stage"] for s in report.facts["counts"]] == stages


# Splits and weights.


def test_a_problem_never_moves_between_splits_as_the_set_grows(make_store):
    store = make_store()
    rows = [{"prompt": f"P{i // 2}", "clip": str(i)} for i in range(2000)]
    mined(store, rows[:500], "small")
    mined(store, rows, "large")
    small = curate(store, clipset="small", name="a", validation=0.1)[1].values()
    report, clips = curate(store, clipset="large", name="b", validation=0.1)
    large, more = clips.values(), curate(store, clipset="large", name="c", validation=0.3)[1].values()

    def chosen(clips):
        of: dict[str, set[str]] = defaultdict(set)
        for c in clips:
            of[c["problem_id"]].add(c["split"])
        assert all(len(splits) == 1 and splits <= {"train", "validation"} for splits in of.values())
        return {p for p, splits in of.items() if splits == {"validation"}}

    assert chosen(small) == {p for p in chosen(large) if p in {c["problem_id"] for c in small}}
    assert chosen(large) < chosen(more)
    assert 70 <= len(chosen(large)) <= 130 and 250 <= len(chosen(more)) <= 350  # of 1,000
    assert report.facts["splits"] == {"train": 2000 - 2 * len(chosen(large)), "validation": 2 * len(chosen(large))}


def test_clips_without_a_problem_are_split_by_prompt_or_group(make_store):
    rows = [
        {"prompt": p, "problem": None, "clip": str(i), "group_id": f"g{i % 7}"} for i in range(60) for p in ("A", "B", None)
    ]
    _, left = curate(make_store(), rows, validation=0.5)
    of: dict[str, set[str]] = defaultdict(set)
    for c in left.values():
        of[c["prompt"] or c["group_id"]].add(c["split"])
    assert len(of) == 9 and all(len(splits) == 1 for splits in of.values())


@pytest.mark.parametrize("validation", [None, 0.4])
@pytest.mark.parametrize("weights", ["uniform", "entropy", "staleness"])
def test_weights_are_their_formula_over_the_mean_of_the_split(weights, validation, make_store):
    half_life = {"half_life": 2.5} if weights == "staleness" else {}
    rules = {"cap": {"problem": 5}, "weights": weights, **half_life}
    report, clips = curate(make_store(), random_rows(90, 3), **rules, **({"validation": validation} if validation else {}))
    left = list(clips.values())
    for split in {c["split"] for c in left}:
        mine = [c for c in left if c["split"] == split]
        newest = {run: max(c["step"] for c in mine if c["run"] == run and c["step"]) for run in {c["run"] for c in mine}}
        raw = {
            "uniform": [1.0 for _ in mine],
            "entropy": [c["peak_entropy"] for c in mine],
            "staleness": [None if c["step"] is None else 0.5 ** ((newest[c["run"]] - c["step"]) / 2.5) for c in mine],
        }[weights]
        known = [w for w in raw if w is not None]
        expected = [1.0 if w is None else w * len(known) / sum(known) for w in raw]
        assert [c["weight"] for c in mine] == pytest.approx(expected, rel=1e-12)
        assert sum(c["weight"] for c in mine) / len(mine) == pytest.approx(1)
    unknown = sum(c["peak_entropy" if weights == "entropy" else "step"] is None for c in left)
    said = [f"{unknown} clips weigh 1: their {'peak entropy' if weights == 'entropy' else 'step'} is unknown"]
    assert report.facts["notes"] == ([] if weights == "uniform" else said) and unknown > 3


def test_without_a_word_about_them_weights_and_splits_stay(make_store):
    rows = [{"weight": float(i), "split": "validation" if i % 2 else None} for i in range(6)]
    _, left = curate(make_store(), rows, dedup=True)
    assert sorted((c["weight"], c["split"]) for c in left.values()) == [(r["weight"], r["split"]) for r in rows]


def test_texts_that_are_not_known_are_counted(make_store, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"problem": "P"}\n')
    rows = [{"prompt": None, "prompt_id": "p"}, {"clip": None, "clip_ids": [1]}, {}]
    report, left = curate(make_store(), rows, against=[str(tmp_path / "b.jsonl")])
    assert len(left) == 3 and report.facts["notes"] == ["2 clips have no text: it was compared with nothing"]


def test_ids_that_are_no_hex_are_as_good(make_store):
    rows = [{"clip_id": i, "prompt": "P", "clip": "same"} for i in ("ü", "a" * 80, "b", "日本")]
    _, left = curate(make_store(), rows, dedup=True)
    assert list(left) == ["a" * 80]


# What is refused.


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({}, "nothing to do: name a rule"),
        ({"cap": {"problem": 0}}, "a cap is at least 1"),
        ({"cap": {"prompts": 2}}, "'problem', 'source' or 'step'"),
        ({"cap": {"problem": "many"}}, "valid integer"),
        ({"near_dedup": 80}, "less than or equal to 1"),
        ({"near_dedup": float("nan")}, "near_dedup"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5 is more than max_tokens 4"),
        ({"ngram": 8, "dedup": True}, "ngram is an option of against"),
        ({"seed": 1, "dedup": True}, "seed is an option of difficulty_temperature"),
        ({"half_life": 1, "weights": "uniform"}, "half_life is an option of weights staleness"),
        ({"weights": "staleness"}, "needs a half_life"),
        ({"weights": "peak"}, "'uniform', 'entropy' or 'staleness'"),
        ({"validation": 1}, "less than 1"),
        ({"difficulty_temperature": 0.5}, "greater than or equal to 1"),
        ({"dedupe": True}, "did you mean dedup"),
    ],
)
def test_rules_that_make_no_sense_are_one_line(rules, says, make_store):
    with Lab(make_store()) as lab, pytest.raises(WrongUsage, match=says) as e:
        lab.curate("mined", "curated", **rules)
    assert "\n" not in str(e.value)


def test_what_is_not_there_is_named(make_store, tmp_path):
    store = make_store([{"reward": 1.0}])
    mined(store, random_rows(3))
    with Lab(store) as lab:
        with pytest.raises(EcholabError, match="no clip set 'hard'.*mined@1"):
            lab.curate("hard", "curated", dedup=True)
        with pytest.raises(WrongUsage, match="a name of its own"):
            lab.curate("mined@1", "mined", dedup=True)
        with pytest.raises(WrongUsage, match="is no name of a clip set"):
            lab.curate("mined", "a/b", dedup=True)
        with pytest.raises(EcholabError, match="no such folder"):
            lab.curate("mined", "curated", dedup=True, listing=tmp_path / "none" / "x.jsonl")
        with pytest.raises(EcholabError, match="none.jsonl: No such file"):
            lab.curate("mined", "curated", against=["none.jsonl"])
    with Lab(store, version=store.snapshot().versions["ingests"]) as lab, pytest.raises(EcholabError, match="earlier state"):
        lab.curate("mined", "curated", dedup=True)
