"""What came of the heap: a part of the report."""

from __future__ import annotations

from page_primer._lean import Record
from page_primer.kernel.anonymous import Use

MIB = 1 << 20


class HeapReport(Record):
    """What `heap` did to this process. Sizes are in bytes."""

    mode: str  # the option: "auto", "arenas" or "all"
    reason: str | None = None  # why nothing was done, where nothing was
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

    def __str__(self) -> str:
        """The one line for people."""
        if self.reason is not None:
            return f"heap left alone: {self.reason}"
        text = (
            f"heap: {self.use}; resident {self.resident_before / MIB:.1f} -> "
            f"{self.resident_after / MIB:.1f} MiB; {self.milliseconds:.1f} ms"
        )
        return "; ".join([text, *self.notes])
