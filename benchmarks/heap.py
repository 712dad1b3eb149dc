"""What of a server's heap is on huge pages, what that takes of memory, and what it saves of page
faults; each from smaps and /proc/PID/stat, from outside.

    python benchmarks/heap.py shares  [--application NAME ...] [--maps]
    python benchmarks/heap.py growth  [--application NAME] [--preload]
    python benchmarks/heap.py faults  [--application NAME ...]
    python benchmarks/heap.py reforks [--application NAME] [--count 200]
                      all of them: [--workers N] [--requests N] [--heap MODE] [--run]

shares: of the arenas' bytes, of [heap] and of other private anonymous memory, what is on huge pages
    after so many requests a worker; the least of the workers. --maps prints every mapping of which
    more than 256 KiB are small. Which mappings arenas lie in the worker itself is asked.
growth: resident and proportional memory of a worker without and with `heap`, after the same
    requests.
faults: minor faults of a worker up to its first answers, and a request from then on.
reforks: a preloaded master with `freeze` whose workers are replaced one after another: what it
    takes on the way, and the numbers of its mappings and descriptors.

--run starts gunicorn, with our configuration as otherwise, by `page-primer run --heap MODE`:
then glibc's tunable is set as well, with `all`. Code is neither moved nor locked, and each variant
is a server of its own. The load average is printed beside the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

from applications import APPLICATIONS
from served import Server, faults, serve

from page_primer.kernel import smaps
from page_primer.kernel.anonymous import is_anonymous
from page_primer.kernel.smaps import Mapping

MIB = 1 << 20
OFF = {"PAGE_PRIMER_REMAP": "0", "PAGE_PRIMER_MLOCK": "0"}
KINDS = ("arenas", "[heap]", "other")


@contextlib.contextmanager
def served(given: argparse.Namespace, application: str, heap: str | None) -> Iterator[Server]:
    """A server; `heap` None: with page-primer, but without the option."""
    settings = {**OFF, **({"PAGE_PRIMER_HEAP": heap} if heap else {})}
    if heap and given.unshare:
        settings["PAGE_PRIMER_HEAP_UNSHARE"] = "1"
    run = ["--remap", "0", "--mlock", "0", *(["--heap", heap] if heap else [])]
    with tempfile.TemporaryDirectory(prefix="page-primer-heap-") as directory, serve(
        directory, application, settings, given.workers, preload=given.preload,
        run=run if given.run else (),
    ) as server:  # fmt: skip
        yield server


def kinds(server: Server) -> dict[int, dict[str, list[Mapping]]]:
    """Of each worker its private anonymous mappings, by what they are for."""
    found: dict[int, dict[str, list[Mapping]]] = {}
    end = time.monotonic() + 120
    pids = set(server.workers())
    while found.keys() < pids and time.monotonic() < end:
        pid, held = json.loads(server.ask("/@arenas").rpartition(b"<li>")[2])
        if pid in found:
            continue
        found[pid] = {kind: [] for kind in KINDS}
        for mapping in filter(is_anonymous, smaps.read_smaps(pid)):
            if mapping.path == "[heap]":
                kind = "[heap]"
            else:
                ours = any(mapping.start < end and start < mapping.end for start, end in held)
                kind = "arenas" if ours or "arenas" in mapping.path else "other"
            found[pid][kind].append(mapping)
    return found


def shares(given: argparse.Namespace) -> None:
    print(f"{'':10}{'':8}" + "".join(f"{kind + ', MiB':>14}{'huge':>7}" for kind in KINDS))
    for application in given.application:
        with served(given, application, given.heap) as server:
            server.ask_many(given.requests)
            workers = kinds(server)
        least = min(workers.values(), key=lambda found: huge_share(found["arenas"]))
        cells = (
            f"{size(least[kind]) / MIB:14.1f}{100 * huge_share(least[kind]):6.0f}%"
            for kind in KINDS
        )
        print(f"{application:10}{python_version():8}" + "".join(cells), flush=True)
        if given.maps:
            print_small(least)


def print_small(found: dict[str, list[Mapping]]) -> None:
    for kind, mappings in found.items():
        for mapping in mappings:
            small = mapping.count("Rss") - mapping.huge
            if small > 256 << 10:
                chunks = max(0, (mapping.end & -2 * MIB) - (mapping.start + 2 * MIB - 1 & -2 * MIB))
                print(
                    f"    {kind:8}{mapping.start:x}-{mapping.end:x} {mapping.path or '-':28}"
                    f"{mapping.size / MIB:7.1f} MiB, {mapping.count('Rss') / MIB:.1f} resident, "
                    f"{small / MIB:.1f} small; {chunks / MIB:.0f} in whole huge pages; "
                    f"{'advised' if 'hg' in mapping.flags else 'not advised'}"
                )


def size(mappings: list[Mapping]) -> int:
    return sum(mapping.count("Rss") for mapping in mappings)


def huge_share(mappings: list[Mapping]) -> float:
    return sum(mapping.huge for mapping in mappings) / (size(mappings) or 1)


def python_version() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def growth(given: argparse.Namespace) -> None:
    print(f"{'':12}{'':10}" + "".join(f"{name:>12}" for name in ("RSS", "PSS", "huge", "PSS tree")))
    for application in given.application:
        for heap in (None, given.heap):
            with served(given, application, heap) as server:
                server.ask_many(given.requests)
                each = [smaps.read_smaps(pid) for pid in server.workers()]
                master = smaps.read_smaps(server.master)

            def mean(name: str, each: list[list[Mapping]] = each) -> float:
                return statistics.mean(smaps.total(one, name) for one in each) / MIB

            tree = sum(smaps.total(one, "Pss") for one in [*each, master]) / MIB
            figures = mean("Rss"), mean("Pss"), mean("AnonHugePages"), tree
            text = "".join(f"{figure:12.1f}" for figure in figures)
            print(f"{application:12}{heap or 'off':10}{text}", flush=True)


def count_faults(given: argparse.Namespace) -> None:
    print(f"{'':12}{'':10}{'of a start':>12}{'a request':>12}")
    for application in given.application:
        for heap in (None, given.heap):
            with served(given, application, heap) as server:
                pids = server.workers()
                before = [faults(pid) for pid in pids]
                server.ask_many(given.requests)
                after = [faults(pid) for pid in pids]
            each = (sum(after) - sum(before)) / (given.requests * len(pids))
            text = f"{statistics.mean(before):12.0f}{each:12.2f}"
            print(f"{application:12}{heap or 'off':10}{text}", flush=True)


def reforks(given: argparse.Namespace) -> None:
    """Each worker is told to go when it has answered."""
    given.preload, given.workers = True, 1
    settings = {**OFF, "PAGE_PRIMER_FREEZE": "1"}
    if given.heap:
        settings["PAGE_PRIMER_HEAP"] = given.heap
    for application in given.application:
        with tempfile.TemporaryDirectory(prefix="page-primer-heap-") as directory, serve(
            directory, application, settings, 1, preload=True,
        ) as server:  # fmt: skip
            (worker,) = server.workers()
            for number in range(given.count + 1):
                os.kill(worker, signal.SIGTERM)
                (worker,) = server.workers(but_not=[worker])
                if number % max(1, given.count // 4) == 0:
                    print(f"{application}, {number} forks: {state_of(server.master)}", flush=True)


def state_of(master: int) -> str:
    found = smaps.read_smaps(master)
    return (
        f"RSS {smaps.total(found, 'Rss') / MIB:.2f}, "
        f"PSS {smaps.total(found, 'Pss') / MIB:.2f} MiB; "
        f"{len(found)} mappings, {len(os.listdir(f'/proc/{master}/fd'))} descriptors"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("shares", "growth", "faults", "reforks"))
    parser.add_argument("--application", choices=APPLICATIONS, nargs="+", default=["django"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000, help="a worker")
    parser.add_argument("--heap", default="auto", choices=("auto", "arenas", "all"))
    parser.add_argument("--preload", action="store_true")
    parser.add_argument("--unshare", action="store_true", help="heap_unshare")
    parser.add_argument("--run", action="store_true", help="by page-primer run")
    parser.add_argument("--maps", action="store_true", help="with shares: what is small, and where")
    parser.add_argument("--count", type=int, default=200, help="with reforks")
    given = parser.parse_args()
    how = f"heap={given.heap}{', page-primer run' if given.run else ''}"
    how += ", heap_unshare" if given.unshare else ""
    how += ", preloaded" if given.preload else ""
    load = ", ".join(f"{figure:.1f}" for figure in os.getloadavg())
    print(
        f"{given.what}: {given.workers} workers, {given.requests} requests each, {how}; {load=!s}"
    )
    {"shares": shares, "growth": growth, "faults": count_faults, "reforks": reforks}[given.what](
        given
    )


if __name__ == "__main__":
    main()
