"""What a gunicorn server's workers take of memory, unprimed and primed, or with and without `heap`
and `freeze`.

    python benchmarks/memory.py --code [--application small|arrays|django|flask] [--aligned PYTHON]
    python benchmarks/memory.py        [--application ...] [--collect]
                                both:  [--workers N] [--requests N] [--rounds N] [--json]

Each variant is a server of its own, preloaded or not; every round runs all of them in turns, and
printed are medians. After so many requests a worker, from smaps and /proc/PID/stat:

    PSS tree    of the master and its workers, together: what the server takes of the machine
    a worker    that, divided by the number of workers
    RSS, PSS, private, shared    of a worker, the mean; shared is resident and other processes' too
    locked      of what is locked the worker's share (smaps' Locked)
    huge        of a worker's private anonymous memory, what is on huge pages
    faults      minor page faults of a worker up to the first answer, and a request from then on

--code is about what is moved and locked, with the defaults, with images in the temporary directory
(TMPDIR). `small` is a WSGI application of the standard library, `arrays` loads numpy and pandas
(without pyarrow, unless --application pyarrow). --aligned names an interpreter that `page-primer
align` was run on, with the same packages. In a container: run this under one, with the virtual
environment and TMPDIR where the overlay is.

Without --code, code is not moved and not locked (PAGE_PRIMER_REMAP=0, PAGE_PRIMER_MLOCK=0): that is
about the heap. `plain` is without page-primer, `page-primer` with it and neither `heap` nor
`freeze`: its modules take two megabytes. With --collect each worker runs a full collection at
every fiftieth request, as
a process that lives long does now and then. Django is not among page-primer's own extras:
`pip install django`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from page_primer.kernel import smaps
from page_primer.processes import family

DJANGO = """
import django
from django.conf import settings
settings.configure(
    SECRET_KEY="x", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, DEBUG=False,
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions",
                    "django.contrib.admin", "django.contrib.messages"],
    MIDDLEWARE=["django.middleware.common.CommonMiddleware",
                "django.contrib.sessions.middleware.SessionMiddleware",
                "django.contrib.auth.middleware.AuthenticationMiddleware"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
)
django.setup()
from django.contrib.auth.models import Group
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.template import engines
from django.urls import path
import django.contrib.admin.sites, django.forms.models, django.core.mail

template = None
ready = False

def index(request):
    global template, ready
    if not ready:  # a connection of its own for each worker
        call_command("migrate", verbosity=0)
        Group.objects.bulk_create(Group(name=f"group {i}") for i in range(50))
        template = engines["django"].from_string(
            "{% for g in groups %}<li>{{ g.pk }}: {{ g.name|upper }}</li>{% endfor %}")
        ready = True
    groups = Group.objects.filter(name__contains="1").order_by("name")
    return HttpResponse(template.render({"groups": groups}))

urlpatterns = [path("", index)]
application = get_wsgi_application()
"""

FLASK = """
import sqlite3
from flask import Flask, render_template_string
application = Flask(__name__)
connection = None

@application.get("/")
def index():
    global connection
    if connection is None:
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        connection.execute("create table t (id integer, name text)")
        connection.executemany("insert into t values (?, ?)", [(i, f"g {i}") for i in range(50)])
    rows = connection.execute("select id, name from t where name like '%1%' order by name")
    return render_template_string(
        "{% for i, n in rows %}<li>{{ i }}: {{ n|upper }}</li>{% endfor %}", rows=rows.fetchall())
"""

SMALL = """
import json, sqlite3, hashlib, decimal, logging, urllib.parse
def application(environ, start_response):
    body = json.dumps({"<li>": hashlib.sha256(b"x" * 1000).hexdigest()}).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

ARRAYS = """
import sys
sys.modules["pyarrow"] = None  # which pandas loads where it is installed
import numpy, pandas
frame = pandas.DataFrame({"group": numpy.arange(20000) % 37, "value": numpy.arange(20000.0)})
def application(environ, start_response):
    found = frame.groupby("group")["value"].agg(["mean", "std"]).sort_values("mean")
    product = numpy.linalg.inv(numpy.eye(50) + 1) @ numpy.arange(50.0)
    body = f"<li>{found.iloc[0]}{product.sum()}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

# Django's and Flask's `application` is a WSGI application; this wraps it.
COLLECTING = """
import gc
_application, _count = application, 0
def application(environ, start_response):
    global _count
    _count += 1
    if _count % 50 == 0:
        gc.collect()
    return _application(environ, start_response)
"""

APPLICATIONS = {
    "django": DJANGO, "flask": FLASK, "small": SMALL, "arrays": ARRAYS,
    "pyarrow": ARRAYS.replace('sys.modules["pyarrow"] = None', "import pyarrow"),
}  # fmt: skip
CODE_VARIANTS: dict[str, dict[str, str] | None] = {"unprimed": None, "primed": {}}
VARIANTS: dict[str, dict[str, str] | None] = {
    "plain": None,
    "page-primer": {},
    "heap=auto": {"PAGE_PRIMER_HEAP": "auto"},
    "freeze": {"PAGE_PRIMER_FREEZE": "1"},
    "heap=auto, freeze": {"PAGE_PRIMER_HEAP": "auto", "PAGE_PRIMER_FREEZE": "1"},
    "heap=auto, unshare": {"PAGE_PRIMER_HEAP": "auto", "PAGE_PRIMER_HEAP_UNSHARE": "1"},
}
COLUMNS = ("PSS tree", "RSS", "PSS", "private", "huge", "anonymous", "faults", "per request")
CODE_COLUMNS = (
    "PSS tree", "a worker", "RSS", "PSS", "private", "shared", "locked", "code huge",
)  # fmt: skip


@contextlib.contextmanager
def server(
    directory: str,
    source: str,
    settings: dict[str, str] | None,
    workers: int,
    *,
    preload: bool,
    python: str = sys.executable,
) -> Iterator[tuple[int, int]]:
    """A gunicorn that answers; its process and port."""
    Path(directory, "served.py").write_text(source)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "gunicorn", "--workers", str(workers), "--bind",
               f"127.0.0.1:{port}", "--log-file", f"{directory}/log"]  # fmt: skip
    if settings is not None:
        command += ["-c", "python:page_primer.integrations.gunicorn_conf"]
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *(["--preload"] if preload else []), "served:application"],
        cwd=directory, env={**environ, **(settings or {})},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process.pid, port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ask(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    if answer.status != 200 or b"<li>" not in body:
        raise SystemExit(f"the application answers {answer.status}, {body[:100]!r}")


def ask_many(port: int, count: int, clients: int) -> None:
    def work() -> None:
        for _ in range(count):
            ask(port)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def wait_for(port: int, master: int, workers: int) -> list[int]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError, AssertionError):
            ask(port)
            found = family(master)[1:]
            if len(found) == workers:
                return found
        time.sleep(0.1)
    raise SystemExit("the server does not answer")


def faults(pid: int) -> int:
    """Minor page faults so far."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def measure(
    source: str,
    settings: dict[str, str] | None,
    workers: int,
    requests: int,
    *,
    preload: bool,
    python: str = sys.executable,
) -> dict[str, float]:
    """One server's numbers, memory in MiB."""
    with tempfile.TemporaryDirectory(prefix="page-primer-memory-") as directory, server(
        directory, source, settings, workers, preload=preload, python=python
    ) as (master, port):  # fmt: skip
        pids = wait_for(port, master, workers)
        ask_many(port, 20, workers)  # every worker has answered
        started = [faults(pid) for pid in pids]
        ask_many(port, requests, workers)
        later = [faults(pid) for pid in pids]
        each = [smaps.read_smaps(pid) for pid in pids]
        tree = [*each, smaps.read_smaps(master)]

        def mean(*names: str) -> float:
            return sum(smaps.total(one, name) for one in each for name in names) / len(each) / 2**20

        whole = sum(smaps.total(one, "Pss") for one in tree) / 2**20
        return {
            "PSS tree": whole,
            "a worker": whole / workers,
            "shared": mean("Shared_Clean", "Shared_Dirty"),
            "locked": mean("Locked"),
            "code huge": mean("ShmemPmdMapped", "FilePmdMapped"),
            "RSS": mean("Rss"),
            "PSS": mean("Pss"),
            "private": mean("Private_Clean", "Private_Dirty"),
            "huge": mean("AnonHugePages"),
            "anonymous": mean("Anonymous"),
            "faults": statistics.mean(started),
            "per request": (sum(later) - sum(started)) / (requests * workers),
        }


def heap_runs(source: str, given: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """One round of the variants of `heap` and `freeze`: titles and numbers."""
    off = {"PAGE_PRIMER_REMAP": "0", "PAGE_PRIMER_MLOCK": "0"}
    for preload in (False, True):
        for name, settings in VARIANTS.items():
            if not preload and ("freeze" in name or "unshare" in name):
                continue  # nothing is inherited
            settings = None if settings is None else {**off, **settings}
            title = f"{'preloaded' if preload else 'each its own'}: {name}"
            yield title, measure(
                source, settings, given.workers, given.requests, preload=preload
            )  # fmt: skip


def code_runs(source: str, given: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """One round of unprimed and primed: titles and numbers."""
    pythons = {"": sys.executable, **({"aligned, ": given.aligned} if given.aligned else {})}
    with tempfile.TemporaryDirectory(prefix="page-primer-memory-") as images:
        for prefix, python in pythons.items():
            for name, settings in CODE_VARIANTS.items():
                if settings is not None:
                    settings = {"PAGE_PRIMER_IMAGE_DIR": f"{images}/images", **settings}
                yield f"{prefix}{name}", measure(
                    source, settings, given.workers, given.requests, preload=given.preload,
                    python=python,
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--code", action="store_true", help="what is moved and locked")
    parser.add_argument("--aligned", metavar="PYTHON", help="with --code: aligned, too")
    parser.add_argument("--preload", action="store_true", help="with --code: load it in the master")
    parser.add_argument("--application", choices=APPLICATIONS, default="django")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=250, help="a worker")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="full collections, too")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    source = APPLICATIONS[given.application] + (COLLECTING if given.collect else "")
    runs: dict[str, list[dict[str, float]]] = {}
    variants, columns = (code_runs, CODE_COLUMNS) if given.code else (heap_runs, COLUMNS)
    for _ in range(given.rounds):
        for title, numbers in variants(source, given):
            runs.setdefault(title, []).append(numbers)
    table = {
        title: {column: statistics.median(run[column] for run in found) for column in columns}
        for title, found in runs.items()
    }
    if given.json:
        print(json.dumps(table, indent=2))
        return
    print(f"{given.application}, {given.workers} workers, {given.requests} requests each; MiB")
    print(f"{'':34}" + "".join(f"{column:>12}" for column in columns))
    for title, row in table.items():
        print(f"{title:34}" + "".join(f"{row[column]:12.1f}" for column in columns))


if __name__ == "__main__":
    main()
