"""What a gunicorn server's workers take of memory, with and without `heap` and `freeze`.

    python benchmarks/memory.py [--application django|flask] [--workers N] [--requests N]
                                [--rounds N] [--collect] [--json]

Each variant is a server of its own, preloaded or not; every round runs all of them in turns, and
printed are medians. After so many requests a worker, from smaps and /proc/PID/stat:

    PSS tree    of the master and its workers, together: what the server takes of the machine
    RSS, PSS, private    of a worker, the mean
    huge        of a worker's private anonymous memory, what is on huge pages
    faults      minor page faults of a worker up to the first answer, and a request from then on

Code is not moved and not locked (PAGE_PRIMER_REMAP=0, PAGE_PRIMER_MLOCK=0): this is about the heap.
`plain` is without page-primer, `page-primer` with it and neither `heap` nor `freeze`: its modules
take two megabytes. With --collect each worker runs a full collection at every fiftieth request, as
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
from page_primer.status import family

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

APPLICATIONS = {"django": DJANGO, "flask": FLASK}
VARIANTS: dict[str, dict[str, str] | None] = {
    "plain": None,
    "page-primer": {},
    "heap=auto": {"PAGE_PRIMER_HEAP": "auto"},
    "freeze": {"PAGE_PRIMER_FREEZE": "1"},
    "heap=auto, freeze": {"PAGE_PRIMER_HEAP": "auto", "PAGE_PRIMER_FREEZE": "1"},
    "heap=auto, unshare": {"PAGE_PRIMER_HEAP": "auto", "PAGE_PRIMER_HEAP_UNSHARE": "1"},
}
COLUMNS = ("PSS tree", "RSS", "PSS", "private", "huge", "anonymous", "faults", "per request")


@contextlib.contextmanager
def server(
    directory: str, source: str, settings: dict[str, str] | None, workers: int, *, preload: bool
) -> Iterator[tuple[int, int]]:
    """A gunicorn that answers; its process and port."""
    Path(directory, "served.py").write_text(source)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "--workers", str(workers), "--bind",
               f"127.0.0.1:{port}", "--log-file", f"{directory}/log"]  # fmt: skip
    if settings is not None:
        command += ["-c", "python:page_primer.integrations.gunicorn_conf"]
    off = {"PAGE_PRIMER_REMAP": "0", "PAGE_PRIMER_MLOCK": "0"}
    process = subprocess.Popen(
        [*command, *(["--preload"] if preload else []), "served:application"],
        cwd=directory, env={**os.environ, **off, **(settings or {})},
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
    source: str, settings: dict[str, str] | None, workers: int, requests: int, *, preload: bool
) -> dict[str, float]:
    """One server's numbers, memory in MiB."""
    with tempfile.TemporaryDirectory(prefix="page-primer-memory-") as directory, server(
        directory, source, settings, workers, preload=preload
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

        return {
            "PSS tree": sum(smaps.total(one, "Pss") for one in tree) / 2**20,
            "RSS": mean("Rss"),
            "PSS": mean("Pss"),
            "private": mean("Private_Clean", "Private_Dirty"),
            "huge": mean("AnonHugePages"),
            "anonymous": mean("Anonymous"),
            "faults": statistics.mean(started),
            "per request": (sum(later) - sum(started)) / (requests * workers),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--application", choices=APPLICATIONS, default="django")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=250, help="a worker")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="full collections, too")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    source = APPLICATIONS[given.application] + (COLLECTING if given.collect else "")
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(given.rounds):
        for preload in (False, True):
            for name, settings in VARIANTS.items():
                if not preload and ("freeze" in name or "unshare" in name):
                    continue  # nothing is inherited
                title = f"{'preloaded' if preload else 'each its own'}: {name}"
                runs.setdefault(title, []).append(
                    measure(source, settings, given.workers, given.requests,
                            preload=preload)
                )  # fmt: skip
    table = {
        title: {column: statistics.median(run[column] for run in found) for column in COLUMNS}
        for title, found in runs.items()
    }
    if given.json:
        print(json.dumps(table, indent=2))
        return
    print(f"{given.application}, {given.workers} workers, {given.requests} requests each; MiB")
    print(f"{'':34}" + "".join(f"{column:>12}" for column in COLUMNS))
    for title, row in table.items():
        print(f"{title:34}" + "".join(f"{row[column]:12.1f}" for column in COLUMNS))


if __name__ == "__main__":
    main()
