"""Parts of the report: what came of a segment of an object, and of the heap."""

from __future__ import annotations

from page_primer._lean import Record
from page_primer.kernel.anonymous import Use
from page_primer.reasons import Reason, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MIB = 1 << 20


class SegmentReport(Record):
    """One PT_LOAD: addresses, bytes, and what was left alone of it and why."""

    start: int
    end: int
    kind: str  # "code", "rodata" or "data"
    bytes: int  # p_memsz; of an aligned file's executable segment what is machine code
    huge_bytes: int  # of them on huge pages
    locked_bytes: int
    left: dict[Reason, int]  # bytes left on small pages


class HeapReport(Record):
    """What `heap` did to this process. Sizes are in bytes."""

    mode: str  # the option: "auto", "arenas" or "all"
    reason: Reason | None = None  # why nothing was done, where nothing was
    detail: str | None = None  # what the reason was in this case
    use: Use = Use()
    collapsed_bytes: int = 0  # by this call
    resident_before: int = 0  # all of the process, before and after this call
    resident_after: int = 0
    regions: int = 0  # huge pages that pymalloc's arenas are parts of
    small_regions: int = 0  # that were not huge when they were made, since the start
    spare_bytes: int = 0  # free in these regions, and kept
    slowest_region: float = 0.0  # milliseconds: the longest that the kernel took for one
    least_memory: int = 0  # heap_min_memory
    notes: tuple[str, ...] = ()
    milliseconds: float = 0.0

    def log(self, logger: Any, before: HeapReport | None, *, named: bool) -> None:
        """Write the one line: a WARNING where a `heap` that was named is refused, DEBUG where
        reason and notes are those of the report before."""
        if before and (self.reason, self.notes) == (before.reason, before.notes):
            logger.debug("page-primer: %s", self)
        else:
            (logger.warning if self.reason and named else logger.info)("page-primer: %s", self)

    def __str__(self) -> str:
        """The one line for people."""
        if self.reason is not None:
            return f"heap left alone: {Refusal(self.reason, self.detail)}"
        text = (
            f"heap: {self.use}; resident {self.resident_before / MIB:.1f} -> "
            f"{self.resident_after / MIB:.1f} MiB; {self.milliseconds:.1f} ms"
        )
        return "; ".join([text, *self.notes])
