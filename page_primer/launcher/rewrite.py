"""`page-primer warm --rewrite`: write files anew that other processes hold in small pages.

They keep the old file until they restart. From Linux 7.2 on there is nothing to rewrite, for the
kernel collapses small pages in place."""

from __future__ import annotations

import os

from page_primer.align import files, replace, rewrite
from page_primer.align.memory import left_small
from page_primer.align.original import Refused

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
            if left_small(new.path):
                raise Refused("the copy is not on huge pages either")
            files.finish(new, old, status)
    return True


def _copy(fd: int, target: int, size: int) -> None:
    """In whole huge pages, each of which the page cache then takes as one."""
    block = files.pmd_size()
    for at in range(0, size, block):
        rewrite.write_all(target, os.pread(fd, block, at), at)
