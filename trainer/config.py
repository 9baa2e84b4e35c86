"""Everything that a run can be told, in TOML: `echolab train CONFIG.toml --set optimizer.lr=1e-6`.

Unknown keys are refused. `echolab train CONFIG.toml --show-config` prints the resolved configuration with these texts."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from echolab.clips.selectors import Selector
from echolab.config import Config
from echolab.errors import EcholabError, WrongUsage
from trainer.algorithms import Algorithm, choose
from trainer.replay import ReplayConfig

PRESETS = Path(__file__).parent / "configs"


class Section(Config):
    model_config = ConfigDict(use_attribute_docstrings=True)


class ModelConfig(Section):
    path: str
    """A folder, or a name on the Hub, of a transformers causal language model; `maze` is a tiny one for the built-in task."""

    tokenizer: str | None = None
    """Its tokenizer, where it lies elsewhere."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and of all that is computed with them; the entropy head keeps its statistics in float32."""

    device: str | None = None
    """cpu, cuda, cuda:1, ...; none: cuda where there is one."""

    threads: int | None = Field(default=None, ge=1)
    """Of torch on a CPU. Several runs on one machine want one each."""


class TaskConfig(Section):
    prompts: str
    """A file (JSONL, Parquet) or a folder of them, `maze` for the built-in task, or `store`: problems that the store knows."""

    where: str | None = None
    """With `store`: a condition on its view `problems`, such as `success_rate BETWEEN 0.1 AND 0.9`."""

    verdicts: str | None = None
    """With `store`: a verifier whose verdicts count in `where` in place of the recorded rewards."""

    refresh: int | None = Field(default=None, ge=1)
    """With `store`: ask again after so many steps."""

    levels: tuple[int, int] = (3, 6)
    """With `maze`: levels of difficulty, 1 to 10."""

    problems: int = Field(default=1024, ge=1)
    """With `maze`: how many mazes there are."""

    map: dict[str, str] = {}
    """Columns of the file: `{prompt = "question"}`, as `echolab ingest --map` takes them."""

    template: Literal["raw", "chat"] = "raw"
    """How a prompt becomes tokens: as it is, or by the tokenizer's chat template."""

    verifier: str = "math"
    """Who judges: math, exact, numeric, choice or python:module:function, as `echolab verify` has them."""

    options: dict[str, Any] = {}
    """Of the verifier."""

    timeout: float = Field(default=5.0, gt=0)
    """Seconds for one answer. An answer that takes longer, or breaks the verifier, has no reward."""

    require_end: bool = True
    """A completion that was cut off is a failure, whatever it says."""


class SamplingConfig(Section):
    prompts: int = Field(default=16, ge=1)
    """Prompts of a step."""

    n: int = Field(default=8, ge=1)
    """Completions of a prompt: its group."""

    temperature: float = Field(default=1.0, gt=0)
    """Of sampling, and of every log-probability and entropy of the run."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Anything but 1 makes the sampler another policy than the one that is trained."""

    top_k: int = Field(default=0, ge=0)
    """Likewise, unless 0."""

    max_tokens: int = Field(default=1024, ge=1)
    """The longest completion."""

    rows: int = Field(default=256, ge=1)
    """Completions that are sampled at once."""

    rounds: int = Field(default=10, ge=1)
    """With dynamic sampling: how often a step may sample before it goes on with what it has."""


class EchoConfig(Section):
    """Online echo: clips of this step's own successes, chosen before any filter drops a group."""

    coefficient: float = Field(default=0.0, ge=0)
    """The weight of the clips' loss; 0.001 in the paper. 0: no echo."""

    reduction: Literal["clip_mean", "group_mean", "token_mean"] = "clip_mean"
    """The mean over clips of their token means, the same over all groups, or over all clip tokens."""

    select: Selector = Selector()
    """Which clips: the options of `echolab mine`."""


class OptimizerConfig(Section):
    lr: float = Field(default=1e-6, gt=0)
    """The learning rate of AdamW."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Its decay rates."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Its weight decay."""

    warm_up: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls afterwards, to 0 after the last step."""

    grad_clip: float = Field(default=1.0, gt=0)
    """The largest norm of a gradient."""

    updates: int = Field(default=1, ge=1)
    """Optimizer steps on the rollouts of one step."""

    micro_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a micro-batch, padding included: memory and speed, never the result. None: 2,048 on a CPU, whose caches hold
    little more, and 16,384 elsewhere."""

    bad_steps: int = Field(default=5, ge=1)
    """Steps in a row without a finite loss after which the run gives up; each is skipped."""

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of one step, counted from 1."""
        if step <= self.warm_up:
            return self.lr * step / self.warm_up
        done = min(1.0, (step - 1 - self.warm_up) / max(1, steps - self.warm_up))
        return self.lr * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]


class EvaluationConfig(Section):
    prompts: str | None = None
    """As `task.prompts`; none: no evaluation. `maze` are mazes that training never sees."""

    levels: tuple[int, int] = (3, 6)
    """With `maze`: their levels."""

    problems: int = Field(default=64, ge=1)
    """With `maze`: how many."""

    every: int = Field(default=50, ge=1)
    """Steps between evaluations; there is one before the first step and one after the last."""

    n: int = Field(default=8, ge=1)
    """Completions of a prompt, sampled as in training but with a seed of their own."""

    greedy: bool = True
    """One more completion of each prompt, without chance."""


class CheckpointConfig(Section):
    every: int = Field(default=100, ge=1)
    """Steps between checkpoints; there is one after the last step and at Ctrl-C."""

    keep: int = Field(default=2, ge=1)
    """The newest so many are kept, and the one of best evaluation."""


class LogConfig(Section):
    gradients: int = Field(default=0, ge=0)
    """Every so many steps the gradient norm of each component and their cosine are measured, at the cost of one more pass;
    0: never."""

    tensorboard: bool = False
    """Also to TensorBoard, in the run's folder."""

    wandb: str | None = None
    """Also to this project of W&B."""


class TrainConfig(Section):
    """One run."""

    out: str
    """The folder of the run: metrics, checkpoints, rollouts on their way to the store."""

    run: str
    """Its name in the store."""

    store: str
    """The store that every step's rollouts go to; made where there is none."""

    steps: int = Field(ge=1)
    """Steps of the run."""

    until_degenerate: float | None = Field(default=None, gt=0, le=1)
    """End earlier, once this share of the groups of the last 12 steps was degenerate: the prompts have little left to teach."""

    seed: int = 0
    """Of everything that is drawn."""

    model: ModelConfig
    task: TaskConfig
    sampling: SamplingConfig = SamplingConfig()
    algorithm: dict[str, Any] = {"name": "grpo"}
    """`name`, a row of trainer/algorithms.py, and any of its fields changed: `{name = "dapo", high = 0.3}`."""

    echo: EchoConfig = EchoConfig()
    replay: ReplayConfig = ReplayConfig.make()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ = self.resolved_algorithm
        if self.task.refresh and self.task.prompts != "store":
            raise ValueError("task.refresh: only problems of a store change; set task.prompts = 'store'")
        if self.echo.select.selector == "match":
            raise ValueError("echo.select: match needs the experts of a store; mine with it and replay what it gives")
        return self

    @property
    def resolved_algorithm(self) -> Algorithm:
        options = dict(self.algorithm)
        return choose(options.pop("name", "grpo"), **options)


def load(path: str | Path, changes: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """A file, or a preset by its name, with `a.b=c` changes; values are TOML, and bare words text."""
    path = Path(path)
    if not path.exists() and (PRESETS / f"{path}.toml").exists():
        path = PRESETS / f"{path}.toml"
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as e:
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        raise EcholabError(f"{path}: {e.strerror or e}; presets are {presets}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise EcholabError(f"{path}: not TOML: {e}") from None
    for change in changes:
        _set(document, change)
    try:
        return TrainConfig(**document)
    except ValidationError as e:
        raise WrongUsage(f"{path}: {_said(e)}") from None


def _set(document: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key.strip():
        raise WrongUsage(f"--set takes KEY=VALUE, such as optimizer.lr=1e-5, not {change!r}")
    *sections, last = key.strip().split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise WrongUsage(f"--set {key.strip()}: {section} is a value, not a section")
    try:
        document[last] = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        document[last] = value.strip()


def _said(error: ValidationError) -> str:
    """The first problem in one line, with the nearest key where one is unknown."""
    problem = error.errors()[0]
    *above, key = problem["loc"] or ("",)
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        model: Any = TrainConfig
        for part in above:
            model = model.model_fields[str(part)].annotation
        near = difflib.get_close_matches(str(key), model.model_fields, 1)
        return f"there is no key {where}" + (f"; did you mean {'.'.join([*map(str, above), near[0]])}?" if near else "")
    if problem["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def show(config: BaseModel, section: str = "") -> str:
    """The configuration as TOML, each key with its text."""
    plain, nested = [], []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            nested.append(f"\n[{section}{name}]\n{show(value, f'{section}{name}.')}")
            continue
        about = " ".join((field.description or "").split())
        plain += [f"# {about}"] if about else []
        plain.append(f"# {name} is not set" if value is None else f"{name} = {_toml(value)}")
    return "\n".join(plain) + "\n" + "".join(nested)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
