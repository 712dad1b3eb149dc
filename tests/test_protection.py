"""Code that the host has given another protection than its file's headers say: it is left alone,
before a move and after one."""

import mmap
from errno import EFAULT

import pytest
from harness import outside
from harness.libraries import chunks_library
from harness.outside import PMD
from harness.process import Process, left_of

PAGE = mmap.PAGESIZE
OTHERWISE = "not mapped as its program headers say"
OPTIONS = {
    "backing": "memfd", "include": "*libchunks.so", "limit": "64M", "private_limit": "64M",
    "mlock": False,
}  # fmt: skip
PROTECTIONS = {
    "---p": 0,  # to be told of whoever executes it
    "r--p": mmap.PROT_READ,  # the same
    "rwxp": mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC,  # to be patched later
}
START = f"""
import ctypes, page_primer
mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
lib.where.restype = ctypes.c_ulong
for n in range(6): lib.touch(n, {PMD})
page = lib.where() + {PMD + 7 * PAGE}
"""


@pytest.fixture
def process(python, tmp_path):
    library = chunks_library(tmp_path)
    with Process(python) as process:
        process.run(f"import ctypes; lib = ctypes.CDLL({str(library)!r})")
        process.run(START)
        yield process


def protect(process, protection):
    assert process.run(f"result = mprotect(page, {PAGE}, {protection})") == 0


def mapping(process):
    page = process.run("result = page")
    return next(v for v in outside.smaps(process.pid) if v.start <= page < v.end)


def check(process, permissions):
    """It has these; and what was made writable is written to."""
    assert mapping(process).perms == permissions
    if "w" in permissions:
        process.run("ctypes.c_ubyte.from_address(page).value = 0xCC")


def chunks(report):
    return next(obj for obj in report["objects"] if obj["path"].endswith("/libchunks.so"))


@pytest.mark.parametrize(("permissions", "protection"), PROTECTIONS.items(), ids=PROTECTIONS)
def test_prime_leaves_another_protection_alone(process, permissions, protection):
    protect(process, protection)
    report = process.prime(**OPTIONS)
    assert report["moved"] == []
    assert set(left_of(report, "libchunks.so")) == {OTHERWISE}
    check(process, permissions)
    # As its headers have it again, it can be moved.
    protect(process, mmap.PROT_READ | mmap.PROT_EXEC)
    process.run("page_primer.restore()")
    report = process.prime(**OPTIONS)
    if "w" in permissions:
        assert "modified in memory" in left_of(report, "libchunks.so")
    else:
        assert chunks(report)["code_huge_bytes"] == 6 * PMD
        assert mapping(process).path.startswith("/memfd:page-primer")


@pytest.mark.parametrize(("permissions", "protection"), PROTECTIONS.items(), ids=PROTECTIONS)
def test_restore_leaves_another_protection_alone(process, permissions, protection):
    assert chunks(process.prime(**OPTIONS))["code_huge_bytes"] == 6 * PMD
    protect(process, protection)
    assert chunks(process.restore())["notes"] == [f"not put back: {OTHERWISE}"]
    assert mapping(process).path.startswith("/memfd:page-primer")
    check(process, permissions)
    if "w" not in permissions:
        protect(process, mmap.PROT_READ | mmap.PROT_EXEC)
        assert chunks(process.restore())["backing"] is None
        assert mapping(process).path.endswith("/libchunks.so")


def test_a_page_that_is_closed_after_the_survey_is_a_failed_swap(process):
    process.run(
        "from page_primer import survey\n"
        "def take(*given, take=survey.take):\n"
        "    found = take(*given)\n"
        f"    mprotect(page, {PAGE}, 0)\n"
        "    return found\n"
        "survey.take = take"
    )
    report = process.prime(**OPTIONS)
    assert report["moved"] == []
    assert set(left_of(report, "libchunks.so")) == {"swap failed"}
    assert chunks(report)["notes"][-1].startswith("swap: populate: ")
    assert mapping(process).perms == "---p"


def test_a_swap_of_a_page_that_cannot_be_read_is_an_error(process):
    """Whether it is the live page, or the one in its place."""
    code = (
        "from page_primer import _core\n"
        "path, base, headers = next(o for o in _core.objects()[2] if b'libchunks' in o[0])\n"
        f"other = _core.reserve({PAGE}, {PAGE}, 0); found = []\n"
        "for target, source in ((page, other), (other, page)):\n"
        f"    try: _core.swap(base, headers, [(target, {PAGE}, 1, source, -1, 0)], [])\n"
        "    except _core.Error as error: found.append([error.errno, error.step])\n"
        f"_core.unmap(other, {PAGE}); result = found"
    )
    assert process.run(code) == [[EFAULT, "populate"]] * 2
    assert mapping(process).perms == "r-xp"
