"""A Celery worker whose tasks ask one of `applications`, through queues in its directory."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from served import environment, write

from page_primer.processes import family

# Queues and results are files: no other server is needed, and none is measured.
_TASKS = """
import os
from celery import Celery
queue = os.path.dirname(os.path.abspath(__file__)) + "/queue"
app = Celery("tasks", broker="filesystem://", backend="file://" + queue)
app.conf.update(
    broker_transport_options={"data_folder_in": queue, "data_folder_out": queue,
                              "control_folder": queue + "/control"},
    broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1,
    imports=["page_primer.integrations.celery"] if "PAGE_PRIMER_APP" in os.environ else [],
)
application = None

@app.task
def ask(path):
    global application
    if application is None:  # each process its own, as where a task's module imports late
        from served import application
    body = b"".join(application({"PATH_INFO": path, "REQUEST_METHOD": "GET"}, lambda *_: None))
    return os.getpid(), b"<li>" in body
"""


class Worker:
    """As a Server of `served`: a worker, and the children of its pool."""

    def __init__(self, process: subprocess.Popen[bytes], tasks: Any, count: int) -> None:
        self._process, self._tasks = process, tasks
        self.master, self.count = process.pid, count

    def ask_many(self, count: int) -> None:
        """`count` tasks a child, as many at a time as there are children."""
        for _ in range(count):
            self._ask()

    def _ask(self) -> set[int]:
        """A task for each child; returns which of them answered."""
        sent = [self._tasks.ask.delay("/") for _ in range(self.count)]
        end = time.monotonic() + 300  # each may have to import its application first
        while not all(result.ready() for result in sent):
            if self._process.poll() is not None:
                raise SystemExit("the worker has ended")
            if time.monotonic() > end:
                raise SystemExit("the worker does not answer")
            time.sleep(0.02)
        answers = [result.get() for result in sent]
        if not all(good for _, good in answers):
            raise SystemExit("the application answers something else")
        return {pid for pid, _ in answers}

    def workers(self) -> list[int]:
        """Wait until each has answered."""
        seen: set[int] = set()
        end = time.monotonic() + 120
        while time.monotonic() < end:
            seen |= self._ask()
            found = family(self.master)[1:]
            if len(found) == self.count and set(found) <= seen:
                return found
        raise SystemExit(f"of {self.count} children {len(seen)} answer")


@contextlib.contextmanager
def work(
    directory: str,
    application: str,
    settings: dict[str, str] | None,
    workers: int,
    python: str = sys.executable,
    wrapper: Sequence[str] = (),
) -> Iterator[Worker]:
    """A worker whose children have answered; arguments are those of served.serve()."""
    write(directory, application, python)
    Path(directory, "tasks.py").write_text(_TASKS)
    for name in ("queue", "queue/control"):
        Path(directory, name).mkdir()
        os.chmod(f"{directory}/{name}", 0o777)
    command = ["-m", "celery", "-A", "tasks", "worker", "-c", str(workers), "-l", "WARNING"]
    command += ["--without-gossip", "--without-mingle"]
    with open(f"{directory}/log", "wb") as log:
        process = subprocess.Popen(
            [*wrapper, python, *command], cwd=directory,
            env={**environment(settings), "C_FORCE_ROOT": "1"}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    sys.path.insert(0, directory)
    try:
        worker = Worker(process, importlib.import_module("tasks"), workers)
        worker.workers()
        yield worker
    finally:
        sys.path.remove(directory)
        sys.modules.pop("tasks", None)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
