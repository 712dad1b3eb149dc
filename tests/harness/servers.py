"""Real servers under test: started on a free port, asked over HTTP, and looked at from outside."""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import re
import signal
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path

import gunicorn.config

from harness import outside
from harness.kernel_log import watch

# Since gunicorn 25.1; the tests' servers would share one.
NO_CONTROL_SOCKET = (
    ["--no-control-socket"] if "control_socket_disable" in gunicorn.config.make_settings() else []
)


def patient_uvicorn():
    """Options for uvicorn, which ends a worker that does not answer for five seconds, as one may on
    a busy machine; 0.37 and newer can be told to wait."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        release = tuple(map(int, metadata.version("uvicorn").split(".")[:2]))
        return ["--timeout-worker-healthcheck", "600"] if release >= (0, 37) else []
    return []


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def children(pid):
    """The processes that a process has, whichever of its threads has started them."""
    found, again = None, _children(pid)
    while found != again:  # while one ends, the kernel may leave out another (proc(5))
        found, again = again, _children(pid)
    for child in found:
        watch(child)
    return sorted(found)


def _children(pid):
    found = set()
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError):  # the thread ends, or the process has ended
            found |= set(map(int, Path(path).read_text().split()))
    return found


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s+(\w+)$", status, re.MULTILINE)
    return bool(int(caught, 16) >> number - 1 & 1)


def wait_for(condition, what, seconds=120):  # a busy machine takes its time
    end = time.monotonic() + seconds
    while (asked := time.monotonic()) < end:
        with contextlib.suppress(OSError, StopIteration, ValueError):  # ended meanwhile
            if condition():
                return
        # Looks take long themselves: what is waited for is to have the processor.
        time.sleep(min(0.5, max(0.05, 2 * (time.monotonic() - asked))))
    raise AssertionError(f"waited {seconds} s for {what}")


def check(pids, locked=True):
    """All attainable .text is on huge pages in each process; returns the measurements."""
    texts = [outside.text_of(pid) for pid in pids]
    for text in texts:
        text.require_huge()
        assert text.locked or not locked, text
    return texts


def show_after(failure, log):
    """What the server had said, for a test that failed."""
    if failure is not None:
        print("\n".join(line[:1000] for line in log.splitlines()[-80:]))


def get(port, path="/", seconds=10):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


class Server:
    """A command that serves HTTP on a port, with its output in a file."""

    def __init__(self, directory, port, *command, env=None):
        self.directory, self.port = Path(directory), port
        self.output = open(self.directory / "output", "wb")
        self.process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=self.output,
            stderr=self.output, env={**os.environ, **(env or {})},
        )  # fmt: skip

    def __enter__(self):
        def answers():
            assert self.process.poll() is None, self.log()
            return self.get()

        wait_for(answers, "the server")
        return self

    def __exit__(self, kind=None, *_):
        show_after(kind, self.log())
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(120)  # a busy machine takes its time
        finally:
            for pid in [*self.family()[1:], *([self.pid] if self.process.poll() is None else [])]:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self.output.close()

    @property
    def pid(self):
        return self.process.pid

    def family(self):
        """The server's process and all that descend from it."""
        found = [self.pid]
        for pid in found:
            found += children(pid)
        return found

    def log(self):
        return (self.directory / "output").read_text()

    def get(self, path="/"):
        return get(self.port, path)
