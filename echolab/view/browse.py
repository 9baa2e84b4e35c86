"""What the page asks for: a page of the list of groups, and one group with its rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from echolab.errors import EcholabError
from echolab.report.rollouts import Group, around, facts, read_groups
from echolab.report.sample import KINDS
from echolab.sql import Session
from echolab.view.editions import Edition
from echolab.views import text

PAGE = 50  # groups
ROLLOUTS, BYTES = 16, 300_000  # of a group at first; of each of its rollouts
FEW_STEPS = 100  # to which a search can be narrowed
SEARCHES = 4  # that are remembered
SORTS = {
    "newest": ("newest step first", "step DESC NULLS LAST"),
    "oldest": ("oldest step first", "step NULLS LAST"),
    "kind": ("by kind", "kind, step DESC NULLS LAST"),
    "lowest": ("lowest reward first", "mean NULLS LAST, step DESC NULLS LAST"),
    "highest": ("highest reward first", "mean DESC NULLS LAST, step DESC NULLS LAST"),
    "longest": ("longest first", "coalesce(n_tokens, n_chars) / n DESC NULLS LAST"),
}
OUTCOMES = {"right": "n_success > 0", "wrong": "n_rewarded > n_success", "unrewarded": "n_unrewarded > 0"}


@dataclass(frozen=True)
class Query:
    """What the user wants to see of the list. `where` is SQL over the view `groups`."""

    words: str = ""
    run: str = ""
    kind: str = ""
    outcome: str = ""
    where: str = ""
    sort: str = "newest"
    page: int = 1

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Query:
        """From the address. What is not known is an error."""
        if unknown := sorted(given.keys() - cls.__dataclass_fields__.keys()):
            raise EcholabError(f"unknown: {unknown[0]}; a list is asked for with {', '.join(cls.__dataclass_fields__)}")
        words = {name: value for name, value in given.items() if name != "page" and value}
        query = replace(cls(), **words)
        for name, known in (("sort", SORTS), ("kind", KINDS), ("outcome", OUTCOMES)):
            if (value := getattr(query, name)) and value not in known:
                raise EcholabError(f"no {name} {value!r}: there are {', '.join(known)}")
        page = given.get("page", "1")
        if not (page.isascii() and page.isdigit() and len(page) < 10):
            raise EcholabError(f"a page is a number, not {page!r}")
        return replace(query, page=max(1, int(page)))


def find(edition: Edition, session: Session, query: Query) -> dict[str, Any]:
    """One page of the groups that fit."""
    params: dict[str, Any] = {}
    conditions = [_of_runs(edition, query)]
    if query.kind:
        conditions.append(f"kind = {text(query.kind)}")
    if query.outcome:
        conditions.append(OUTCOMES[query.outcome])
    if query.where:
        conditions.append(f"({query.where}\n)")
    fitting = " AND ".join(conditions)
    if query.words:
        params = {"those": _search(edition, session, query, fitting)}
        fitting += " AND group_id IN (SELECT unnest($those::VARCHAR[]))"
    found = int(session.sql(f"SELECT count(*) AS n FROM groups WHERE {fitting}", params).item())
    pages = max(1, -(-found // PAGE))
    page, order = min(query.page, pages), f"{SORTS[query.sort][1]}, group_id, role"
    rows = session.sql(
        f"""SELECT group_id, run, split, step, role, kind, n, n_rewarded, n_success, coalesce(asked, '') AS asked FROM (
            SELECT * FROM groups WHERE {fitting} ORDER BY {order} LIMIT {PAGE} OFFSET {(page - 1) * PAGE}
        ) LEFT JOIN asked USING (prompt_id) ORDER BY {order}""",
        params,
    )
    return {
        "edition": edition.number, "groups": rows.to_dicts(), "found": found, "total": edition.index["groups"],
        "page": page, "pages": pages,
    }  # fmt: skip


def _search(edition: Edition, session: Session, query: Query, fitting: str) -> list[str]:
    """Groups with these words in a prompt or a completion, whatever their case. All texts of the runs are read, or those of
    a few steps where the other filters leave no more."""
    steps = session.sql(f"SELECT DISTINCT run, step FROM groups WHERE {fitting} LIMIT {FEW_STEPS + 1}").to_dicts()
    if not steps:
        return []
    here = around(steps) if len(steps) <= FEW_STEPS else _of_runs(edition, query)
    key = query.words, here
    if key not in edition.searches:
        has = f"contains(lower({{}}), lower({text(query.words)}))"
        found = session.sql(
            f"""SELECT DISTINCT group_id FROM rollouts
            WHERE {here} AND ({has.format("completion")} OR {has.format("coalesce(prompt, messages)")})"""
        )
        while len(edition.searches) >= SEARCHES:
            edition.searches.pop(next(iter(edition.searches)), None)
        edition.searches[key] = found["group_id"].to_list()
    return edition.searches[key]


def _of_runs(edition: Edition, query: Query) -> str:
    runs = [query.run] if query.run else edition.index["runs"]
    return f"run IN ({', '.join(map(text, runs)) or 'NULL'})"


def group(edition: Edition, session: Session, id: str, rollout: str | None = None, everyone: bool = False) -> dict[str, Any]:
    """A group as reader.js takes it, its long rollouts cut; or one `rollout` of it, whole; or `everyone`, not only some."""
    known = facts(session, id)
    read = _read(edition, session, known, None if everyone or rollout else ROLLOUTS)
    if rollout is None:
        return read.payload(None if everyone else ROLLOUTS, BYTES)
    one = replace(
        read,
        rows=[row for row in read.rows if row["rollout_id"] == rollout],
        beside=[row for row in read.beside if row["rollout_id"] == rollout],
    )
    if not one.rows and not one.beside:
        raise EcholabError(f"group {id} has no rollout {rollout}")
    return one.payload()["rollouts"][0]


def _read(edition: Edition, session: Session, known: dict[str, Any], rollouts: int | None) -> Group:
    beside = edition.experts if known["role"] == "policy" else {}
    clipset, pieces = edition.choice.clipset, edition.pieces
    return next(read_groups(session, [known], clipset, rollouts=rollouts, experts=beside, pieces=pieces, cuts="cuts"))
