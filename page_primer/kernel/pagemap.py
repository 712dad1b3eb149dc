"""/proc/self/pagemap: which pages of its address space this process has in its page tables.

The highest byte of an entry (Linux, Documentation/admin-guide/mm/pagemap.rst): bit 63 is present,
62 swapped, 56 mapped by this process alone.
"""

from __future__ import annotations

import os

from page_primer import _core
from page_primer._lean import Record, suppress
from page_primer.kernel.thp import page_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# What bytes.translate() is to delete, so that those with all of some bits are left to be counted.
_NOT_PRESENT, _NOT_SWAPPED, _NOT_EXCLUSIVE = (
    bytes(byte for byte in range(256) if byte & bits != bits) for bits in (0x80, 0x40, 0x81)
)


class Pages(Record):
    """One chunk, and how many of its pages are what the page table says."""

    start: int
    present: int
    exclusive: int  # of those that are present
    swapped: int


class Pagemap:
    """The file, open. Where it is closed to us (a process that dropped privileges), `closed`."""

    def __enter__(self) -> Pagemap:
        self._file = None
        with suppress(OSError):
            self._file = _core.opened(os.open, "/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._page = page_size()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def closed(self) -> bool:
        return self._file is None

    def chunks(self, low: int, high: int, size: int) -> Iterator[Pages]:
        """Each chunk of `size` bytes of [low, high), which are multiples of it. One read."""
        entries = size // self._page * 8
        assert self._file is not None, "closed"
        raw = os.pread(self._file, (high - low) // self._page * 8, low // self._page * 8)
        for index, start in enumerate(range(low, high, size)):
            top = raw[index * entries + 7 : (index + 1) * entries : 8]
            yield Pages(
                start,
                len(top.translate(None, _NOT_PRESENT)),
                len(top.translate(None, _NOT_EXCLUSIVE)),
                len(top.translate(None, _NOT_SWAPPED)),
            )
