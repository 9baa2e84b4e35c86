"""`echolab view`: a store in the browser, on this machine only."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from typing import Annotated

import typer

from pipelines.options import (
    JsonOption,
    ScorerOption,
    SegmenterOption,
    StoreOption,
    VerifierOption,
    count,
    open_lab,
    option,
    print_json,
    say,
)


def view(
    run: Annotated[list[str] | None, option("Only this run; may be given again.", "--run")] = None,
    clipset: Annotated[str | None, option("Mark the EchoClips of this clip set (the newest).")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    store: StoreOption = None,
    verifier: VerifierOption = None,
    scorer: ScorerOption = None,
    segmenter: SegmenterOption = None,
    json_: JsonOption = False,
) -> None:
    """Browse all of a store in the browser, until Ctrl-C. Groups are filtered by SQL, and there are the charts of the report.

    The page follows a store that is written meanwhile. Only this machine can open it; from another one, forward the port:
    ssh -L 8421:127.0.0.1:8421 HOST, and there `echolab view --port 8421 --no-browser`.

    echolab view --store store
    """
    from echolab.view.server import Viewer, serve  # isort: skip, it says what is not installed
    from echolab.view.editions import Editions, Wanted
    from echolab.view.page import shell

    with open_lab(store) as lab:
        opened = lab.store
    page = shell(opened.root.name)
    editions = Editions(opened, Wanted(tuple(run) if run else None, clipset, verifier, scorer, segmenter))

    def ready(url: str) -> None:
        if json_:
            print_json({"url": url})
        else:
            print(url)
            say(f"{opened.root}: {count(editions.newest.index['groups'], 'group')} to browse until Ctrl-C")
        sys.stdout.flush()
        if not no_browser and not json_ and sys.stdout.isatty() and has_screen():
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    serve(Viewer(editions, page), port, ready)


def has_screen() -> bool:
    """A browser opened on a machine that one is only logged in to would be a window nobody sees, or one in the terminal."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
