"""docs/cookbook.md: every named query with its answer on one small store.

`PYTHONPATH=tests python tests/generators/cookbook.py` writes it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from generators import told

import echolab
from echolab.lab import Lab
from echolab.queries import Query, list_queries
from pipelines.render import markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cookbook.md"
PARAMS = {
    "arms": {"base": "grpo"},
    "compare_runs": {"a": "base", "b": "new"},
    "degenerate_groups": {"run": "base"},
    "pass_at_k": {"k": "1,4", "run": "base"},
    "profile_compare": {"a": "golden", "b": "own"},
}
ROWS, COLUMNS = 4, 10
HEAD = """# The cookbook

Every named query with an answer, from one small made-up store: a run `base` of four problems over seven steps, a run `new`
beside it, experts, entropies of two scorers, two profiles, two clip sets, and the evaluations of an experiment. Of each answer
four rows and ten columns are shown. `echolab query NAME` prints all; `echolab query --list` and [views](views.md) describe the
parameters.
"""


def fill(lab: Lab, folder: Path) -> None:
    """The store of the page; every id in it comes from its content."""
    rows = told.steps(6)
    rows += [{**r, "step": 7, "group": "7", "completion": rows[0]["completion"]} for r in rows if r["group"] == "6-3"]
    means = {g: fmean(r["reward"] for r in rows if r["group"] == g) for g in {r["group"] for r in rows}}
    rows = [{**r, "advantage": r["reward"] - means[r["group"]]} for r in rows]
    _ingest(lab, folder, "base", [_plain(r, i) for i, r in enumerate(rows)])
    better = [_plain({**r, "reward": 1.0 if r["sample"] == 0 else r["reward"]}, i) for i, r in enumerate(rows) if r["step"] > 3]
    _ingest(lab, folder, "new", better)
    _ingest(lab, folder, "gold", [_plain(r, i) for i, r in enumerate(told.experts())], role="expert")
    for arm, counts in {"grpo": (2, 3, 2), "fresh": (5, 6, 6), "peak": (1, 6, 3)}.items():
        for seed, right in enumerate(counts):
            name, questions = f"{arm}-s{seed}", (("easy", 1), ("hard", 0))
            asked = [
                {"step": 20, "group": source, "prompt": f"{source}?", "completion": f"{k}", "source": source,
                 "reward": float(k < right + more)}
                for source, more in questions for k in range(8)
            ]  # fmt: skip
            _ingest(lab, folder, name, asked, split="eval")
    told.score(lab.store)
    told.score(lab.store, "run = 'base'", "scorer1")
    lab.verify("numeric", workers=1)
    lab.profile("golden", "role = 'expert' AND success", scorer=told.SCORER, bootstrap=20)
    lab.profile("own", "run = 'base' AND success", scorer=told.SCORER, bootstrap=20)
    lab.mine("hard", scorer=told.SCORER)
    lab.mine("first", selector="first_k", scorer=told.SCORER)


def _plain(row: dict[str, Any], number: int) -> dict[str, Any]:
    """As a line of a plain dump; some were cut off, and some rewards are wrong."""
    names = ("step", "group", "completion", "reward", "ground_truth", "advantage")
    kept = {k: row[k] for k in names if row.get(k) is not None}
    body, answer = row["completion"].split("The answer is ")
    said = int(answer.rstrip(".")) + (0 if row["reward"] or number % 11 == 0 else 1)
    kept["completion"] = f"{body}The answer is \\boxed{{{said}}}."
    return {**kept, "prompt": row["problem"], "finish_reason": "stop" if number % 7 else "length"}


def _ingest(lab: Lab, folder: Path, run: str, rows: list[dict[str, Any]], **options: Any) -> None:
    file = folder / f"{run}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lab.ingest(file, run=run, **options)


def page(lab: Lab) -> str:
    return HEAD + "".join(_entry(lab, query) for query in list_queries())


def _entry(lab: Lab, query: Query) -> str:
    params = PARAMS.get(query.name, {})
    answer = lab.query(query.name, scorer=told.SCORER, **params)
    told_params = "".join(f" --param {k}={v}" for k, v in params.items())
    shown = answer.head(ROWS).select(answer.columns[:COLUMNS])
    left = []
    if answer.height > ROWS:
        left.append(f"{answer.height - ROWS:,} more rows")
    if answer.width > COLUMNS:
        left.append("and " + ", ".join(f"`{c}`" for c in answer.columns[COLUMNS:]))
    more = f"\n{'; '.join(left)}\n" if left else ""
    command = f"```sh\necholab query {query.name}{told_params}\n```"
    return f"\n## {query.name}\n\n{query.answers}\n\n{command}\n\n{markdown(shown).strip()}\n{more}"


def write() -> str:
    with tempfile.TemporaryDirectory() as folder, echolab.open(Path(folder, "store"), create=True) as lab:
        fill(lab, Path(folder))
        return page(lab)


if __name__ == "__main__":
    PAGE.write_text(write())
