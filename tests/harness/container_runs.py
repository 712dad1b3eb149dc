"""What is tried in containers a few times by the tests, and hundreds of times by
tools/container_check: restarts, and starts in a memory cgroup that just fits the application."""

from __future__ import annotations

import compileall
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import page_primer
from harness.cgroup import Cgroup
from harness.gunicorn_server import Gunicorn
from harness.process import Process
from page_primer.images import names

__all__ = ["APPLICATIONS", "Left", "Start", "peak_of", "restart", "start"]

# A service that is started, forks a worker, and ends; or is killed, as by a node that is short of
# memory. What is left of it is looked at from outside.
_SERVICE = """
import os, signal, ssl, page_primer
report = page_primer.prime()
child = os.fork()
if child == 0:
    page_primer.prime()
    os._exit(0)
os.waitpid(child, 0)
print(report.interpreter.backing, flush=True)
if {killed}:
    os.kill(os.getpid(), signal.SIGKILL)
"""

_RESTART = """
import os, subprocess, sys
done = subprocess.run([sys.executable, "-c", {service!r}], stdout=subprocess.PIPE, text=True)
home = os.environ["HOME"]
paths = [os.path.join(at, name) for at, _, names in os.walk(home) for name in names]
result = done.stdout.strip(), {{path: os.lstat(path).st_blocks * 512 for path in paths}}
"""


class Left(NamedTuple):
    """What is there after a service has ended."""

    backing: str  # that its interpreter had
    size: int  # bytes
    images: int


def restart(times: int, wrapper: Sequence[str]) -> Iterator[Left]:
    """Start a service so many times, one after another; every fifth is killed, and not the last.

    Args:
        times: a multiple of five.
        wrapper: of the container, in which it has a home of its own.
    """
    env = {"HOME": "/var/tmp/home", "XDG_CACHE_HOME": "", "PYTHONDONTWRITEBYTECODE": "1"}
    with Process(sys.executable, wrapper=wrapper, env=env) as process:
        process.run("import os; os.mkdir('/var/tmp/home')")
        for number in range(times):
            service = _SERVICE.format(killed=number % 5 == 2)
            backing, sizes = process.run(_RESTART.format(service=service))
            folders = {os.path.basename(os.path.dirname(path)) for path in sizes}
            images = {name for name in folders if names.is_name(name)}
            yield Left(backing, sum(sizes.values()), len(images))


APPLICATIONS = {
    "small": "import json, sqlite3, hashlib, decimal, logging, urllib.parse, ssl\n",
    "arrays": (
        "import sys\nsys.modules['pyarrow'] = None\nimport numpy, pandas\n"
        "frame = pandas.DataFrame({'group': numpy.arange(20000) % 37})\n"
    ),
}
_ANSWER = """
import os
def app(environ, start_response):
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


class Start(NamedTuple):
    """One start of a server in a cgroup."""

    kills: int  # by the kernel, for want of memory
    peak: int  # bytes


def _serve(
    directory: Path, application: str, cgroup: Cgroup, workers: int, backing: str | None
) -> None:
    env = {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env["PAGE_PRIMER_IMAGE_DIR"] = f"{directory}/images"
    env["PAGE_PRIMER_BACKING"] = backing or "auto"
    options = {} if backing else {"conf": None}
    source = APPLICATIONS[application] + _ANSWER
    with Gunicorn(
        sys.executable, directory, "--workers", str(workers),
        app=source, env=env, wrapper=cgroup.wrapper, **options,
    ) as server:  # fmt: skip
        server.wait_until_each_answered()


def peak_of(directory: Path, application: str, workers: int) -> int:
    """The most memory that an unprimed server takes, bytes."""
    # As an installed package is: compiling takes memory in each process.
    compileall.compile_dir(os.path.dirname(page_primer.__file__), quiet=1)
    with Cgroup(8 << 30) as cgroup:
        _serve(directory, application, cgroup, workers, None)
        return cgroup.peak


def start(directory: Path, application: str, workers: int, backing: str, limit: int) -> Start:
    """Start a primed server in a cgroup, until each worker has answered.

    Raises:
        AssertionError: it did not come up.
    """
    with Cgroup(limit) as cgroup:
        _serve(directory, application, cgroup, workers, backing)
        return Start(cgroup.oom_kills, cgroup.peak)
