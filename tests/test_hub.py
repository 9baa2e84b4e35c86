"""Names of models: a wrong one is told within seconds, whatever the network does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

hub_constants = pytest.importorskip("huggingface_hub.constants", reason="names on the Hub need transformers")

from echolab import hub  # noqa: E402
from echolab.errors import EcholabError  # noqa: E402

Answer = Callable[..., None]


@pytest.fixture
def at(monkeypatch) -> Callable[[str], None]:
    """Where the Hub is."""
    path = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(hub_constants.ENDPOINT)
    return lambda address: monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + path)


@pytest.fixture
def answers(monkeypatch, tmp_path, at) -> Iterator[Answer]:
    """`answers(404, **headers)`: a Hub that says this to everything; without a status one that says nothing."""
    servers: list[ThreadingHTTPServer] = []
    over = threading.Event()

    def start(status: int | None, **headers: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                if status is None:
                    over.wait(20)
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        at(f"http://127.0.0.1:{servers[-1].server_port}")

    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "SECONDS", 1.0)
    yield start
    over.set()
    for server in servers:
        server.shutdown()


def refused(name: str) -> str:
    began = time.monotonic()
    with pytest.raises(EcholabError) as e:
        hub.located(name, "config.json")
    assert time.monotonic() - began < 5
    assert name in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def test_folders_are_taken_as_they_are_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_ask", None)
    (tmp_path / "config.json").write_text("{}")
    assert hub.located(str(tmp_path), "config.json") == (str(tmp_path), {"local_files_only": True})
    assert "there is no tokenizer.json in it" in str(
        pytest.raises(EcholabError, hub.located, str(tmp_path), "tokenizer.json").value
    )
    for name in (str(tmp_path / "gone"), "./gone", "~/gone", "some/where/else"):
        assert "no such folder" in refused(name)


def test_what_the_hub_has_is_left_to_transformers(answers):
    answers(200, Content_Length="2", ETag="x", X_Repo_Commit="a" * 40)
    assert hub.located("some/model", "config.json") == ("some/model", {})
    answers(404, X_Error_Code="EntryNotFound")  # another file than ours: transformers knows more of them
    assert hub.located("some/model", "config.json") == ("some/model", {})


def test_what_the_hub_does_not_have_or_not_for_everybody_is_said(answers):
    answers(404, X_Error_Code="RepoNotFound")
    assert "nothing of this name on the Hub" in refused("some/model")
    answers(403, X_Error_Code="GatedRepo")
    assert "accepted its terms" in refused("some/model")
    assert "no name on the Hub" in refused("some model")


def test_a_hub_that_does_not_answer_costs_seconds(answers, at, monkeypatch):
    answers(None)
    assert "does not answer" in refused("some/model")
    answers(503)
    assert "does not answer" in refused("some/model")
    at("http://127.0.0.1:1")
    assert "does not answer" in refused("some/model")
    at("http://nowhere.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: time.sleep(10))
    assert "does not answer" in refused("some/model")


def test_offline_or_not_what_was_downloaded_before_is_loaded_from_there(answers, at, monkeypatch, tmp_path):
    folder = tmp_path / "cache" / "models--some--model"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    at("http://127.0.0.1:1")
    assert hub.located("some/model", "config.json") == ("some/model", {"local_files_only": True})
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert hub.located("some/model", "config.json") == ("some/model", {"local_files_only": True})
    assert "not downloaded before" in refused("other/model")
