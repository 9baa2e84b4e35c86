"""Names of models and tokenizers: a folder here, or what the Hub calls them. transformers asks the Hub again and again for
minutes where there is no network; here it is asked once, for seconds, before transformers is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from echolab.errors import EcholabError

SECONDS = 8.0  # that the Hub has for its answer, finding its address included


def located(name: str, file: str) -> tuple[str, dict[str, Any]]:
    """What transformers is to load a model or tokenizer from, and with which options. `file` is one that it must have."""
    local = Path(name).expanduser()
    if local.exists():
        if not (local / file).exists():
            raise EcholabError(f"{name} cannot be loaded: there is no {file} in it")
        return str(local), {"local_files_only": True}
    if local.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise EcholabError(f"{name}: no such folder")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    answer = _ask(name, file)
    if isinstance(answer, HFValidationError):
        raise EcholabError(f"{name}: no such folder, and no name on the Hub")
    if isinstance(answer, GatedRepoError):
        raise EcholabError(f"{name}: the Hub gives it only to those who accepted its terms: do so there, then `hf auth login`")
    if isinstance(answer, RepositoryNotFoundError):
        raise EcholabError(f"{name}: no such folder, and nothing of this name on the Hub (`hf auth login` if it is private)")
    if answer is None:
        return name, {}
    if isinstance(try_to_load_from_cache(name, file), str):
        return name, {"local_files_only": True}
    raise EcholabError(
        f"{name}: no such folder, not downloaded before, and the Hub does not answer ({type(answer).__name__}): give a folder"
    )


def _ask(name: str, file: str) -> Exception | None:
    """Why the Hub has no such file, or None if it has, or has others of this name."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    found: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, file), timeout=SECONDS / 2)
            found.append(None)
        except EntryNotFoundError:
            found.append(None)
        except Exception as e:  # of many kinds: no network, offline mode, no such name
            found.append(e)

    thread = threading.Thread(target=ask, daemon=True)  # a search for an address knows no limit of time
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else TimeoutError()
