"""A long life of the arena allocator in fast forward: `python -m harness.heap_churn OPERATIONS`.

Arenas are asked for and given back as pymalloc does it, through the functions that it was given,
in waves: a process that grows and shrinks. Each is written to at both ends, which must be there
when it is given back, lie apart from all others, and be aligned. Amid it forks, whose children go
on from there on their own. At the end everything must be as it was: regions, mappings, memory.

Huge pages are forbidden to this process, which would spend its time clearing them: what is tried is
the bookkeeping. Prints one line; ends with 1 where something is not as it should be.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys

from page_primer import _core

PR_SET_THP_DISABLE = 41
HUGE = 2 << 20
SIZES = (1 << 20, 1 << 20, 1 << 20, 256 << 10)
MOST = 96  # arenas at a time

ALLOC = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
FREE = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Allocator(ctypes.Structure):
    _fields_ = (("ctx", ctypes.c_void_p), ("alloc", ALLOC), ("free", FREE))


def installed() -> Allocator:
    """The arena allocator that pymalloc has."""
    found = Allocator()
    ctypes.pythonapi.PyObject_GetArenaAllocator(ctypes.byref(found))
    return found


class Churn:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.allocator = installed()
        self.held: list[tuple[int, int, int]] = []  # address, size, stamp
        self.taken: set[int] = set()  # quarters of megabytes
        self.done = 0

    def take(self) -> None:
        size = self.random.choice(SIZES)
        address = self.allocator.alloc(self.allocator.ctx, size)
        if address is None:
            raise SystemExit("no memory")
        quarters = set(range(address >> 18, (address + size) >> 18))
        # Ours are aligned; the one before ours, asked where ours cannot, need not be.
        if address % size or quarters & self.taken:
            raise SystemExit(f"{address:#x}, {size} bytes: not aligned, or in use")
        self.taken |= quarters
        stamp = self.random.randrange(1 << 62)
        for at in (address, address + size - 8):
            ctypes.c_uint64.from_address(at).value = stamp
        self.held.append((address, size, stamp))

    def give(self) -> None:
        address, size, stamp = self.held.pop(self.random.randrange(len(self.held)))
        for at in (address, address + size - 8):
            if ctypes.c_uint64.from_address(at).value != stamp:
                raise SystemExit(f"{at:#x} was written to by somebody else")
        self.taken -= set(range(address >> 18, (address + size) >> 18))
        self.allocator.free(self.allocator.ctx, address, size)

    def run(self, operations: int, *, forks: bool) -> None:
        target = 0
        for number in range(operations):
            if number % 200 == 0:
                target = self.random.randrange(MOST)
            # Towards the wave's height, and about it.
            grow = len(self.held) < target or self.random.random() < 0.3
            if grow or not self.held:
                self.take()
            else:
                self.give()
            if forks and number % 20_000 == 10_000:
                self.fork()
        self.done += operations

    def fork(self) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self.run(2_000, forks=False)
                self.give_all()
                status = 0 if _core.arenas_counts()[1] <= 64 << 20 else 2
            finally:
                os._exit(status)
        if os.waitpid(pid, 0)[1] != 0:
            raise SystemExit("a child failed")

    def give_all(self) -> None:
        while self.held:
            self.give()


def state() -> tuple[int, int, int]:
    """Regions, mappings, and resident KiB."""
    with open("/proc/self/smaps", encoding="utf-8") as file:
        lines = file.read().splitlines()
    resident = sum(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    return _core.arenas_counts()[0], sum("VmFlags" in line for line in lines), resident


def main() -> int:
    operations = int(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    if _core.arenas_install(HUGE) != "active":
        print("no arena allocator")
        return 0
    churn = Churn(operations)
    churn.run(min(operations, 20_000), forks=True)
    churn.give_all()
    before = state()
    churn.run(operations, forks=True)
    churn.give_all()
    after = state()
    made = _core.arenas_counts()[3]
    print(f"{churn.done} operations, {made} regions; regions, mappings, KiB: {before} -> {after}")
    # AddressSanitizer keeps what was freed for a while, in mappings of its own; ThreadSanitizer
    # what it knows of memory (18 mappings and 8 MiB seen).
    sanitized = "TSAN_OPTIONS" in os.environ or "libasan" in os.environ.get("LD_PRELOAD", "")
    maps, size = (64, 256 << 10) if sanitized else (4, 2 << 10)
    most = before[0] + 1, before[1] + maps, before[2] + size
    flat = all(now <= limit for now, limit in zip(after, most, strict=True))
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
