"""A replacement in pieces: mapped at addresses of its own, described, measured, and given up."""

from __future__ import annotations

import os

from page_primer import _core
from page_primer._lean import Record, cached, is_ours, suppress
from page_primer.elf.file import PF_X
from page_primer.elf.objects import Object, Region
from page_primer.kernel import smaps
from page_primer.kernel.address_space import map_new

TYPE_CHECKING = False
if TYPE_CHECKING:
    from page_primer.images import store

_READ_EXEC = _core.PROT_READ | _core.PROT_EXEC
READ_WRITE = _core.PROT_READ | _core.PROT_WRITE
PROT_BTI = 0x10  # arm64, <asm/mman.h>


class Refused(Record):
    """An attempt that came to nothing before smaps could be asked."""

    where: str
    reason: str


class Piece(Record):
    """A region and the place where its replacement is mapped; fd is -1 for memory to be moved."""

    region: Region
    protection: int
    area: _core.Area
    fd: int
    offset: int

    @property
    def size(self) -> int:
        return self.region.end - self.region.start

    @property
    def source(self) -> int:
        return self.area.address

    @property
    def swap(self) -> tuple[int, int, int, _core.Area, int, int]:
        """The piece as _core.swap() takes it."""
        return self.region.start, self.size, self.protection, self.area, self.fd, self.offset


class Prepared(Record):
    """A replacement for one object's regions, mapped elsewhere."""

    backing: str
    where: str
    pieces: tuple[Piece, ...]
    pmd: int
    image: store.Image | None = None
    written: int = 0  # bytes copied for it
    keep: tuple[_core.Descriptor, ...] = ()  # to be closed in the end
    anchors: tuple[str, ...] = ()  # the anchors that tools need with it

    @property
    def wanted(self) -> int:
        """Bytes that whole huge pages can cover."""
        return sum(high - low for low, high in (p.region.huge(self.pmd) for p in self.pieces))

    @cached
    def huge(self) -> int:
        """Bytes that smaps shows on huge pages."""
        return sum(m.huge for m in smaps.starting_at({p.source for p in self.pieces}))

    def discard(self) -> None:
        """Give the replacement up."""
        self.unmap()
        if self.image is not None:
            self.image.close()

    def begin(self) -> None:
        """From now on it may be in use."""
        if self.image is not None:
            self.image.keep()

    def settle(self) -> None:
        """It is where it was to be: give up what was needed on the way."""
        self.unmap()
        if self.image is not None:
            self.image.close_file()

    def unmap(self) -> None:
        """Unmap what was mapped for comparison, and was not moved."""
        for piece in self.pieces:
            with suppress(OSError):
                piece.area.unmap()
        for fd in self.keep:
            with suppress(OSError):
                fd.close()


Attempt = Prepared | Refused

# A page behind every piece, so that the kernel does not merge it with what is mapped next to it
# and smaps speaks of it alone.
GUARD = os.sysconf("SC_PAGESIZE")


def place(region: Region, obj: Object, pmd: int, fd: int, offset: int, flags: int) -> Piece:
    """Map a file (or, with fd -1, writable anonymous memory) for a region, with its final
    protection, at an address that is equal to the region's modulo the huge page size."""
    final = _READ_EXEC if region.flags & PF_X else _core.PROT_READ
    if region.flags & PF_X and obj.bti:
        final |= PROT_BTI
    size = region.end - region.start
    now = READ_WRITE if flags & _core.MAP_ANONYMOUS else final
    area = map_new(size, pmd, region.start, now, flags, fd, offset, guard=GUARD)
    return Piece(region, final, area, fd, offset)


def reason_of(error: OSError) -> str:
    """An OSError in few words, with the step where the core says which. One that a signal handler
    of the host raised (TimeoutError is one) is no reason, and goes on to the host."""
    if not is_ours(error):
        raise error
    step = getattr(error, "step", None)
    if step:
        return f"{step}: {os.strerror(error.errno or 0)}"
    return error.strerror or str(error)
