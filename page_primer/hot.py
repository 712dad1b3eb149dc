"""Which chunks of an object are worth a copy, and what copies may cost.

The interpreter is copied whole. Of other objects only *hot* chunks are: those with machine code of
which this process has touched enough pages to be worth a huge one. The rest stays on the file.

A copy is shared where other processes map the same pages: an image at a load address that recurs.
At a random one (overlayfs, unaligned) there is one chance in 512 that anybody will use it again.
"""

from __future__ import annotations

from page_primer.elf.file import PF_X
from page_primer.elf.objects import Object, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from page_primer.options import Options

# A chunk is hot if this process has touched one page in so many. A single touch brings in 64 KiB
# (fault_around_bytes), and the static constructors of a C++ library touch each of its chunks once.
_ONE_IN = 8


def is_shared(obj: Object, pmd: int) -> bool:
    """Whether the load address modulo a huge page is the same each time, so that one image serves
    every process."""
    return obj.fixed or (obj.start % pmd == 0 and not obj.by_chance)


def chunks_of(obj: Object, regions: Iterable[Region], pmd: int) -> tuple[Region, ...]:
    """The hot chunks that lie wholly inside regions with code, as regions of their own."""
    hot = {start for start, touched in obj.touched or () if _ONE_IN * touched >= pmd}
    return _joined(chunk for chunk in _chunks(regions, pmd) if chunk.start in hot)


class Allowance:
    """What may yet be copied of objects other than the interpreter, bytes."""

    def __init__(self, options: Options, pmd: int, used: int, used_private: int) -> None:
        self._pmd = pmd
        self._shared = options.limit - used
        self._private = options.private_limit - used_private

    def fit(self, obj: Object, regions: tuple[Region, ...]) -> tuple[Region, ...]:
        """What of an object's regions is within the limit: all, or of hot chunks the hottest."""
        room = self._shared if is_shared(obj, self._pmd) else self._private
        if obj.interpreter or sum(region.length for region in regions) <= room:
            return regions
        if not obj.in_chunks:
            return ()
        heat = dict(obj.touched or ())
        chunks = sorted(_chunks(regions, self._pmd), key=lambda chunk: -heat.get(chunk.start, 0))
        return _joined(sorted(chunks[: max(0, room) // self._pmd], key=lambda c: c.start))

    def take(self, obj: Object, regions: Iterable[Region]) -> None:
        size = 0 if obj.interpreter else sum(region.length for region in regions)
        if is_shared(obj, self._pmd):
            self._shared -= size
        else:
            self._private -= size


def share(obj: Object) -> float:
    """How much of an object a lock keeps in memory: all of the interpreter; of others, which are
    locked as they are touched, what is there now."""
    if obj.interpreter or obj.resident is None:
        return 1.0
    return min(1.0, obj.resident / sum(s.end - s.start for s in obj.segments))


def _chunks(regions: Iterable[Region], pmd: int) -> Iterator[Region]:
    for region in regions:
        low, high = region.huge(pmd)
        if region.flags & PF_X:
            for start in range(low, high, pmd):
                yield Region(start, start + pmd, region.flags)


def _joined(chunks: Iterable[Region]) -> tuple[Region, ...]:
    """Neighbours of the same protection as one region."""
    found: list[Region] = []
    for chunk in chunks:
        last = found[-1] if found else None
        if last and (last.end, last.flags) == (chunk.start, chunk.flags):
            chunk = Region(found.pop().start, chunk.end, chunk.flags)
        found.append(chunk)
    return tuple(found)
