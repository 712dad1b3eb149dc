"""Hardware counters of a server's threads, by perf_event_open(2), where the machine has them.

Counted is user code only, which any user may count of processes of their own while
kernel.perf_event_paranoid is 2 or less. The threads that are there are attached to, and what they
start is counted with them (`inherit`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_SYSCALL = {"x86_64": 298, "aarch64": 241}  # perf_event_open
_HARDWARE, _CACHE, _RAW = 0, 3, 4  # PERF_TYPE_*
_INHERIT, _EXCLUDE_KERNEL, _EXCLUDE_HV = 1 << 1, 1 << 5, 1 << 6
_TIMES = 1 | 2  # PERF_FORMAT_TOTAL_TIME_ENABLED, _RUNNING
_ATTRIBUTES = struct.Struct("IIQQQQQIIQ")  # perf_event_attr, PERF_ATTR_SIZE_VER0

_GENERAL = {
    "cycles": (_HARDWARE, 0),
    "instructions": (_HARDWARE, 1),
    # PERF_COUNT_HW_CACHE_DTLB or _ITLB, | OP_READ << 8 | RESULT_MISS << 16
    "itlb_misses": (_CACHE, 4 | 1 << 16),
    "dtlb_misses": (_CACHE, 3 | 1 << 16),
}


def _intel(event: int) -> tuple[int, int]:
    return _RAW, event | 0x10 << 8 | 1 << 24  # .WALK_ACTIVE: umask 0x10, cmask 1


# Raw events by processor (tools/perf/pmu-events in Linux). Cycles of page walks, where it counts
# them; AMD and Arm count the walks.
_SKYLAKE = {"itlb_walk_cycles": _intel(0x85), "dtlb_walk_cycles": _intel(0x08)}
_GOLDEN_COVE = {"itlb_walk_cycles": _intel(0x11), "dtlb_walk_cycles": _intel(0x12)}
_ZEN = {"itlb_walks": (_RAW, 0x85 | 0x0F << 8), "dtlb_walks": (_RAW, 0x45 | 0xF0 << 8)}
_ARM = {"itlb_walks": (_RAW, 0x35), "dtlb_walks": (_RAW, 0x34)}  # ITLB_WALK, DTLB_WALK
# Models of family 6: Skylake to Tiger Lake, and since Alder Lake and Sapphire Rapids.
_SKYLAKES = {
    0x4E,
    0x5E,
    0x55,
    0x8E,
    0x9E,
    0xA5,
    0xA6,
    0x66,
    0x6A,
    0x6C,
    0x7D,
    0x7E,
    0x8C,
    0x8D,
    0xA7,
}
_GOLDEN_COVES = {0x8F, 0xCF, 0x97, 0x9A, 0xB7, 0xBA, 0xBF, 0xAD, 0xAE, 0xAA, 0xAC}


@dataclass(frozen=True)
class Counters:
    """The events that this machine can count, or why there is none."""

    events: dict[str, tuple[int, int]]
    missing: str | None = None

    def attach(self, pids: Iterable[int]) -> Attached:
        """Count for some processes from now on. Threads that end meanwhile stay counted."""
        return Attached(self.events, pids)


class Attached:
    """Counters of some processes; a context, which closes them."""

    def __init__(self, events: dict[str, tuple[int, int]], pids: Iterable[int]) -> None:
        self._open: list[tuple[str, int]] = []
        for pid in pids if events else ():
            with contextlib.suppress(OSError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    for name, event in events.items():
                        with contextlib.suppress(OSError):  # ended, or another's
                            self._open.append((name, _perf_event_open(*event, int(thread))))

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        for name_and_fd in self._open:
            os.close(name_and_fd[1])

    def read(self) -> dict[str, float]:
        """The counts, scaled up where events took turns on the hardware."""
        found: dict[str, float] = {}
        for name, fd in self._open:
            value, enabled, running = struct.unpack("QQQ", os.read(fd, 24))
            if running:
                found[name] = found.get(name, 0.0) + value * enabled / running
        return found


def available() -> Counters:
    """Try each event on this thread."""
    events: dict[str, tuple[int, int]] = {}
    refusal: OSError | None = None
    for name, event in {**_GENERAL, **_of_processor()}.items():
        try:
            os.close(_perf_event_open(*event, 0))
            events[name] = event
        except OSError as error:
            refusal = refusal or error
    if events:
        return Counters(events)
    return Counters({}, _why(refusal))


def _why(error: OSError | None) -> str:
    if error and error.errno in (errno.EACCES, errno.EPERM):
        return (
            "no hardware counters: not allowed (kernel.perf_event_paranoid above 2, or a "
            "container's seccomp profile; CAP_PERFMON allows it)"
        )
    if error and error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
        return "no hardware counters: this machine has none (a virtual machine without a PMU?)"
    return f"no hardware counters: {error.strerror if error else 'unknown processor'}"


def _of_processor() -> dict[str, tuple[int, int]]:
    if platform.machine() == "aarch64":
        return _ARM
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        text = file.read().partition("\n\n")[0]
    facts: dict[str, str] = {}
    for line in text.splitlines():
        name, _, text = line.partition(":")
        facts[name.strip()] = text.strip()
    vendor, family = facts.get("vendor_id"), facts.get("cpu family")
    model = int(facts.get("model", "0"))
    if vendor == "AuthenticAMD" and family in ("23", "25", "26"):
        return _ZEN
    if vendor == "GenuineIntel" and family == "6":
        if model in _SKYLAKES:
            return _SKYLAKE
        return _GOLDEN_COVE if model in _GOLDEN_COVES else {}
    return {}


def _perf_event_open(kind: int, config: int, thread: int) -> int:
    """
    Raises:
        OSError: the machine has no such event, or it may not be counted.
    """
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    flags = _INHERIT | _EXCLUDE_KERNEL | _EXCLUDE_HV
    attributes = _ATTRIBUTES.pack(
        kind, _ATTRIBUTES.size, config, 0, 0, _TIMES, flags, 0, 0, 0
    )  # fmt: skip
    library = ctypes.CDLL(None, use_errno=True)
    cloexec = ctypes.c_ulong(8)
    fd = library.syscall(
        ctypes.c_long(number), ctypes.c_char_p(attributes), thread, -1, -1, cloexec
    )
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(fd)
