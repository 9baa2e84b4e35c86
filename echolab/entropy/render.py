"""A stored rollout as the token ids that a model is to score, or the reason why it cannot be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from echolab.vocab import Vocab

# Columns of `rollouts` that scoring reads.
COLUMNS = (
    "rollout_id", "run", "step", "prompt", "messages", "prompt_format", "completion", "tokenizer", "prompt_ids",
    "completion_ids", "loss_mask",
)  # fmt: skip


class Unfit(Exception):
    """Why a rollout cannot be scored. Reasons are counted: they name no single rollout."""


@dataclass
class Renderer:
    """Token ids of a rollout's prompt and completion, under one tokenizer and template."""

    tokenizer: Any
    vocab: Vocab
    template: str  # auto, raw or chat
    vocabulary: int  # ids that the model knows
    limit: int  # tokens that it takes
    truncate: bool

    def __call__(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        if self.uses_ids(row):
            completion = row["completion_ids"]
            prompt = row["prompt_ids"] or prompt_ids(self.tokenizer, self.template, row)
        else:
            completion, prompt = self._completion(row), prompt_ids(self.tokenizer, self.template, row)
        if not completion:
            raise Unfit("its completion is empty")
        if not prompt:
            raise Unfit("it has no prompt, and the tokenizer no token that begins a text")
        if max(max(prompt), max(completion)) >= self.vocabulary:
            raise Unfit("it has token ids beyond the model's vocabulary")
        if len(prompt) + len(completion) > self.limit:
            if not self.truncate or len(prompt) >= self.limit:
                raise Unfit("it is longer than the model's context")
            completion = completion[: self.limit - len(prompt)]
        return prompt, completion

    def uses_ids(self, row: dict[str, Any]) -> bool:
        """Are the rollout's own token ids those of this tokenizer? Its tokenizer says so, or that they decode to its text."""
        tokens = row["completion_ids"]
        if tokens is None:
            return False
        if row["tokenizer"] in (self.vocab.tokenizer, self.tokenizer.name_or_path):
            return True
        if row["completion"] is None:
            whose = (
                f"of tokenizer {row['tokenizer']}" if row["tokenizer"] else "of an unnamed tokenizer: ingest with --tokenizer"
            )
            raise Unfit(f"it has only token ids, {whose}")
        texts = (self._decode(tokens, special) for special in (False, True))
        return any(text == row["completion"] for text in texts)

    def _decode(self, tokens: list[int], skip_special: bool) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def _completion(self, row: dict[str, Any]) -> list[int]:
        text = row["completion"]
        if text is None:
            raise Unfit("its token ids are another tokenizer's, and it has no text")
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._decode(tokens, False) != text:
            raise Unfit("its text does not come back from the tokenizer as it was")
        return tokens


def prompt_ids(tokenizer: Any, template: str, row: dict[str, Any]) -> list[int]:
    """A rollout's prompt as the tokens that come before its completion. `template` is raw, chat, or auto: as the prompt's
    format says."""
    chat = template == "chat" or (template == "auto" and row["prompt_format"] == "chat")
    if chat:
        text = _chat(tokenizer, row)
    elif row["prompt"] is not None:
        text = row["prompt"]
    else:
        text = "\n\n".join(str(m.get("content") or "") for m in _messages(row))
    rendered = chat or row["prompt_format"] == "rendered"
    tokens = tokenizer(text, add_special_tokens=not rendered)["input_ids"]
    if not tokens:
        first = tokenizer.bos_token_id
        tokens = [first if first is not None else tokenizer.eos_token_id]
    return [t for t in tokens if t is not None]


def _chat(tokenizer: Any, row: dict[str, Any]) -> str:
    if not tokenizer.chat_template:
        raise Unfit("its prompt is a chat, and the tokenizer has no chat template")
    messages = _messages(row) or [{"role": "user", "content": row["prompt"] or ""}]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # a template is a program of its own
        raise Unfit(f"the chat template refuses its messages ({type(e).__name__})") from None


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages = json.loads(row["messages"] or "[]")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Unfit("its messages are not those of a chat")
    return messages
