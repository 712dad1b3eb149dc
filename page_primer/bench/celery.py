"""Tasks for a Celery worker, sent and waited for by the application itself, in a process beside."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from page_primer.bench import interpreter, load
from page_primer.bench.failures import CutShort, Failure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from page_primer.bench.server import Process
# By the Python of the worker, which has the application; answers with a line of JSON.
# A result is waited for in the order of sending, `window` of them at a time; its own time of
# completion is not taken from the result (a worker's clock), so latencies are as the sender sees
# them.
_DRIVER = """
import json, os, sys, time
sys.path.insert(0, os.getcwd())
application, name, arguments, number, window, queue = json.load(sys.stdin)
from celery.app.utils import find_app
from celery.backends.base import DisabledBackend
app = find_app(application)
if isinstance(app.backend, DisabledBackend):
    print(json.dumps({"error": "the application has no result backend, by which the end of a task "
                      "is seen (CELERY_RESULT_BACKEND=rpc:// gives it one)"}))
    sys.exit()
try:
    if number < 0:
        with app.connection_for_write() as connection:
            made = app.amqp.queues[queue](connection.default_channel)
            made.declare()  # or Redis's transport does not know what it is bound to
            made.delete()
            made.exchange.delete()
        print("{}")
        sys.exit()
    if not number:
        ready, end = False, time.monotonic() + 3
        while not ready and time.monotonic() < end:
            answers = app.control.broadcast("active_queues", reply=True, timeout=0.2,
                                            limit=None if queue else 1)
            ready = any(not queue or queue in [one["name"] for one in found]
                        for answer in answers for found in answer.values())
        print(json.dumps({"ready": ready}))
        sys.exit()
    where = {"queue": queue} if queue else {}
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
    print(json.dumps({"latencies": latencies, "seconds": time.perf_counter() - began}))
except SystemExit:
    raise
except BaseException as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


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

    def wait_until_ready(
        self, process: Process, seconds: float, helpers: set[int], queue: str = ""
    ) -> float:
        """Wait until the worker (of that queue) answers; returns how many seconds that took.

        Raises:
            Failure: it ended, or stays silent.
        """
        end = process.began + seconds
        while time.monotonic() < end:
            if why := process.ended():
                raise Failure(f"the worker {why}, before it answered")
            try:
                answer = self._ask(0, 1, helpers, queue)
            except CutShort as error:
                raise Failure(str(error)) from None
            if answer.get("ready"):
                return time.monotonic() - process.began
        raise Failure(f"no answer from the worker within {seconds:.0f} s{process.last_words()}")

    def send(self, number: int, window: int, helpers: set[int], queue: str = "") -> load.Load:
        """Send tasks (to that queue), and wait for their results.

        Raises:
            CutShort: one failed.
        """
        answer = self._ask(number, window, helpers, queue)
        return load.Load(answer["seconds"], tuple(sorted(answer["latencies"])))

    def forget(self, queue: str, helpers: set[int]) -> None:
        """Leave nothing of the queue with the broker."""
        with contextlib.suppress(CutShort):
            self._ask(-1, 1, helpers, queue)

    def _ask(self, number: int, window: int, helpers: set[int], queue: str = "") -> dict[str, Any]:
        asked = json.dumps([self.application, self.name, self.arguments, number, window, queue])
        status, out = load.run_helper([self.python, "-c", _DRIVER], helpers, asked)
        lines = out.strip().splitlines() or ["no output"]
        # What the application's libraries say as they are taken down may come behind the answer.
        answer = next(
            (found for line in reversed(lines) if isinstance(found := _value(line), dict)), None
        )
        if answer is None:
            raise CutShort(f"sending tasks ended with status {status}: {lines[-1]}")
        if "error" in answer:
            raise CutShort(f"{self.name}: {answer['error']}")
        return answer


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
