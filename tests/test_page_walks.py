"""benchmarks/page_walks.py: what is huge of an address space, and cases with known answers."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from tlb.cores import CORES, simulate  # noqa: E402
from tlb.layout import HUGE, Area, Snapshot, per_segment, spread  # noqa: E402
from tlb.works import WORKS, python_for, script, versions  # noqa: E402

MB = 1 << 20
SMAPS = f"""marks 7
arena {30 * MB:x} {MB:x}
arena {32 * MB:x} {2 * MB:x}
{4 * MB:x}-{5 * MB:x} r--p 00000000 08:01 11 /usr/lib/libexample.so
Rss:                1024 kB
{5 * MB:x}-{13 * MB:x} r-xp 00100000 08:01 11 /usr/lib/libexample.so
Rss:                8192 kB
FilePmdMapped:      4096 kB
VmFlags: rd ex mr mw me
{16 * MB:x}-{17 * MB:x} rw-p 00900000 08:01 11 /usr/lib/libexample.so
{20 * MB:x}-{24 * MB:x} rw-p 00000000 00:00 0 [heap]
Rss:                4096 kB
AnonHugePages:      2048 kB
{30 * MB:x}-{32 * MB:x} rw-p 00000000 00:00 0
Rss:                1024 kB
AnonHugePages:         0 kB
{32 * MB:x}-{34 * MB:x} rw-p 00000000 00:00 0
Rss:                2048 kB
AnonHugePages:      2048 kB
"""


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "maps"
    path.write_text(SMAPS)
    return Snapshot.read(path)


def test_an_address_space_is_read(space):
    assert space.marks == 7
    assert len(space.areas) == 6
    assert space.base("libexample.so") == 4 * MB
    assert space.find("libexample.so", 2 * MB, code=True) == 6 * MB
    assert space.find("libexample.so", 9 * MB, code=False) == 16 * MB
    assert space.find("other.so", 0, code=True) is None
    kinds = [(area.start // MB, area.end // MB, kind) for area, kind in space.kinds()]
    assert kinds == [(20, 24, "brk"), (30, 31, "arena"), (31, 32, "other"), (32, 34, "arena")]
    assert space.share("brk") == 0.5
    assert space.share("arena") == 2 / 2.5  # half of the first mapping's resident memory is its own
    assert space.share("other") == 0.0


def test_what_is_huge(space):
    """The rule takes whole chunks of the code segment; smaps says that two of its three are."""
    assert per_segment(space) == {3, 4, 5}
    assert space.areas[1].huge_chunks == {3, 4}
    assert Area(2 * MB, 6 * MB, "r-xp", 0, "", huge=4 * MB).huge_chunks == {1, 2}
    assert spread(range(10), 0.5) == {0, 2, 4, 6, 8}
    assert spread(range(10), 0.0) == spread([], 1.0) == set()
    assert spread(range(3), 1.0) == {0, 1, 2}


def compiled(directory, name):
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    path = directory / f"{name}.so"
    source = BENCHMARKS / "tlb" / f"{name}.c"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    return ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("tlbsim"), "tlbsim")))


def walks(simulator, core, pages, *, huge=False, data=False, workers=1):
    """Walks while each of so many neighbouring pages is touched once, over and over."""
    records = (ctypes.c_uint32 * pages)(
        *(number << 15 | (1 if data else 100 << 1) for number in range(pages))
    )
    per_page = HUGE // 4096
    tags = (ctypes.c_uint64 * pages)(
        *((number // per_page << 2 | 2) if huge else number << 2 for number in range(pages))
    )
    found = simulate(simulator, records, tags, core, workers, 1000)
    return found.data_walks if data else found.walks


@pytest.mark.parametrize("core", CORES, ids=lambda core: core.name)
def test_cycles_of_pages_with_known_answers(simulator, core):
    """What fits is not walked for; what exceeds all levels by far always is (true LRU); and 16,384
    pages are 32 huge ones, which fit again."""
    assert walks(simulator, core, 40) == walks(simulator, core, 40, data=True) == 0
    assert walks(simulator, core, 16384) == 16384
    assert walks(simulator, core, 16384, data=True) == 16384
    assert walks(simulator, core, 16384, huge=True) == 0
    assert walks(simulator, core, 16384, huge=True, data=True) == 0
    # Address spaces of their own: what fits once does not fit a thousand times.
    assert walks(simulator, core, 40, workers=100) > 0


@pytest.mark.parametrize("core", CORES, ids=lambda core: core.name)
def test_the_same_trace_gives_the_same_walks(simulator, core):
    """Again and again, to the page; and the pages' walks are all of them."""
    numbers, pages = random.Random(1), 3000
    records = (ctypes.c_uint32 * 20000)(
        *(
            numbers.randrange(pages) << 15 | numbers.choice((1, 2 * numbers.randrange(1, 50)))
            for _ in range(20000)
        )
    )
    tags = (ctypes.c_uint64 * pages)(*(number << 2 for number in range(pages)))
    found = set()
    for _ in range(3):
        by_page = (ctypes.c_uint64 * pages)()
        result = simulate(simulator, records, tags, core, 4, 1000, by_page)
        assert sum(by_page) == result.walks + result.data_walks > 0
        found.add((result.walks, result.data_walks, tuple(by_page)))
    assert len(found) == 1


KEEPING = """
import sys
sys.path.insert(0, {directory!r})
from marks import measure
kept = []
measure(lambda number: kept.append([[] for _ in range(50_000)]), warm=1)
"""


def test_what_a_workload_has_at_its_last_mark(tmp_path):
    """Not at its exit, where the interpreter has freed it."""
    library, maps = compiled(tmp_path, "mapsnap"), tmp_path / "maps"
    work = KEEPING.format(directory=str(BENCHMARKS / "tlb"))
    own = {"LD_PRELOAD": str(library), "PAGE_WALKS_MAPS": str(maps), "PAGE_PRIMER": "0"}
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONMALLOC"}
    subprocess.run(
        [sys.executable, "-c", work, "2", "3"], env={**environ, **own}, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    space = Snapshot.read(maps)
    assert space.marks == 6
    arenas = sum(area.resident for area, kind in space.kinds() if kind == "arena")
    # 350,000 lists of 56 bytes each, with the collector's header 72, and their places in others.
    assert 20 * MB < arenas < 60 * MB, space.areas


@pytest.mark.parametrize("work", WORKS)
def test_each_workload_is_there(work, tmp_path):
    path = script(work)
    compile(path.read_text(), path, "exec")
    pinned = {name: pin for name, pin in WORKS[work].items() if pin}
    found = versions(sys.executable, work)
    assert found.keys() <= WORKS[work].keys()
    if pinned.items() <= found.items():  # a Python that has all of it is taken as it is
        assert python_for(work, sys.executable, tmp_path / "none") == sys.executable
        assert not (tmp_path / "none").exists()
