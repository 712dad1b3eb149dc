"""Memory without a file's name: memfd, anonymous, hugetlb."""

from __future__ import annotations

import errno
import fcntl
import os

from page_primer import _core
from page_primer._lean import ours, suppress
from page_primer.backing.pieces import (
    READ_WRITE,
    Attempt,
    Piece,
    Prepared,
    Refused,
    place,
    reason_of,
)
from page_primer.elf.objects import Object, Region
from page_primer.kernel.address_space import map_new
from page_primer.kernel.limits import check_file_size
from page_primer.kernel.thp import bring_in, collapse
from page_primer.plan import Move

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# linux/memfd.h, linux/fcntl.h
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_HUGETLB, _MFD_NOEXEC_SEAL = 1, 2, 4, 8
_MFD_HUGE_SHIFT = 26
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE


def _memfd(move: Move, pmd: int) -> Iterator[Attempt]:
    yield from _memory_file("memfd", move, pmd, 0)


def _hugetlb(move: Move, pmd: int) -> Iterator[Attempt]:
    size = (pmd.bit_length() - 1) << _MFD_HUGE_SHIFT
    yield from _memory_file("hugetlb", move, pmd, _MFD_HUGETLB | size)


def _memory_file(name: str, move: Move, pmd: int, flags: int) -> Iterator[Attempt]:
    if not move.memory:
        yield Refused(name, "nothing is left but what profilers need on the file")
        return
    try:
        # Not the object's name: tools that search for "libpython" would find two.
        fd = _memfd_create("page-primer", flags)
        offsets, end = {}, 0
        for region in move.memory:
            offsets[region], end = end, end + region.end - region.start
        check_file_size(end)
        if flags & _MFD_HUGETLB:
            # Takes the pages from the pool, or says that it has none; touching them without that
            # could end in SIGBUS.
            os.posix_fallocate(fd, 0, end)
        else:
            os.ftruncate(fd, end)
        for region in move.memory:
            _fill_shared(fd, offsets[region], region, move.object, pmd)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)

        # Of hugetlb pages a private mapping would reserve as many again.
        kind = _core.MAP_PRIVATE | _core.MAP_NORESERVE
        pieces = []
        for region in move.memory:  # no closure: its frame would keep the descriptor (let_go())
            pieces.append(place(region, move.object, pmd, fd, offsets[region], kind))
        for piece in pieces:
            bring_in(piece.source, piece.size, pmd)
    except ours(OSError) as error:
        yield Refused(name, reason_of(error))
        return
    yield Prepared(name, name, tuple(pieces), pmd, written=end, keep=(fd,))


def small(obj: Object, regions: Sequence[Region], pmd: int) -> Prepared:
    """A copy of regions in a memory file, on whatever pages: allowed under MDWE as well, unlike
    anonymous memory that becomes executable. Raises OSError."""
    found = next(_memory_file("memfd", Move(obj, (), tuple(regions)), pmd, 0))
    if isinstance(found, Refused):
        raise OSError(errno.ENOMEM, found.reason)
    return found


def _memfd_create(name: str, flags: int) -> _core.Descriptor:
    flags |= _MFD_CLOEXEC
    try:
        # Also where vm.memfd_noexec=2 forbids other memfds; mmap(PROT_EXEC) is not affected.
        return _core.opened(_core.memfd, os.fsencode(name), flags | _MFD_NOEXEC_SEAL)
    except ours(OSError) as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3
            raise
        return _core.opened(_core.memfd, os.fsencode(name), flags | _MFD_ALLOW_SEALING)


def _fill_shared(fd: int, offset: int, region: Region, obj: Object, pmd: int) -> None:
    """Fill a part of a memory file with a region's content, through a mapping, which is what gets
    huge pages on kernels without MADV_COLLAPSE (shmem_enabled=advise)."""
    size = region.end - region.start
    area = map_new(size, pmd, 0, READ_WRITE, _core.MAP_SHARED, fd, offset)
    with suppress(OSError):
        _core.advise(area.address, size, _core.MADV_HUGEPAGE)
    with suppress(OSError):  # Linux before 5.14; a refusal shows below
        _core.advise(area.address, size, _core.MADV_POPULATE_WRITE)
    _fill(area.address, region, obj)
    area.unmap()


def _fill(address: int, region: Region, obj: Object) -> None:
    """Copy a region's content from the object's file: from memory it could be a debugger's."""
    with _core.opened(os.open, obj.path, os.O_RDONLY | os.O_CLOEXEC) as fd:
        for low, high, offset in originals(region, obj):
            _core.fill(address + low - region.start, high - low, fd, offset)


def originals(region: Region, obj: Object) -> Iterator[tuple[int, int, int]]:
    """The parts (start, end, file offset) of an object's segments that make up a region."""
    for segment in obj.segments:
        low, high = max(region.start, segment.start), min(region.end, segment.file_end)
        if not segment.writable and low < high:
            yield low, high, segment.offset + low - segment.start


def _anonymous(move: Move, pmd: int) -> Iterator[Attempt]:
    if not move.memory:
        yield Refused("anonymous", "nothing is left but what profilers need on the file")
        return

    def place_region(region: Region) -> Piece:
        kind = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
        piece = place(region, move.object, pmd, -1, 0, kind)
        with suppress(OSError):
            _core.advise(piece.source, piece.size, _core.MADV_HUGEPAGE)
        _fill(piece.source, region, move.object)
        collapse(piece.source, piece.size)  # up to 6.17 only while it is writable
        _core.protect(piece.source, piece.size, piece.protection)
        return piece

    try:
        pieces = tuple(map(place_region, move.memory))
    except ours(OSError) as error:
        yield Refused("anonymous", reason_of(error))
        return
    written = sum(piece.size for piece in pieces)
    yield Prepared("anonymous", "anonymous memory", pieces, pmd, written=written)


BACKINGS: dict[str, Callable[[Move, int], Iterator[Attempt]]] = {
    "memfd": _memfd,
    "anonymous": _anonymous,
    "hugetlb": _hugetlb,
}
