"""Offline trajectory analysis and data curation for RL with verifiable rewards.

>>> import echolab
>>> lab = echolab.open("store")
>>> lab.sql("SELECT count(*) AS n FROM groups WHERE kind = 'mixed'")["n"][0]
28
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from echolab.errors import EcholabError

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from echolab.lab import Lab

__version__ = "0.1.0"
__all__ = ["EcholabError", "open"]


def open(store: str | Path, *, create: bool = False, version: int | None = None, at: datetime | None = None) -> Lab:
    """Open a store; `create` makes an empty one where there is none. `version` and `at` look at an earlier state.

    >>> with echolab.open("another", create=True) as lab:
    ...     lab.validate()
    []
    """
    from echolab.lab import Lab  # not at import time: `import echolab` stays light

    return Lab.open(store, create=create, version=version, at=at)
