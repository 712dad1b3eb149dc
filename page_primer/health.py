"""The status of this process for a health endpoint: what page_primer.status() says.

Nothing here primes, and nothing is imported for a process that was not primed.
"""

from __future__ import annotations

import os
import sys
import time

from page_primer._lean import Record, replace, suppress
from page_primer.reasons import Reason
from page_primer.report import TOTALS, Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from page_primer.apply.process import Process
    from page_primer.kernel.anonymous import Use
    from page_primer.outcome import ObjectReport


class CodeStatus(Record):
    """The object that holds the interpreter; bytes."""

    path: str
    backing: str | None  # as in a report
    where: str | None
    code_bytes: int
    code_huge_bytes: int
    attainable_bytes: int  # what its layout lets be huge
    locked_bytes: int


class Status(Record):
    """One process, as it was measured last, with what the kernel says of it now; bytes."""

    pid: int
    primed: bool  # something is on huge pages by us, huge already, or locked
    reason: Reason | None  # why nothing was done, where that is so
    detail: str | None
    pending: bool  # prime() would find something new: a library, or that this is a forked child
    shortfalls: tuple[str, ...]  # what the log warns of, with remedies
    interpreter: CodeStatus | None
    objects: int
    code_bytes: int
    code_huge_bytes: int
    locked_bytes: int
    copied_bytes: int
    shared_bytes: int
    private_bytes: int
    added_bytes: int  # by which priming made this process grow
    heap: Use | None  # None: the heap was not to be touched
    vm_locked_bytes: int | None  # VmLck and VmRSS, of the whole process, now; None: not readable
    vm_resident_bytes: int | None
    measured: bool  # smaps was read for this


def read(fallback: Report | None, *, measure: bool) -> Status:
    """The status of this process.

    Args:
        fallback: the report of a call that did nothing, for a process without another.
        measure: read smaps anew.
    """
    process = _process()
    report = process.shown if process else None
    measured = False
    if measure and process and report is not None and report.reason is None:
        again = _measured()
        measured = again.reason is None
        report = again if measured else report
    report = report or fallback or Report(os.getpid(), None)
    pending = process is not None and _is_pending(process)
    if process and not measured and not process.mlocks.in_force:
        # Forked since, and a fork inherits no locks.
        objects = tuple(replace(obj, locked_bytes=0) for obj in report.objects)
        report = replace(report, objects=objects)
    core = report.interpreter
    lines = _kernel_lines()
    return Status(
        pid=os.getpid(),
        primed=any(obj.backing or obj.locked_bytes for obj in report.objects),
        reason=report.reason,
        detail=report.detail,
        pending=pending,
        shortfalls=tuple(shortfall.text for shortfall in report.shortfalls()),
        interpreter=_code_status(core) if core else None,
        objects=len(report.objects),
        **{name: getattr(report, name) for name in TOTALS},
        added_bytes=report.resident_bytes,
        heap=report.heap.use if report.heap else None,
        vm_locked_bytes=_size(lines, b"VmLck:"),
        vm_resident_bytes=_size(lines, b"VmRSS:"),
        measured=measured,
    )


def _code_status(core: ObjectReport) -> CodeStatus:
    return CodeStatus(**{name: getattr(core, name) for name in CodeStatus._fields})


def _process() -> Process | None:
    driver = sys.modules.get("page_primer.apply.process")
    return getattr(driver, "process", None)  # another thread may be importing it


def _is_pending(process: Process) -> bool:
    from page_primer import _core  # it is there, as the driver imported it

    return process.identity != (os.getpid(), _core.forks()) or process.loads != _core.loads()


def _measured() -> Report:
    from page_primer import on_process  # of a measurement alone

    return on_process(_look)


def _look(process: Process) -> Report:
    before = process.resident, process.huge
    last = process.report or Report(os.getpid(), None)
    report = process.measure_again(last, time.perf_counter())
    # What has grown since is not by priming; and the last report was made of what was huge then.
    process.resident, process.huge = before
    return replace(report, resident_bytes=process.resident[0])


def _kernel_lines() -> list[bytes]:
    with suppress(OSError), open("/proc/self/status", "rb", buffering=0) as file:
        return file.readall().splitlines()
    return []


def _size(lines: list[bytes], title: bytes) -> int | None:
    """The number of KiB behind a title, in bytes."""
    for line in lines:
        if line.startswith(title):
            return int(line.split()[1]) << 10
    return None
