"""The small SQL prompt of `echolab sql`: lines until a semicolon, history kept between sessions."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from echolab.errors import EcholabError
from pipelines.options import count
from pipelines.render import table

if TYPE_CHECKING:
    from echolab.sql import Session

HELP = "One SELECT, ended by a semicolon. .views lists the views, .queries the named queries, .quit leaves."


def prompt(session: Session, rows: int) -> None:
    """Ask and answer until .quit or Ctrl-D. Ctrl-C drops the question at hand."""
    history = _load_history()
    print(HELP)
    lines: list[str] = []
    while True:
        try:
            line = input("  ...> " if lines else "echolab> ")
        except KeyboardInterrupt:
            print()
            lines = []
            continue
        except EOFError:
            print()
            break
        word = line.strip().rstrip(";").lower()
        if not lines and word in (".quit", ".exit", "quit", "exit", "\\q"):
            break
        if not lines and (word.startswith(".") or word in ("", "help")):
            print(_command(session, word) if word else "", end="\n" if word else "")
            continue
        lines.append(line)
        if re.sub(r"--.*$", "", line).rstrip().endswith(";"):
            _answer(session, "\n".join(lines), rows)
            lines = []
    _save_history(history)


def _answer(session: Session, query: str, rows: int) -> None:
    started = time.monotonic()
    try:
        frame = session.sql(query)
    except EcholabError as e:
        print(e)
    except KeyboardInterrupt:
        print("interrupted")
    else:
        print(table(frame, rows), end="")
        print(f"{count(frame.height, 'row')} in {time.monotonic() - started:.2f} s")


def _command(session: Session, command: str) -> str:
    if command == ".views":
        return "\n".join(session.sql("SHOW TABLES")["name"])
    if command == ".queries":
        from echolab.queries import list_queries

        return "\n".join(f"{q.name}: {q.title}" for q in list_queries())
    return HELP if command in ("help", ".help") else f"no command {command}. {HELP}"


def _load_history() -> Path | None:
    """Where readline is missing the prompt works without history."""
    try:
        import readline
    except ImportError:
        return None
    state = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state"))
    history = state / "echolab" / "sql_history"
    with contextlib.suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(history)
    return history


def _save_history(history: Path | None) -> None:
    if history is not None:
        import readline

        with contextlib.suppress(OSError):
            readline.set_history_length(1000)
            readline.write_history_file(history)
