"""What a server's workers take of memory, unprimed and primed, or with and without `heap` and
`freeze`.

    python benchmarks/memory.py --code [--application small|arrays|torch|django|flask]
                                       [--server gunicorn|uvicorn|celery] [--aligned PYTHON]
                                       [--container] [--workers N,N,...]
    python benchmarks/memory.py        [--application ...] [--collect] [--workers N]
                                both:  [--requests N] [--rounds N] [--json FILE]

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
align` was run on, with the same packages. --container runs the servers as in one with Docker's
defaults, as a user without privileges: overlay file systems over /usr, /opt, /root, /home and /var,
so an interpreter elsewhere is not in it (root only). With several numbers of workers each has its
rows. Celery's queues are files, and its tasks call the application.

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
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import kept
from applications import APPLICATIONS
from served import Server, faults, serve
from worker import Worker, work

from page_primer.kernel import smaps

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from harness.container import container

SERVERS = ("gunicorn", "uvicorn", "celery")
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


def measure(
    given: argparse.Namespace,
    settings: dict[str, str] | None,
    workers: int,
    *,
    preload: bool,
    python: str = sys.executable,
    wrapper: Sequence[str] = (),
) -> dict[str, float]:
    """One server's numbers, memory in MiB."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="page-primer-memory-"))
        server: Server | Worker
        if given.server == "celery":
            server = stack.enter_context(
                work(directory, given.application, settings, workers, python, wrapper)
            )
        else:
            server = stack.enter_context(
                serve(
                    directory, given.application, settings, workers, preload=preload,
                    collect=given.collect, python=python, server=given.server, wrapper=wrapper,
                )
            )  # fmt: skip
        pids = server.workers()
        started = [faults(pid) for pid in pids]
        server.ask_many(given.requests)
        later = [faults(pid) for pid in pids]
        each = [smaps.read_smaps(pid) for pid in pids]
        tree = [*each, smaps.read_smaps(server.master)]

        def mean(*names: str) -> float:
            return sum(smaps.total(one, name) for one in each for name in names) / len(each) / 2**20

        whole = sum(smaps.total(one, "Pss") for one in tree) / 2**20
        return {
            "PSS tree": whole,
            "a worker": whole / len(pids),
            "shared": mean("Shared_Clean", "Shared_Dirty"),
            "locked": mean("Locked"),
            "code huge": mean("ShmemPmdMapped", "FilePmdMapped"),
            "RSS": mean("Rss"),
            "PSS": mean("Pss"),
            "private": mean("Private_Clean", "Private_Dirty"),
            "huge": mean("AnonHugePages"),
            "anonymous": mean("Anonymous"),
            "faults": statistics.mean(started),
            "per request": (sum(later) - sum(started)) / (given.requests * len(pids)),
        }


def heap_runs(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """One round of the variants of `heap` and `freeze`: titles and numbers."""
    off = {"PAGE_PRIMER_REMAP": "0", "PAGE_PRIMER_MLOCK": "0"}
    for preload in (False, True):
        for name, settings in VARIANTS.items():
            if not preload and ("freeze" in name or "unshare" in name):
                continue  # nothing is inherited
            title = f"{'preloaded' if preload else 'each its own'}: {name}"
            if given.only and given.only not in title:
                continue
            settings = None if settings is None else {**off, **settings}
            yield title, measure(given, settings, given.workers[0], preload=preload)


def code_runs(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """One round of unprimed and primed: titles and numbers."""
    pythons = {"": sys.executable, **({"aligned, ": given.aligned} if given.aligned else {})}
    with contextlib.ExitStack() as stack:
        images = stack.enter_context(tempfile.TemporaryDirectory(prefix="page-primer-memory-"))
        wrapper: Sequence[str] = ()
        if given.container:
            upper = tempfile.TemporaryDirectory(prefix="page-primer-memory-", dir="/srv")
            wrapper = container(Path(stack.enter_context(upper)))
            os.chown(images, 1000, 1000)  # as whom it runs
        for workers in given.workers:
            for prefix, python in pythons.items():
                for name, settings in CODE_VARIANTS.items():
                    if settings is not None:
                        settings = {"PAGE_PRIMER_IMAGE_DIR": f"{images}/images", **settings}
                    yield f"{workers}: {prefix}{name}", measure(
                        given, settings, workers,
                        preload=given.preload, python=python, wrapper=wrapper,
                    )  # fmt: skip


def counts(text: str) -> list[int]:
    """Numbers of workers, with commas between them."""
    found = [int(number) for number in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--code", action="store_true", help="what is moved and locked")
    parser.add_argument("--aligned", metavar="PYTHON", help="with --code: aligned, too")
    parser.add_argument("--preload", action="store_true", help="with --code: load it in the master")
    parser.add_argument("--server", choices=SERVERS, default="gunicorn")
    parser.add_argument("--application", choices=APPLICATIONS, default="django")
    parser.add_argument("--container", action="store_true", help="with --code: as in one (root)")
    parser.add_argument("--workers", type=counts, default=[4], help="with --code: 1,4,16")
    parser.add_argument("--requests", type=int, default=250, help="a worker")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="full collections, too")
    parser.add_argument("--only", default="", help="variants whose title contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.application == "torch" and importlib.util.find_spec("torch") is None:
        raise SystemExit("torch is not installed here")
    if not given.code and (given.container or given.server == "celery" or len(given.workers) > 1):
        parser.error("--container, --server celery and several --workers are for --code")
    if given.container and (os.geteuid() or given.server == "celery"):
        parser.error("--container needs root, and a --server other than celery")
    measured = kept.commit()
    runs: dict[str, list[dict[str, float]]] = {}
    variants, columns = (code_runs, CODE_COLUMNS) if given.code else (heap_runs, COLUMNS)
    for _ in range(given.rounds):
        for title, numbers in variants(given):
            runs.setdefault(title, []).append(numbers)
    table = {
        title: {column: statistics.median(run[column] for run in found) for column in columns}
        for title, found in runs.items()
    }
    if given.json:
        kept.write(given.json, measured, {"mib": table})
    load = ", ".join(f"{figure:.1f}" for figure in os.getloadavg())
    many = ", ".join(map(str, given.workers))
    served = f"{given.server}, {given.application}, {many} workers"
    served += " as in a container" * given.container
    print(f"{served}, {given.requests} requests each; MiB")
    print(f"load average {load}")
    print(f"{'':34}" + "".join(f"{column:>12}" for column in columns))
    for title, row in table.items():
        print(f"{title:34}" + "".join(f"{row[column]:12.1f}" for column in columns))


if __name__ == "__main__":
    main()
