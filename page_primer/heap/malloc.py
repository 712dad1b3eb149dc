"""malloc: which one it is, and what of its memory takes part.

glibc's malloc grows [heap] by brk(2), 132 KiB at a time. mallopt(M_TOP_PAD) would make that whole
huge pages, but it also ends the dynamic mmap threshold (glibc, malloc/malloc.c, do_set_top_pad): a
block of some megabytes would be mapped and unmapped anew each time, for as long as the process
lives. So [heap] is advised and collapsed as it is, whenever we are called. The tunable
glibc.malloc.hugetlb=1 (glibc 2.35) does both and keeps the threshold, but is read at a program's
start only.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping

# Of names of files, for people; the first that fits.
_KNOWN = ("jemalloc", "tcmalloc", "mimalloc", "snmalloc", "hoard", "asan")


def other_allocator() -> str | None:
    """The allocator that took glibc's place, or None. Such a one has its own ways with huge pages
    (jemalloc's `thp`, tcmalloc's hugepage-aware heap), so it is left alone."""
    from page_primer import _core  # not where a command is only started

    where, libc = _core.malloc_object()
    if libc is None:
        return "a C library other than glibc"
    if where is None or where == libc:
        return None
    name = os.path.basename(os.fsdecode(where))
    return next((known for known in _KNOWN if known in name), name)


def tunable_in_force() -> bool:
    """Whether glibc itself advises what malloc gets."""
    return _names_hugetlb(os.environ.get("GLIBC_TUNABLES", ""))


def add_tunable(environment: MutableMapping[str, str]) -> None:
    """Have glibc advise, and grow [heap] in whole huge pages, in programs that are started in this
    environment; unless somebody decided on it."""
    settings = environment.get("GLIBC_TUNABLES", "")
    if not _names_hugetlb(settings, "="):
        environment["GLIBC_TUNABLES"] = f"{settings}:{_HUGETLB}=1".lstrip(":")


def _names_hugetlb(settings: str, value: str = "=1 =2") -> bool:
    wanted = tuple(f"{_HUGETLB}{end}" for end in value.split())
    return any(setting.startswith(wanted) for setting in settings.split(":"))


_HUGETLB = "glibc.malloc.hugetlb"
