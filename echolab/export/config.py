"""What to export, and how: options that are checked before the store is asked."""

from __future__ import annotations

from difflib import get_close_matches
from types import ModuleType
from typing import Literal

from pydantic import field_validator, model_validator

from echolab.config import Config
from echolab.export import axolotl, hf, jsonl, llamafactory, openrlhf, parquet, replay, trl_grpo, trl_sft, verl

TARGETS: dict[str, ModuleType] = {
    m.NAME: m for m in (hf, trl_sft, trl_grpo, verl, openrlhf, axolotl, llamafactory, jsonl, parquet, replay)
}
What = Literal["clips", "rollouts", "prompts"]
Form = Literal["text", "chat", "tokens"]


class ExportConfig(Config):
    """Options of `echolab export`. `what` and `form` are resolved: where None is given, the usual one is taken."""

    to: str
    what: What | None = None
    clipset: str | None = None
    where: str | None = None  # a condition on the rows
    best: int | None = None  # of each group, this many rollouts of the highest reward
    form: Form | None = None  # of prompts; None: chat if all are chats, text if none is
    tokenizer: str | None = None  # must be the one of the ids: its fingerprint, or a folder
    source: str | None = None  # dataset name of rows that have none
    ability: str | None = None  # verl's column: math unless told
    title: str | None = None  # of the card
    license: str | None = None
    language: tuple[str, ...] = ()
    verifier: str | None = None  # whose word rewards and success are
    scorer: str | None = None  # whose tokens and segments `where` may ask for
    segmenter: str | None = None

    @field_validator("to")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in TARGETS:
            near = get_close_matches(value, TARGETS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TARGETS)}"
            raise ValueError(f"no format {value!r}: {hint}")
        return value

    @field_validator("where")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty: give a condition such as step >= 100, or leave it out")
        return value

    @field_validator("best")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("must be at least 1")
        return value

    @model_validator(mode="after")
    def _fits(self) -> ExportConfig:
        takes, forms = self.target.TAKES, self.target.FORMS
        if self.rows not in takes:
            raise ValueError(f"{self.to} takes {' or '.join(takes)}, not {self.rows}")
        if self.rows == "clips" and self.clipset is None:
            raise ValueError("which clips? Give --clipset NAME")
        if self.best is not None and self.rows != "rollouts":
            raise ValueError(f"--best chooses rollouts of a group: there is nothing to choose among {self.rows}")
        for options, target in ((("title", "license", "language"), "hf"), (("ability",), "verl")):
            if self.to != target and (given := [o for o in options if getattr(self, o)]):
                raise ValueError(f"--{given[0]} is an option of {target}, {self.to} has no place for it")
        if self.form is not None and self.form not in forms:
            raise ValueError(f"{self.to} knows {' and '.join(forms) or 'no'} form{'s' * (len(forms) != 1)}, not {self.form}")
        return self

    @property
    def target(self) -> ModuleType:
        return TARGETS[self.to]

    @property
    def rows(self) -> str:
        """What is exported: as given, else clips of a clip set, else rollouts, where the format takes them."""
        usual = ("clips", "rollouts") if self.clipset is not None else ("rollouts",)
        return self.what or next((w for w in usual if w in self.target.TAKES), self.target.TAKES[0])
