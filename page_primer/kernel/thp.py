"""Transparent huge pages: their size, and how the kernel is asked for them.

No answer of madvise(2) is believed; what came of it is in smaps.
"""

from __future__ import annotations

import errno
import os

from page_primer import _core
from page_primer._lean import ours, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SETTINGS = "/sys/kernel/mm/transparent_hugepage"
_PMD_SIZE_FILE = f"{SETTINGS}/hpage_pmd_size"


def page_size() -> int:
    """The size of a small page, bytes."""
    return os.sysconf("SC_PAGESIZE")


def pmd_size() -> int:
    """The size of a huge page in bytes: 2 MiB on x86-64, up to 512 MiB on arm64; 0 without THP."""
    try:
        with open(_PMD_SIZE_FILE, encoding="utf-8") as file:
            return int(file.read())
    except ours(OSError, ValueError):
        return 0


def chosen(name: str) -> str:
    """What is in brackets in a file of SETTINGS, as in "always [madvise] never"; empty where it
    cannot be read."""
    try:
        with open(f"{SETTINGS}/{name}", encoding="utf-8") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except ours(OSError):
        return ""


def has_no_huge_pages() -> bool:
    """Where pmd_size() is 0: whether that is since the kernel has none. Otherwise it cannot be
    read: no descriptor is free, or a sandbox keeps us from it."""
    try:
        with open(_PMD_SIZE_FILE, "rb"):
            return False
    except ours(OSError) as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)


def bring_in(address: int, length: int, pmd: int) -> None:
    """Make the pages of a file mapping present, huge if the kernel will: advice comes before the
    first touch (ext4, xfs), collapse after it (tmpfs; on 6.1 it fails on untouched pages)."""
    # A process, kernel or sandbox without THP says EINVAL to advice.
    with suppress(OSError):
        _core.advise(address, length, _core.MADV_HUGEPAGE)
    _core.populate(address, length)
    low, high = -(-address // pmd) * pmd, (address + length) // pmd * pmd
    if low < high:
        collapse(low, high - low)


def collapse(address: int, length: int) -> None:
    """MADV_COLLAPSE, whose errors say little (EINVAL also for "is huge already")."""
    for _ in range(2):
        try:
            _core.advise(address, length, _core.MADV_COLLAPSE)
        except ours(OSError) as error:
            if error.errno == errno.EAGAIN:
                continue
        return


def fault_in(ranges: Sequence[Iterable[int]], mappings: Sequence[Iterable[int]] = ()) -> None:
    """Have ranges (start, end) of live code mapped, by huge entries where possible.

    Args:
        ranges: what is to be in memory.
        mappings: where that is not all of them, the mappings that hold it: advice for a part would
            split them.
    """
    for start, end in mappings or ranges:
        with suppress(OSError):
            _core.advise(start, end - start, _core.MADV_HUGEPAGE)
    for start, end in ranges:
        with suppress(OSError):
            # Never by reading: the object may have been unloaded.
            _core.advise(start, end - start, _core.MADV_POPULATE_READ)
