"""`page-primer warm --rewrite`: write files anew that other processes hold in small pages.

They keep the old file until they restart. From Linux 7.2 on there is nothing to rewrite, for the
kernel collapses small pages in place."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from page_primer.align import files, replace, rewrite
from page_primer.align.memory import left_small
from page_primer.align.original import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

_HELD = ": other processes map it in small pages"  # how page-primer-warm ends its line


def rewrite_held(path: str) -> bool:
    """Rewrite a file of which page-primer-warm says that others map it in small pages.

    Args:
        path: a file or a link to it.

    Returns:
        Whether it was rewritten: False where nothing was to be.

    Raises:
        Refused, OSError: it stays as it is.
    """
    if not left_small(path).endswith(_HELD):
        return False
    with replace.to_replace(os.path.realpath(path)) as old:
        status = os.fstat(old.fd)
        if status.st_nlink > 1:
            raise Refused("it has several names")
        with replace.beside(old.path) as new:
            with new.writable() as target:
                _copy(old.fd, target, status.st_size)
                replace.copy_attributes(old.fd, target)
                os.fsync(target)
                _compare(old.fd, target, status.st_size)
            if left_small(new.path):
                raise Refused("the copy is not on huge pages either")
            files.finish(new, old, status)
    return True


def _copy(fd: int, target: int, size: int) -> None:
    """In whole huge pages, each of which the page cache then takes as one."""
    for at, data in _blocks(fd, size):
        rewrite.write_all(target, data, at)


def _compare(fd: int, target: int, size: int) -> None:
    """Raise Refused where the new file is not what the old one is now."""
    same = all(
        one == other for one, other in zip(_blocks(fd, size), _blocks(target, size), strict=True)
    )
    if not same or os.fstat(target).st_size != size:
        raise Refused("the copy differs from it")


def _blocks(fd: int, size: int) -> Iterator[tuple[int, bytearray]]:
    """The bytes of each huge page of a file, and where it begins."""
    block = files.pmd_size()
    for at in range(0, size, block):
        data = bytearray(min(block, size - at))
        rewrite.read_into(fd, memoryview(data), at)
        yield at, data
