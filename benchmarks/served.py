"""A gunicorn or uvicorn that serves one of `applications`, asked by threads of this process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from applications import APPLICATIONS, ARENAS, COLLECTING, PATHS, PREPARED

from page_primer.processes import family


class Server:
    """A server that answers, and what it is asked."""

    def __init__(self, master: int, port: int, workers: int, paths: Sequence[str]) -> None:
        self.master, self.port, self.count, self.paths = master, port, workers, paths

    def ask(self, path: str = "/") -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        if b" 200 " not in answer[:20] or b"<li>" not in answer:
            raise SystemExit(f"the application answers {answer[:200]!r}")
        return answer

    def ask_many(self, count: int, tick: Callable[[], object] | None = None) -> None:
        """`count` requests a worker, each path in turn, as many at a time as there are workers."""

        def work() -> None:
            for number in range(count):
                self.ask(self.paths[number % len(self.paths)])

        threads = [threading.Thread(target=work) for _ in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while tick and thread.is_alive():
                tick()
                thread.join(0.5)
            thread.join()

    def workers(self, but_not: Sequence[int] = ()) -> list[int]:
        """Wait until all of them are there and something answers."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with contextlib.suppress(OSError, AssertionError):
                self.ask()
                found = [pid for pid in family(self.master)[1:] if not _is_tracker(pid)]
                if len(found) == self.count and not set(found) & set(but_not):
                    return found
            time.sleep(0.1)
        raise SystemExit("the server does not answer")


def _is_tracker(pid: int) -> bool:
    """Whether it is the process that multiprocessing has beside spawned workers."""
    return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _command(
    server: str, workers: int, port: int, log: str, *, primed: bool, preload: bool
) -> list[str]:
    """A server's module and its arguments."""
    if server == "uvicorn":
        by_us = "page_primer.integrations.uvicorn:create_app"
        return [
            "uvicorn", "--workers", str(workers), "--port", str(port), "--log-level", "warning",
            "--interface", "wsgi", *(["--factory", by_us] if primed else ["served:application"]),
        ]  # fmt: skip
    return [
        "gunicorn", "--workers", str(workers), "--bind", f"127.0.0.1:{port}", "--log-file", log,
        "--timeout", "120", *(["--preload"] if preload else []),
        *(["-c", "python:page_primer.integrations.gunicorn_conf"] if primed else []),
        "served:application",
    ]  # fmt: skip


@contextlib.contextmanager
def serve(  # noqa: PLR0913  # each is a choice that a benchmark offers
    directory: str,
    application: str,
    settings: dict[str, str] | None,
    workers: int,
    *,
    preload: bool,
    collect: bool = False,
    run: Sequence[str] = (),
    python: str = sys.executable,
    server: str = "gunicorn",
    wrapper: Sequence[str] = (),
) -> Iterator[Server]:
    """A server whose workers have answered.

    Args:
        settings: page-primer's, as environment; None: without page-primer.
        collect: a full collection at every fiftieth request of a worker, as a process that lives
            long does now and then.
        run: options of `page-primer run`, which then starts it.
        wrapper: a command that runs it, in its own place.
    """
    write(directory, application, python, collect=collect)
    primed = settings is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module = _command(server, workers, port, f"{directory}/log", primed=primed, preload=preload)
    command = [*(["-m", "page_primer", "run", *run, "--", python] if run else []), "-m", *module]
    process = subprocess.Popen(
        [*wrapper, python, *command], cwd=directory, env=environment(settings),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        found = Server(process.pid, port, workers, PATHS.get(application, ("/",)))
        found.workers()
        found.ask_many(20)  # every worker has answered
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def write(directory: str, application: str, python: str, *, collect: bool = False) -> None:
    """Write served.py, which has the application, and what that needs; others may run it, too."""
    os.chmod(directory, 0o777)
    source = APPLICATIONS[application] + (COLLECTING if collect else "") + ARENAS
    Path(directory, "served.py").write_text(source)
    if application in PREPARED:
        subprocess.run([python, "served.py"], cwd=directory, check=True)


def environment(settings: dict[str, str] | None) -> dict[str, str]:
    """A server's: with page-primer's settings, or None, without it."""
    ours = {} if settings is None else {"PAGE_PRIMER_APP": "served:application", **settings}
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", **ours}


def faults(pid: int) -> int:
    """Minor page faults so far."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])
