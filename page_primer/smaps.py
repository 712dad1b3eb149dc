"""Read /proc/PID/smaps: what the kernel says of each mapping, of any process.

smaps is the only truth about huge pages: AnonHugePages, ShmemPmdMapped and FilePmdMapped count what
is mapped by a PMD entry, not what was advised (Linux, Documentation/filesystems/proc.rst).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property

HUGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Private_Hugetlb", "Shared_Hugetlb")

# A mapping's own line, and, in smaps, the lines "Rss:  4 kB" ... "VmFlags: rd ex ..." below it.
_MAPPING = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+) *(.*)\n((?:[A-Z].*\n)*)", re.MULTILINE
)
_COUNTER = re.compile(r"^(\w+): +(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Mapping:
    """One mapping of an address space. What smaps says below its first line is parsed when it is
    asked for: a process has hundreds of mappings, and few of them matter."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str
    details: str = field(default="", repr=False, compare=False)

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def executable(self) -> bool:
        return self.permissions[2] == "x"

    @property
    def writable(self) -> bool:
        return self.permissions[1] == "w"

    @cached_property
    def counters(self) -> dict[str, int]:
        """Bytes, by smaps' names; empty when read from maps."""
        return {name: int(number) << 10 for name, number in _COUNTER.findall(self.details)}

    @cached_property
    def flags(self) -> frozenset[str]:
        """VmFlags, two letters each; empty when read from maps."""
        _, _, flags = self.details.partition("VmFlags:")
        return frozenset(flags.split())

    @property
    def huge(self) -> int:
        """Bytes mapped by huge page table entries."""
        return sum(self.counters.get(name, 0) for name in HUGE)

    @property
    def is_locked(self) -> bool:
        """Whether mlock is in force. (The counter `Locked` is a share where processes share.)"""
        # Asked of every mapping, so without parsing the rest: the flags are the last line.
        return " lo " in self.details[self.details.rfind("VmFlags:") :]


def read_maps(pid: int | str = "self") -> list[Mapping]:
    """The mappings of a process, without counters."""
    return [_mapping(match) for match in _MAPPING.finditer(_text(f"/proc/{pid}/maps"))]


def read_smaps(pid: int | str = "self") -> list[Mapping]:
    """The mappings of a process, with counters and flags.

    Raises:
        OSError: no such process, or not allowed to look (ptrace(2), PTRACE_MODE_READ).
    """
    return [_mapping(match) for match in _MAPPING.finditer(_text(f"/proc/{pid}/smaps"))]


def overlapping(mappings: Iterable[Mapping], start: int, end: int) -> Iterator[Mapping]:
    """Those of `mappings` that share a byte with [start, end)."""
    return (m for m in mappings if m.start < end and start < m.end)


def total(mappings: Iterable[Mapping], counter: str) -> int:
    """The sum of one counter, bytes."""
    return sum(mapping.counters.get(counter, 0) for mapping in mappings)


def _text(path: str) -> str:
    # In one go: the kernel then walks the address space in as few steps as it can.
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.readall())


def _mapping(match: re.Match[str]) -> Mapping:
    start, end, permissions, offset, device, inode, path, details = match.groups()
    return Mapping(
        int(start, 16), int(end, 16), permissions, int(offset, 16), device, int(inode),
        path.replace("\\012", "\n"), details,
    )  # fmt: skip


def starting_at(starts: Set[int]) -> list[Mapping]:
    """The mappings of this process that start at the given addresses, with counters. Only these are
    parsed, which makes it several times faster than read_smaps()."""
    text = _text("/proc/self/smaps")
    found = []
    for start in sorted(starts):
        # The kernel prints at least eight digits.
        at = text.find(f"\n{start:08x}-") + 1
        match = _MAPPING.match(text, at)
        if match and int(match[1], 16) == start:
            found.append(_mapping(match))
    return found
