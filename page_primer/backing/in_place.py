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

    from page_primer.elf.objects import Region

ALREADY = "already"  # the report's backing of what was on huge pages without us


class Outcome(Record):
    """What of an object's mappings is on huge pages now, and by whose doing."""

    backing: str  # ALREADY or IN_PLACE
    wanted: int  # bytes that whole huge pages can cover
    huge: int  # bytes that they do cover, by smaps

    @property
    def complete(self) -> bool:
        return self.huge >= self.wanted


def bring_in(objects: Sequence[Sequence[Region]], pmd: int) -> list[Outcome]:
    """Get huge pages into mappings of several objects, as far as the kernel does that.

    Faulting in is enough where the page cache holds huge pages. Otherwise MADV_COLLAPSE makes them:
    on tmpfs since Linux 6.1, on every file system with large folios since 7.2, and on any with
    CONFIG_READ_ONLY_THP_FOR_FS.

    Args:
        objects: of each the mappings, whole: advice for a part would split them.
        pmd: the size of a huge page, bytes.

    Returns:
        What came of it, for each.
    """
    for mappings in objects:
        fault_in(mappings)
    before = _huge(objects)
    short = [i for i, mappings in enumerate(objects) if before[i] < _wanted(mappings, pmd)]
    for i in short:
        for mapping in objects[i]:
            low, high = mapping.huge(pmd)
            collapse(low, high - low)
    after = _huge(objects) if short else before
    return [
        Outcome(IN_PLACE if i in short else ALREADY, _wanted(mappings, pmd), after[i])
        for i, mappings in enumerate(objects)
    ]


def _wanted(mappings: Sequence[Region], pmd: int) -> int:
    return sum(high - low for low, high in (mapping.huge(pmd) for mapping in mappings))


def _huge(objects: Sequence[Sequence[Region]]) -> list[int]:
    found = smaps.starting_at({mapping.start for mappings in objects for mapping in mappings})
    huge = {mapping.start: mapping.huge for mapping in found}
    return [sum(huge.get(mapping.start, 0) for mapping in mappings) for mappings in objects]
