"""prime() and restore(), again and again, with each backing in turn, among threads and forks: what
the process holds must be flat.

    python -m harness.cycles N [--heap]

Prints one line and ends with 1 if it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from typing import Any

import page_primer
from harness.leaks import held

BACKINGS = ("image", "memfd", "anonymous")


def options(folder: str, number: int, *, heap: bool) -> dict[str, Any]:
    return {
        "image_dir": f"{folder}/images", "backing": BACKINGS[number % len(BACKINGS)],
        "limit": 0, "mlock": "code", "keep_profilers": number % 2 == 0, "heap": heap,
    }  # fmt: skip


def fork(given: dict[str, Any]) -> None:
    """A child that primes and ends."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if page_primer.prime(**given).reason is None else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"a child ended with {status:#x}"


def cycle(folder: str, numbers: range, *, heap: bool) -> int:
    """Bytes of code on huge pages, in all."""
    huge = 0
    for number in numbers:
        given = options(folder, number, heap=heap)
        report = page_primer.prime(**given)
        assert report.reason is None, report
        huge += report.code_huge_bytes
        json.loads(json.dumps({"a": [number, None]}))
        if number % 100 == 50:
            fork(given)
        page_primer.restore()
    return huge


def work(stop: threading.Event) -> None:
    while not stop.wait(0.01):
        assert sorted(range(50), key=lambda n: -n)[0] == 49


def main() -> int:
    parser = argparse.ArgumentParser(description="prime() and restore() for long")
    parser.add_argument("cycles", type=int)
    parser.add_argument("--heap", action="store_true")
    given = parser.parse_args()
    folder, stop = tempfile.mkdtemp(prefix="page-primer-cycles-"), threading.Event()
    threads = [threading.Thread(target=work, args=(stop,)) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        began = time.monotonic()
        cycle(folder, range(60), heap=given.heap)  # what is taken once
        before = held()
        huge = cycle(folder, range(given.cycles), heap=given.heap)
        after = held()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        shutil.rmtree(folder)
    more = {kind: after[kind] - before[kind] for kind in before}
    flat = (
        more["descriptors"] == more["locked"] == 0 and more["mappings"] <= 4
        and more["size"] <= 16 << 10 and more["blocks"] < 1000 and more.get("malloc", 0) < 1 << 20
        and more.get("references", 0) < 1000
    )  # fmt: skip
    print(f"{given.cycles:,} cycles in {time.monotonic() - began:.0f} s, {huge >> 20:,} MiB made "
          f"huge; more afterwards: {more}: {'flat' if flat else 'NOT FLAT'}")  # fmt: skip
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
