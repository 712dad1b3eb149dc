"""Huge pages where the code is: the file's own pages, in the mapping that the loader made.

A mapping whose address equals its file offset modulo the huge page size can have huge pages as it
is: of files that were aligned or linked so, of Debian's arm64 builds as shipped, of objects that
`glibc.elf.thp` placed. Nothing is copied, nothing is replaced, and there is nothing to undo: the
page cache holds one copy for every process.
"""

from __future__ import annotations

from page_primer._lean import Record
from page_primer.kernel import smaps
from page_primer.kernel.thp import collapse, fault_in
from page_primer.options import IN_PLACE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from page_primer.plan import Move

ALREADY = "already"  # the report's backing of what was on huge pages without us


class Outcome(Record):
    """What of an object's mappings is on huge pages now, and by whose doing."""

    backing: str  # ALREADY or IN_PLACE
    wanted: int  # bytes that whole huge pages can cover
    huge: int  # bytes that they do cover, by smaps

    @property
    def complete(self) -> bool:
        return self.huge >= self.wanted


def bring_in(moves: Sequence[Move], pmd: int) -> list[Outcome]:
    """Get huge pages into the mappings of several objects, as far as the kernel does that.

    Faulting in is enough where the page cache holds huge pages. Otherwise MADV_COLLAPSE makes them:
    on tmpfs since Linux 6.1, on every file system with large folios since 7.2, and on any with
    CONFIG_READ_ONLY_THP_FOR_FS.

    Args:
        moves: of each object its mappings, and what of them is to be huge.
        pmd: the size of a huge page, bytes.

    Returns:
        What came of it, for each.
    """
    for move in moves:
        fault_in(move.hot or move.in_place, move.in_place)
    wanted = [move.sizes(pmd) for move in moves]
    before = _huge(moves, wanted)
    short = [i for i, sizes in enumerate(wanted) if before[i] < sum(sizes)]
    for i in short:
        for region in moves[i].hot or moves[i].in_place:
            low, high = region.huge(pmd)
            collapse(low, high - low)
    after = _huge(moves, wanted) if short else before
    return [
        Outcome(IN_PLACE if i in short else ALREADY, sum(sizes), after[i])
        for i, sizes in enumerate(wanted)
    ]


def _huge(moves: Sequence[Move], wanted: Sequence[Sequence[int]]) -> list[int]:
    """What is huge of each object, as far as that is wanted: smaps counts for a mapping, which may
    have other huge pages, too."""
    found = smaps.starting_at({mapping.start for move in moves for mapping in move.in_place})
    huge = {mapping.start: mapping.huge for mapping in found}
    return [
        sum(
            min(size, huge.get(mapping.start, 0))
            for mapping, size in zip(move.in_place, sizes, strict=True)
        )
        for move, sizes in zip(moves, wanted, strict=True)
    ]
