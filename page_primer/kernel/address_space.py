"""Mappings at addresses of our own, where nothing else is."""

from __future__ import annotations

import os

from page_primer import _core
from page_primer._lean import suppress


def map_new(
    size: int, alignment: int, like: int, protection: int, flags: int, fd: int, offset: int,
    *, guard: int = 0,
) -> _core.Area:  # fmt: skip
    """Map at a new address that equals `like` modulo `alignment`, with `guard` bytes of reserved
    address space behind."""
    area = _core.reserve(size + guard, alignment, like)
    area.map(size, protection, flags, fd, offset)
    return area


def places_on(alignment: int, path: str, size: int) -> bool:
    """Whether mmap(2) of itself maps a file at multiples of `alignment`, as ext4, xfs and btrfs
    have it do for a huge page's size. Where that cannot be tried, yes.

    Args:
        alignment: bytes, a power of two.
        path: the file.
        size: bytes that are mapped of it, as by the loader.
    """
    with suppress(OSError), _core.opened(os.open, path, os.O_RDONLY | os.O_CLOEXEC) as fd:
        # Elsewhere a mapping ends where the last one begins: of two sizes that differ by a page,
        # one at most is at such an address.
        sizes = size, size + os.sysconf("SC_PAGESIZE")
        return not any(_core.placed(each, fd) % alignment for each in sizes)
    return True


class Window:
    """A part of a file, mapped to be written elsewhere: the kernel then copies it once, and no
    buffer is needed. `view` is for system calls alone, which say EFAULT where the file was cut
    short; to look at it would be a signal."""

    def __init__(self, fd: int, offset: int, size: int, page: int) -> None:
        skip = offset % page
        whole = -(-(skip + size) // page) * page
        # Shared: into private mappings the kernel writes the breakpoints of uprobes that are on the
        # file (valid_vma() in kernel/events/uprobes.c), and they would be copied.
        protection, flags = _core.PROT_READ, _core.MAP_SHARED | _core.MAP_POPULATE
        self._area = map_new(whole, page, 0, protection, flags, fd, offset - skip)
        self.view = _core.view(self._area.address + skip, size)

    def close(self) -> None:
        self.view.release()
        self._area.unmap()
