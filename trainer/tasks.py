"""Problems: where they come from, and in which order a run takes them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import echolab
from echolab.errors import EcholabError
from echolab.prompts import read
from trainer import maze
from trainer.config import TrainConfig
from trainer.rollouts import Problem


@dataclass
class Tasks:
    """The problems of a run. Each epoch takes all of them once, in an order of its own that the seed decides."""

    config: TrainConfig
    tokenizer: Any
    needs_gold: bool
    problems: list[Problem]
    position: int = 0  # problems that were taken since the run began
    asked_at: int = 0  # the position at which the store was asked

    @classmethod
    def open(cls, config: TrainConfig, tokenizer: Any, needs_gold: bool) -> Tasks:
        return cls(config, tokenizer, needs_gold, training(config, tokenizer, needs_gold))

    def take(self, n: int) -> list[Problem]:
        """The next n problems; all at once are different, unless there are fewer."""
        refresh = self.config.task.refresh
        if refresh and self.position - self.asked_at >= refresh * self.config.sampling.prompts:
            self.problems = training(self.config, self.tokenizer, self.needs_gold)
            self.asked_at = self.position
        taken = []
        for _ in range(n):
            epoch, place = divmod(self.position, len(self.problems))
            taken.append(self.problems[self._order(epoch)[place]])
            self.position += 1
        return taken

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.problems)))
        random.Random(f"{self.config.seed} epoch {epoch}").shuffle(order)
        return order


def training(config: TrainConfig, tokenizer: Any, needs_gold: bool) -> list[Problem]:
    """The problems that a run trains on, as its configuration names them."""
    task = config.task
    if task.prompts == "maze":
        rows = maze.problems(task.problems, task.levels, config.seed)
    elif task.prompts == "store":
        rows = stored(config.store, task.where, task.verdicts)
    else:
        rows = list(read(task.prompts, task.map))
    if not rows:
        raise EcholabError(f"task.prompts = {task.prompts!r} gives no problem" + (f" where {task.where}" if task.where else ""))
    without = sum(row.get("ground_truth") is None for row in rows)
    if needs_gold and without:
        raise EcholabError(f"{without} of {len(rows)} problems have no ground_truth, which verifier {task.verifier} needs")
    return [problem(row, tokenizer, task.template) for row in rows]


def held_out(config: TrainConfig, tokenizer: Any) -> list[Problem]:
    """The problems of evaluation, as tokens."""
    return [problem(row, tokenizer, config.task.template) for row in questions(config)]


def questions(config: TrainConfig) -> list[dict[str, Any]]:
    """The rows of evaluation; mazes are of another seed than those of training."""
    e = config.evaluation
    if e.prompts is None:
        return []
    return maze.problems(e.problems, e.levels, "held out") if e.prompts == "maze" else list(read(e.prompts, config.task.map))


def stored(store: str, where: str | None, verifier: str | None = None) -> list[dict[str, Any]]:
    """Problems that a store knows, each with its prompt and answer from one of its rollouts."""
    with echolab.open(store) as lab:
        frame = lab.sql(
            f"""SELECT p.problem_id, arg_min(r.prompt, r.rollout_id) AS prompt, arg_min(r.messages, r.rollout_id) AS messages,
              arg_min(r.ground_truth, r.rollout_id) AS ground_truth, arg_min(r.source, r.rollout_id) AS source
            FROM (SELECT DISTINCT problem_id FROM problems WHERE ({where or "true"})) p
            JOIN rollouts r ON r.problem_id = p.problem_id
            GROUP BY p.problem_id ORDER BY p.problem_id""",
            verifier=verifier,
        )
    return frame.to_dicts()


def problem(row: dict[str, Any], tokenizer: Any, template: str) -> Problem:
    """A row with its prompt as token ids."""
    messages, prompt = row.get("messages"), row.get("prompt")
    if isinstance(messages, str):
        messages = json.loads(messages)
    if template == "chat":
        if not tokenizer.chat_template:
            raise EcholabError("task.template = chat, and the tokenizer has no chat template: use raw")
        asked = messages or [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt = prompt if prompt is not None else "\n\n".join(str(m.get("content") or "") for m in messages or ())
        tokens = tokenizer(prompt)["input_ids"]
    extra = row.get("extra") or ({"level": row["level"]} if "level" in row else {})
    return Problem(tokens, prompt, row.get("ground_truth"), messages, row.get("source"), extra)
