"""The kernel's log around a test: faults of the kernel's own, and of processes under test.

Other tests run beside this one, and some have processes that are meant to crash. So a fault of a
process counts where the harness has looked at that process: what looks at one calls `watch()`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Set

__all__ = ["KernelLog", "faults", "watch"]

# The kernel's own. Of stalls and lockups a loaded virtual machine has its share, whatever it runs.
KERNEL = re.compile(
    r"\bBUG:|\bkernel BUG at|\bOops\b|^WARNING: |^general protection fault, |"
    r"\bBad page |\bBad rss-counter|\bBad swap |\bVM_(?:BUG|WARN)_ON"
)
# `python3[123]: segfault at ...`, `traps: python3[123] trap invalid opcode ...`, and on arm64
# `python3[123]: unhandled exception: ...`.
PROCESS = re.compile(r"^(?:traps: )?\S.*?\[(\d+)\]:? (?:segfault at|trap |general prot|unhandled )")

_watched: set[int] = set()


def watch(pid: int) -> None:
    """Count this process's faults from now on."""
    _watched.add(pid)


def faults(lines: list[str], watched: Set[int] = _watched) -> list[str]:
    """The lines that tell of a fault of the kernel's, or of a process that is watched."""
    return [
        line
        for line in lines
        if KERNEL.search(line)
        or ((found := PROCESS.search(line)) is not None and int(found[1]) in watched)
    ]


class KernelLog:
    """What the kernel logs from now on.

    Raises:
        OSError: the log is not readable here (kernel.dmesg_restrict without CAP_SYSLOG).
    """

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def new(self) -> list[str]:
        """The messages since the last call."""
        lines = []
        while True:
            try:
                record = os.read(self._fd, 8192)  # one record a call
            except BlockingIOError:
                return lines
            except BrokenPipeError:  # records were overwritten before they were read
                continue
            # "level,number,microseconds,flags;message", then lines of the record's keys
            lines.append(record.decode(errors="replace").partition(";")[2].partition("\n")[0])
