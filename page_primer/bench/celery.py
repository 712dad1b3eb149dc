"""Tasks for a Celery worker, sent and waited for by the application itself, in a process beside."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from page_primer.bench import interpreter, load
from page_primer.bench.failures import CutShort, Failure
from page_primer.bench.tree import END_SECONDS, dies_with_us

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from page_primer.bench.server import Process
# By the Python of the worker, which has the application: it answers each line of JSON with one. A
# result is waited for in the order of sending, `window` of them at a time; its own time of
# completion is not taken from the result (a worker's clock), so latencies are as the sender sees
# them.
_DRIVER = """
import json, os, sys, time
sys.path.insert(0, os.getcwd())
application, name, arguments, queue = json.loads(sys.stdin.readline())
def is_ready():
    answers = app.control.broadcast("active_queues", reply=True, timeout=0.2,
                                    limit=None if queue else 1)
    return any(not queue or queue in [one["name"] for one in found]
               for answer in answers for found in answer.values())
def forget():
    with app.connection_for_write() as connection:
        made = app.amqp.queues[queue](connection.default_channel)
        made.declare()  # or Redis's transport does not know what it is bound to
        made.delete()
        made.exchange.delete()
def send(number, window):
    sent, latencies, began = [], [], time.perf_counter()
    def wait():
        at, result = sent.pop(0)
        result.get(timeout=60)
        latencies.append(time.perf_counter() - at)
    for _ in range(number):
        if len(sent) >= window:
            wait()
        sent.append((time.perf_counter(), app.send_task(name, arguments, **where)))
    while sent:
        wait()
    return {"latencies": latencies, "seconds": time.perf_counter() - began}
where = {"queue": queue} if queue else {}
app = None
for line in sys.stdin:
    what, *numbers = json.loads(line)
    try:
        if app is None:
            from celery.app.utils import find_app
            from celery.backends.base import DisabledBackend
            app = find_app(application)
        if isinstance(app.backend, DisabledBackend):
            answer = {"error": "the application has no result backend, by which the end of a task "
                      "is seen (CELERY_RESULT_BACKEND=rpc:// gives it one)"}
        elif what == "send":
            answer = send(*numbers)
        elif what == "forget":
            answer = {"forgotten": forget()}
        else:
            answer = {"ready": is_ready()}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""
_SECONDS = 600.0  # for an answer; a worker that hangs is not waited for longer
_FORGET_SECONDS = 10.0


@dataclass(frozen=True)
class Task:
    """A task, and the application that the worker's command names."""

    python: str
    application: str
    name: str
    arguments: list[Any]

    @classmethod
    def of(cls, words: Sequence[str], command: Sequence[str], environ: Mapping[str, str]) -> Task:
        """
        Args:
            words: the task's name, and its arguments: JSON each, or text.
            command: the worker's, with -A or --app.

        Raises:
            ValueError: no application is named.
            Failure: the command is not run by a Python.
        """
        application = environ.get("CELERY_APP", "")
        for word, following in zip(command, [*command[1:], ""], strict=True):
            if word in ("-A", "--app"):
                application = following
            elif word.startswith("--app="):
                application = word.removeprefix("--app=")
        if not application:
            raise ValueError(
                f"--celery-task: `{shlex.join(command)}` names no application (-A APP)"
            )
        start = interpreter.start_of(command, environ)
        return cls(start.python, application, words[0], [_value(word) for word in words[1:]])


class Client:
    """A context: the process that sends tasks to one worker, to its queue if that has a name.

    Args:
        task: which.
        queue: a name, or the empty string.
        helpers: the ids of processes that are no part of the server.
    """

    def __init__(self, task: Task, queue: str, helpers: set[int]) -> None:
        self._task, self._queue, self._helpers = task, queue, helpers
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        process, self._process, self._unread = self._process, None, b""
        if process is not None:
            process.kill()  # nothing where it has ended
            process.wait()
            for file in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what it did not read
                    file.close()  # type: ignore[union-attr]  # PIPE
            self._helpers.discard(process.pid)

    def wait_until_ready(self, process: Process, seconds: float) -> float:
        """Wait until the worker answers; returns how many seconds that took.

        Raises:
            Failure: it ended, or stays silent.
        """
        end = process.began + seconds
        while time.monotonic() < end:
            if why := process.ended():
                raise Failure(f"the worker {why}, before it answered")
            try:
                answer = self._ask("ready")
            except CutShort as error:
                raise Failure(str(error)) from None
            if answer.get("ready"):
                return time.monotonic() - process.began
        of = f" of queue {self._queue}" if self._queue else ""
        raise Failure(f"no answer from a worker{of} within {seconds:.0f} s{process.last_words()}")

    def send(self, number: int, window: int) -> load.Load:
        """Send so many tasks, so many of them at a time, and wait for their results.

        Raises:
            CutShort: one failed.
        """
        answer = self._ask("send", number, window)
        return load.Load(answer["seconds"], tuple(sorted(answer["latencies"])))

    def forget(self) -> bool:
        """Leave nothing of the queue with the broker, if that answers."""
        try:
            self._ask("forget", seconds=_FORGET_SECONDS)
        except CutShort:
            return False
        return True

    def _ask(self, *words: str | int, seconds: float = _SECONDS) -> dict[str, Any]:
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        end, last = time.monotonic() + seconds, "no output"
        with contextlib.suppress(BrokenPipeError):  # it has ended, as is seen below
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()
        for line in self._lines(end):
            # What the application and its libraries say comes between.
            if isinstance(answer := _value(line), dict):
                if "error" in answer:
                    said = str(answer["error"]).strip().splitlines()
                    raise CutShort(f"{self._task.name}: {said[-1]}")
                return answer
            last = line.strip() or last
        over = time.monotonic() > end
        with contextlib.suppress(subprocess.TimeoutExpired):  # its output may have ended before it
            self._process.wait(0 if over else END_SECONDS)
        status = self._process.poll()
        self._end()
        if over or status is None:
            raise CutShort(f"no answer to all tasks within {seconds:.0f} s")
        raise CutShort(f"sending tasks ended with status {status}: {last}")

    def _start(self) -> None:
        task = self._task
        self._process = subprocess.Popen(
            [task.python, "-c", _DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,  # Ctrl-C is ours
            preexec_fn=dies_with_us(),
        )  # fmt: skip
        self._helpers.add(self._process.pid)
        first = json.dumps([task.application, task.name, task.arguments, self._queue])
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(first.encode() + b"\n")

    def _lines(self, end: float) -> Iterator[str]:
        """What it writes, line by line, until it ends or time is over."""
        assert self._process is not None
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                yield line.decode(errors="replace")
                continue
            left = end - time.monotonic()
            if left < 0:
                return
            if not select.select([fd], [], [], left)[0]:
                continue
            if not (read := os.read(fd, 1 << 16)):
                return
            self._unread += read


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
