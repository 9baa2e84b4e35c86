"""`echolab generate`: rollouts of a model on a file of prompts, into the store by the door that every dump takes.

A generation is all that a token depends on: weights, prompts, and options. Its prompts are cut into parts, and each part
becomes one source of the ledger. So what is there is not sampled again, and a generation that was stopped goes on."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from echolab import ids
from echolab.engines import Samples, Sampling
from echolab.engines.torch_engine import TorchEngine
from echolab.entropy.render import Unfit, prompt_ids
from echolab.entropy.scorer import Scorer, ScorerConfig
from echolab.errors import Busy, EcholabError
from echolab.ingest import ingest
from echolab.plan import IngestConfig
from echolab.prompts import read
from echolab.readers.base import dumps
from echolab.readers.own import write
from echolab.recorded import Scorer as Recorded
from echolab.scoring import resegment
from echolab.segment import Segmenter
from echolab.store import Store

PART_ROLLOUTS = 128  # about the rollouts of a part
VERSION = 1  # of what is sampled: another one samples anew
Progress = Callable[[int, int, float], None]  # prompts done, prompts in all, tokens a second


class GenerateConfig(Sampling):
    """What is sampled, how, and where it goes."""

    run: str
    model: str
    prompts: str  # a file (JSON lines, a JSON list, Parquet) or a folder of them
    n: int = Field(default=8, ge=1)  # rollouts of a prompt: its group
    seed: int = 0
    template: Literal["auto", "raw", "chat"] = "auto"  # auto: messages by the chat template, texts as they are
    step: int | None = Field(default=None, ge=0)
    split: str = "train"
    source: str | None = None  # name of the dataset, where the prompts do not say it
    map: dict[str, str] = {}  # column -> its name in the file
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    device: str | None = None
    threads: int | None = Field(default=None, ge=1)
    rows: int = Field(default=256, ge=1)  # rollouts that are sampled at once: memory, never the result


@dataclass
class GenerateReport:
    """What came of it."""

    run: str
    scorer: str  # of the entropies
    prompts: int  # in all
    known: int = 0  # prompts whose rollouts the store had
    rollouts: int = 0
    ended: int = 0  # of these: by themselves
    tokens: int = 0
    seconds: float = 0.0
    skipped: Counter[str] = field(default_factory=Counter)  # prompts that nothing could be sampled for, by reason


@dataclass
class _Part:
    """Some prompts of the file, from number `first` on."""

    name: str  # in the ledger
    first: int
    rows: list[dict[str, Any]]


@dataclass
class _Asked:
    """One prompt that is sampled."""

    part: str  # its name
    place: int  # in the file
    row: dict[str, Any]  # as in the store
    tokens: list[int]


@dataclass
class Generation:
    """A loaded model and the prompts that it is to go on from."""

    config: GenerateConfig
    model: Scorer
    prompts: int
    id: str

    @classmethod
    def load(cls, config: GenerateConfig) -> Generation:
        """Everything that may be wrong shows here, before there is a store."""
        IngestConfig.make(run=config.run)
        n, digest = 0, blake2b(digest_size=16)
        for row in read(config.prompts, config.map):
            n += 1
            digest.update((dumps(row) or "").encode() + b"\n")
        if not n:
            raise EcholabError(f"{config.prompts}: no prompts in it")
        temperature = config.temperature or 1.0  # at 0 the numbers are those at 1
        names = ("model", "tokenizer", "dtype", "template", "device", "threads")
        model = Scorer.load(ScorerConfig.make(temperature=temperature, **{name: getattr(config, name) for name in names}))
        counts = config.model_dump(include={*Sampling.model_fields, "n", "seed", "step", "split", "source"})
        id = ids.config_id("generation", [VERSION, model.id, digest.hexdigest(), json.dumps(counts, sort_keys=True)])
        return cls(config, model, n, id)

    @property
    def sampling(self) -> Sampling:
        return Sampling.make(**self.config.model_dump(include=set(Sampling.model_fields)))

    @property
    def ingest_config(self) -> IngestConfig:
        c = self.config
        return IngestConfig.make(
            run=c.run, format="echolab", step=c.step, split=c.split, model=self.model.name, source=c.source,
            tokenizer=self.model.vocab.tokenizer, temperature=c.temperature or None, dtype=self.model.settings["dtype"],
        )  # fmt: skip

    def run(self, store: Store, progress: Progress | None = None) -> GenerateReport:
        """Sample what the store does not have. What was committed stays, whatever happens then."""
        options = self.ingest_config
        scorer = Recorded(options.run, options.tokenizer, options.temperature, options.dtype)
        report, began = GenerateReport(self.config.run, scorer.id, self.prompts), time.monotonic()
        done, tokens = 0, 0

        def more(n: int) -> None:
            nonlocal tokens
            tokens += n
            if progress:
                progress(done, self.prompts, tokens / max(time.monotonic() - began, 1e-9))

        engine = TorchEngine(self.model.model, self.model.eos, self.config.rows, progress=more)
        with _alone(store, self.id):
            self.model.vocab.keep(store)
            for parts in self._windows(store, report):
                asked = [a for part in parts for a in self._asked(part, report)]
                tokens_of, keys = [a.tokens for a in asked], [a.place for a in asked]
                made = engine.sample(tokens_of, self.config.n, self.sampling, self.config.seed, keys)
                if asked:
                    with store.lock():
                        scorer.register(store, self.model.eos)
                    self._store(store, options, asked, made)
                report.rollouts += len(made)
                report.ended += made.finish_reason.count("stop")
                report.tokens += sum(map(len, made.completion_ids))
                done = report.known + sum(report.skipped.values()) + report.rollouts // self.config.n
                more(0)
            if report.skipped.total() == self.prompts:
                raise EcholabError(f"{self.config.prompts}: nothing sampled: {report.skipped.most_common(1)[0][0]}")
            resegment(store, scorer.id, Segmenter())
        report.seconds = time.monotonic() - began
        return report

    def _windows(self, store: Store, report: GenerateReport) -> Iterator[list[_Part]]:
        """Parts that the store does not have, as many as are sampled at once."""
        config = self.config
        live = {r.source_path for r in store.snapshot().ledger.live if r.run == config.run}
        size = max(1, PART_ROLLOUTS // config.n)
        rows, held = read(config.prompts, config.map), []
        for first in range(0, self.prompts, size):
            part = _Part(f"generate-{self.id[:16]}/{first // size:06d}.parquet", first, list(islice(rows, size)))
            if part.name in live:
                report.known += len(part.rows)
                continue
            held.append(part)
            if sum(len(p.rows) for p in held) * config.n >= config.rows:
                yield held
                held = []
        if held:
            yield held

    def _asked(self, part: _Part, report: GenerateReport) -> Iterator[_Asked]:
        """The prompts of a part as rows of the store and as tokens."""
        file = Path(self.config.prompts).name
        for place, found in enumerate(part.rows, part.first):
            messages = found.get("messages")
            chat = self.config.template == "chat" or (self.config.template == "auto" and messages is not None)
            row = {
                "group_id": ids.config_id("group", [self.id, place]),
                "group_source": "explicit",
                "source": found.get("source"),
                "prompt": found.get("prompt"),
                "messages": dumps(messages),
                "prompt_format": "chat" if chat else "raw",
                "ground_truth": found.get("ground_truth"),
                "policy_version": self.model.settings["weights"],
                "sampling": dumps({**self.sampling.model_dump(), "seed": self.config.seed}),
                "extra": dumps({**found["extra"], "prompt_origin": {"file": file, "row": place}}),
            }
            try:
                yield _Asked(part.name, place, row, self._tokens(row))
            except Unfit as e:
                report.skipped[str(e)] += 1

    def _tokens(self, row: dict[str, Any]) -> list[int]:
        tokens = prompt_ids(self.model.tokenizer, self.config.template, row)
        if not tokens:
            raise Unfit("it is empty, and the tokenizer has no token that begins a text")
        if max(tokens) >= self.model.renderer.vocabulary:
            raise Unfit("it has token ids beyond the model's vocabulary")
        if len(tokens) >= self.model.limit:
            raise Unfit("it fills the model's context")
        return tokens

    def _store(self, store: Store, options: IngestConfig, asked: Sequence[_Asked], made: Samples) -> None:
        """Each part as a file of our own format, all of them read in by one commit."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for i, tokens in enumerate(made.prompt_ids):
            a, completion = asked[i // self.config.n], made.completion_ids[i]
            sampled = {
                "sample": i % self.config.n,
                "prompt_ids": tokens,
                "completion_ids": completion,
                "completion": self.model.text(completion),
                "logprobs": made.logprobs[i],
                "entropies": made.entropies[i],
                "finish_reason": made.finish_reason[i],
            }
            rows.setdefault(a.part, []).append({**a.row, **sampled})
        with store.job("generate") as folder:
            dump = folder / "dump"
            for name, of_part in rows.items():
                path = dump / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, of_part)
            report = ingest(store, [dump], options)
        for f in report.files:
            if f.status != "ingested" or f.quarantined:
                raise EcholabError(f"rollouts could not be stored: {'; '.join([f'{f.file} {f.status}', *f.notes])}")


@contextmanager
def _alone(store: Store, id: str) -> Iterator[None]:
    """Two processes would sample the same."""
    with ExitStack() as held:
        try:
            held.enter_context(store.lock(0, f"generate-{id}"))
        except Busy:
            raise Busy("another process is sampling just these rollouts") from None
        yield
