"""Worker processes that can be killed: what hangs or dies in one costs its own item and nothing else.

A server process loads the function once and forks the workers from there. So a fresh worker costs milliseconds, none is
forked from a process that has threads, and a user's script needs no `if __name__ == "__main__"`. Workers run in their main
thread. When we die, the server notices, kills its workers and ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from echolab.errors import EcholabError

CHECK_SECONDS = 0.1  # between two looks at an item that should have ended
BATCH_SECONDS, BATCH_ITEMS = 0.05, 256  # items travel together, so that cheap ones are not eaten by round trips
PATIENCE = 0.3  # seconds after which an item is late: another worker takes the place of its worker at once
FAIR = 0.1  # of the timeout: what an item has of a processor at least, however busy the machine, up to PATIENT timeouts
PATIENT = 10
LATE = 24  # late items that run beside the normal work
LATE_NICE = 5, 19  # priority of as many of them as there are workers, and of the others
MEMORY_GB = 4.0  # address space of a worker
LOAD_SECONDS = 120.0  # for the module that a task names, with all that it imports
STILLBORN = 5  # workers in a row that end before they did anything


@dataclass(frozen=True)
class Outcome:
    """What became of one item: `ok` with the function's value, `timeout`, or `error` with the reason."""

    status: str
    value: Any = None
    reason: str = ""


@dataclass(frozen=True)
class Task:
    """`module:name` of a factory, called once with `arguments` (JSON); it gives the function of one item. `path` is
    where modules are looked for, before Python's own path."""

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    path: Sequence[str] = ()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    task: Task, items: Iterable[Any], *, workers: int | None = None, timeout: float = 5.0, memory_gb: float = MEMORY_GB
) -> Generator[tuple[Any, Outcome], None, None]:
    """Each item with its outcome, as they come. `items` is read only as far as workers have room, and nothing is started
    before the first one. An item has `timeout` seconds by the clock, longer only where a busy machine gave it next to nothing
    of them; one that is late already no longer has a core of its own."""
    if not hasattr(socket, "send_fds"):
        raise EcholabError("worker processes need a system with fork, as Linux and macOS are")
    items = iter(items)
    first = next(items, None)
    if first is None:
        return
    pool = Pool(task, workers or cores(), timeout, memory_gb)
    try:
        pool.queue.append(first)
        yield from pool.results(items)
    finally:
        pool.close()


@dataclass
class _Worker:
    serial: int
    link: Connection
    pid: int | None = None  # once it is ready
    todo: deque[Any] = field(default_factory=deque)
    since: float = 0.0  # when the first of `todo` began
    cpu: float = 0.0  # seconds of a processor that it had used when the batch began
    late: bool = False

    def spent(self, now: float) -> float:
        """Seconds that its item has had. Where it waits for nothing but a processor, only those that it had one."""
        state, cpu = _processor(self.pid)
        return cpu - self.cpu if state == "R" else now - self.since


class Pool:
    """Workers that stay for several calls of `results`; `close` ends them. Our side: who works on what since when."""

    def __init__(self, task: Task, workers: int, timeout: float = 5.0, memory_gb: float = MEMORY_GB):
        self.count, self.timeout, self.patience = workers, timeout, min(PATIENCE, timeout)
        self.queue: deque[Any] = deque()
        self.workers: dict[int, _Worker] = {}
        self.serial = self.stillborn = 0
        self.born, self.loaded = time.monotonic(), False
        self.batch, self.seconds = 1, 0.0
        self.said = b""
        self.done: list[tuple[Any, Outcome]] = []
        self.control, theirs = socket.socketpair()
        self.select = selectors.DefaultSelector()
        self.select.register(self.control, selectors.EVENT_READ)
        call = [theirs.fileno(), [*task.path, *sys.path], task.factory, dict(task.arguments), memory_gb]
        code = "import json, sys; a = json.loads(sys.argv[1]); sys.path[:] = a[1]; from echolab.workers import serve; serve(*a)"
        self.server = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(call)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a user's function prints is no part of our output
            start_new_session=True,  # Ctrl-C is ours
        )
        theirs.close()

    def results(self, items: Iterator[Any]) -> Iterator[tuple[Any, Outcome]]:
        """Each item with its outcome, as they come. Read it to its end before the next call."""
        while True:
            self._feed(items)
            if not self.queue and not any(w.todo for w in self.workers.values()):
                return
            self._staff()
            patience = self._patience()
            if not any(w.pid for w in self.workers.values()):
                patience = LOAD_SECONDS if patience is None else min(patience, LOAD_SECONDS)
                if not self.loaded and time.monotonic() - self.born > LOAD_SECONDS:
                    raise EcholabError(f"no worker is ready after {LOAD_SECONDS:g} s: does a module hang as it is imported?")
            else:
                self.loaded = True
            for key, _ in self.select.select(patience):
                if key.data is None:
                    self._listen()
                elif key.data.serial in self.workers:  # not buried just now
                    self._hear(key.data)
            self._watch()
            done, self.done = self.done, []
            yield from done

    def close(self) -> None:
        """The server ends, and its workers with it, when the control connection does."""
        self.control.close()
        for w in self.workers.values():
            w.link.close()
        self.select.close()
        try:
            self.server.wait(10)
        except subprocess.TimeoutExpired:  # it still loads a module that hangs
            self.server.kill()
            self.server.wait()

    def _feed(self, items: Iterator[Any]) -> None:
        idle = [w for w in self.workers.values() if w.pid and not w.todo and not w.late]
        for w in idle:
            while self.queue and len(w.todo) < self.batch:
                w.todo.append(self.queue.popleft())
            w.todo.extend(islice(items, self.batch - len(w.todo)))
            if not w.todo:
                break
            w.since, w.cpu = time.monotonic(), _processor(w.pid)[1]
            with contextlib.suppress(OSError):  # it died: the server will say so
                w.link.send(list(w.todo))
        if not self.queue:  # is there more to do? Only the next item tells
            self.queue.extend(islice(items, 1))

    def _staff(self) -> None:
        """As many workers as there shall be at once. Where too many are late, these count too."""
        late = sum(w.late for w in self.workers.values())
        wanted = self.count - max(0, late - LATE)
        for _ in range(wanted - (len(self.workers) - late)):
            ours, theirs = socket.socketpair()
            self.serial += 1
            w = self.workers[self.serial] = _Worker(self.serial, Connection(ours.detach()))
            self.select.register(w.link, selectors.EVENT_READ, w)
            try:
                socket.send_fds(self.control, [b"fork %d 0\n" % w.serial], [theirs.fileno()])
            except OSError:
                self._listen()  # why the server is gone
            finally:
                theirs.close()

    def _patience(self) -> float | None:
        """Seconds until somebody has to be looked after."""
        now = time.monotonic()
        ends = (w.since + (self.timeout if w.late else self.patience) - now for w in self.workers.values() if w.todo)
        return min((end if end > 0 else CHECK_SECONDS for end in ends), default=None)

    def _hear(self, w: _Worker) -> None:
        """Results of one worker."""
        try:
            while w.link.poll():
                result = w.link.recv()
                if w.pid is None:
                    w.pid = result
                    continue
                self.stillborn = 0
                if not w.todo:
                    continue  # of a late one that ran on, before it was killed
                now = time.monotonic()
                self.done.append((w.todo.popleft(), Outcome(*result)))
                if w.late:
                    self._tell("kill", w)
                else:
                    self._pace(now - w.since)
                w.since = now
        except (EOFError, OSError):
            self._forget(w)

    def _forget(self, w: _Worker) -> None:
        with contextlib.suppress(KeyError):
            self.select.unregister(w.link)

    def _pace(self, seconds: float) -> None:
        """The size of a batch, from what items took lately."""
        self.seconds += (seconds - self.seconds) * 0.05
        self.batch = max(1, min(int(BATCH_SECONDS / max(self.seconds, 1e-9)), BATCH_ITEMS, 2 * self.batch + 1))

    def _watch(self) -> None:
        now = time.monotonic()
        for w in list(self.workers.values()):
            if not w.todo or now - w.since < self.patience:
                continue
            spent = w.spent(now)
            if not w.late and spent >= self.patience:
                while len(w.todo) > 1:
                    self.queue.appendleft(w.todo.pop())
                late = sum(other.late for other in self.workers.values())
                w.late = True
                self._tell("nice", w, LATE_NICE[late >= self.count])
            if now - w.since >= self.timeout and (spent >= FAIR * self.timeout or now - w.since >= PATIENT * self.timeout):
                w.late = True
                self.done.append((w.todo.popleft(), Outcome("timeout", reason=f"no result after {self.timeout:g} s")))
                self._tell("kill", w)

    def _tell(self, what: str, w: _Worker, value: int = 0) -> None:
        with contextlib.suppress(OSError):
            self.control.sendall(b"%s %d %d\n" % (what.encode(), w.serial, value))

    def _listen(self) -> None:
        """What the server says: a worker has died, or why the server itself ends."""
        try:
            data = self.control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            raise EcholabError("the worker processes' server has died: run the command again, it goes on where it was")
        *lines, self.said = (self.said + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "failed" in message:
                raise EcholabError(message["failed"])
            self._bury(self.workers.pop(message["dead"]), message["status"])

    def _bury(self, w: _Worker, status: int) -> None:
        """A worker has died, by our hand or not. What it was doing is an error; the rest of its batch others do."""
        self._hear(w)
        self._forget(w)
        w.link.close()
        if w.todo:
            self.done.append((w.todo.popleft(), Outcome("error", reason=_cause(status))))
            self.queue.extendleft(reversed(w.todo))
        elif not w.late:
            self.stillborn += 1
            if self.stillborn >= STILLBORN:
                raise EcholabError(f"worker processes end at once: {_cause(status)}")


def _processor(pid: int | None) -> tuple[str, float]:
    """State of a process, and seconds of a processor that it has used; as of one that waits, where nothing tells."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            facts = f.read().rpartition(b")")[2].split()
    except OSError:
        return "S", 0.0
    return facts[0].decode(), (int(facts[11]) + int(facts[12])) / os.sysconf("SC_CLK_TCK")


def _cause(status: int) -> str:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"its worker was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return f"its worker ended with exit code {os.waitstatus_to_exitcode(status)}"


# The server, and the workers that it forks.


def serve(control: int, path: Sequence[str], factory: str, arguments: Mapping[str, Any], memory_gb: float) -> None:
    """The server's life: load the function, then fork, kill and bury workers until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent(signal.SIGKILL)  # a module may hang while it is loaded
    link = socket.socket(fileno=control)
    try:
        module, _, name = factory.partition(":")
        function = getattr(import_module(module), name)(**arguments)
    except BaseException as e:
        link.sendall(json.dumps({"failed": _said(e)}).encode() + b"\n")
        return
    _die_with_parent(0)  # from here on we see that the other side is gone, and have workers to kill
    gc.freeze()  # what is loaded stays shared with the workers
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    pids: dict[int, int] = {}
    with selectors.DefaultSelector() as select, contextlib.suppress(OSError):
        select.register(link, selectors.EVENT_READ)
        select.register(woken, selectors.EVENT_READ)
        said, handles, more = b"", deque[int](), True
        while more:
            for key, _ in select.select():
                if key.fileobj is woken:
                    woken.recv(4096)
                    _reap(pids, link)
                    continue
                data, received, _, _ = socket.recv_fds(link, 1 << 16, 64)
                handles.extend(received)
                *orders, said = (said + data).split(b"\n")
                for order in orders:
                    what, serial, value = order.split()
                    if what == b"fork":
                        pids[int(serial)] = _fork(function, handles.popleft(), memory_gb, (link, woken, wake))
                    elif pid := pids.get(int(serial)):
                        _kill(pid) if what == b"kill" else os.setpriority(os.PRIO_PROCESS, pid, int(value))
                more = more and bool(data)
    signal.set_wakeup_fd(-1)
    for pid in pids.values():
        _kill(pid)
        os.waitpid(pid, 0)


def _kill(worker: int) -> None:
    """With every process that the function has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)


def _reap(pids: dict[int, int], link: socket.socket) -> None:
    for serial, pid in list(pids.items()):
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            del pids[serial]
            _kill(pid)
            link.sendall(json.dumps({"dead": serial, "status": ended[1]}).encode() + b"\n")


def _fork(function: Callable[[Any], Any], handle: int, memory_gb: float, ours: Sequence[socket.socket]) -> int:
    if pid := os.fork():
        os.close(handle)
        with contextlib.suppress(OSError):  # the worker was faster
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for s in ours:
            s.close()
        _die_with_parent(signal.SIGKILL)
        _limit_memory(memory_gb)
        _work(function, Connection(handle))
    except (EOFError, OSError):  # nobody asks any more
        os._exit(0)
    finally:
        os._exit(1)


def _work(function: Callable[[Any], Any], link: Connection) -> None:
    link.send(os.getpid())
    while True:
        for item in link.recv():
            try:
                result = ("ok", function(item))
            except MemoryError:
                result = ("error", None, "out of memory")
            except BaseException as e:  # also SystemExit: a verdict is missing, whatever the reason
                result = ("error", None, _said(e))
            try:
                link.send(result)
            except OSError:
                raise
            except Exception as e:  # a value that does not travel
                link.send(("error", None, _said(e)))


def _said(error: BaseException) -> str:
    if isinstance(error, EcholabError):
        return str(error)
    try:
        text = " ".join(str(error).split())[:200]
    except Exception:
        text = ""
    return f"{type(error).__name__}{': ' if text else ''}{text}"


def _limit_memory(gb: float) -> None:
    """What grows without end gets a MemoryError; and should memory run out all the same, workers die before others."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        if gb:
            resource.setrlimit(resource.RLIMIT_AS, (int(gb * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")


def _die_with_parent(by: int) -> None:
    """Linux sends us this signal when our parent dies, however it dies; 0: none."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, by)  # PR_SET_PDEATHSIG
