"""Call a function of the package again and again; what it took must not grow.

    python leaks.py '{"CASE": ROUNDS, ...}'

One JSON object comes out: of each case, what was there more after ROUNDS calls than before.
"""

import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import page_primer
from page_primer import _core

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 4 * PAGE
READ_WRITE = _core.PROT_READ | _core.PROT_WRITE
ANONYMOUS = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
TOP = 1 << 63  # an address that no process has
CASES: dict[str, Callable[[], object]] = {}

# What the cases have in common; prepared() makes it.
_options: Any
_file: int
_area: int
_report: page_primer.Report


def case(function: Callable[[], object]) -> Callable[[], object]:
    """A function that calls the one that its name says, both well and badly."""
    CASES[{"version": "__version__"}.get(function.__name__, function.__name__)] = function
    return function


def refused(function: Callable[..., object], *arguments: object) -> None:
    """Call it badly: an error takes memory, too."""
    try:
        function(*arguments)
    except (OSError, OverflowError, TypeError, ValueError):
        return
    raise AssertionError(f"{function.__name__}{arguments} is not refused")


# ----------------------------------------------------------------------------------------- _core --


@case
def Error() -> None:  # noqa: N802
    with contextlib.suppress(OSError):
        raise _core.Error(12, "a step")


@case
def objects() -> None:
    _core.objects()


@case
def loads() -> None:
    _core.loads()


@case
def interpreter_address() -> None:
    _core.interpreter_address()


@case
def threads() -> None:
    _core.threads()


@case
def reserve() -> None:
    _core.reserve(SIZE, 1 << 21, 0x1000)  # let go of
    area = _core.reserve(SIZE - 1, PAGE, 0)
    area.map(SIZE, READ_WRITE, ANONYMOUS, -1, 0)
    refused(area.map, SIZE + 1, READ_WRITE, ANONYMOUS, -1, 0)
    refused(area.map, PAGE, READ_WRITE, _core.MAP_PRIVATE, -1, 0)
    area.unmap()
    refused(area.map, PAGE, READ_WRITE, ANONYMOUS, -1, 0)
    refused(_core.reserve, SIZE, 3, 0)
    refused(_core.reserve, 1 << 62, PAGE, 0)


@case
def opened() -> None:
    _core.opened(os.dup, _file)  # let go of
    with _core.opened(os.open, sys.executable, flags=os.O_RDONLY) as file:
        os.pread(file, 4, 0)
        assert f"{file}" == str(file.fileno())
        file.keep()
    file.close()
    refused(_core.opened)
    refused(_core.opened, os.open, "/nowhere", os.O_RDONLY)
    refused(_core.opened, str)


@case
def placed() -> None:
    _core.placed(SIZE, _file)
    refused(_core.placed, SIZE, -1)
    refused(_core.placed, 0, _file)


@case
def map() -> None:
    area = _core.reserve(SIZE, PAGE, 0)
    area.unmap()
    _core.map(area.address, SIZE, READ_WRITE, ANONYMOUS, -1, 0)
    _core.unmap(area.address, SIZE)
    refused(_core.map, _area, SIZE, 1, ANONYMOUS, -1, 0)
    refused(_core.map, TOP, SIZE, 1, ANONYMOUS, -1, 0)


@case
def memfd() -> None:
    os.close(_core.memfd(b"leaks", 0))
    refused(_core.memfd, b"leaks", 1 << 20)
    refused(_core.memfd, "leaks", 0)


@case
def fill() -> None:
    _core.fill(_area, SIZE, _file, 0)
    refused(_core.fill, _area, SIZE, -1, 0)


@case
def view() -> None:
    _core.view(_area, SIZE).release()
    refused(_core.view, _area, -1)


@case
def unmap() -> None:
    area = _core.reserve(SIZE, PAGE, 0)
    _core.unmap(area.address, SIZE)
    area.unmap()
    refused(_core.unmap, _area + 1, SIZE)


@case
def protect() -> None:
    _core.protect(_area, SIZE, READ_WRITE)
    refused(_core.protect, TOP, SIZE, READ_WRITE)


@case
def advise() -> None:
    _core.advise(_area, SIZE, _core.MADV_POPULATE_READ)
    refused(_core.advise, _area, SIZE, 9999)


@case
def populate() -> None:
    _core.populate(_area, SIZE)
    refused(_core.populate, TOP, SIZE)


@case
def lock() -> None:
    with contextlib.suppress(OSError):  # RLIMIT_MEMLOCK may be nothing
        _core.lock(_area, SIZE)
        _core.lock(_area, SIZE, _core.MLOCK_ONFAULT)
    _core.unlock(_area, SIZE)
    refused(_core.lock, TOP, SIZE)


@case
def unlock() -> None:
    _core.unlock(_area, SIZE)
    refused(_core.unlock, TOP, SIZE)


@case
def swap() -> None:
    """As restore() does it: the file's own mappings again."""
    _name, base, headers = _core.objects()[2][0]
    piece = (_area, SIZE, READ_WRITE, _area, -1, 0)
    _core.swap(base, headers, [], [])
    refused(_core.swap, base + 1, headers, [piece] * 50, [piece])
    refused(_core.swap, base, headers, [piece] * 50 + [(1, 2)], [])
    refused(_core.swap, base, headers, [(_area, SIZE, 1, TOP, -1, 0)], [])


@case
def thp_disabled() -> None:
    _core.thp_disabled()


@case
def mdwe() -> None:
    with contextlib.suppress(OSError):  # Linux before 6.3
        _core.mdwe()


@case
def limit() -> None:
    _core.limit(_core.RLIMIT_MEMLOCK)
    refused(_core.limit, 9999)


@case
def dump_page() -> None:
    area = _core.reserve(PAGE, PAGE, 0)
    area.map(PAGE, _core.PROT_READ, _core.MAP_PRIVATE, _file, 0)
    _core.dump_page(area.address)
    refused(_core.dump_page, TOP)


@case
def dump_before() -> None:
    area = _core.reserve(2 * PAGE, PAGE, 0)
    area.unmap()
    second = area.address + PAGE
    _core.map(second, PAGE, _core.PROT_READ, _core.MAP_PRIVATE, _file, PAGE)
    _core.dump_before(second, _core.PROT_READ, _file, PAGE)
    _core.unmap(second, PAGE)
    refused(_core.dump_before, TOP, _core.PROT_READ, _file, PAGE)


@case
def alone() -> None:
    assert _core.alone(lambda: 5, lambda _: 6) == 5
    assert _core.alone(lambda: _core.alone(lambda: 5, lambda mine: mine), lambda _: 6) is True
    with contextlib.suppress(ZeroDivisionError):
        _core.alone(lambda: 1 // 0, lambda _: 6)
    refused(_core.alone, 5)


@case
def before_fork() -> None:
    _core.before_fork()
    _core.after_fork()


@case
def after_fork() -> None:
    _core.before_fork()
    _core.after_fork()


@case
def filesystem() -> None:
    _core.filesystem(_file)
    refused(_core.filesystem, -1)


@case
def credentials() -> None:
    _core.credentials()


@case
def forks() -> None:
    _core.forks()


@case
def arenas_install() -> None:
    _core.arenas_install(1 << 21)
    refused(_core.arenas_install, -1)


@case
def arenas_retire() -> None:
    _core.arenas_install(1 << 21)
    _core.arenas_retire()


@case
def arenas_regions() -> None:
    _core.arenas_regions()


@case
def arenas_counts() -> None:
    _core.arenas_counts()


@case
def region_size() -> None:
    _core.region_size()


@case
def heap_mark() -> None:
    _core.heap_mark()


@case
def heap_align() -> None:
    _core.heap_align(1 << 21)  # moves the break once: there it stays until malloc needs more
    refused(_core.heap_align, 3)


@case
def malloc_object() -> None:
    _core.malloc_object()


# ----------------------------------------------------------------------------------- page_primer --


@case
def prime() -> None:
    """What is done again and again: moved, or known to be; and an option that is none."""
    page_primer.prime(**_options)
    page_primer.prime(**_options)
    page_primer.restore()
    refused(lambda: page_primer.prime(limit="much"))


@case
def restore() -> None:
    page_primer.restore()


@case
def status() -> None:
    page_primer.status()
    page_primer.status(measure=True)


@case
def Options() -> None:  # noqa: N802
    page_primer.Options.load({"include": "a,b", "limit": "5M"}, {"PAGE_PRIMER_BACKING": "memfd"})
    page_primer.Options(merge=False).as_dict()
    refused(page_primer.Options.load, {"limit": -1})


_logger = logging.getLogger("leaks")
_logger.addHandler(logging.NullHandler())
_logger.propagate = False
_logger.setLevel(logging.DEBUG)


@case
def Report() -> None:  # noqa: N802
    _report.as_dict()
    _report.summary()
    _report.log(_logger)
    _report.log(_logger, since=_report)
    print(_report, file=io.StringIO())


@case
def version() -> None:
    assert page_primer.__version__


# ---------------------------------------------------------------------------------- what is held --


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                 "fordblks", "keepcost")]  # fmt: skip


def held() -> dict[str, int]:
    """What this process holds now, cycles that wait for the collector aside."""
    gc.collect()
    found = {"blocks": sys.getallocatedblocks(), "descriptors": len(os.listdir("/proc/self/fd"))}
    if hasattr(sys, "gettotalrefcount"):  # a debug build
        found["references"] = sys.gettotalrefcount()
    with open("/proc/self/maps") as file:
        found["mappings"] = sum(1 for _ in file)
    with open("/proc/self/status") as file:
        rows = dict(line.split(":", 1) for line in file)
    found["locked"] = int(rows["VmLck"].split()[0])
    found["size"] = int(rows["VmSize"].split()[0])
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallinfo2"):  # glibc 2.33
        libc.mallinfo2.restype = _Mallinfo2
        info = libc.mallinfo2()
        found["malloc"] = info.uordblks + info.hblkhd
    return found


def allowed_malloc(rounds: int) -> int:
    """Bytes: a table of the interpreter's that grows does so once."""
    return (1 << 16) + 8 * rounds


def allowed_blocks(rounds: int) -> float:
    """What may be there more of the allocator's blocks: some come and go."""
    return 50 + rounds / 10


def grown(function: Callable[[], object], rounds: int) -> dict[str, int]:
    """What it took over many calls, and did not give back.

    The interpreter's own caches grow by some hundred blocks before they are full (CPython 3.13),
    a leak grows for ever: of up to five windows of so many calls the least counts. An arena, too,
    may be made in one of them.
    """
    for _ in range(max(3, rounds // 10)):
        function()
    held()
    before = held()
    least: dict[str, int] = {}
    for _ in range(5):
        for _ in range(rounds):
            function()
        after = held()
        more = {kind: after[kind] - before[kind] for kind in before}
        least = {kind: min(size, least.get(kind, size)) for kind, size in more.items()}
        counted = max(least["blocks"], least.get("references", 0))
        settled = least.get("malloc", 0) < allowed_malloc(rounds)
        if counted < allowed_blocks(rounds) and least["mappings"] <= 1 and settled:
            break
        before = after
    return least


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Have what the cases have in common."""
    global _options, _file, _area, _report
    # Neither tempfile nor shutil before all is measured: they bring half of the shared libraries
    # that each round would prime.
    folder = f"{os.environ.get('TMPDIR', '/tmp')}/page-primer-leaks-{os.getpid()}"
    os.mkdir(folder, 0o700)
    try:
        _options = {"image_dir": f"{folder}/images", "limit": 0, "mlock": "code"}
        _file = os.open(sys.executable, os.O_RDONLY)
        area = _core.reserve(SIZE, PAGE, 0)
        area.map(SIZE, READ_WRITE, ANONYMOUS, -1, 0)
        _area = area.address
        _report = page_primer.prime(**_options)
        page_primer.restore()
        yield
        page_primer.restore()
    finally:
        import shutil

        shutil.rmtree(folder)


def main() -> None:
    given = json.loads(sys.argv[1])
    with prepared():
        found = {name: grown(CASES[name], rounds) for name, rounds in given.items()}
    json.dump(found, sys.stdout)
    lost = {name: more.get("references", 0) for name, more in found.items()}
    lost = {name: more for name, more in lost.items() if more >= allowed_blocks(given[name])}
    if lost:
        sys.exit(f"references lost: {lost}")


if __name__ == "__main__":
    main()
