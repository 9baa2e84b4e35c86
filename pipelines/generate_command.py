"""`echolab generate`: rollouts of a model, for offline use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echolab.errors import EcholabError
from pipelines.options import PARTLY, JsonOption, Progress, StoreOption, count, option, pairs, print_json, store_path


def generate(
    model: Annotated[str, option("Model folder, or its name on the Hub.", "--model", "-m")],
    prompts: Annotated[Path, option("File of prompts (JSON lines, a JSON list, Parquet), or a folder of them.")],
    run: Annotated[str, option("The run that the rollouts belong to.")],
    n: Annotated[int, typer.Option("--n", "-n", help="Rollouts of each prompt.")] = 8,
    temperature: Annotated[float, typer.Option(help="Logits are divided by it; 0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that have this share together.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only so many of the likeliest tokens; 0: all.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="The longest completion.")] = 1024,
    seed: Annotated[int, typer.Option(help="Another one draws other rollouts.")] = 0,
    template: Annotated[str, typer.Option(help="raw, chat, or auto: messages as a chat, texts raw.")] = "auto",
    map: Annotated[list[str] | None, option("The prompts' names: prompt=question.", metavar="COLUMN=NAME")] = None,
    step: Annotated[int | None, option("Training step of the weights.")] = None,
    split: Annotated[str, typer.Option(help="train, eval, ...")] = "train",
    source: Annotated[str | None, option("Name of the dataset.")] = None,
    tokenizer: Annotated[str | None, option("Tokenizer folder, where it is not the model's own.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: float32 on a CPU.")] = "auto",
    device: Annotated[str | None, option("cpu, cuda, cuda:1, ...")] = None,
    threads: Annotated[int | None, option("Threads of torch.")] = None,
    rows: Annotated[int, typer.Option(help="Rollouts that are sampled at once.")] = 256,
    store: StoreOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Sample rollouts and their entropies into the store. It is made if it is not there; what it has is not sampled again,
    and what was stopped goes on.

    echolab generate --model Qwen/Qwen2.5-0.5B --prompts problems.jsonl --n 8 --run base --store store
    """
    from echolab.store import Store

    root = store_path(store)
    try:
        from echolab.generate import GenerateConfig, Generation
    except ImportError:
        raise EcholabError("sampling needs torch and transformers: pip install 'echolab[torch]'") from None
    config = GenerateConfig.make(
        model=model, prompts=str(prompts), run=run, n=n, temperature=temperature, top_p=top_p, top_k=top_k,
        max_tokens=max_tokens, seed=seed, template=template, map=pairs(map or [], "--map"), step=step, split=split,
        source=source, tokenizer=tokenizer, dtype=dtype, device=device, threads=threads, rows=rows,
    )  # fmt: skip
    generation = Generation.load(config)
    with Progress("sampling", enabled=not json_, unit="prompts") as progress:
        show = progress and (lambda done, total, rate: progress(f"({rate:,.0f} tokens/s)", done, total))
        report = generation.run(Store.create(root), show)
    if json_:
        print_json(report.__dict__)
    else:
        said = f"run {run}: {count(report.rollouts, 'rollout')} sampled, {report.tokens:,} tokens in {report.seconds:,.1f} s"
        print(said + (f", {report.ended / report.rollouts:.1%} ended by themselves" if report.rollouts else ""))
        if report.known:
            print(f"{count(report.known, 'prompt')} had theirs already")
        for reason, prompts_ in report.skipped.most_common():
            print(f"{count(prompts_, 'prompt')} without rollouts: {reason}")
    if report.skipped:
        raise typer.Exit(PARTLY)
