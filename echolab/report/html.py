"""One HTML page that needs nothing else: its policy allows no request but where said so, and no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from echolab.report.sample import as_json


def part(name: str, package: str = "echolab.report") -> str:
    """A file of a page: style.css, reader.js, page.js; or that of another package."""
    return (resources.files(package) / name).read_text("utf-8")


def page(
    title: str, body: str, styles: Sequence[str], scripts: Sequence[str], data: Mapping[str, str], *, connect: str = "'none'"
) -> str:
    """The whole page. `data` are elements of JSON by their id, as `as_json` writes it; `connect` is whom it may ask."""
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; connect-src {connect};"
        " base-uri 'none'; form-action 'none'"
    )
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escape(title)}</title>\n",
            *(f"<style>{style}</style>\n" for style in styles),
            f"</head>\n<body>\n{body}\n",
            *(f'<script type="application/json" id="{escape(id)}">{json}</script>\n' for id, json in data.items()),
            *(f"<script>{script}</script>\n" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def _hashes(texts: Iterable[str]) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts) or "'none'"


def table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """`head` has of each column its name and its class: n for numbers. Cells are text."""
    names = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in head)
    lines = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell, (_, kind) in zip(row, head, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'


def words(text: str) -> str:
    """Escaped; what stands in backticks is code."""
    parts = escape(text, quote=False).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def reader_index(groups: Sequence[Mapping[str, Any]], scale: Mapping[str, float | None], kinds: Mapping[str, str]) -> str:
    """What `EmbeddedGroups` of reader.js knows beside the groups' own elements."""
    there = [[kind, word] for kind, word in kinds.items() if any(g["kind"] == kind for g in groups)]
    runs = sorted({g["run"] for g in groups})
    return as_json({"groups": groups, "scale": scale, "kinds": there, "runs": runs})
