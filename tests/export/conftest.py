"""Stores with a clip set, and exports of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from generators.clipsets import SCORER, TOKENIZER, add_clipset, clip, rollout, score

from echolab.export.config import ExportConfig
from echolab.export.run import ExportReport, export
from echolab.store import Store


@pytest.fixture(scope="session")
def fill(make_store, add_rows) -> Callable[..., Store]:
    """`fill(rollouts, clips)`: a store with their scores, and the clip set `hard@1`."""

    def make(rollouts: Iterable[dict[str, Any]], clips: Iterable[dict[str, Any]] | None = None, **ledger: Any) -> Store:
        rows = list(rollouts)
        store = make_store(rows, **ledger)
        scored = [score(r) for r in rows if r["completion_ids"] is not None]
        add_rows(store, "scores", scored)
        with store.lock():
            settings = {"kind": "model", "model": "tiny", "tokenizer": TOKENIZER, "weights": "w" * 32, "dtype": "float32"}
            store.register("scorers", SCORER, "tiny", {**settings, "temperature": 1.0})
        add_clipset(store, "hard", [clip(r) for r in rows if r["sample"] == 0] if clips is None else clips)
        return store

    return make


@pytest.fixture(scope="session")
def store(fill) -> Store:
    """6 groups of 3; a clip for each, the last two for validation. All tests share it."""
    rows = [rollout(g, s) for g in range(6) for s in range(3)]
    return fill(rows, [clip(r, split="validation" if r["group"] > "g3" else None) for r in rows if r["sample"] == 0])


@pytest.fixture
def exported(store, tmp_path) -> Callable[..., tuple[ExportReport, Path]]:
    """`exported("verl", where=...)`: the report of an export of the clip set's rows, and its folder."""

    def run(to: str, target: Store = store, name: str = "out", **options: Any) -> tuple[ExportReport, Path]:
        report = export(target, tmp_path / name, ExportConfig.make(to=to, **{"clipset": "hard", **options}))
        return report, tmp_path / name

    return run


@pytest.fixture(scope="session")
def once(store, tmp_path_factory) -> Callable[..., tuple[ExportReport, Path]]:
    """As `exported`, made once: for tests that only read it."""
    folder = tmp_path_factory.mktemp("exports")

    @cache
    def run(to: str, **options: Any) -> tuple[ExportReport, Path]:
        out = folder / "-".join([to, *map(str, options.values())])
        return export(store, out, ExportConfig.make(to=to, **{"clipset": "hard", **options})), out

    return run
