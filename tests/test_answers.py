"""Where the answer of a completion stands: what the extractors find, and that nothing makes them slow."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab import answers

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
MARKED = ("boxed", "answer", "hashes")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{4} so \boxed{3}", "3"),
        (r"\boxed{\frac{1}{2}} and {more}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} }", r"\{1, 2\}"),
        (r"\boxed{\left\{x \right.}", r"\left\{x \right."),
        (r"{ open \boxed{7}", "7"),
        (r"\boxed{12} then \boxed{4", "12"),
        (r"I put it in \boxed{}: \boxed{5}", "5"),
        (r"\boxed{5}. The form was \boxed{}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\boxed{5}} or \boxed{4", "5"),
        (r"\boxed {8} \fbox{9}", "9"),
        (r"a \\boxed{6} in escaped text", "6"),
        ("<answer> 12 </answer>", "12"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        (r"<answer>$\boxed{3}$</answer>", "3"),
        (r"<answer>3</answer> that is \boxed{4}", "4"),
        ("<answer>12", None),
        ("12</answer>", None),
        ("<answer></answer>", None),
        ("so\n#### 1,234\n", "1,234"),
        ("#### 5\nno:\n#### $6.50$", "6.50"),
        ("#### 3/4.", "3/4"),
        ("#### Step 2: add\ntext", None),
        ("The answer is 5", None),
        ("", None),
    ],
)
def test_the_last_marked_answer_is_found(text, found):
    assert answers.extract(text, MARKED) == found


@pytest.mark.parametrize(
    ("text", "opened", "found"),
    [
        (r"<think>\boxed{1}</think>\boxed{2}", False, "2"),
        (r"<think>\boxed{1}</think>I do not know", False, None),
        (r"\boxed{1}</think>so \boxed{2}", True, "2"),
        (r"<think>a</think>\boxed{1}<think>b</think>\boxed{2}", False, "2"),
        (r"<|begin_of_thought|>\boxed{1}<|end_of_thought|>\boxed{2}<|end_of_solution|>", False, "2"),
        # A thought that never ends: only a closed <answer> is one.
        (r"<think>maybe \boxed{1}", False, None),
        (r"maybe \boxed{1}", True, None),
        (r"<think>maybe \boxed{1} <answer>2</answer>", False, "2"),
        ("<think>\n#### 3", False, None),
        (r"\boxed{1} <think>or rather \boxed{2}", False, "1"),
        (r"<think>a</think>\boxed{3}<think>or \boxed{4}", False, "3"),
    ],
)
def test_what_is_thought_does_not_count(text, opened, found):
    assert answers.extract(text, MARKED, opened) == found


def test_a_prompt_may_open_the_thought():
    assert answers.opens_thought("<|im_start|>assistant\n<think>\n") and not answers.opens_thought("Think!")
    assert not answers.opens_thought(None)


def test_extractors_are_tried_in_the_given_order_and_a_long_answer_keeps_its_end():
    text = r"\boxed{1} <answer>2</answer>"
    assert answers.extract(text, ("answer", "boxed")) == "2" and answers.extract(text, ("boxed", "answer")) == "1"
    assert answers.extract("  all of it ", ("text",)) == "all of it"
    long = "\\boxed{" + "1+" * 5_000 + "= 7}"
    assert answers.extract(long, ("boxed",)) == ("1+" * 5_000 + "= 7")[-answers.MAX_CHARS :]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("**B**", "B"), (r"\text{B}", "B"), (r"$\text{(D)}$", "D"),
        ("B) 12 apples", "B"),
        ("C: because", "C"), ("b", "B"), ("(c)", "C"), ("The answer is (C).", "C"), ("Answer: **E**", "E"),
        (r"The final answer is: $\boxed{\text{A}}$", "A"), ("answer is option (D)", "D"), ("12", None), ("Apple", None),
        ("I think so", None), ("A triangle", None), ("K", None), ("", None),
    ],
)  # fmt: skip
def test_a_letter_is_read_however_it_is_written(text, found):
    assert answers.letter(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("First A, then C. The answer is B because D fails.", "B"),
        ("The answer is A. Wait, the correct answer is:\n**C**", "C"),
        ("We compare.\n\n(D)", "D"),
        ("Option A is wrong.", None),
        ("the answer is 5", None),
    ],
)
def test_a_choice_is_announced_or_stands_alone_on_the_last_line(text, found):
    assert answers.choice(text) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("27", 27), ("27.0", 27), ("-3", -3), ("\u22123", -3), (".5", 0.5), ("1,234.5", 1234.5), ("1 234 567", 1234567),
        ("10{,}000", 10000), (r"1\,000", 1000), ("3/4", 0.75), (r"\frac{3}{4}", 0.75), (r"-\dfrac{1}{2}", -0.5),
        (r"\frac34", 0.75),
        (r"12\frac{3}{5}", 12.6), ("-1 1/2", -1.5), ("12%", 0.12), (r"12\%", 0.12), ("50 percent", 0.5), ("1e5", 1e5),
        (r"1.5 \times 10^{3}", 1500), ("x = 5", 5), ("$1,000$", 1000), (r"\$18", 18), ("12 apples", 12), (r"12\text{ cm}", 12),
        (r"45^\circ", 45), ("7.", 7),
        ("5 or 6", None), ("(1,2)", None), ("1,23", None), ("1/0", None), ("1e9999", None), ("", None), ("nan", None),
        ("infinity", None), ("x", None), ("2+3", None), ("1e", None), ("2x", None), ("2 x", None), ("3pi", None),
        ("3 pi", None),
        (r"2\pi", None),
    ],
)  # fmt: skip
def test_one_number_is_read_and_nothing_else(text, value):
    assert answers.number(text) == (None if value is None else pytest.approx(value, rel=1e-15))


def test_a_ground_truth_may_be_a_whole_solution():
    assert answers.gold("3 <<1+2=3>>\n#### 3") == "3" and answers.gold(r"so $x = \boxed{4}$") == "4"
    assert answers.gold(" 27.0 ") == "27.0"


PIECES = [
    "\\boxed{", "\\fbox{", "\\boxed", "{", "}", "\\{", "\\\\", "\\", "<answer>", "</answer>", "<think>", "</think>", "####",
    "#", "1",
    "answer is ", "answer: ", "option ", "(", "*", "B", " ", "\n", "\\text{", "$", "<|end_of_thought|>",
    "\\boxed {", "\\boxed{}",
    "answer", "is", ":", "\\boxed{1}", "#### 1", ", ", "=", "\x00", "\ud800",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40).map("".join))
@settings(max_examples=400, deadline=None)
def test_no_text_raises_and_what_is_found_stands_in_the_text(text):
    found = answers.extract(text, answers.EXTRACTORS)
    assert found is None or found in text
    for read in (answers.letter, answers.number, answers.gold, answers.plain, answers.bare):
        read(text)


@pytest.mark.parametrize(
    "piece", [*PIECES, "\\boxed{1}{", "(\\boxed{", "is ((", "<answer><think>", "answer a", "#### 1 ", "{}"]
)
def test_a_million_hostile_characters_take_time_in_proportion(piece):
    """Were it quadratic, a million would take hours."""
    text = piece * (1_000_000 // len(piece))
    started = time.monotonic()
    answers.extract(text, answers.EXTRACTORS[:-1])
    answers.extract("\\boxed{1" + text, answers.EXTRACTORS[:-1])
    assert time.monotonic() - started < 20
    answers.letter(text[: answers.MAX_CHARS])
    answers.number(text[: answers.MAX_CHARS])


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data not found: real-data test skipped")
@pytest.mark.parametrize("step", [400, 800])
def test_on_all_amc_texts_the_answer_is_the_one_that_the_evaluation_recorded(step):
    document = json.loads((DATA / f"rollouts/reasoning_gym_llama3b_step{step}_amc23.json").read_text())
    completions = [c for r in document["categories"][0]["datasets"][0]["results"] for c in r["completions"]]
    assert len(completions) == 2000
    for c in completions:
        assert answers.extract(c["full_model_response"], MARKED) == c["model_answer"]
