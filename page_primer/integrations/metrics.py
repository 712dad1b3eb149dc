"""The figures of this process that monitoring systems get: sizes in bytes, and faults.

Read from smaps when they are asked for, for which the kernel walks the process's page tables: a few
milliseconds, and more with many gigabytes of resident memory.
"""

from __future__ import annotations

import os
import sys
from collections import Counter

from page_primer._lean import Record


class Metric(Record):
    """One figure; `value` of the process, or of each label where it has one."""

    name: str
    description: str
    unit: str
    value: int = 0
    by_reason: dict[str, int] | None = None  # reason -> value


def read() -> tuple[Metric, ...]:
    """The figures of this process, always the same ones in the same order; none where page-primer
    does nothing."""
    try:
        import resource  # not on Windows

        from page_primer.processes import examine  # which needs the core
    except ImportError:  # without its C core
        return ()
    status = examine(os.getpid())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (
        Metric("code", "Machine code of loaded ELF objects", "bytes", status.sum("code_bytes")),
        Metric("code_huge", "Machine code on huge pages", "bytes", status.sum("code_huge_bytes")),
        Metric(
            "code_left",
            "Machine code that prime() left on small pages, by reason",
            "bytes",
            by_reason=_left(),
        ),
        Metric("locked", "Locked memory of ELF objects", "bytes", status.sum("locked_bytes")),
        Metric("copied", "Memory that code was copied to", "bytes", status.sum("copied_bytes")),
        Metric("heap", "Resident private anonymous memory", "bytes", status.heap.bytes),
        Metric("heap_huge", "Of it on huge pages", "bytes", status.heap.huge),
        Metric("minor_faults", "Page faults without reading a file", "faults", usage.ru_minflt),
        Metric("major_faults", "Page faults that read from a file", "faults", usage.ru_majflt),
    )


def _left() -> dict[str, int]:
    """Of the last report of this process, code by the reason for which it was left alone."""
    driver = sys.modules.get("page_primer.apply.process")
    process = getattr(driver, "process", None)  # another thread may be importing it
    report = process.shown if process else None
    left: Counter[str] = Counter()
    for obj in report.objects if report else ():
        for segment in obj.segments:
            if segment.kind == "code":
                left.update({str(reason): size for reason, size in segment.left.items()})
    return dict(left)
