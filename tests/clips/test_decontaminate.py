"""Decontamination: against computations over the raw files that use nothing of echolab, and case by case."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import polars as pl
import pytest
from generators.mined import mined

from echolab.clips.benchmarks import load
from echolab.clips.decontaminate import Contamination
from echolab.clips.ngrams import Said
from echolab.errors import EcholabError
from echolab.lab import Lab

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
BENCHMARKS = DATA / "benchmarks"
real = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data not found: real-data test skipped")
NINE = "How many ducks lay sixteen eggs on rainy Mondays?"


def plain(text: str) -> str:
    return " ".join(text.lower().split())


def rows(name: str) -> list[dict]:
    if name.endswith("parquet"):
        return pl.read_parquet(BENCHMARKS / name).to_dicts()
    return [json.loads(line) for line in (BENCHMARKS / name).read_text().splitlines()]


def user(messages: list[dict]) -> str:
    return next(m["content"] for m in messages if m["role"] == "user")


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def caught(benchmark: Path | str, prompts: list[str], n: int = 8) -> list[bool]:
    index = Contamination([load(str(benchmark))], n)
    return [bool(hits) for hits in index.of_prompts(Said(prompts), [None] * len(prompts))]


@pytest.fixture
def against(make_store, tmp_path):
    """`against(problems, prompts)`: curate clips with these prompts; returns the report and the listed lines by prompt."""

    def curated(problems: list, prompts: list[str], clips: list[str] | None = None, **rules):
        store = make_store()
        benchmark = write(tmp_path / "benchmark.jsonl", [p if isinstance(p, dict) else {"problem": p} for p in problems])
        texts = [{"clip": c} for c in clips] if clips else [{}] * len(prompts)
        full = mined(store, [{"prompt": p, **t} for p, t in zip(prompts, texts, strict=True)])
        with Lab(store) as lab:
            report = lab.curate("mined", "curated", against=[str(benchmark)], listing=tmp_path / "dropped.jsonl", **rules)
        by_id = {c["clip_id"]: c["prompt"] for c in full}
        lines = map(json.loads, (tmp_path / "dropped.jsonl").read_text().splitlines())
        return report, {by_id[line["clip_id"]]: line for line in lines}

    return curated


# What is caught.


def test_a_copied_prompt_of_nine_words_is_caught_by_its_n_gram(against):
    report, dropped = against([NINE, "Another problem"], [NINE, "Something else altogether, nothing shared here at all"])
    assert report.n_out == 1 and list(dropped) == [NINE]
    (hit,) = dropped[NINE]["hits"]
    assert hit == {
        "benchmark": "benchmark.jsonl", "row": 0, "column": "problem", "in": "prompt", "kind": "ngram",
        "shared": "how many ducks lay sixteen eggs on rainy",
    }  # fmt: skip


def test_a_copied_prompt_of_three_words_is_caught_by_its_whole_text(against):
    report, dropped = against(["x", "Solve $x = 2$."], ["solve x=2", "Solve $x = 3$.", "Solve $x - 2$"])
    assert list(dropped) == ["solve x=2"]
    assert dropped["solve x=2"]["hits"] == [
        {"benchmark": "benchmark.jsonl", "row": 1, "column": "problem", "in": "prompt", "kind": "exact",
         "shared": "Solve $x = 2$."}
    ]  # fmt: skip


def test_a_paraphrase_passes_and_nothing_calls_it_more_than_decontaminated_by_n_grams(against):
    report, dropped = against([NINE], ["On Mondays with rain, sixteen eggs are laid by what number of ducks?"])
    assert report.n_out == 1 and not dropped
    assert report.facts["decontamination"][0]["ngram"] == 8
    assert "clean" not in json.dumps(report.facts).lower()


@pytest.mark.parametrize(
    "copy",
    [
        NINE.upper(),
        NINE.replace(" ", "\n\t "),
        NINE.replace("How", "**How**").replace("?", " ?!"),
        NINE.replace("ducks", "“ducks”").replace("Mondays", "Ｍondays"),
        "Ho\u0301w many ducks lay sixteen eggs on rainy Mondays",
        "My task. " + NINE + " Let's think step by step and output the final answer within \\boxed{}.",
        f"<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n{NINE}<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_case_punctuation_white_space_accents_and_what_stands_around_do_not_hide_a_copy(against, copy):
    assert list(against([NINE], [copy])[1]) == [copy]


def test_short_problems_are_found_on_a_line_of_their_own_and_by_the_id_of_their_problem(make_store, tmp_path):
    benchmark = write(tmp_path / "b.jsonl", [{"problem": "Compute 2^10."}])
    store = make_store()
    mined(
        store,
        [
            {"prompt": "Compute 2^10.\nPlease reason step by step."},
            {"prompt": "QUESTION Compute 2^10. ANSWER", "problem": "Compute 2^10."},  # as --strip-template leaves it
            {"prompt": "QUESTION Compute 2^10. ANSWER"},
        ],
    )
    with Lab(store) as lab:
        assert lab.curate("mined", "curated", against=[str(benchmark)]).n_out == 1


def test_clips_are_compared_with_problems_and_solutions_by_thirteen_words(against):
    words = [f"w{chr(97 + i)}" for i in range(20)]
    solution, other = " ".join(words), [f"v{chr(97 + i)}" for i in range(20)]
    clips = [
        "As known: " + " ".join(words[3:16]) + ".",  # 13 words of a solution
        "As known: " + " ".join(words[3:15]) + ".",  # 12
        " ".join(other[:13]),  # of a problem
        "nothing",
    ]
    row = {"problem": " ".join(other), "solution": solution, "answer": "42"}
    report, dropped = against([row], [f"prompt {i}" for i in range(4)], clips)
    found = {p: [(h["in"], h["column"], h["shared"]) for h in line["hits"]] for p, line in dropped.items()}
    assert found == {
        "prompt 0": [("clip", "solution", " ".join(words[3:16]))],
        "prompt 2": [("clip", "problem", " ".join(other[:13]))],
    }


# What a template brings.


def test_system_prompts_templates_and_instructions_that_many_rows_share_are_no_hits(against):
    system = "You are a helpful assistant who thinks about every problem step by step and checks each line twice"
    suffix = "Please reason step by step, and put your final answer within \\boxed{} at the very end."
    numbers = ["one", "two", "three", "four", "five", "six"]
    problems = [{"prompt": [{"role": "system", "content": system}, {"role": "user", "content": f"{n} ducks? {suffix}"}]}
                for n in numbers]  # fmt: skip
    prompts = [f"{system}\n\nseven geese? {suffix}", f"five ducks? {suffix}", f"Of five ducks? {suffix}"]
    report, dropped = against(problems, prompts)
    assert list(dropped) == [prompts[1]] and dropped[prompts[1]]["hits"][0]["kind"] == "exact"
    assert report.facts["decontamination"][0]["left_out"] > 0


def test_n_grams_without_a_letter_are_no_evidence(against):
    row = {"problem": "Add 1 2 3 4 5 6 7 8 9 10", "solution": " ".join(map(str, range(30)))}
    report, dropped = against([row], ["Count: 1 2 3 4 5 6 7 8 9 10 11", "q"], ["1 2 3", " ".join(map(str, range(5, 25)))])
    assert report.n_out == 2 and not dropped


@pytest.mark.parametrize(
    ("sharing", "texts", "is_evidence"),
    [(3, 3, True), (4, 4, False), (3, 15, True), (4, 39, False), (4, 40, True), (10, 100, True), (11, 105, False),
     (10, 900, True), (11, 900, False), (12, 1200, True), (13, 1200, False)],
)  # fmt: skip
def test_what_many_texts_of_a_file_share_is_left_out(sharing, texts, is_evidence, tmp_path):
    shared = "alpha beta gamma delta epsilon zeta eta theta"
    letters = [chr(97 + i) * 3 for i in range(20)]
    with_it = [f"{a}{b} {shared} {b}{a}" for a in letters for b in letters][:sharing]
    numbered = (f"{a} {b} {c} no word of these is in any other" for a in letters for b in letters for c in letters)
    benchmark = write(tmp_path / "b.jsonl", [{"problem": t} for t in [*with_it, *islice(numbered, texts - sharing)]])
    assert caught(benchmark, [f"So {shared} it is"]) == [is_evidence]


def test_hits_are_those_of_a_loop_over_all_pairs(tmp_path):
    """Against tuples of words, written from the module's description."""
    rng = random.Random(5)

    def texts(n: int) -> list[str]:
        """Of so few words, and with endings so alike, that much is shared and some of it is common."""
        made = (rng.choices("ab7c", k=rng.randrange(1, 10)) + list(rng.choice(["", "", "stuvw"])) for _ in range(n))
        return list(dict.fromkeys(" ".join(words) for words in made))

    def grams(words: list[str], n: int) -> dict[int, tuple[str, ...]]:
        return {i: tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    n_common = n_left_out_whole = 0
    for round in range(12):
        problems, prompts, n = texts(50), texts(50), rng.choice([3, 4, 5])
        count = Counter(g for p in problems for g in set(grams(p.split(), n).values()))
        common = {g for g, c in count.items() if c > max(3, min(10, len(problems) / 10), len(problems) / 100)}

        def covered(text: str, n: int = n, common: set = common) -> set[int]:
            return {j for i, g in grams(text.split(), n).items() if g in common for j in range(i, i + n)}

        def evidence(text: str, n: int = n) -> set[tuple[str, ...]]:
            mine = grams(text.split(), n)
            return {g for i, g in mine.items() if not covered(text) & {*range(i, i + n)} and set(g) != {"7"}}

        def wholes(text: str) -> set[str]:
            rest = [w for i, w in enumerate(text.split()) if i not in covered(text)]
            return {text.replace(" ", "")} | ({"".join(rest)} if len(rest) >= 3 else set())

        index = Contamination([load(str(write(tmp_path / f"{round}.jsonl", [{"problem": p} for p in problems])))], n)
        for prompt, hits in zip(prompts, index.of_prompts(Said(prompts), [None] * len(prompts)), strict=True):
            mine = set(grams(prompt.split(), n).values())
            assert {h.text.text for h in hits} == {
                p for p in problems if evidence(p) & mine or (not evidence(p) and wholes(p) & wholes(prompt))
            }
            for hit in hits:
                assert hit.kind == "exact" or tuple(hit.shared.split()) in mine & evidence(hit.text.text)
        n_common += len(common)
        n_left_out_whole += sum(len(wholes(p)) for p in problems)
    assert n_common > 20 and n_left_out_whole > 600


# The benchmarks that are there.


@real
def test_all_amc23_problems_are_found_among_the_amc_prompts_of_luffy():
    amc = [r["problem"] for r in rows("qwen25math_amc23_test.jsonl")]
    luffy = {plain(user(r["prompt"])) for r in rows("luffy_valid.all.parquet") if "amc" in r["data_source"]}
    assert sum(plain(p) in luffy for p in amc) == 40
    assert sum(caught(BENCHMARKS / "luffy_valid.all.parquet", amc)) == 40
    assert sum(caught(f"{BENCHMARKS / 'luffy_valid.all.parquet'}:prompt", amc, n=13)) == 40


@real
def test_all_of_math_500_is_found_in_luffy_short_problems_too():
    math = [r["prompt"] for r in rows("roll_math_benchmarks.jsonl") if r["source"] not in ("aime2024", "aime2025")]
    assert len(math) == 500 and sum(len(plain(p).split()) < 8 for p in math) >= 30
    assert sum(caught(BENCHMARKS / "luffy_valid.all.parquet", math)) == 500


@real
def test_aime24_is_worded_differently_in_half_of_roll():
    qwen = {plain(r["problem"]) for r in rows("qwen25math_aime24_test.jsonl")}
    roll = [r["prompt"] for r in rows("roll_math_benchmarks.jsonl") if r["source"] == "aime2024"]
    equal = [plain(p) in qwen for p in roll]
    found = caught(BENCHMARKS / "qwen25math_aime24_test.jsonl", roll)
    assert sum(equal) == 15 and all(f for f, e in zip(found, equal, strict=True) if e)
    assert 15 < sum(found) <= 30  # n-grams find more than equal texts do


@real
def test_the_five_questions_of_math_500_are_found_among_those_of_qwen():
    math = {plain(r["prompt"]) for r in rows("roll_math_benchmarks.jsonl")}
    path = DATA / "rollouts" / "qwen25math_rm_maj_example_math_100x8.jsonl"
    questions = [json.loads(line)["question"] for line in path.read_text().splitlines()]
    equal = [plain(q) in math for q in questions]
    found = caught(BENCHMARKS / "roll_math_benchmarks.jsonl", questions)
    assert sum(equal) == 5 and all(f for f, e in zip(found, equal, strict=True) if e)


@real
@pytest.mark.parametrize(
    ("name", "column", "below_8", "below_13"),
    [("qwen25math_olympiadbench_test.jsonl", "question", 4, 39), ("roll_math_benchmarks.jsonl", "prompt", 32, 82),
     ("qwen25math_minerva_math_test.jsonl", "problem", 0, 7), ("gsm8k_test.jsonl", "question", 0, 0)],
)  # fmt: skip
def test_problems_without_an_n_gram_are_found_in_themselves(name, column, below_8, below_13):
    for n, expected in ((8, below_8), (13, below_13)):
        short = [r[column] for r in rows(name) if len(plain(r[column]).split()) < n]
        assert len(short) == expected
        assert all(caught(f"{BENCHMARKS / name}:{column}", short, n))


@real
def test_a_benchmark_of_another_field_shares_nothing_though_the_prompts_share_their_system_prompt():
    luffy = rows("luffy_valid.all.parquet")
    prompts = list(dict.fromkeys("\n".join(m["content"] for m in r["prompt"]) for r in luffy))[:400]
    found = [f for f, p in zip(caught(BENCHMARKS / "luffy_valid.arc_c.parquet", prompts), prompts, strict=True) if f]
    assert not found


@real
def test_real_rollouts_are_all_caught_by_the_benchmark_they_were_sampled_for(make_store):
    document = json.loads((DATA / "rollouts" / "reasoning_gym_llama3b_step800_amc23.json").read_text())
    results = document["categories"][0]["datasets"][0]["results"]
    store = make_store()
    mined(store, [{"prompt": r["question"], "clip": c["full_model_response"]} for r in results for c in r["completions"][:3]])
    with Lab(store) as lab:
        against = {name: [str(BENCHMARKS / f"qwen25math_{name}_test.jsonl")] for name in ("amc23", "aime24")}
        report = lab.curate("mined", "none", against=against["amc23"])
        assert (report.n_in, report.n_out, report.facts["decontamination"][0]["rows"]) == (120, 0, 40)
        report = lab.curate("mined", "most", against=against["aime24"])
        hits = report.facts["decontamination"][0]["hits"]
        assert 90 < report.n_out < 120 and {h["shared"] for h in hits} == {"the form fracmn where m and n are"}


# Files.


def test_problems_are_read_from_every_form_that_benchmarks_have(tmp_path):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    forms = {
        "text": ("Q", [("Q", True)]),
        "messages": (chat, [("Q", True), ("A", False)]),
        "json": (json.dumps(chat), [("Q", True), ("A", False)]),
        "parts": ([{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image"}]}], [("Q", True)]),
        "texts": (["Q", "R"], [("Q", True), ("R", True)]),
        "rendered": ("<|im_start|>user\nQ<|im_end|>\n", [("Q", True)]),
        "interval": ("[0, 1]", [("[0, 1]", True)]),
    }
    for name, (value, expected) in forms.items():
        path = write(tmp_path / f"{name}.jsonl", [{"column": value}, {"column": None}, {"column": value}])
        assert [(t.text, t.is_problem) for t in load(f"{path}:column").texts] == expected, name
    pl.DataFrame({"prompt": [chat], "extra_info": [{"answer": "long"}]}).write_parquet(tmp_path / "verl.parquet")
    found = [(t.text, t.column, t.is_problem) for t in load(str(tmp_path / "verl.parquet")).texts]
    assert found == [("Q", "prompt", True), ("A", "prompt", False), ("long", "extra_info.answer", False)]
    (tmp_path / "list.json").write_text(json.dumps([{"question": "Q", "solution": ["A", "B"]}], indent=1))
    assert [t.text for t in load(str(tmp_path / "list.json")).texts] == ["Q", "A", "B"]


@real
@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*")), ids=lambda p: p.name)
def test_every_benchmark_here_is_read_without_a_word_about_its_columns(path):
    problems = [t for t in load(str(path)).texts if t.is_problem]
    expected = {"luffy_valid.all.parquet": 1590, "gsm8k_test.jsonl": 1319, "roll_math_benchmarks.jsonl": 560}
    assert len(problems) == expected.get(path.name, len(problems)) and len(problems) > 25


def test_a_colon_belongs_to_the_name_of_a_file_that_is_there(tmp_path):
    path = write(tmp_path / "a:b.jsonl", [{"problem": "P", "other": "O"}])
    assert [t.text for t in load(str(path)).texts] == ["P"]
    assert [t.text for t in load(f"{path}:other").texts] == ["O"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "none.jsonl: No such file"),
        ("a.jsonl:missing", b'{"problem": "p", "answer": 1}', "no column missing; its columns are problem, answer"),
        ("a.jsonl:answer", b'{"problem": "p", "answer": 1}', "column answer holds neither texts nor chat messages"),
        ("a.jsonl", b'{"id": 1, "text": "p"}', "its columns are id, text: name one with a.jsonl:COLUMN"),
        ("a.jsonl", b"", "it has no rows"),
        ("a.jsonl", b'{"problem": "p"}\n{"problem"', "line 2 is not JSON"),
        ("a.jsonl", b'{"problem": "p"}\n7', "row 2 is no JSON object"),
        ("a.json", b"[1]", "row 1 is no JSON object"),
        ("a.json", b'[{"problem": ', "neither JSON nor Parquet"),
        ("a.jsonl", b"\xff\xfe\x00", "neither JSON nor Parquet"),
        ("a.parquet", b"PAR1 nonsense PAR1", "cannot be read as Parquet"),
    ],
)
def test_files_that_are_no_benchmarks_are_named_in_one_line(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_bytes(content)
    with pytest.raises(EcholabError, match=re.escape(says)) as e:
        load(str(tmp_path / name))
    assert "\n" not in str(e.value)
