"""Rendered prompts come apart into the messages that they were made from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echolab.export.prompts import BARE, split
from echolab.ids import problem_text

CHATML = "".join("<|im_start|>{}\n{}<|im_end|>\n".format(*m) for m in (("system", "S\ns"), ("user", "Q?")))
LLAMA = "<|begin_of_text|>" + "".join(
    "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format(*m) for m in (("system", "S\ns"), ("user", "Q?"))
)
ASKED = [("user", "Q?")]
WITH_SYSTEM = [("system", "S\ns"), ("user", "Q?")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (CHATML + "<|im_start|>assistant\n", WITH_SYSTEM),
        (CHATML + "<|im_start|>assistant\n<think>\n", WITH_SYSTEM),
        (CHATML, WITH_SYSTEM),
        (LLAMA + "<|start_header_id|>assistant<|end_header_id|>\n\n", WITH_SYSTEM),
        ("<bos><start_of_turn>user\nQ?<end_of_turn>\n<start_of_turn>model\n", ASKED),
        ("<｜begin▁of▁sentence｜>S\ns<｜User｜>Q?<｜Assistant｜><think>\n", WITH_SYSTEM),
        ("<｜User｜>Q?<｜Assistant｜>", ASKED),
        ("<s>[INST] Q? [/INST]", ASKED),
        ("system\nS\ns\nuser\nQ?\nassistant\n", WITH_SYSTEM),
        ("user\nQ?\nassistant\n<think>\n", ASKED),
        ("Q?", ASKED),
        ("What does <|im_start|> mean?", [("user", "What does <|im_start|> mean?")]),
    ],
)
def test_the_templates_of_the_trainers_come_apart(prompt, expected):
    found = split(prompt)
    assert [(m["role"], m["content"]) for m in found] == expected
    assert problem_text(prompt) == expected[-1][1], "as ids see the problem"


def test_earlier_turns_are_kept():
    turns = [("user", "2 + 2?"), ("assistant", "5"), ("user", "Sure?")]
    prompt = "".join("<|im_start|>{}\n{}<|im_end|>\n".format(*t) for t in turns) + "<|im_start|>assistant\n"
    assert [(m["role"], m["content"]) for m in split(prompt)] == turns


@given(st.text(min_size=1).filter(lambda t: "<|im_" not in t), st.text(min_size=1).filter(lambda t: "<|im_" not in t))
def test_whatever_was_said_in_chatml_is_found_again(system, user):
    prompt = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    assert [m["content"] for m in split(prompt)] == [system, user]


def test_sql_tells_a_template_without_its_tokens():
    import duckdb

    found = [
        duckdb.execute("SELECT regexp_matches($1, $2)", [p, BARE]).fetchall()[0][0]
        for p in ("user\nQ", "system\nS", "a user\n")
    ]
    assert found == [True, True, False]
