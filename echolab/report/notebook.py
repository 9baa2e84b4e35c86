"""`lab.reader(group_id)`: one group with the reader of the report, as a page of its own and in the cell of a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from echolab.report.choice import choose
from echolab.report.html import page, part, reader_index
from echolab.report.rollouts import experts, facts, read_groups
from echolab.report.sample import KINDS, Sample
from echolab.sql import Session
from echolab.store import Snapshot

START = """new EcholabReader(document.getElementById("reader"),
  new EmbeddedGroups(JSON.parse(document.getElementById("reader-index").textContent)), {permalinks: false});"""


@dataclass(frozen=True)
class ReaderPage:
    """A group that can be read: a notebook shows it in its cell, `html` is the whole page."""

    group_id: str
    html: str
    height: int = 720

    def _repr_html_(self) -> str:
        """In a frame that may run its own scripts and nothing else."""
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{escape(self.html, quote=True)}"'
            f' style="width:100%;height:{self.height}px;border:0" title="rollouts of group {self.group_id}"></iframe>'
        )


def reader_page(snapshot: Snapshot, group_id: str, *, clipset: str | None = None, **views: Any) -> ReaderPage:
    """All rollouts of a group, and an expert of its problem. `views` are verifier, scorer and segmenter."""
    choice = choose(snapshot, clipset, **{"verifier": None, "scorer": None, "segmenter": None, **views})
    with Session(snapshot, choice.options) as session:
        group = facts(session, group_id)
        beside = experts(session, [group["problem_id"]]) if group["problem_id"] and group["role"] == "policy" else {}
        found = Sample(1)
        for read in read_groups(session, [group], choice.clipset, experts=beside):
            found.add(read.payload())
    data = {"reader-index": reader_index(found.entries, found.scale(), KINDS)}
    data |= {f"g-{id}": payload for id, payload in found.payloads.items()}
    body = '<main class="alone"><div id="reader"></div></main>'
    whole = page(f"echolab: group {group['group_id']}", body, [part("style.css")], [part("reader.js"), START], data)
    return ReaderPage(group["group_id"], whole)
