"""The page that is served: it holds the reader and the means to draw charts, and asks the server for all else."""

from __future__ import annotations

from html import escape

from echolab.report.build import vega
from echolab.report.html import page, part


def shell(name: str) -> str:
    """The page of a store of this name. It is the same whatever the store holds."""
    body = (
        f'<div id="top"><header class="top"><p class="kicker">echolab view · {escape(name)}</p>'
        '<button id="theme" type="button" title="light or dark" aria-label="light or dark">◐</button><h1></h1>'
        "<noscript><p>This page needs JavaScript.</p></noscript></header></div>"
        '<main><p id="trouble" class="trouble" role="alert" hidden></p>'
        '<section id="read" class="wide" hidden><h2>Read</h2><p id="about"></p><div id="reader"></div></section>'
        '<div id="rest"><section><p>The charts are being drawn.</p></section></div></main><div id="foot"></div>'
    )
    scripts = [vega(), part("reader.js"), part("page.js"), part("view.js", "echolab.view")]
    return page(f"echolab: {name}", body, [part("style.css")], scripts, {}, connect="'self'")
