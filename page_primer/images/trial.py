"""Whether files in a directory can be on huge pages: tried, since it depends on the file system (in
a container on the one below overlayfs), the kernel and its settings.

The answer stays in the store: for good if it is yes, until the kernel is another; for a while if it
is no, since memory may have been fragmented.
"""

from __future__ import annotations

import os
import time

from page_primer import _core
from page_primer._lean import suppress
from page_primer.kernel import smaps
from page_primer.kernel.address_space import map_new
from page_primer.kernel.limits import check_file_size
from page_primer.kernel.thp import bring_in, page_size

_ANSWER = ".trial"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_REPLACE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_HOLDS = 3600  # seconds
SIZE = 2  # huge pages that are tried
_TRIES = 2
_counter = 0


def gives_huge_pages(store: int, pmd: int) -> bool:
    """Whether images in a store will be on huge pages; yes where it cannot be tried, since what
    comes of an image is seen in any case.

    Args:
        store: the open directory.
        pmd: the size of a huge page, bytes.
    """
    known = f"{os.uname().release} {pmd:x} "
    with suppress(OSError, ValueError):
        with _core.opened(os.open, _ANSWER, _READ, dir_fd=store) as fd:
            text, age = os.read(fd, 256).decode(), time.time() - os.fstat(fd).st_mtime
        if text == f"{known}yes\n":
            return True
        if text == f"{known}no\n" and 0 <= age < _NO_HOLDS:
            return False
    huge = True
    with suppress(OSError):
        # One is enough: where memory is fragmented, there may not be a free one for each.
        huge = any(measure(store, pmd) for _ in range(_TRIES))
        with _core.opened(os.open, _ANSWER, _REPLACE, 0o644, dir_fd=store) as fd:
            os.write(fd, f"{known}{'yes' if huge else 'no'}\n".encode())
    return huge


def measure(store: int, pmd: int) -> int:
    """Write a file of two huge pages, map it as an image is, and return the bytes that smaps shows
    on huge pages, 0 or all of them mostly. Nothing is left behind.

    Raises:
        OSError: a step was refused.
    """
    with _create(store) as kept:
        _fill(kept, pmd)
        huge = _map(kept, pmd)
        if huge < SIZE * pmd:
            # Not as written: on some kernels (xfs before 6.12) only what is read back can be.
            os.fsync(kept)
            os.posix_fadvise(kept, 0, 0, os.POSIX_FADV_DONTNEED)
            huge = max(huge, _map(kept, pmd))
        return huge


def _create(store: int) -> _core.Descriptor:
    """A file without a name."""
    global _counter
    _counter += 1
    name = f"{_ANSWER}-{os.getpid()}-{time.time_ns():x}-{_counter}"
    fd = _core.opened(os.open, name, _READ | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=store)
    os.unlink(name, dir_fd=store)
    return fd


def _fill(kept: int, pmd: int) -> None:
    check_file_size((SIZE + 1) * pmd)
    # By another descriptor, closed before the file is mapped: what is open for writing cannot be
    # made huge with CONFIG_READ_ONLY_THP_FOR_FS.
    block = b"page-primer trial".ljust(64) * (pmd // 64)
    path = f"/proc/self/fd/{kept}"
    with _core.opened(os.open, path, os.O_WRONLY | os.O_CLOEXEC) as target:
        for number in range(1, SIZE + 1):
            done = os.pwrite(target, block, number * pmd)
            while done < pmd:
                done += os.pwrite(target, block[done:], number * pmd + done)


def _map(kept: int, pmd: int) -> int:
    page, size = page_size(), SIZE * pmd
    protection = _core.PROT_READ | _core.PROT_EXEC
    # A page behind it, so that the kernel does not merge it with what is mapped next to it.
    area = map_new(size, pmd, 0, protection, _core.MAP_PRIVATE, kept, pmd, guard=page)
    bring_in(area.address, size, pmd)
    return sum(mapping.huge for mapping in smaps.starting_at({area.address}))
