"""Checkpoints: a folder each, in the format that transformers reads, with all that the run needs to go on exactly.

One is written beside its place and renamed: what has a checkpoint's name is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from echolab.errors import EcholabError

STATE, FACTS = "trainer.pt", "trainer.json"


def save(folder: Path, step: int, model: Any, tokenizer: Any, state: dict[str, Any], facts: dict[str, Any]) -> Path:
    """`state` holds tensors and plain values (optimizer, generators, buffer), `facts` what a person may want to read."""
    place = folder / f"step_{step:06d}"
    unfinished = folder / f".{place.name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        with (unfinished / STATE).open("wb") as f:  # to a name, torch would not say what is wrong with the disk
            torch.save(state, f)
        (unfinished / FACTS).write_text(json.dumps({"step": step, **facts}, indent=1))
        for file in unfinished.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(place, ignore_errors=True)  # of a run that came here before and was resumed from further back
        unfinished.rename(place)
    except (OSError, RuntimeError, SafetensorError) as e:
        shutil.rmtree(unfinished, ignore_errors=True)
        first = e.__context__ if isinstance(e.__context__, OSError) else e  # torch has another error on top of the system's
        reason = getattr(first, "strerror", None) or str(first).splitlines()[0]
        raise EcholabError(f"cannot write checkpoint {place}: {reason}; the ones before it are whole") from None
    return place


def all_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step_*") if (p / FACTS).exists())


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given. Nothing in the file is executed."""
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)


def load_facts(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / FACTS).read_text())


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Only the newest `keep` stay, and that of the best step."""
    for checkpoint in all_of(folder)[:-keep]:
        if checkpoint.name != f"step_{best or 0:06d}":
            gone = checkpoint.with_name(f".{checkpoint.name}.tmp")  # at once, however long the deleting takes
            checkpoint.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
