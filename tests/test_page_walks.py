"""benchmarks/page_walks.py: what is huge of an address space, and cases with known answers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from tlb.cores import CORES, simulate  # noqa: E402
from tlb.layout import HUGE, Area, Snapshot, per_segment, spread  # noqa: E402

MB = 1 << 20
SMAPS = f"""marks 7
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
"""


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "maps"
    path.write_text(SMAPS)
    return Snapshot.read(path)


def test_an_address_space_is_read(space):
    assert space.marks == 7
    assert len(space.areas) == 5
    assert space.base("libexample.so") == 4 * MB
    assert space.find("libexample.so", 2 * MB, code=True) == 6 * MB
    assert space.find("libexample.so", 9 * MB, code=False) == 16 * MB
    assert space.find("other.so", 0, code=True) is None
    assert [kind for _, kind in space.kinds()] == ["brk", "arena"]
    assert space.share("brk") == 0.5
    assert space.share("arena") == space.share("other") == 0.0


def test_what_is_huge(space):
    """The rule takes whole chunks of the code segment; smaps says that two of its three are."""
    assert per_segment(space) == {3, 4, 5}
    assert space.areas[1].huge_chunks == {3, 4}
    assert Area(2 * MB, 6 * MB, "r-xp", 0, "", huge=4 * MB).huge_chunks == {1, 2}
    assert spread(range(10), 0.5) == {0, 2, 4, 6, 8}
    assert spread(range(10), 0.0) == spread([], 1.0) == set()
    assert spread(range(3), 1.0) == {0, 1, 2}


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    path = tmp_path_factory.mktemp("tlbsim") / "tlbsim.so"
    source = BENCHMARKS / "tlb" / "tlbsim.c"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", path, source], check=True)
    return ctypes.CDLL(str(path))


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
