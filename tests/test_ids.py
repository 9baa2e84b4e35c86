"""Ids: different content never shares one, equal content always does."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from echolab import ids

scalars = (
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=False) | st.text(max_size=4) | st.binary(max_size=3)
)
fields = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


def same(a, b) -> bool:
    """Equal in value and in type, all the way down: Python takes 1, True and 1.0 for the same."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@given(st.lists(fields, max_size=4), st.lists(fields, max_size=4))
def test_two_lists_of_fields_encode_alike_only_if_they_are_the_same(a, b):
    left, right = (b"".join(ids._encode(f) for f in x) for x in (a, b))
    assert (left == right) == same(tuple(a), tuple(b))


def test_fields_that_look_alike_are_told_apart():
    lookalikes = [
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        ("abc", ""),
        ("", "abc"),
        ("abc", None),
        (("a", "bc"),),
        (("a",), "bc"),
        ("a", ("bc",)),
        (None,),
        ("",),
        ((),),
        (0,),
        ("0",),
        (False,),
        (0.0,),
        (-0.0,),
        (1,),
        ("1",),
        (True,),
        (1.0,),
        (b"1",),
        (("1",),),
        ("None",),
    ]
    hashes = [ids.config_id("test", x) for x in lookalikes]
    assert len(set(hashes)) == len(lookalikes)


def test_an_id_is_32_hex_characters_and_depends_on_its_kind():
    made = [
        ids.prompt_id("x"),
        ids.problem_id("x"),
        ids.config_id("scorer", ("x",)),
        ids.config_id("verifier", ("x",)),
        ids.random_id(),
    ]
    assert all(re.fullmatch("[0-9a-f]{32}", i) for i in made)
    assert len(set(made)) == len(made)


PINNED = {
    "prompt": "1e4d038ada93977020fa4eff13e3943b",
    "group": "a3b7de408985a4b1ff191b93678e07fb",
    "rollout": "e544a3fc3d2de2f063fd421edc2d2d95",
    "rollout of tokens": "4151df1cbc0630acafcf5116887cef7f",
}


def test_ids_do_not_change_between_releases():
    assert ids.prompt_id("What is 2 + 2?") == PINNED["prompt"]
    assert ids.group_id("run", "train", 3, ("uid", 7)) == PINNED["group"]
    assert ids.rollout_id(PINNED["group"], "p", "c", None, 1) == PINNED["rollout"]
    assert ids.rollout_id(PINNED["group"], "p", ids.tokens([1, 2, 3]), 0, None, 2) == PINNED["rollout of tokens"]


@given(st.lists(st.integers(0, 2**31 - 1), max_size=5), st.lists(st.integers(0, 2**31 - 1), max_size=5))
def test_token_ids_hash_by_their_values(a, b):
    assert (ids.tokens(a) == ids.tokens(b)) == (a == b)


def test_text_and_tokens_of_a_completion_never_meet():
    assert ids.rollout_id("g", "p", "\x01" + "\x00" * 7, None, 0) != ids.rollout_id("g", "p", ids.tokens([1]), None, 0)


def test_a_problem_is_known_again_across_unicode_forms_and_white_space_but_not_across_case():
    assert ids.problem_id("Caf\u00e9  au\nlait ") == ids.problem_id("Cafe\u0301 au lait")
    assert ids.problem_id("P") != ids.problem_id("p")


def test_the_problem_stands_between_the_role_markers_of_a_rendered_prompt():
    question = "What is 2 + 2?"
    for prompt in (
        f"<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        f"<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>",
        f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n",
        f"[INST] {question} [/INST]",
        f"system\nBe good.\nuser\n{question}\nassistant\n",
        question,
    ):
        assert ids.problem_text(prompt) == question
    assert ids.problem_text("ignored", [{"role": "system", "content": "x"}, {"role": "user", "content": question}]) == question
    assert ids.problem_text(f"{question} Think!", strip=re.compile(" Think!")) == question
