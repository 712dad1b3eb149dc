"""The heap on huge pages: real processes, looked at from outside."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from harness import interpreters, outside
from harness.cgroup import Cgroup
from harness.gunicorn_server import Gunicorn
from harness.libraries import build
from harness.process import Process

from page_primer import reasons
from page_primer.heap.driver import growth_allowed

MIB = 1 << 20
PMD = outside.PMD
THP = Path("/sys/kernel/mm/transparent_hugepage")
ONLY_HEAP = {"remap": False, "mlock": False, "include": ["nothing"]}

# What the doctor says of the heap in such a process.
ADVICE = (
    "from page_primer.heap.advice import advice\n"
    "from page_primer.kernel.thp import pmd_size\n"
    "from page_primer.options import Options\n"
    "result = advice(Options(heap='all'), pmd_size())"
)

# Small objects that take so many MiB of arenas; freed, they leave them empty.
FILL = (
    "head = bytes(range(200))\nfill = lambda mib: [head + b'%08d' % i for i in range(mib * 4096)]\n"
)


# Objects that the collector tracks, in arenas that lie side by side: a growing list of them would
# leave holes between.
CHAIN = "chain = None\nfor i in range(300_000): chain = [chain, i]\n"


@pytest.fixture(autouse=True)
def _huge_pages():
    chosen = (THP / "enabled").read_text().partition("[")[2].partition("]")[0]
    if chosen == "never" or PMD != 2 * MIB:
        pytest.skip(f"transparent huge pages are {chosen!r}, of {PMD >> 10} KiB")


def regions(process):
    return process.run("from page_primer import _core; result = _core.arenas_regions()")


def in_regions(process):
    """Resident and huge bytes of the mappings that hold our regions."""
    bases = regions(process)
    found = [
        v for v in outside.smaps(process.pid) if any(v.start <= base < v.end for base in bases)
    ]
    return sum(v.kb["Rss"] for v in found) << 10, sum(v.kb["AnonHugePages"] for v in found) << 10


@pytest.fixture(scope="session")
def patient(tmp_path_factory):
    """Environment variables of a process that has all the time that the kernel takes."""
    source = Path(__file__).with_name("harness") / "patient.c"
    directory = tmp_path_factory.mktemp("patient")
    library = build(directory, "patient.so", source.read_text(), "-shared", "-fPIC")
    return {"LD_PRELOAD": str(library)}


def resident(process):
    return sum(v.kb["Rss"] for v in outside.smaps(process.pid)) << 10


def test_new_arenas_are_huge(every_python, patient):
    with Process(every_python, env=patient) as process:
        report = process.prime(heap="arenas", **ONLY_HEAP)
        assert report["heap"]["reason"] is None
        before = len(regions(process))
        process.run(FILL + "kept = fill(60)")
        assert len(regions(process)) - before >= 28
        rss, huge = in_regions(process)
        # Those that the kernel had no huge page for, or none in time, are small.
        small = process.run("result = page_primer._core.arenas_counts()[4]")
        assert huge >= 0.95 * 60 * MIB - small * PMD >= 30 * MIB
        assert rss - huge <= (2 + small) * PMD  # what lies beside them may be in the same mapping
        again = process.prime(heap="arenas", **ONLY_HEAP)["heap"]
        assert again["use"]["arenas_huge"] >= huge
        everything = [v for v in outside.smaps(process.pid) if v.perms == "rw-p" and not v.inode]
        said = sum(again["use"][f"{kind}_huge"] for kind in ("arenas", "other", "malloc"))
        seen = sum(v.kb["AnonHugePages"] for v in everything if v.path != "[stack]") << 10
        assert abs(said - seen) <= PMD  # khugepaged may come in between
        process.run("del kept")
        assert len(regions(process)) <= before + 2


def test_what_is_there_is_collapsed_and_hardly_grows(every_python):
    with Process(every_python) as process:
        process.run(CHAIN + "blocks = [bytes(3000 + i % 2) for i in range(8000)]")
        before = resident(process)
        report = process.prime(heap="all", **ONLY_HEAP)["heap"]
        assert report["reason"] is None
        grown = report["resident_after"] - report["resident_before"]
        # What may be added, and what the call itself allocates in between.
        assert grown <= max(PMD, 0.03 * before) + MIB, report
        # A busy machine does not get all of it done in the time that there is, or has no huge page
        # left; the report has to say so.
        stopped = any("stopped" in note or "no huge page" in note for note in report["notes"])
        slack = 1 << 40 if stopped else 3 * PMD
        assert report["collapsed_bytes"] >= PMD, report["notes"]
        heap = [v for v in outside.smaps(process.pid) if v.path == "[heap]"]
        size = sum(v.kb["Rss"] for v in heap) << 10
        assert sum(v.huge for v in heap) >= size - slack, report["notes"]
        assert size >= 20 * MIB
        use = report["use"]
        assert use["malloc_huge"] == sum(v.huge for v in heap)
        assert use["arenas"] >= 20 * MIB
        assert use["arenas_huge"] >= use["arenas"] - slack - 2 * MIB
        assert report["collapsed_bytes"] >= use["malloc_huge"] + use["arenas_huge"] - PMD
        assert process.run("result = chain[1], len(blocks[-1])") == [299_999, 3001]


def end_of_heap(process):
    """Where [heap] ends, which a fork and advice divide."""
    return max(v.end for v in outside.smaps(process.pid) if v.path == "[heap]")


GROW = "blocks = [bytes(3000 + i % 2) for i in range({})]\n"


def test_how_much_collapses_may_add():
    """1.5 % or a quarter of a huge page; twice and four times as much where `all` is asked for."""
    for mode in ("arenas", "auto"):
        assert growth_allowed(mode, 10 * MIB, PMD) == PMD // 4
        assert growth_allowed(mode, 1000 * MIB, PMD) == 15 * MIB
    assert growth_allowed("all", 10 * MIB, PMD) == PMD
    assert growth_allowed("all", 1000 * MIB, PMD) == 30 * MIB


def test_the_heap_ends_where_a_huge_page_does(every_python):
    """So a whole huge page is in one mapping, although what a child adds is in another."""
    with Process(every_python) as process:
        process.run(GROW.format(2000) + "from page_primer import _core")
        before = resident(process)
        moved = process.run(f"result = _core.heap_align({PMD})")
        end = end_of_heap(process)
        assert end % PMD == 0
        assert 0 <= moved < PMD + (1 << 20)
        # Hardly any of it, but for an arena that Python may have made meanwhile.
        assert resident(process) <= before + (1 << 20) + moved // 4, (before, moved)
        assert process.run(f"result = _core.heap_align({PMD})") == 0
        # malloc has what lies below it.
        process.run("more = " + GROW.format(20)[9:])
        assert end_of_heap(process) == end or moved < 512 << 10, moved
        child = process.run(
            "import os\n"
            "extra = []\n"  # until there is room below the break, which stays there then
            f"while _core.heap_align({PMD}) < 1 << 19: extra.append(bytes(100_000))\n"
            "read, write = os.pipe()\n"
            "if (pid := os.fork()) == 0:\n"
            + "    "
            + GROW.format(3000)
            + "    lines = [line for line in open('/proc/self/maps') if '[heap]' in line]\n"
            "    os.write(write, ' '.join(line.split('-')[0] for line in lines).encode())\n"
            "    os._exit(blocks[-1] != bytes(3001))\n"
            "assert os.waitpid(pid, 0)[1] == 0\n"
            "result = os.read(read, 1000).decode()"
        )
        starts = [int(start, 16) for start in child.split()]
        assert len(starts) >= 2
        assert all(start % PMD == 0 for start in starts[1:])
        assert (
            process.run("del blocks, more\n" + GROW.format(9000) + "result = len(blocks)") == 9000
        )


LIBC = """
import ctypes
from page_primer import _core
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.sbrk.restype = [ctypes.c_void_p], ctypes.c_void_p
def move(before_multiple):
    libc.sbrk(ctypes.c_ssize_t((-libc.sbrk(0) - before_multiple) % (2 << 20)))
"""
# Blocks of 124 KiB between others that stay: of what is free there malloc can serve as much.
FREE = """
large = [(libc.malloc(124 << 10), libc.malloc(1000))[0] for _ in range(60)]
for block in large: libc.free(block)
"""


@pytest.mark.parametrize("why", ["enough is free", "blocks are mapped"])
def test_what_malloc_would_not_have_is_not_skipped(python, why):
    env = {"MALLOC_MMAP_THRESHOLD_": "65536"} if why == "blocks are mapped" else {}
    with Process(python, env=env) as process:
        process.run(LIBC + (FREE if why == "enough is free" else "") + f"move({PMD - 4096})")
        before = end_of_heap(process)
        assert before % PMD == 4096
        assert process.run(f"result = _core.heap_align({PMD})") == 0
        assert end_of_heap(process) == before


def test_a_block_that_extends_the_heap_beyond_a_huge_page_is_followed_by_more(python):
    """Malloc extends it by 252 KiB for the first one."""
    with Process(python) as process:
        process.run(LIBC + f"move({244 << 10})")
        process.run(f"_core.heap_align({PMD})")
        end = end_of_heap(process)
        assert end % PMD == 0
        process.run("for _ in range(15): libc.malloc(100_000)")
        assert end_of_heap(process) == end


RECORD = (
    "from page_primer import _core\n"
    "calls, align = [], _core.heap_align\n"
    "_core.heap_align = lambda huge: calls.append(align(huge)) or calls[-1]\n"
)


def test_the_heap_is_not_aligned_for_ever(python):
    with Process(python) as process:
        process.run(RECORD + "import ctypes; kept = []")
        for limit in range(1, 12):  # which makes it another call
            process.prime(heap="auto", limit=limit, **ONLY_HEAP)
            process.run("kept.append([bytes(100_000) for _ in range(30)])")  # what malloc has free
            process.run("ctypes.CDLL(None).sbrk(4096)")
        assert process.run("result = sum(map(bool, calls))") == 8


@pytest.mark.parametrize("how", ["", "a thread", "arenas alone", "the tunable"])
def test_where_the_break_is_left_alone(python, how):
    env = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if how == "the tunable" else {}
    with Process(python, env=env) as process:
        process.run(RECORD)
        if how == "a thread":  # it may be in malloc, whose lock is not ours
            process.run(
                "import threading\nevent = threading.Event()\n"
                "threading.Thread(target=event.wait, daemon=True).start()"
            )
        process.prime(heap="arenas" if how == "arenas alone" else "auto", **ONLY_HEAP)
        assert process.run("result = len(calls)") == (0 if how else 1)


def test_nothing_new_is_nothing_to_do(python):
    with Process(python) as process:
        process.prime(heap="all", **ONLY_HEAP)
        again = process.run(
            f"options = {dict(ONLY_HEAP, heap='all')!r}\n"
            "first = page_primer.prime(**options)\n"
            "result = page_primer.prime(**options) is first"
        )
        assert again


@pytest.mark.slow
def test_churn_returns_what_it_took(python):
    """Allocate and free 200 MiB again and again: what stays is what stays without us."""
    sizes = []
    for heap in ("", "arenas", "all"):
        with Process(python) as process:
            if heap:
                process.prime(heap=heap, **ONLY_HEAP)
            else:
                process.run("import page_primer.apply")
            base = resident(process)
            process.run("for _ in range(3): [bytes(479) for _ in range(409_600)]")
            sizes.append((base, resident(process)))
    for (base, after), ends in zip(sizes[1:], (1, 2), strict=True):
        # The last region of arenas; and with "all" the end of [heap], aligned to a huge page.
        assert after <= sizes[0][1] * 1.05 + max(0, base - sizes[0][0]) + ends * PMD, sizes


@pytest.mark.slow
def test_arenas_with_a_survivor_each_give_their_memory_back(python):
    """One object in fifty thousand stays, so no region is ever free: their other halves are."""
    kept = "kept = fill(200)[::50_000]"
    with Process(python) as plain, Process(python) as process:
        plain.run("import page_primer.apply")
        process.prime(heap="arenas", **ONLY_HEAP)
        modules = max(0, resident(process) - resident(plain))  # what prime() itself takes
        plain.run(FILL + kept)
        process.run(FILL + kept)
        assert resident(process) <= resident(plain) * 1.05 + modules + 2 * PMD


@pytest.mark.slow
def test_thousands_of_arenas_leave_nothing(python):
    with Process(python) as process:
        process.prime(heap="arenas", **ONLY_HEAP)
        process.run(FILL + "fill(8)")
        maps = len(outside.smaps(process.pid))
        made = process.run(
            "for _ in range(200): [bytes(479) for _ in range(16_384)]\n"
            "result = page_primer._core.arenas_counts()"
        )
        assert made[3] >= 400  # regions
        assert made[0] <= 4
        assert made[2] <= 2 * PMD  # kept free
        assert len(outside.smaps(process.pid)) <= maps + 3


def test_a_long_life_of_arenas_leaves_nothing(python):
    """`make sanitize` has more of it, under AddressSanitizer."""
    done = subprocess.run(
        [python, "-m", "harness.heap_churn", "40000"], cwd=Path(__file__).parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) == 60_000


FORK = """
import os
kept = fill(40)
def child():
    global kept
    del kept[::2]
    more = [head * 2 for i in range(80_000)]
    del kept
    again = fill(10)
    grandchild = os.fork()
    if grandchild == 0:
        del more, again
        os._exit(len(fill(5)) != 5 * 4096)
    assert os.waitpid(grandchild, 0)[1] == 0
    huge = sum(
        int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("AnonHuge")
    )
    os._exit(0 if huge >= 26 << 10 else 1)
statuses = []
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        child()
    statuses.append(os.waitpid(pid, 0)[1])
result = statuses, kept[5], len(kept)
"""


@pytest.mark.slow
def test_children_free_what_they_inherit(every_python, patient):
    with Process(every_python, env=patient) as process:
        process.prime(heap="arenas", **ONLY_HEAP)
        statuses, one, count = process.run(FILL + FORK.replace("kept[5]", "kept[5].hex()"))
        assert statuses == [0] * 5
        assert (one, count) == (bytes([*range(200), *b"00000005"]).hex(), 40 * 4096)


def test_restore_makes_no_more_and_frees_its_own(every_python):
    with Process(every_python) as process:
        process.prime(heap="arenas", **ONLY_HEAP)
        process.run(FILL + "kept = fill(20)")
        before = regions(process)
        assert process.restore()["heap"] is None
        process.run("more = fill(20)")
        assert set(regions(process)) <= set(before)
        process.run("del kept")
        assert len(regions(process)) <= 2
        assert process.run("result = more[7][-1:] == b'7'")
        process.prime(heap="arenas", **ONLY_HEAP)
        process.run("kept = fill(20)")
        assert len(regions(process)) >= 8
        process.run("del more, kept")


@pytest.mark.slow
@pytest.mark.parametrize("allocator", ["debug", "pymalloc_debug", "malloc", "malloc_debug"])
def test_pythonmalloc(every_python, allocator, patient):
    with Process(every_python, env={"PYTHONMALLOC": allocator, **patient}) as process:
        report = process.prime(heap="arenas", **ONLY_HEAP)["heap"]
        process.run(FILL + "kept = fill(20)")
        if allocator.startswith("malloc"):
            assert any("pymalloc is not in use" in note for note in report["notes"])
            assert regions(process) == []
        else:
            assert in_regions(process)[1] >= 20 * MIB


@pytest.fixture(scope="module")
def python_with_mimalloc(tmp_path_factory):
    environ = {**os.environ, "PYTHONMALLOC": "mimalloc"}
    for path in interpreters.INTERPRETERS.values():
        tried = subprocess.run([path, "-c", ""], env=environ, check=False, capture_output=True)
        if tried.returncode == 0:
            return interpreters.python_of(tmp_path_factory.mktemp("mimalloc"), path)
    pytest.skip("no interpreter here has mimalloc (CPython 3.13)")


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("allocator", ["mimalloc", "mimalloc_debug"])
def test_mimalloc_is_left_alone(python_with_mimalloc, allocator, ignored):
    """Its blocks are counted as pymalloc's are. Without an environment it is not in use."""
    options = ["-E"] if ignored else []
    with Process(python_with_mimalloc, env={"PYTHONMALLOC": allocator}, options=options) as process:
        process.run(FILL + CHAIN + "import sys; assert sys.getallocatedblocks() > 300_000")
        report = process.prime(heap="arenas", **ONLY_HEAP)["heap"]
        process.run("kept = fill(20)")
        found = ["pymalloc is not in use" in note for note in report["notes"]]
        advised = [v for v in outside.smaps(process.pid) if "hg" in v.flags]
        says = process.run(ADVICE)[1]
        if ignored:
            assert (found, "pymalloc is not in use" in says) == ([], False)
            assert regions(process)
            assert advised
        else:
            assert (found, "pymalloc is not in use" in says) == ([True], True)
            assert report["use"]["arenas"] == report["collapsed_bytes"] == 0
            assert advised == regions(process) == []


@pytest.mark.slow
def test_tracemalloc(every_python):
    with Process(every_python, options=["-X", "tracemalloc"]) as process:
        process.prime(heap="arenas", **ONLY_HEAP)
        traced = process.run(
            FILL + "import tracemalloc\nkept = fill(20)\n"
            "result = tracemalloc.get_traced_memory()[0]\ntracemalloc.stop()\ndel kept\nfill(20)"
        )
        assert traced >= 20 * MIB
        assert len(regions(process)) <= 8


@pytest.mark.slow
def test_threads(every_python):
    with Process(every_python) as process:
        process.prime(heap="all", **ONLY_HEAP)
        process.run(
            FILL + "import threading\n"
            "def work():\n"
            "    for _ in range(6): fill(3)\n"
            "threads = [threading.Thread(target=work) for _ in range(8)]\n"
            "for thread in threads: thread.start()\n"
            "for thread in threads: thread.join()"
        )
        assert len(regions(process)) <= 8


INTERPRETERS = """
import sys, threading
if sys.version_info >= (3, 13):
    import _interpreters as interpreters
    make = lambda own: interpreters.create("isolated" if own else "legacy")
    def run(number, source):
        failed = interpreters.exec(number, source)
        assert failed is None, failed
else:
    import _xxsubinterpreters as interpreters
    make = lambda own: (
        interpreters.create(isolated=own) if sys.version_info >= (3, 12) else interpreters.create()
    )
    run = interpreters.run_string
source = '''
head = bytes(range(200))
kept = [head + b"%08d" % i for i in range(4096 * 6)]
for _ in range(5):
    more = [head + b"%08d" % i for i in range(4096 * 4)]
    del more
assert kept[77][-2:] == b"77"
'''
numbers = [make(OWN) for _ in range(4)]
threads = [threading.Thread(target=run, args=(number, source)) for number in numbers]
for thread in threads: thread.start()
kept = fill(10)
for thread in threads: thread.join()
held = len(page_primer._core.arenas_regions())
for number in numbers: interpreters.destroy(number)
result = held
"""


@pytest.mark.slow
@pytest.mark.parametrize("own_gil", [False, True])
def test_sub_interpreters(every_python, own_gil):
    with Process(every_python) as process:
        process.prime(heap="arenas", **ONLY_HEAP)
        held = process.run(FILL + INTERPRETERS.replace("OWN", str(own_gil)))
        assert held >= 17  # 34 MiB
        process.run("del kept; fill(3)")
        assert process.run("result = fill(1)[9][-1:] == b'9'")


WRAPPER = r"""
#include <stddef.h>
typedef struct
{ void *ctx; void *(*alloc)(void *, size_t); void (*free)(void *, void *, size_t); } A;
void PyObject_GetArenaAllocator(A *); void PyObject_SetArenaAllocator(A *);
static A before; static long live; long calls;
static void *alloc(void *c, size_t n)
{ calls++; live += n; return before.alloc(before.ctx, n); }
static void release(void *c, void *p, size_t n) { live -= n; before.free(before.ctx, p, n); }
void install(void)
{ A ours = {&before, alloc, release}; PyObject_GetArenaAllocator(&before);
  PyObject_SetArenaAllocator(&ours); }
void uninstall(void) { PyObject_SetArenaAllocator(&before); }
"""


@pytest.fixture(scope="session")
def wrapper(tmp_path_factory):
    """A library with an arena allocator that counts, and calls the one before."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (Debian's build-essential)")
    directory = tmp_path_factory.mktemp("wrapper")
    (directory / "wrapper.c").write_text(WRAPPER)
    made = directory / "wrapper.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", made, directory / "wrapper.c"], check=True)
    return f"import ctypes; wrapper = ctypes.PyDLL({str(made)!r})\n"


@pytest.mark.slow
def test_an_allocator_installed_before(every_python, wrapper):
    with Process(every_python) as process:
        process.run(FILL + wrapper + "wrapper.install()\nearly = fill(10)")
        process.prime(heap="arenas", **ONLY_HEAP)
        calls = process.run("c = ctypes.c_long.in_dll(wrapper, 'calls')\nresult = c.value")
        assert calls >= 9
        process.run("kept = fill(20); del early")
        assert process.run("result = c.value") <= calls + 1
        process.run("del kept")
        process.restore()
        process.run("kept = fill(20)")  # more than what the interpreter kept of the arenas before
        assert process.run("result = c.value") >= calls + 8


@pytest.mark.slow
def test_an_allocator_installed_after_and_taken_off(every_python, wrapper):
    with Process(every_python) as process:
        process.prime(heap="arenas", **ONLY_HEAP)
        process.run(FILL + "early = fill(10)\n" + wrapper + "wrapper.install()\nkept = fill(10)")
        assert len(regions(process)) >= 9  # it calls ours
        again = process.prime(heap="arenas", limit=1, **ONLY_HEAP)["heap"]
        assert any("over page-primer's" in note for note in again["notes"])
        process.restore()
        count = len(regions(process))
        process.run("late = fill(10); del early")
        assert len(regions(process)) < count
        process.run("wrapper.uninstall(); del kept, late; kept = fill(5); del kept")
        assert len(regions(process)) < count - 4
        process.prime(heap="arenas", **ONLY_HEAP)
        process.run("kept = fill(10)")
        assert len(regions(process)) >= 4


@pytest.mark.slow
def test_ours_taken_off_by_the_one_before(every_python, wrapper):
    """Who puts an older allocator back has our arenas freed there, as mappings."""
    with Process(every_python) as process:
        process.run(FILL + wrapper + "wrapper.install()")
        process.prime(heap="arenas", **ONLY_HEAP)
        process.run("kept = fill(10)\nwrapper.uninstall()\nlate = fill(5)\ndel kept")
        process.prime(heap="arenas", limit=1, **ONLY_HEAP)
        process.run("kept = fill(10)\ndel late")
        assert process.run("result = kept[5][-1:] == b'5'")


def test_a_small_cgroup_is_left_alone(python):
    with Cgroup(128 * MIB) as cgroup, Process(python, wrapper=cgroup.wrapper) as process:
        report = process.prime(heap="all", **ONLY_HEAP)["heap"]
        assert report["reason"] == reasons.SMALL_LIMIT
        assert f"128 MiB ({cgroup.path}" in report["detail"]
        assert (report["least_memory"], report["regions"]) == (256 * MIB, 0)
        process.run(FILL + "kept = fill(5)")
        assert regions(process) == []
        report = process.prime(heap="all", heap_min_memory="64M", **ONLY_HEAP)["heap"]
        assert report["reason"] is None
        process.run("more = fill(20)")
        rss, huge = in_regions(process)
        # Those that the kernel had no huge page for, or none in time, are small.
        small = process.run("result = page_primer._core.arenas_counts()[4]")
        assert rss >= 20 * MIB
        assert huge >= 20 * MIB - small * PMD, small
        assert cgroup.oom_kills == 0


def test_a_process_without_huge_pages_is_told_so(python):
    with Process(python) as process:
        process.run("import ctypes; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)")
        report = process.prime(heap="all", **ONLY_HEAP)["heap"]
        assert "PR_SET_THP_DISABLE" in report["reason"]
        assert regions(process) == []


def test_a_forked_child_collapses_what_it_shares_only_if_asked(python):
    with Process(python) as process:
        process.run(CHAIN)
        # So that nothing else is new in the child; and a busy machine takes longer than that.
        process.run(
            "import json, page_primer.apply, page_primer.heap.chunks as chunks\n"
            "chunks.TIME_LIMIT = 60"
        )
        collapsed = process.run(
            "import os\n"
            "result = []\n"
            "for unshare in (False, True):\n"
            "    read, write = os.pipe()\n"
            "    if (pid := os.fork()) == 0:\n"
            "        r = page_primer.prime(heap='all', heap_unshare=unshare, remap=False,\n"
            "            mlock=False, include=['nothing'])\n"
            "        os.write(write, json.dumps([r.heap.collapsed_bytes, r.heap.notes]).encode())\n"
            "        os._exit(0)\n"
            "    os.waitpid(pid, 0)\n"
            "    result.append(json.loads(os.read(read, 10000)))"
        )
        assert collapsed[0][0] <= 4 * PMD, collapsed
        assert collapsed[1][0] >= 16 * MIB, collapsed


def test_the_allocator_that_is_not_glibcs_is_named(python, tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (Debian's build-essential)")
    (tmp_path / "m.c").write_text(
        "#include <stddef.h>\nextern void *__libc_malloc(size_t);\n"
        "void *malloc(size_t n) { return __libc_malloc(n); }\n"
        "size_t malloc_usable_size(void *p) { return p ? 1 : 0; }\n"
    )
    library = tmp_path / "libjemalloc.so.2"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "m.c"], check=True)
    with Process(python, env={"LD_PRELOAD": str(library)}) as process:
        process.run("blocks = [bytes(3000) for i in range(8000)]")
        report = process.prime(heap="all", **ONLY_HEAP)["heap"]
        assert "malloc is jemalloc, left alone" in report["notes"]
        assert report["use"]["malloc_huge"] == 0
        status, found, remedy = process.run(ADVICE)
        assert (status, remedy) == ("ok", None) and "; malloc is jemalloc, left alone; " in found
    with Process(python, env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}) as process:
        report = process.prime(heap="all", **ONLY_HEAP)["heap"]
        assert "glibc advises malloc's memory itself" in report["notes"]
        status, found, remedy = process.run(ADVICE)
        assert (status, remedy) == ("ok", None)
        assert found.startswith("all: ") and "; glibc advises malloc's memory itself; " in found


def test_it_is_switched_off_again(python):
    count = "from page_primer import _core\nresult = len(_core.arenas_regions())"
    with Process(python) as process:
        assert process.prime(heap="arenas", **ONLY_HEAP)["heap"]["reason"] is None
        process.run(FILL + "kept = fill(8)")
        assert process.run(count) > 0
        assert process.prime(heap=False, **ONLY_HEAP)["heap"] is None
        before = process.run(count)
        process.run(FILL + "more = fill(16)")
        assert process.run(count) == before


@pytest.mark.parametrize("value", ["some", 2, "1.5"])
def test_a_bad_heap_is_named(python, value):
    with Process(python) as process:
        message = process.run(
            "import page_primer\n"
            "try:\n"
            f"    page_primer.prime(heap={value!r})\n"
            "except ValueError as error:\n"
            "    result = str(error)"
        )
        assert message.startswith('heap must be "auto"')


@pytest.mark.slow
def test_status_tells_what_smaps_tells(python):
    with Process(python) as process:
        process.prime(heap="all", **ONLY_HEAP)
        process.run(FILL + "kept = fill(20)")
        done = subprocess.run(
            [python, "-m", "page_primer", "status", "--json", str(process.pid)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)[0]["heap"]
        vmas = [v for v in outside.smaps(process.pid) if v.perms == "rw-p" and not v.inode]
        vmas = [v for v in vmas if v.path in ("", "[heap]") or v.path.startswith("[anon:")]
        # Not every kernel has names for anonymous memory (CONFIG_ANON_VMA_NAME).
        named = [v for v in vmas if v.path == "[anon:page-primer arenas]"]
        assert found["malloc"] == sum(v.kb["Rss"] for v in vmas if v.path == "[heap]") << 10
        huge = found["arenas_huge"] + found["malloc_huge"] + found["other_huge"]
        # Where the kernel had no huge page at hand, or none soon enough, a region is small.
        small = process.run("from page_primer import _core; result = _core.arenas_counts()[4]")
        assert huge == sum(v.huge for v in vmas) >= 20 * MIB - small * PMD
        assert found["arenas_huge"] == sum(v.huge for v in named)
        text = subprocess.run(
            [python, "-m", "page_primer", "status", str(process.pid)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert f"heap: {huge / MIB:.1f} of" in text


@pytest.mark.parametrize(("heap", "status"), [("", "info"), ("all", "ok")])
def test_the_doctor_says_what_the_heap_can_have(python, heap, status):
    done = subprocess.run(
        [python, "-m", "page_primer", "doctor", "--json"],
        env={"PAGE_PRIMER_HEAP": heap, "PAGE_PRIMER_REMAP": "0"},
        capture_output=True, text=True, check=False,  # it is about the heap alone
    )  # fmt: skip
    (check,) = [c for c in json.loads(done.stdout)["checks"] if c["name"] == "heap"]
    assert check["status"] == status
    assert "arenas" in check["found"] and "defrag=" in check["found"]


APP = """
import gc, json, os
kept = [[str(i)] for i in range(200_000)]
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"pid": os.getpid(), "frozen": gc.get_freeze_count()}).encode()]
"""


def test_gunicorn_preloaded_arenas_are_huge_and_frozen(python, tmp_path, patient):
    options = {"PAGE_PRIMER_HEAP": "auto", "PAGE_PRIMER_FREEZE": "1", "PAGE_PRIMER_REMAP": "0"}
    options.update(patient)
    with Gunicorn(python, tmp_path, "--preload", app=APP, env=options) as server:
        assert json.loads(server.get())["frozen"] >= 200_000
        # The application was loaded after ours was installed: in whole huge pages.
        vmas = [v for v in outside.smaps(server.master) if v.perms == "rw-p" and not v.inode]
        assert sum(v.huge for v in vmas) >= 20 * MIB
        lines = [message for pid, message in server.lines("INFO") if pid == server.master]
        assert len([line for line in lines if line.startswith("heap: ")]) == 1
        assert len([line for line in lines if "objects frozen" in line]) == 1
        before = server.workers
        os.kill(server.master, signal.SIGHUP)
        server.wait_for_workers(1, but_not=before)
        assert json.loads(server.get())["frozen"] >= 200_000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_run_has_glibc_advise_mallocs_memory(python, before, after):
    """The tunable leaves malloc's dynamic mmap threshold alone, as mallopt() does not."""
    env = {"GLIBC_TUNABLES": before} if before else {}
    done = subprocess.run(
        [python, "-m", "page_primer", "run", "--remap", "0", "--mlock", "0",
         "--heap", "all", "--", python, "-c",
         "import os, page_primer.apply; blocks = [bytes(3000 + i % 2) for i in range(9000)]\n"
         "print(os.environ['GLIBC_TUNABLES'])\n"
         "heap = [b for b in open('/proc/self/smaps').read().split('VmFlags') if '[heap]' in b]\n"
         "print(sum(int(b.split('AnonHugePages:')[1].split()[0]) for b in heap))"],
        capture_output=True, text=True, check=True, env={**os.environ, **env},
    )  # fmt: skip
    tunables, huge = done.stdout.split()
    assert tunables == after
    if after.endswith("=1") and glibc() >= (2, 35):
        assert int(huge) << 10 >= 20 * MIB


def glibc():
    return tuple(int(part) for part in os.confstr("CS_GNU_LIBC_VERSION").split()[1].split("."))
