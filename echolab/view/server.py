"""The server behind `echolab view`: this machine only, GET only, and only for who knows the token in its address."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from echolab.errors import EcholabError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Mount, Route
except ImportError:
    raise EcholabError("view needs Starlette and uvicorn: pip install 'echolab[view]'") from None

from echolab.report.sample import as_json
from echolab.sql import Session
from echolab.view.browse import SORTS, Query, find, group
from echolab.view.editions import AT_ONCE, Edition, Editions

log = logging.getLogger("echolab")
HOST = "127.0.0.1"
SECONDS = 60.0  # that one request may take
HEADERS = (  # of every answer
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
Work = Callable[[Edition, Session, Request], Any]


class Guard:
    """Lets through what asks this server by its own name, with its token, for something to read. A page of another site can
    send requests here, also under a name of its own that it points at this machine, but it knows no token."""

    def __init__(self, app: Any, token: str, port: int):
        self.app, self.token, self.port = app, token, port
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")} | ({HOST, "localhost"} if port == 80 else set())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def dressed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        app = self.app if scope["type"] != "http" else self.refusal(Request(scope)) or self.app
        await app(scope, receive, dressed)

    def refusal(self, request: Request) -> Response | None:
        given = [*request.scope["path"].split("/"), ""][1]  # `request.url` is made from the host that was sent
        if request.headers.get("host") not in self.hosts:
            said = f"This server is http://{HOST}:{self.port} and answers under no other name. Forward this port as itself.\n"
            return PlainTextResponse(said, 403)
        if not secrets.compare_digest(given.encode(), self.token.encode()):
            return PlainTextResponse("Open the whole address that `echolab view` printed: its token is missing.\n", 403)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("This server only shows.\n", 405, {"allow": "GET, HEAD"})
        return None


@dataclass(eq=False)
class Asking:
    """One request: it is given up when it takes too long, or nobody waits for it."""

    until: float
    alone: bool = False

    def give_up(self) -> str | None:
        if self.alone:
            return "nobody waits for this any more"
        return None if time.monotonic() < self.until else f"this took longer than {SECONDS:.0f} s: narrow it down"


class Viewer:
    """What is served: a page, and JSON for it."""

    def __init__(self, editions: Editions, page: str):
        self.editions, self.page = editions, page
        self.threads = ThreadPoolExecutor(AT_ONCE, "view")
        self.asking: set[Asking] = set()
        self.ends = False

    def app(self, token: str) -> Starlette:
        def lists(edition: Edition, session: Session, request: Request) -> Any:
            return find(edition, session, Query.of(dict(request.query_params)))

        def reads(edition: Edition, session: Session, request: Request) -> Any:
            given = request.query_params
            return group(edition, session, request.path_params["id"], given.get("rollout"), "all" in given)

        routes = [
            Route("/", self.shell),
            Route("/state", self.state),
            Route("/overview", self.overview),
            Route("/groups", self.answer(lists)),
            Route("/group/{id}", self.answer(reads)),
        ]
        return Starlette(routes=[Mount(f"/{token}", routes=routes)])

    async def shell(self, request: Request) -> Response:
        return Response(self.page, media_type="text/html; charset=utf-8")

    async def state(self, request: Request) -> Response:
        """What there is to see, and whether there is more than before."""
        await asyncio.to_thread(self.editions.look)
        said = {**self.editions.newest.index, "sorts": [[name, word] for name, (word, _) in SORTS.items()]}
        return _json(
            as_json({**said, "trouble": self.editions.trouble or self.editions.undrawn, "overview": self.editions.drawn_number})
        )

    async def overview(self, request: Request) -> Response:
        return _json(self.editions.drawn or "null")

    def answer(self, work: Work) -> Callable[[Request], Awaitable[Response]]:
        """`work` in a thread, as JSON; what cannot be answered as one line."""

        def worked(asking: Asking, request: Request) -> str:
            with self.editions.use() as edition, edition.asking(asking.give_up) as session:
                return as_json(work(edition, session, request))

        async def endpoint(request: Request) -> Response:
            asking = Asking(time.monotonic() + SECONDS, alone=self.ends)
            self.asking.add(asking)
            try:
                answer = asyncio.get_running_loop().run_in_executor(self.threads, worked, asking, request)
                while not (await asyncio.wait([answer], timeout=0.2))[0]:
                    if await request.is_disconnected():  # meanwhile `abandon` may say the same
                        asking.alone = True
                return _json(await answer)
            except EcholabError as e:
                return _json(as_json({"error": " ".join(str(e).split())}), 400)
            except Exception as e:  # a bug of ours must not end the server
                log.exception("unexpected")
                return _json(as_json({"error": f"{type(e).__name__}: {' '.join(str(e).split())}"}), 500)
            finally:
                self.asking.discard(asking)

        return endpoint

    def abandon(self) -> None:
        """Give up what is being answered, and what is asked from now on."""
        self.ends = True
        for asking in self.asking.copy():
            asking.alone = True

    def close(self) -> None:
        self.abandon()
        self.threads.shutdown()
        self.editions.close()


def _json(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")


class _Server(uvicorn.Server):
    """One that says when it answers (Ctrl-C before that would end in a warning of asyncio's), and when it ends."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], ends: Callable[[], None]):
        super().__init__(config)
        self.ready, self.ends = ready, ends

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.ends()
        await super().shutdown(sockets)


def serve(viewer: Viewer, port: int, ready: Callable[[str], None]) -> None:
    """Until Ctrl-C. `ready` is told the address; port 0 is any that is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except (OSError, OverflowError) as e:
            raise EcholabError(f"port {port} cannot be used ({getattr(e, 'strerror', None) or e}): choose another") from None
        port, token = listening.getsockname()[1], secrets.token_urlsafe(24)
        config = uvicorn.Config(
            Guard(viewer.app(token), token, port), http="h11", ws="none", lifespan="off", log_level="warning", access_log=False,
            server_header=False, timeout_graceful_shutdown=5,
        )  # fmt: skip
        try:
            _Server(config, lambda: ready(f"http://{HOST}:{port}/{token}/"), viewer.abandon).run(sockets=[listening])
        finally:
            viewer.close()
