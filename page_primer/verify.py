"""From mappings to segments: how much of an object's code is on huge pages, and locked."""

from __future__ import annotations

from page_primer.elf.objects import Range, Region, Segment
from page_primer.kernel.smaps import Mapping, overlapping
from page_primer.outcome import SegmentReport
from page_primer.plan import Remainder
from page_primer.reasons import Reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


def measure(
    segments: Iterable[Segment],
    mappings: Sequence[Mapping],
    pmd: int,
    left: Iterable[Remainder] = (),
) -> tuple[SegmentReport, ...]:
    """Measure an object's segments.

    Args:
        segments: the object's.
        mappings: those of its process, from smaps.
        pmd: the size of a huge page, bytes.
        left: what the plan left alone, for the reasons.
    """
    huge = list(_huge_ranges(mappings, pmd))
    return tuple(_measure(segment, mappings, huge, left) for segment in segments)


def _huge_ranges(mappings: Iterable[Mapping], pmd: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, bytes): the part of each mapping that huge pages can cover, and how much of it
    they do."""
    for mapping in mappings:
        if pmd and mapping.size >= pmd and mapping.huge:
            start, end = Region(mapping.start, mapping.end, 0).huge(pmd)
            yield start, end, mapping.huge


def _measure(
    segment: Segment,
    mappings: Sequence[Mapping],
    huge: Iterable[tuple[int, int, int]],
    left: Iterable[Remainder],
) -> SegmentReport:
    huge_bytes = 0
    for start, stop, size in huge:
        # smaps counts per mapping: what is missing from one is taken to be missing here.
        missing = stop - start - size
        both = sum(part.clip(Range(start, stop)).length for part in segment.measured)
        huge_bytes += max(0, both - missing)
    locked = sum(
        min(segment.end, mapping.end) - max(segment.start, mapping.start)
        for mapping in overlapping(mappings, segment.start, segment.end)
        if mapping.is_locked
    )
    reasons: dict[Reason, int] = {}
    for part in left:
        if segment.start <= part.start and part.end <= segment.end:
            reasons[part.reason] = reasons.get(part.reason, 0) + part.end - part.start
    return SegmentReport(
        segment.start,
        segment.end,
        segment.kind,
        sum(part.length for part in segment.measured),
        huge_bytes,
        locked,
        reasons,
    )
