"""Where the items of a scoring job are worked off: in worker processes of this machine, or on a Ray cluster.

Every worker loads the model once. The parent reads rollouts, hands out items and takes their results; a worker that dies
costs its item one try, and another takes its place."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from echolab.errors import EcholabError, WrongUsage
from echolab.jobs import Backend, Done, Payload, Result

if TYPE_CHECKING:
    from echolab.entropy.scorer import Scorer, ScorerConfig

MAX_DEATHS = 5  # of workers in a row, before one has done anything
START_SECONDS = 1800  # until the first actor of a Ray cluster has its model

Choice = Callable[["ScorerConfig", "Scorer"], Backend]


def choose_backend(name: str, workers: int | None = None, address: str | None = None) -> Choice | None:
    if workers is not None and workers < 1:
        raise WrongUsage("--workers must be at least 1")
    if name == "serial":
        if workers is not None or address is not None:
            raise WrongUsage("--workers and --ray-address are for --backend process and ray")
        return None
    if name == "process":
        return lambda config, scorer: process(_as_here(config, scorer), workers or _workers(scorer), scorer.id)
    if name == "ray":
        return lambda config, scorer: on_ray(_as_here(config, scorer), workers, address, scorer.id)
    raise WrongUsage(f"unknown backend {name!r}: use serial, process or ray")


def _as_here(config: ScorerConfig, scorer: Scorer) -> ScorerConfig:
    """What `auto` came to in this process, it means in every worker."""
    return config.model_copy(update={"dtype": scorer.settings["dtype"]})


def _workers(scorer: Scorer) -> int:
    import torch

    if scorer.device.type == "cuda":
        return torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // 2)


def _config_of(config: ScorerConfig, number: int, workers: int) -> dict[str, Any]:
    """A worker's own GPU, or its share of the cores: workers that all take all of them wait for each other."""
    import torch

    options = config.model_dump(mode="json")
    if config.device is None and torch.cuda.is_available():
        options["device"] = f"cuda:{number % torch.cuda.device_count()}"
    if config.threads is None:
        options["threads"] = max(1, (os.cpu_count() or 1) // workers)
    return options


def _load(options: dict[str, Any], expected: str | None) -> Scorer:
    """The scorer, if it is the expected one: another folder of the same name may lie on another machine."""
    from echolab.entropy.scorer import Scorer, ScorerConfig

    scorer = Scorer.load(ScorerConfig.make(**options))
    if expected not in (None, scorer.id):
        raise EcholabError(f"{scorer.config.model} is another model there: scorer {scorer.id}, not {expected}")
    return scorer


# Processes.


class _Worker:
    """One process and our end of its pipe."""

    def __init__(self, context: Any, options: dict[str, Any], expected: str | None, number: int):
        self.number, self.item = number, -1
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, options, expected), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, payload: Payload) -> None:
        self.item = payload[0]
        with contextlib.suppress(OSError):  # it died: `wait` says so
            self.link.send(payload)

    def close(self) -> None:
        self.link.close()
        self.process.kill()
        self.process.join()


def _serve(link: Connection, options: dict[str, Any], expected: str | None) -> None:
    """The worker's side: it ends when the parent does."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    try:
        try:
            scorer = _load(options, expected)
        except Exception as e:  # told where somebody sees it
            link.send((None, EcholabError(f"a worker cannot load the model: {e}")))
            return
        while True:
            number, rows = link.recv()
            link.send((number, _attempt(scorer, rows)))
    except (EOFError, OSError):
        return


def _attempt(scorer: Scorer, rows: Any) -> Done | Exception:
    try:
        return scorer(rows)
    except Exception as e:  # whatever it is, the item failed, and the job is told
        return EcholabError(str(e) or type(e).__name__)


def process(config: ScorerConfig, workers: int, expected: str | None = None) -> Backend:
    """Items in `workers` processes, each with the scorer of the `expected` id."""

    def backend(payloads: Iterable[Payload]) -> Iterator[Result]:
        context = multiprocessing.get_context("spawn")
        start = lambda number: _Worker(context, _config_of(config, number, workers), expected, number)  # noqa: E731
        crew = [start(number) for number in range(workers)]
        deaths, todo = 0, iter(payloads)
        busy: dict[Any, _Worker] = {}
        try:
            for worker in crew:
                _next(worker, todo, busy)
            while busy:
                for link in wait(list(busy)):
                    worker = busy.pop(link)
                    try:
                        number, result = worker.link.recv()
                        if number is None:
                            raise result
                        deaths = 0
                    except (EOFError, OSError):
                        deaths += 1
                        number, result = worker.item, EcholabError("its worker died")
                        worker.close()
                        worker = crew[worker.number] = start(worker.number)
                    yield number, result
                    if deaths >= MAX_DEATHS:
                        raise EcholabError(f"{deaths} workers in a row died before they did anything: is there memory enough?")
                    _next(worker, todo, busy)
        finally:
            for worker in crew:
                worker.close()

    return backend


def _next(worker: _Worker, todo: Iterator[Payload], busy: dict[Any, _Worker]) -> None:
    payload = next(todo, None)
    if payload is not None:
        worker.give(payload)
        busy[worker.link] = worker


# Ray.


class Actor:
    """A worker on a Ray cluster."""

    def __init__(self, options: dict[str, Any], expected: str | None):
        self.error = None
        try:
            self.scorer = _load(options, expected)
        except Exception as e:  # told where somebody sees it
            self.error = str(e) or type(e).__name__

    def ready(self) -> str | None:
        """Why it is not."""
        return self.error

    def work(self, rows: Any) -> Done | Exception:
        return _attempt(self.scorer, rows)


def on_ray(config: ScorerConfig, workers: int | None, address: str | None, expected: str | None = None) -> Backend:
    """Items in `workers` actors. The model's path must be readable where they run."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise EcholabError("--backend ray needs Ray: pip install 'echolab[ray]'") from None

    def backend(payloads: Iterable[Payload]) -> Iterator[Result]:
        mine = not ray.is_initialized()
        if mine:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield from _on_actors(ray, config, workers, expected, payloads)
        finally:
            if mine:
                ray.shutdown()

    return backend


def _on_actors(
    ray: Any, config: ScorerConfig, workers: int | None, expected: str | None, payloads: Iterable[Payload]
) -> Iterator[Result]:
    """An item goes to an actor that has answered: one that finds no place in the cluster never does."""
    kind, workers = _places(ray.cluster_resources(), workers)
    remote = ray.remote(**{f"num_{kind}s": 1})(Actor)
    crew: dict[int, Any] = {}
    busy: dict[Any, tuple[int, int | None]] = {}  # a call: whose, and the item

    def start(number: int) -> None:
        crew[number] = remote.remote({**_config_of(config, number, workers), "device": config.device}, expected)
        busy[crew[number].ready.remote()] = (number, None)

    todo, deaths, left, patience = iter(payloads), 0, True, START_SECONDS
    try:
        for number in range(workers):
            start(number)
        while left or any(item is not None for _, item in busy.values()):
            answered = ray.wait(list(busy), timeout=patience)[0]
            if not answered:
                raise EcholabError(f"no worker started in {patience} s: has the Ray cluster a free {kind.upper()}?")
            number, item = busy.pop(answered[0])
            try:
                result, patience = ray.get(answered[0]), None
            except ray.exceptions.RayError as e:
                deaths += 1
                if item is not None:
                    yield item, EcholabError(f"its worker died: {type(e).__name__}")
                if deaths >= MAX_DEATHS:
                    raise EcholabError(
                        f"{deaths} workers in a row died before they did anything: is there memory enough?"
                    ) from None
                ray.kill(crew[number])
                start(number)
                continue
            if item is not None:
                deaths = 0
                yield item, result
            elif result is not None:
                raise EcholabError(f"a worker cannot load the model: {result}")
            payload = next(todo, None)
            left = payload is not None
            if payload is not None:
                busy[crew[number].work.remote(payload[1])] = (number, payload[0])
    finally:
        for actor in crew.values():
            ray.kill(actor)


def _places(cluster: Mapping[str, float], workers: int | None) -> tuple[str, int]:
    """What each actor takes one of, and how many actors: no more than the cluster has room for."""
    kind, most = ("gpu", cluster["GPU"]) if cluster.get("GPU") else ("cpu", cluster.get("CPU", 1))
    most = max(1, int(most))
    return kind, min(workers or (most if kind == "gpu" else max(1, most // 2)), most)
