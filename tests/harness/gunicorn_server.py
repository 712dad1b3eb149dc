"""A real gunicorn under test, with its log in a file."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from harness.servers import (
    NO_CONTROL_SOCKET,
    catches,
    children,
    free_port,
    get,
    show_after,
    wait_for,
)

CONF = "python:page_primer.integrations.gunicorn_conf"

# For gunicorn.conf.py. Each worker that ends collects garbage several times over, among all that
# the master has loaded: more than half of what a re-fork costs. Of what is frozen the collector
# looks at nothing.
FROZEN = """
import gc
def when_ready(server):
    gc.freeze()
"""

APP = """
import os
def app(environ, start_response):
    if environ["PATH_INFO"] == "/late":
        import ssl, decimal, sqlite3
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
"""


class Gunicorn:
    """A gunicorn serving APP on a free port, with its log in a file."""

    def __init__(self, python, directory, *options, conf=CONF, env=None, app=APP, wrapper=()):
        self.directory = Path(directory)
        (self.directory / "served.py").write_text(app)
        self.log_file = self.directory / "gunicorn.log"
        self.pid_file = self.directory / "gunicorn.pid"
        self.port = free_port()
        conf_option = ["-c", conf] if conf else []
        command = [
            *wrapper, python, "-m", "gunicorn", *conf_option, "--bind", f"127.0.0.1:{self.port}",
            "--pid", str(self.pid_file), "--log-file", str(self.log_file), "--log-level", "debug",
            *NO_CONTROL_SOCKET, *options, "served:app",
        ]  # fmt: skip
        self.output = open(self.directory / "output", "wb")
        self.process = subprocess.Popen(
            command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=self.output,
            stderr=self.output, env={**os.environ, **(env or {})},
        )  # fmt: skip

    def __enter__(self):
        try:
            wait_for(lambda: self.get() and self.master, "gunicorn")
        except AssertionError as error:
            raise AssertionError(self.log()) from error
        return self

    def __exit__(self, kind=None, *_):
        show_after(kind, self.log())
        # After a USR2 that a test did not see through there are two masters.
        for path in self.directory.glob("gunicorn.pid*"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self.output.close()

    @property
    def master(self):
        return int(self.pid_file.read_text())

    @property
    def workers(self):
        return children(self.master)

    def log(self):
        text = self.log_file.read_text() if self.log_file.exists() else ""
        return text + (self.directory / "output").read_text()

    def lines(self, level):
        """page-primer's lines of a level: (pid, message)."""
        pattern = rf"\[(\d+)\] \[{level}\] page-primer: (.*)"
        return [(int(pid), message) for pid, message in re.findall(pattern, self.log())]

    def get(self, path="/"):
        return get(self.port, path)

    def wait_for_workers(self, count, but_not=()):
        def there():
            found = self.workers
            new = not set(found) & set(but_not)
            return len(found) == count and new and all(map(has_begun, found))

        wait_for(there, f"{count} new workers")
        for _ in range(3 * count):
            self.get()

    def wait_until_each_answered(self):
        """Until every worker has answered a request; the application's answer is its process's."""
        answered = set()

        def ask():
            answered.add(int(self.get()))
            return answered >= set(self.workers)

        wait_for(ask, "an answer of each worker")

    def wait_until_settled(self, count):
        """Until there are so many workers, and the same ones a second later."""

        def settled():
            before = self.workers
            time.sleep(1)
            return len(before) == count and self.workers == before

        wait_for(settled, f"{count} settled workers")


def has_begun(worker):
    """Whether a worker is past its first hook, post_fork: it handles SIGABRT then, which the master
    never does (gunicorn/workers/base.py, init_signals())."""
    return catches(worker, signal.SIGABRT)


def require_no_failure(server):
    log = server.log()
    assert "Traceback" not in log, log
    assert "SIGSEGV" not in log, log
    assert "SIGBUS" not in log, log
    assert "SIGILL" not in log, log
