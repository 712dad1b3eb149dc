"""`page-primer warm --rewrite`: write files anew that other processes hold in small pages.

They keep the old file until they restart. From Linux 7.2 on there is nothing to rewrite, for the
kernel collapses small pages in place."""

from __future__ import annotations

import os
import subprocess

from page_primer.align import files, replace, rewrite
from page_primer.align.original import Refused

_HELD = ": other processes map it in small pages\n"  # how page-primer-warm ends its line


def rewrite_held(program: str, path: str) -> bool:
    """Rewrite a file of which page-primer-warm says that others map it in small pages.

    Args:
        program: the path of page-primer-warm.
        path: a file or a link to it.

    Returns:
        Whether it was rewritten: False where nothing was to be.

    Raises:
        Refused, OSError: it stays as it is.
    """
    if not _warm(program, path).endswith(_HELD):
        return False
    path = os.path.realpath(path)
    with replace.opened(path) as fd:
        replace.check_replaceable(fd)
        status = os.fstat(fd)
        if status.st_nlink > 1:
            raise Refused("it has several names")
        with replace.beside(path) as new:
            _copy(fd, new, status.st_size)
            if _warm(program, new):
                raise Refused("the copy is not on huge pages either")
            files.finish(new, path, fd, status)
    return True


def _warm(program: str, path: str) -> str:
    """What page-primer-warm says of a file that is not on huge pages; nothing of others."""
    words = [program, os.path.join(os.curdir, path)]  # what begins with `-` is an option
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, errors="replace", check=False)
    return done.stdout if done.returncode else ""


def _copy(fd: int, new: str, size: int) -> None:
    """In whole huge pages, each of which the page cache then takes as one."""
    block = files.pmd_size()
    target = os.open(new, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for at in range(0, size, block):
            rewrite.write_all(target, os.pread(fd, block, at), at)
        replace.copy_attributes(fd, target)
        os.fsync(target)
    finally:
        os.close(target)
