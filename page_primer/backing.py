"""Where huge memory comes from. Each backing *prepares* a replacement at an address of its own,
faults it in, and lets the caller see in smaps what came of it; nothing live is touched here.

Which source works on which kernel is a matter of versions, settings and luck, so every attempt is
believed only when smaps shows the pages huge.
"""

from __future__ import annotations

import errno
import fcntl
import os

from page_primer import _core, image, mounts, signpost, smaps, store
from page_primer.elf import PF_X
from page_primer.options import Options
from page_primer.plan import Move, Region
from page_primer.record import Record, cached, replace
from page_primer.scratch import map_new
from page_primer.suppress import suppress
from page_primer.survey import Object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_READ_EXEC = _core.PROT_READ | _core.PROT_EXEC
_READ_WRITE = _core.PROT_READ | _core.PROT_WRITE
PROT_BTI = 0x10  # arm64, <asm/mman.h>

# linux/memfd.h, linux/fcntl.h
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_HUGETLB, _MFD_NOEXEC_SEAL = 1, 2, 4, 8
_MFD_HUGE_SHIFT = 26
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE

# From which kernel on a file system's files can be on huge pages without further settings. Others
# are tried after these: a kernel with CONFIG_READ_ONLY_THP_FOR_FS can collapse any file.
GOOD_SINCE = {"ext4": (6, 16), "xfs": (6, 1), "tmpfs": (6, 1)}
_FILES_SINCE = (6, 1)  # MADV_COLLAPSE; before it, only xfs has huge folios, and only when read


class Refused(Record):
    """An attempt that came to nothing before smaps could be asked."""

    where: str
    reason: str


class Piece(Record):
    """A region and the place where its replacement is mapped; fd is -1 for memory to be moved."""

    region: Region
    protection: int
    source: int
    fd: int
    offset: int

    @property
    def size(self) -> int:
        return self.region.end - self.region.start

    @property
    def swap(self) -> tuple[int, int, int, int, int, int]:
        """The piece as _core.swap() takes it."""
        return self.region.start, self.size, self.protection, self.source, self.fd, self.offset


class Prepared(Record):
    """A replacement for one object's regions, mapped elsewhere."""

    backing: str
    where: str
    pieces: tuple[Piece, ...]
    pmd: int
    image: store.Image | None = None
    written: int = 0  # bytes copied for it
    keep: tuple[int, ...] = ()  # descriptors to close in the end
    signs: tuple[str, ...] = ()  # the signposts that tools need with it

    @property
    def wanted(self) -> int:
        """Bytes that whole huge pages can cover."""
        return sum(high - low for low, high in (p.region.huge(self.pmd) for p in self.pieces))

    @cached
    def huge(self) -> int:
        """Bytes that smaps shows on huge pages."""
        return sum(m.huge for m in smaps.starting_at({p.source for p in self.pieces}))

    def discard(self, *, moved_below: int = 0) -> None:
        """Give the replacement up."""
        self.unmap(moved_below=moved_below)
        if self.image is not None:
            self.image.close()

    def unmap(self, *, moved_below: int = 0) -> None:
        """Unmap what was mapped for comparison. What was moved to a target below `moved_below` is
        no longer there, and its place may be somebody else's by now."""
        for piece in self.pieces:
            gone = piece.size if piece.fd < 0 and piece.region.start < moved_below else 0
            with suppress(OSError):
                _core.unmap(piece.source + gone, piece.size + _GUARD - gone)
        for fd in self.keep:
            with suppress(OSError):
                os.close(fd)


Attempt = Prepared | Refused
Place = tuple[str, str | None]  # a directory for images, and why it is passed over, if it is

# A page behind every piece, so that the kernel does not merge it with what is mapped next to it
# and smaps speaks of it alone.
_GUARD = os.sysconf("SC_PAGESIZE")


def attempts(
    move: Move,
    pmd: int,
    options: Options,
    places: Sequence[Place],
    posts: signpost.Signposts,
    fresh: bool = False,
) -> Iterator[Attempt]:
    """Try the backings that the options allow, in order. The caller takes the first that is good
    enough and discards the others; nothing is prepared before it is asked for.

    Args:
        move: the object and its regions.
        pmd: the size of a huge page, bytes.
        options: what the caller wants.
        places: what directories() says.
        posts: put up as far as what is prepared needs them before it is swapped in.
        fresh: the image that is there has wrong content: write a new one.
    """
    wanted = ("image", "memfd", "anonymous") if options.backing == "auto" else (options.backing,)
    for name in wanted:
        if name == "image":
            signs: tuple[str, ...] = (signpost.FAR,) if move.far else ()
            found = _image(move, pmd, places, fresh)
        else:
            signs = (signpost.NEAR, signpost.FAR) if move.signed else ()
            if signs and not posts.put_up(signs):
                signs = ()  # then the head stays
            found = _MEMORY[name](replace(move, memory=move.signed) if signs else move, pmd)
        for attempt in found:
            yield replace(attempt, signs=signs) if isinstance(attempt, Prepared) else attempt


def _place(region: Region, obj: Object, pmd: int, fd: int, offset: int, flags: int) -> Piece:
    """Map a file (or, with fd -1, writable anonymous memory) for a region, with its final
    protection, at an address that is equal to the region's modulo the huge page size."""
    final = _READ_EXEC if region.flags & PF_X else _core.PROT_READ
    if region.flags & PF_X and obj.bti:
        final |= PROT_BTI
    size = region.end - region.start
    now = final if fd >= 0 else _READ_WRITE
    source = map_new(size, pmd, region.start, now, flags, fd, offset, guard=_GUARD)
    return Piece(region, final, source, fd, offset)


def _place_all(regions: Sequence[Region], prepare: Callable[[Region], Piece]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    try:
        for region in regions:
            pieces.append(prepare(region))
    except BaseException:
        for piece in pieces:
            _core.unmap(piece.source, piece.size + _GUARD)
        raise
    return tuple(pieces)


def bring_in(address: int, length: int, pmd: int) -> None:
    """Make the pages of a file mapping present, huge if the kernel will: advice comes before the
    first touch (ext4, xfs), collapse after it (tmpfs; on 6.1 it fails on untouched pages)."""
    low, high = Region(address, address + length, 0).huge(pmd)
    # A process, kernel or sandbox without THP says EINVAL to advice; smaps will tell.
    with suppress(OSError):
        _core.advise(address, length, _core.MADV_HUGEPAGE)
    _core.populate(address, length)
    if low < high:
        collapse(low, high - low)


def collapse(address: int, length: int) -> None:
    """MADV_COLLAPSE. Its errors say little (EINVAL also for "is huge already"): smaps will tell."""
    for _ in range(2):
        try:
            _core.advise(address, length, _core.MADV_COLLAPSE)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                continue
        return


# ------------------------------------------------------------------------------------- image ---


def kernel() -> tuple[int, int]:
    """The running kernel's version, as in (6, 1)."""
    release = "".join(digit if digit.isdecimal() else " " for digit in os.uname().release)
    major, minor, *_ = *release.split(), 0, 0
    return int(major), int(minor)


def directories(options: Options) -> list[Place]:
    """The image directories to try, in order, each with the reason to pass it over, if any."""
    if options.image_dir is not None:
        return [(options.image_dir, None)]
    good: list[str] = []
    other: list[str] = []
    table = mounts.read()
    for path in store.candidates():
        since = GOOD_SINCE.get(mounts.mount_of(os.path.realpath(path), table).filesystem)
        (good if since and kernel() >= since else other).append(path)
    reason = None
    if options.backing == "auto" and kernel() < _FILES_SINCE:
        reason = "files are on huge pages from Linux 6.1 on"
    return [(path, reason) for path in good + other]


def _image(move: Move, pmd: int, places: Sequence[Place], fresh: bool) -> Iterator[Attempt]:
    layout = image.lay_out(move.object, move.image, pmd)
    for path, reason in places:
        if reason:
            yield Refused(path, reason)
            continue
        try:
            with store.Store(path) as directory:
                yield from from_store(directory, layout, fresh)
        except (store.Unusable, image.CannotLayOut) as error:
            yield Refused(path, str(error))
        except OSError as error:
            yield Refused(path, reason_of(error))


def from_store(
    directory: store.Store, layout: image.Layout, fresh: bool = False
) -> Iterator[Attempt]:
    """Attempts with an image in one directory: the one that is there (unless a fresh one is asked
    for), the same read again, since the pages of a file that somebody else read or copied first are
    in memory as small ones, and where that is no help, since somebody maps them, a new one."""
    found = directory.get(layout, fresh=fresh)
    try:
        yield _map_image(found, layout)
    except OSError as error:
        if found.written:
            raise
        yield Refused(found.path, reason_of(error))
    if not found.written:
        yield _map_again(directory, layout)
        found = directory.get(layout, fresh=True)
        yield _map_image(found, layout)
    # Not huge as written: on some kernels (xfs before 6.12) only what is read back can be.
    yield _map_again(directory, layout, found.written)


def _map_again(directory: store.Store, layout: image.Layout, written: int = 0) -> Attempt:
    again = directory.get(layout)
    with suppress(OSError):
        os.fsync(again.fd)
        os.posix_fadvise(again.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return _map_image(replace(again, written=written), layout)
    except OSError as error:
        return Refused(again.path, reason_of(error))


def _map_image(found: store.Image, layout: image.Layout) -> Prepared:
    def place(region: Region) -> Piece:
        offset = layout.offset(region.start)
        return _place(region, layout.object, layout.pmd, found.fd, offset, _core.MAP_PRIVATE)

    try:
        pieces = _place_all(layout.regions, place)
    except BaseException:
        found.close()
        raise
    prepared = Prepared("image", found.path, pieces, layout.pmd, found, found.written)
    try:
        for piece in pieces:
            bring_in(piece.source, piece.size, layout.pmd)
    except BaseException:
        prepared.discard()
        raise
    return prepared


# --------------------------------------------------------------- memory without a file's name ---


def _memfd(move: Move, pmd: int) -> Iterator[Attempt]:
    yield from _memory_file("memfd", move, pmd, 0)


def _hugetlb(move: Move, pmd: int) -> Iterator[Attempt]:
    size = (pmd.bit_length() - 1) << _MFD_HUGE_SHIFT
    yield from _memory_file("hugetlb", move, pmd, _MFD_HUGETLB | size)


def _memory_file(name: str, move: Move, pmd: int, flags: int) -> Iterator[Attempt]:
    if not move.memory:
        yield Refused(name, "nothing is left but what profilers need on the file")
        return
    fd = -1
    try:
        # Not the object's name: tools that search for "libpython" would find two.
        fd = _memfd_create("page-primer", flags)
        offsets, end = {}, 0
        for region in move.memory:
            offsets[region], end = end, end + region.end - region.start
        image.check_file_size(end)
        if flags & _MFD_HUGETLB:
            # Takes the pages from the pool, or says that it has none; touching them without that
            # could end in SIGBUS.
            os.posix_fallocate(fd, 0, end)
        else:
            os.ftruncate(fd, end)
        for region in move.memory:
            _fill_shared(fd, offsets[region], region, move.object, pmd)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)

        def place(region: Region) -> Piece:
            # Of hugetlb pages a private mapping would reserve as many again.
            kind = _core.MAP_PRIVATE | _core.MAP_NORESERVE
            return _place(region, move.object, pmd, fd, offsets[region], kind)

        pieces = _place_all(move.memory, place)
        prepared = Prepared(name, name, pieces, pmd, written=end, keep=(fd,))
        fd = -1
        try:
            for piece in pieces:
                bring_in(piece.source, piece.size, pmd)
        except BaseException:
            prepared.unmap()
            raise
        yield prepared
    except OSError as error:
        yield Refused(name, reason_of(error))
    finally:
        if fd >= 0:
            os.close(fd)


def small(obj: Object, regions: Sequence[Region], pmd: int) -> Prepared:
    """A copy of regions in a memory file, on whatever pages: allowed under MDWE as well, unlike
    anonymous memory that becomes executable. Raises OSError."""
    found = next(_memory_file("memfd", Move(obj, (), tuple(regions)), pmd, 0))
    if isinstance(found, Refused):
        raise OSError(errno.ENOMEM, found.reason)
    return found


def _memfd_create(name: str, flags: int) -> int:
    flags |= _MFD_CLOEXEC
    try:
        # Also where vm.memfd_noexec=2 forbids other memfds; mmap(PROT_EXEC) is not affected.
        return _core.memfd(os.fsencode(name), flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3
            raise
        return _core.memfd(os.fsencode(name), flags | _MFD_ALLOW_SEALING)


def _fill_shared(fd: int, offset: int, region: Region, obj: Object, pmd: int) -> None:
    """Fill a part of a memory file with a region's content, through a mapping, which is what gets
    huge pages on kernels without MADV_COLLAPSE (shmem_enabled=advise)."""
    size = region.end - region.start
    address = map_new(size, pmd, 0, _READ_WRITE, _core.MAP_SHARED, fd, offset)
    try:
        with suppress(OSError):
            _core.advise(address, size, _core.MADV_HUGEPAGE)
        with suppress(OSError):  # Linux before 5.14; a refusal shows below
            _core.advise(address, size, _core.MADV_POPULATE_WRITE)
        _fill(address, region, obj)
    finally:
        _core.unmap(address, size)


def _fill(address: int, region: Region, obj: Object) -> None:
    """Copy a region's content from the object's file: from memory it could be a debugger's."""
    fd = os.open(obj.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for low, high, offset in originals(region, obj):
            _core.fill(address + low - region.start, high - low, fd, offset)
    finally:
        os.close(fd)


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

    def place(region: Region) -> Piece:
        kind = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
        piece = _place(region, move.object, pmd, -1, 0, kind)
        try:
            with suppress(OSError):
                _core.advise(piece.source, piece.size, _core.MADV_HUGEPAGE)
            _fill(piece.source, region, move.object)
            collapse(piece.source, piece.size)  # up to 6.17 only while it is writable
            _core.protect(piece.source, piece.size, piece.protection)
        except BaseException:
            _core.unmap(piece.source, piece.size + _GUARD)
            raise
        return piece

    try:
        pieces = _place_all(move.memory, place)
    except OSError as error:
        yield Refused("anonymous", reason_of(error))
        return
    written = sum(piece.size for piece in pieces)
    yield Prepared("anonymous", "anonymous memory", pieces, pmd, written=written)


_MEMORY: dict[str, Callable[[Move, int], Iterator[Attempt]]] = {
    "memfd": _memfd,
    "anonymous": _anonymous,
    "hugetlb": _hugetlb,
}


def reason_of(error: OSError) -> str:
    """An OSError in few words, with the step where the core says which."""
    step = getattr(error, "step", None)
    if step:
        return f"{step}: {os.strerror(error.errno or 0)}"
    return error.strerror or str(error)
