"""Move one object to its replacement, and back: prepare, swap, and clean up after every failure."""

from __future__ import annotations

import errno
import fcntl  # noqa: F401  # a library that copies need: amid the moves all would be surveyed again
import os

from page_primer import _core, backing, reasons
from page_primer._lean import Record, is_ours, suppress
from page_primer._loading import Loading
from page_primer.apply import core_files
from page_primer.backing.pieces import PROT_BTI, Attempt, Prepared, Refused, reason_of
from page_primer.elf.file import PF_X
from page_primer.elf.objects import Object, Region, Segment
from page_primer.kernel.address_space import map_new
from page_primer.kernel.smaps import overlapping
from page_primer.kernel.thp import fault_in, page_size
from page_primer.options import Options
from page_primer.plan import Move
from page_primer.reasons import Reason
from page_primer.survey import is_protected_as_declared

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from page_primer.images.anchors import Anchors
    from page_primer.images.places import Place
    from page_primer.kernel.smaps import Mapping

Key = tuple[int, bytes]  # base and program headers: one loaded object


def key_of(obj: Object) -> Key:
    return obj.base, obj.headers


class Primed(Record):
    """An object that was moved, with what is needed to measure it and to put it back."""

    object: Object
    regions: tuple[Region, ...]
    prepared: Prepared
    notes: tuple[str, ...]
    anchors: Anchors
    maker: tuple[int, int]  # the process that moved it: its number, and how many forks led to it

    @property
    def bytes(self) -> int:
        return sum(region.end - region.start for region in self.regions)


class NotMoved(Exception):
    """An object stays where it is; `notes` tell the attempts."""

    def __init__(self, reason: Reason, notes: Iterable[str]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.notes = tuple(notes)


def carry_out(
    move: Move,
    pmd: int,
    options: Options,
    places: Sequence[Place],
    registry: dict[Key, Primed],
    *,
    verified: bool,
) -> None:
    """Move one object to the first backing that smaps confirms, or to the first at all.

    Args:
        move: the object and its regions.
        pmd: the size of a huge page, bytes.
        options: what the caller wants.
        places: the directories for images.
        registry: where the move is entered before it is made: an exception of the host's (Ctrl-C,
            a signal handler's) may come at any moment, and what is in it can be put back.
        verified: ask smaps of each backing. Otherwise the caller is to ask, after the move: smaps
            is slow, and once for all objects is enough where the first backing is good.

    Raises:
        NotMoved: no backing was good enough, or the swap was refused. The object is as it was.
    """
    with Loading():  # not where nothing is copied
        from page_primer.images.anchors import Anchors

    anchors = Anchors(move.object, move.near, move.far, places)
    try:
        _carry_out(move, pmd, options, places, anchors, registry, verified)
    except BaseException:
        if key_of(move.object) not in registry:
            anchors.unmap()
        raise


def _carry_out(
    move: Move,
    pmd: int,
    options: Options,
    places: Sequence[Place],
    anchors: Anchors,
    registry: dict[Key, Primed],
    verified: bool,
) -> None:
    notes = list(move.notes)
    for fresh in (False, True):
        attempts = backing.attempts(move, pmd, options, places, anchors, fresh)
        prepared = _choose(attempts, notes, verified)
        begun: list[bool] = []
        try:
            anchors.map(prepared.anchors)
            anchors.unmap(but=prepared.anchors)
        except BaseException:
            prepared.discard()
            raise
        if anchors.problem:
            notes.append(anchors.problem)
        regions, key = tuple(p.region for p in prepared.pieces), key_of(move.object)
        here = os.getpid(), _core.forks()
        registry[key] = Primed(move.object, regions, prepared, tuple(notes), anchors, here)
        prepared.begin()
        try:
            _swap_in(move.object, prepared, begun)
        except BaseException as error:
            if not isinstance(error, OSError) or not is_ours(error):
                if not begun:  # otherwise whether it was swapped, smaps will tell
                    prepared.discard()
                    del registry[key]
                raise
            step = getattr(error, "step", "")
            wrong = step == "compare" and _is_wrong(prepared, move.object, error)
            if step == "undo":  # it stays in the registry, to be put back another time
                notes.append(f"swap: {reason_of(error)}")
                raise NotMoved(reasons.SWAP_FAILED, notes) from error
            prepared.discard()
            del registry[key]  # last: a signal handler may raise
            if step == "compare":
                if fresh or not wrong:
                    raise NotMoved(reasons.MODIFIED, notes) from error
                notes.append(f"{prepared.where}: wrong content, written again")
                continue
            if error.strerror == reasons.FILE_GONE:
                raise NotMoved(reasons.FILE_GONE, notes) from error
            notes.append(f"swap: {reason_of(error)}")
            raise NotMoved(reasons.SWAP_FAILED, notes) from error
        core_files.include(move.object, prepared)
        fault_in(regions)
        prepared.settle()
        return


def _choose(attempts: Iterable[Attempt], notes: list[str], verified: bool) -> Prepared:
    """The first attempt that is huge throughout, or else the one that came nearest; if that is not
    to be verified, the first that was not refused."""
    best: Prepared | None = None
    for attempt in attempts:
        if isinstance(attempt, Refused):
            notes.append(f"{attempt.where}: {attempt.reason}")
            continue
        if not verified:
            return attempt
        try:
            huge, so_far = attempt.huge, best.huge if best else 0
        except BaseException:
            for prepared in (attempt, best):
                if prepared is not None:
                    prepared.discard()
            raise
        if huge < attempt.wanted:
            notes.append(f"{attempt.where}: {huge} of {attempt.wanted} bytes huge")
        worse = best if huge > so_far else attempt
        if worse is not None:
            worse.discard()
        if huge > so_far:
            best = attempt
            if huge == best.wanted:
                break
    if best is None:
        raise NotMoved(reasons.NO_BACKING, notes)
    return best


def _swap_in(obj: Object, prepared: Prepared, begun: list[bool]) -> None:
    """Swap, and have something in `begun` from the moment when it may have been done."""
    with _core.opened(os.open, obj.path, os.O_RDONLY | os.O_CLOEXEC) as original:
        _require_same_file(obj, original)  # or undoing would map another file's code
        regions = [piece.region for piece in prepared.pieces]
        undo = [
            (start, end - start, protection, 0, original, offset)
            for start, end, protection, offset in _original_mappings(obj, regions)
        ]
        # Read what is to be compared before the loader's lock is taken: it may come from disk.
        for region in regions:
            with suppress(OSError):
                size = region.end - region.start
                _core.advise(region.start, size, _core.MADV_POPULATE_READ)
        swaps = [piece.swap for piece in prepared.pieces]
        begun.append(True)
        _core.swap(obj.base, obj.headers, swaps, undo)


def _require_same_file(obj: Object, fd: int) -> None:
    """Times do not count: a new hard link changes them, and bytes are compared anyway."""
    status, source = os.fstat(fd), obj.source
    now = (status.st_dev, status.st_ino, status.st_size)
    if source is None or now != (source.device, source.inode, source.size):
        raise OSError(errno.ESTALE, reasons.FILE_GONE)


def _original_mappings(obj: Object, regions: Sequence[Region]) -> list[tuple[int, int, int, int]]:
    """(start, end, protection, file offset) of the loader's mappings that regions replace a part
    of. Whole ones: the kernel does not merge mappings of a file that was opened twice."""
    found = []
    for segment in _hit(obj, regions):
        protection = _core.PROT_READ
        if segment.flags & PF_X:
            protection |= _core.PROT_EXEC | (PROT_BTI if obj.bti else 0)
        found.append((segment.start, segment.file_end, protection, segment.offset))
    return found


def _hit(obj: Object, regions: Sequence[Region]) -> Iterator[Segment]:
    """The segments of which regions are a part."""
    for segment in obj.segments:
        hit = any(r.start < segment.file_end and segment.start < r.end for r in regions)
        if hit and not segment.writable:
            yield segment


def _require_protection(
    obj: Object, regions: Sequence[Region], mappings: Sequence[Mapping]
) -> None:
    """Who has made code writable since it was moved, or closed it, would have that undone."""
    for segment in _hit(obj, regions):
        for mapping in overlapping(mappings, segment.start, segment.file_end):
            if not is_protected_as_declared(segment, mapping):
                raise OSError(errno.EACCES, reasons.MAPPED_OTHERWISE)


def put_back(primed: Primed, mappings: Sequence[Mapping]) -> None:
    """Map an object's own file over what it was moved to. Raises OSError when that fails."""
    obj = primed.object
    _require_protection(obj, primed.regions, mappings)
    with _core.opened(os.open, obj.path, os.O_RDONLY | os.O_CLOEXEC) as fd:
        _require_same_file(obj, fd)
        originals: list[tuple[int, int, int, int | _core.Area, int, int]] = []
        for start, end, protection, offset in _original_mappings(obj, primed.regions):
            size, flags = end - start, _core.MAP_PRIVATE
            area = map_new(size, page_size(), 0, protection, flags, fd, offset)
            originals.append((start, end - start, protection, area, fd, offset))
        pieces = originals
        if primed.prepared.backing == "hugetlb":
            # Such a mapping can be cut at whole huge pages only (EINVAL): other memory takes its
            # place first, each region at once, and the file's mappings take that one's.
            with Loading():  # it is there: loaded with that backing
                from page_primer.backing import memory as memory_backing

            between = memory_backing.small(obj, primed.regions, primed.prepared.pmd)
            pieces = [*(piece.swap for piece in between.pieces), *originals]
        _core.swap(obj.base, obj.headers, pieces, originals)


def _is_wrong(prepared: Prepared, obj: Object, error: OSError) -> bool:
    """After a failed comparison: whether an image's content is to blame, rather than code that was
    modified in memory."""
    if prepared.image is None or not isinstance(error, _core.Error):
        return False
    with Loading():  # it is there: loaded with every backing
        from page_primer.backing import memory as memory_backing

    address = error.start
    piece = next(p for p in prepared.pieces if p.region.start <= address < p.region.end)
    with suppress(OSError), open(obj.path, "rb") as original:
        for _, _, offset in memory_backing.originals(Region(address, address + 1, 0), obj):
            original.seek(offset)
            there = piece.offset + address - piece.region.start
            return os.pread(prepared.image.fd, 1, there) != original.read(1)
    return False
