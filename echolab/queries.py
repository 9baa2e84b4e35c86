"""What lies in sql/: views and named queries, each a file with a header that documents it, and the page made of these."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from echolab.errors import EcholabError
from echolab.schema import TABLES

_LINE = re.compile(r"-- (\w+): (.+)")
_PARAM = re.compile(r"(\w+) (text|int|float|bool|list)(?:\{([\w,]+)\}|>=(-?\d+))? = (.+?) \| (.+)")


@dataclass(frozen=True)
class Param:
    """One parameter, as its header line has it: `name type{choices}>=lowest = default | doc`."""

    name: str
    type: str
    default: str  # as the header writes it
    doc: str
    choices: tuple[str, ...] = ()
    lowest: int | None = None

    def parse(self, value: Any) -> Any:
        """The value of a parameter from Python or from the command line, where everything is text."""
        try:
            parsed = None if value is None else _PARSERS[self.type](value)
        except (ValueError, TypeError, KeyError):
            raise EcholabError(f"parameter {self.name} is {_KINDS[self.type]}, not {value!r}") from None
        if parsed is not None and self.choices and parsed not in self.choices:
            raise EcholabError(f"parameter {self.name} is {', '.join(self.choices[:-1])} or {self.choices[-1]}, not {value!r}")
        if parsed is not None and self.lowest is not None and parsed < self.lowest:
            raise EcholabError(f"parameter {self.name} is at least {self.lowest}, not {value}")
        return parsed


@dataclass(frozen=True)
class Query:
    """A named query: the header and the SELECT of sql/queries/NAME.sql."""

    name: str
    title: str
    answers: str
    params: tuple[Param, ...]
    examples: tuple[str, ...]
    sql: str

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters with their values; defaults where none is given."""
        names = [p.name for p in self.params]
        for name in given:
            if name not in names:
                near = get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names)}"
                raise EcholabError(f"query {self.name} has no parameter {name}: {hint}")
        defaults = {p.name: None if p.default == "NULL" else p.default for p in self.params}
        return {p.name: p.parse(given.get(p.name, defaults[p.name])) for p in self.params}


@dataclass(frozen=True)
class ViewFile:
    """The header and the SELECT of sql/views/NAME.sql. Columns without a line mean what they mean in their table."""

    name: str
    about: str
    columns: dict[str, str]
    sql: str


def sql_folder() -> Path:
    """Where the files are: inside an installed wheel, or beside the package in a checkout."""
    package = Path(str(resources.files("echolab")))
    inside = package / "_sql"
    return inside if inside.is_dir() else package.parent / "sql"


@cache
def list_queries() -> tuple[Query, ...]:
    return tuple(parse_query(p.stem, p.read_text("utf-8")) for p in sorted((sql_folder() / "queries").glob("*.sql")))


@cache
def view_files() -> dict[str, ViewFile]:
    return {p.stem: parse_view(p.stem, p.read_text("utf-8")) for p in sorted((sql_folder() / "views").glob("*.sql"))}


def find_query(name: str) -> Query:
    queries = {q.name: q for q in list_queries()}
    if name not in queries:
        near = get_close_matches(name, queries, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(queries)}"
        raise EcholabError(f"no query {name!r}: {hint}")
    return queries[name]


def parse_query(name: str, text: str) -> Query:
    """Strict: a header that does not say everything is an error."""
    fields, sql = _header(name, text, ("title", "answers", "param", "example"))
    params = tuple(_param(*_match(name, _PARAM, line)) for line in fields["param"])
    query = Query(name, " ".join(fields["title"]), " ".join(fields["answers"]), params, tuple(fields["example"]), sql)
    if len(fields["title"]) != 1 or not query.answers or not query.examples:
        raise _malformed(name, "it needs one title, and at least one line of answers and of example")
    if wrong := [e for e in query.examples if not f"{e} ".startswith(f"echolab query {name} ")]:
        raise _malformed(name, f"an example begins with `echolab query {name}`, not {wrong[0]!r}")
    code = re.sub(r"--.*", "", sql)
    if (used := set(re.findall(r"\$(\w+)", code))) != {p.name for p in params}:
        raise _malformed(name, f"it documents {sorted(p.name for p in params)} and uses {sorted(used)}")
    query.bind({})  # the defaults have their types
    return query


def _param(name: str, type: str, choices: str | None, lowest: str | None, default: str, doc: str) -> Param:
    return Param(
        name, type, default, doc, tuple((choices or "").split(",")) if choices else (), int(lowest) if lowest else None
    )


def parse_view(name: str, text: str) -> ViewFile:
    fields, sql = _header(name, text, ("view", "about", "column"))
    if fields["view"] != [name] or not fields["about"]:
        raise _malformed(name, "it needs `-- view:` with the file's name, and at least one line of about")
    columns = dict(_match(name, re.compile(r"(\w+) \| (.+)"), line) for line in fields["column"])
    return ViewFile(name, " ".join(fields["about"]), columns, sql)


def _header(name: str, text: str, keys: tuple[str, ...]) -> tuple[dict[str, list[str]], str]:
    fields: dict[str, list[str]] = {k: [] for k in keys}
    lines = text.splitlines()
    body = next((i for i, line in enumerate(lines) if not line.startswith("--")), len(lines))
    for line in lines[:body]:
        found = _LINE.fullmatch(line)
        if found is None or found[1] not in fields:
            raise _malformed(name, f"{line!r} is not `-- key: value` with a key of {', '.join(keys)}")
        fields[found[1]].append(found[2])
    return fields, "\n".join(lines[body:]).strip() + "\n"


def _match(name: str, pattern: re.Pattern[str], line: str) -> tuple[Any, ...]:
    found = pattern.fullmatch(line)
    if found is None:
        raise _malformed(name, f"cannot read {line!r}")
    return found.groups()


def _malformed(name: str, why: str) -> EcholabError:
    return EcholabError(f"malformed header of {name}.sql: {why}")


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _as_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError
    return int(value)


def _as_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _as_bool(value: Any) -> bool:
    return value if isinstance(value, bool) else {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]


def _as_list(value: Any) -> list[int]:
    """`1,8`, a JSON array, or a sequence."""
    if isinstance(value, str):
        value = json.loads(value) if value.startswith("[") else [v.strip() for v in value.split(",")]
    return [_as_int(v) for v in (value if isinstance(value, list | tuple) else [value])]


_PARSERS = {"text": _as_text, "int": _as_int, "float": _as_float, "bool": _as_bool, "list": _as_list}
_KINDS = {
    "text": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "list": "whole numbers such as 1,8",
}  # fmt: skip


def markdown(types: Mapping[str, Mapping[str, str]]) -> str:
    """The whole of docs/views.md; `types` are the columns of each view."""
    out = [
        "# Views and named queries",
        "",
        "Generated from the headers of `sql/views/*.sql` and `sql/queries/*.sql`. Every view is there, typed and empty, in a",
        "new store. Tables without a section here are views of the same name with the columns of [tables.md](tables.md);",
        "registries show the newest row of each id.",
        "",
        "With `--verifier`, reward and success are that verifier's word in every view and query: ok gives its score and",
        "success, no_answer gives 0 and false, anything else is NULL.",
        "",
        "Macros for queries of your own: `degenerate(kind)` (all_success, all_fail or constant), `judged(kind)` (these or",
        "mixed), `truncated(finish_reason)` (cut at the length limit; NULL is not), `success_threshold(run)`,",
        "`failure_reward(run)`, `tol()`.",
        "",
        "# Views",
    ]
    for name, columns in types.items():
        view = view_files()[name]
        out += ["", f"## {name}", "", view.about, "", "| column | type | what it is |", "|---|---|---|"]
        out += [f"| `{c}` | `{t}` | {view.columns.get(c) or _table_doc(name, c)} |" for c, t in columns.items()]
    out += ["", "# Named queries", "", "`echolab query NAME [--param name=value]`"]
    for q in list_queries():
        out += ["", f"## {q.name}", "", f"**{q.title}.** {q.answers}", "", *(f"    {e}" for e in q.examples), ""]
        out += ["| parameter | type | default | what it is |", "|---|---|---|---|"]
        out += [f"| `{p.name}` | {p.type} | {p.default} | {p.doc} |" for p in q.params]
    return "\n".join(out) + "\n"


def _table_doc(view: str, column: str) -> str:
    """What a column means in the table of the view's name, else in the first table that has it."""
    tables = [TABLES[view]] if view in TABLES else list(TABLES.values())[1:]
    return next(c.doc for t in tables for c in t.columns if c.name == column)
