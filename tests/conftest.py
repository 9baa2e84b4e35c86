"""Stores for tests, made the way ingest makes them: staged files, one commit, the ledger row last; and a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from echolab import ids
from echolab.schema import TABLES
from echolab.store import Store, now

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the Hub, which would try for minutes

Rows = Iterable[dict[str, Any]]


def full_row(row: dict[str, Any], number: int, ingest_id: str) -> dict[str, Any]:
    """A rollout with what it must have. `group` and `problem` are short names, turned into ids."""
    row = {"run": "r", "split": "train", "step": 1, "role": "policy", **row}
    group, problem = row.pop("group", "g"), row.pop("problem", None)
    defaults = {
        "rollout_id": ids.random_id(),
        "ingest_id": ingest_id,
        "group_id": ids.group_id(row["run"], row["split"], row["step"], (group,)),
        "group_source": "explicit",
        "problem_id": None if problem is None else ids.problem_id(problem),
        "prompt_id": None if problem is None else ids.prompt_id(problem),
        "prompt": problem,
        "prompt_format": "raw",
        "origin": {"file": "rows.jsonl", "row": number},
    }
    return {**defaults, **row}


def _add_reading(store: Store, rows: Rows, **ledger: Any) -> str:
    ingest_id = ids.random_id()
    full = [full_row(row, i, ingest_id) for i, row in enumerate(rows)]
    steps = [r["step"] for r in full if r["step"] is not None]
    entry = {
        "ingest_id": ingest_id, "run": full[0]["run"] if full else "r", "source_path": f"{ingest_id}.jsonl", "attempt": 1,
        "start_step": min(steps, default=None), "bytes_read": 1, "sha256": "0", "format": "generic", "reader_version": 1,
        "options": "{}", "n_rows": len(full), "n_shared": 0, "n_quarantined": 0, "group_source": "explicit",
        "completeness": "all", "supersedes": [], "created_at": now(), **ledger,
    }  # fmt: skip
    with store.job("test") as folder:
        staged = store.stage("rollouts", pa.Table.from_pylist(full, schema=TABLES["rollouts"].arrow), folder) if full else []
        with store.lock():
            if staged:
                store.commit("rollouts", staged)
            store.add("ingests", pa.Table.from_pylist([entry], schema=TABLES["ingests"].arrow))
    return ingest_id


@pytest.fixture(scope="session")
def add_reading() -> Callable[..., str]:
    """`add_reading(store, rows, attempt=2, ...)` stores rollouts and their ledger row; returns the ingest_id."""
    return _add_reading


@pytest.fixture(scope="session")
def add_rows() -> Callable[[Store, str, Rows], None]:
    """`add_rows(store, "verdicts", rows)` commits rows of any table without a ledger."""

    def add(store: Store, table: str, rows: Rows) -> None:
        with store.lock():
            store.add(table, pa.Table.from_pylist(list(rows), schema=TABLES[table].arrow))

    return add


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Store]:
    """`make_store(rows)`: a new store with one reading of these rows (none where there are no rows)."""

    def make(rows: Rows = (), **ledger: Any) -> Store:
        store = Store.create(tmp_path_factory.mktemp("store") / "s")
        if rows := list(rows):
            _add_reading(store, rows, **ledger)
        return store

    return make


CHROMIUM = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api: Any = pytest.importorskip(
        "playwright.sync_api", reason="browser tests need playwright: pip install 'echolab[report-test]'"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: browser test skipped")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=chromium, args=list(CHROMIUM), ignore_default_args=["--hide-scrollbars"]
        )
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """`visit(file or address)` opens a page, and afterwards asserts that it asked for nothing but itself, or its server, and
    complained of nothing but what is `expected`."""
    opened: list[Any] = []
    said, asked, addresses, fine = [], [], [], []

    def visit(page: Path | str, fragment: str = "", ready: str = "html[data-ready]", expected: tuple[str, ...] = (), **options):
        address = page.as_uri() if isinstance(page, Path) else page
        tab = browser.new_page(**{"viewport": {"width": 1300, "height": 900}, **options})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}") or dialog.dismiss())
        tab.on("request", lambda request: asked.append(request.url))
        opened.append(tab)
        addresses.append(address)
        fine.extend(expected)
        tab.goto(f"{address}{fragment}")
        tab.wait_for_selector(ready, timeout=60_000)
        return tab

    yield visit
    assert not [text for text in said if text not in fine]
    for url in {url.split("#")[0] for url in asked} - {*addresses, "about:srcdoc"}:
        assert any(address.startswith("http") and url.startswith(address) for address in addresses), url
    for tab in opened:
        assert tab.evaluate("window.hacked") is None
        tab.close()
