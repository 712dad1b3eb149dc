"""The package's functions and the core's in several threads at the same time, among forks: for
ThreadSanitizer, and for a free-threaded CPython, where nothing else keeps them apart.

    python -m harness.together ROUNDS

Prints one line; ends with 1 where a thread failed, or something is held that was not before.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable

import page_primer
from harness import leaks
from harness.cycles import fork, options
from page_primer import _core

# Each in all threads. Not those that write to one piece of memory, for which callers take turns,
# nor those whose bad calls are fatal under ThreadSanitizer.
FUNCTIONS = (
    "objects", "loads", "threads", "interpreter_address", "thp_disabled", "limit", "credentials",
    "forks", "arenas_regions", "arenas_counts", "region_size", "heap_mark", "malloc_object",
    "memfd", "view", "populate", "advise", "dump_page", "before_fork", "Error", "Report",
    "Options", "status",
)  # fmt: skip
EACH, PRIMING = 3, 2  # threads


class Threads:
    def __init__(self, rounds: int, folder: str) -> None:
        self.rounds = rounds
        self.folder = folder
        self.begin = threading.Barrier(EACH + PRIMING)
        self.failures: list[str] = []

    def each_function(self, number: int) -> None:
        """Every function once a round, in an order of this thread's own."""
        order = random.Random(number)
        names = list(FUNCTIONS)
        for _ in range(self.rounds):
            order.shuffle(names)
            for name in names:
                leaks.CASES[name]()
            # Where others keep it for ten seconds, on a busy machine, the answer is False.
            assert _core.alone(lambda: None, lambda is_mine: is_mine) in (None, False)

    def prime(self, number: int) -> None:
        for turn in range(number, number + self.rounds):
            given = options(self.folder, turn, heap=turn % 3 == 0)
            page_primer.prime(**given)
            filled = [bytes(400) for _ in range(5_000)]  # arenas
            if turn % 10 == 5:
                fork(given)
            page_primer.restore()
            del filled

    def guarded(self, function: Callable[[int], None], number: int) -> None:
        try:
            self.begin.wait()
            function(number)
        except BaseException:
            self.failures.append(traceback.format_exc())

    def run(self) -> None:
        work = [(self.each_function, n) for n in range(EACH)]
        work += [(self.prime, n) for n in range(PRIMING)]
        threads = [threading.Thread(target=self.guarded, args=pair) for pair in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main() -> int:
    rounds, began = int(sys.argv[1]), time.monotonic()
    folder = tempfile.mkdtemp(prefix="page-primer-together-")
    try:
        with leaks.prepared():
            Threads(5, folder).run()  # what is taken once
            before = leaks.held()
            all_of_it = Threads(rounds, folder)
            all_of_it.run()
            page_primer.restore()
            after = leaks.held()
    finally:
        shutil.rmtree(folder)
    print(*all_of_it.failures, sep="\n", file=sys.stderr, end="")
    more = {kind: after[kind] - before[kind] for kind in ("descriptors", "locked")}
    flat = not any(more.values())
    lock = "no lock" if not getattr(sys, "_is_gil_enabled", lambda: True)() else "the GIL"
    print(f"{rounds:,} rounds in {EACH + PRIMING} threads with {lock} in "
          f"{time.monotonic() - began:.0f} s; more afterwards: {more}: "
          f"{'flat' if flat else 'NOT FLAT'}")  # fmt: skip
    return 0 if flat and not all_of_it.failures else 1


if __name__ == "__main__":
    sys.exit(main())
