"""Read /proc/PID/smaps: what the kernel says of each mapping, of any process.

smaps is the only truth about huge pages: AnonHugePages, ShmemPmdMapped and FilePmdMapped count what
is mapped by a PMD entry, not what was advised (Linux, Documentation/filesystems/proc.rst).
"""

from __future__ import annotations

import os

from page_primer._lean import Record, cached

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence, Set

HUGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Private_Hugetlb", "Shared_Hugetlb")


class Mapping(Record, aside=("details",)):
    """One mapping of an address space. What smaps says below its first line is parsed when it is
    asked for: a process has hundreds of mappings, and few of them matter."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str
    details: str = ""

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def executable(self) -> bool:
        return self.permissions[2] == "x"

    @property
    def writable(self) -> bool:
        return self.permissions[1] == "w"

    def count(self, name: str) -> int:
        """A counter in bytes, by smaps' name; 0 where there is none, and when read from maps."""
        at = self.details.find(f"\n{name}:")
        if at < 0:
            return 0
        number, _, _ = self.details[at + len(name) + 2 : at + len(name) + 40].partition(" kB")
        return int(number) << 10

    @cached
    def flags(self) -> frozenset[str]:
        """VmFlags, two letters each; empty when read from maps."""
        _, _, flags = self.details.partition("VmFlags:")
        return frozenset(flags.split())

    @property
    def huge(self) -> int:
        """Bytes mapped by huge page table entries."""
        return sum(self.count(name) for name in HUGE)

    @property
    def is_locked(self) -> bool:
        """Whether mlock is in force. (The counter `Locked` is a share where processes share.)"""
        # Asked of every mapping, so without parsing the rest: the flags are the last line.
        return " lo " in self.details[self.details.rfind("VmFlags:") :]


def read_maps(pid: int | str = "self") -> list[Mapping]:
    """The mappings of a process, without counters."""
    return [_mapping(line) for line in _text(f"/proc/{pid}/maps").split("\n")[:-1]]


def read_smaps(pid: int | str = "self") -> list[Mapping]:
    """The mappings of a process, with counters and flags.

    Raises:
        OSError: no such process, or not allowed to look (ptrace(2), PTRACE_MODE_READ).
    """
    return [_mapping(line, details) for line, details in _blocks(_text(f"/proc/{pid}/smaps"))]


def overlapping(mappings: Sequence[Mapping], start: int, end: int) -> Iterator[Mapping]:
    """Those of `mappings`, which are in the order of their addresses, that share a byte with
    [start, end)."""
    low, high = 0, len(mappings)
    while low < high:
        middle = (low + high) // 2
        if mappings[middle].end <= start:
            low = middle + 1
        else:
            high = middle
    while low < len(mappings) and mappings[low].start < end:
        yield mappings[low]
        low += 1


def total(mappings: Iterable[Mapping], counter: str) -> int:
    """The sum of one counter, bytes."""
    return sum(mapping.count(counter) for mapping in mappings)


def _text(path: str) -> str:
    # In one go: the kernel then walks the address space in as few steps as it can.
    try:
        with open(path, "rb", buffering=0) as file:
            return os.fsdecode(file.readall())
    except OSError as error:  # of reading, it does not say which file
        raise type(error)(error.errno, error.strerror, path) from error


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Each mapping's own line in smaps, and the lines below it, of which "Size:" is the first."""
    line, *rest = text.split("\nSize:")
    for part in rest:
        details, _, following = part.rpartition("\n")
        yield line, details
        line = following


def _mapping(line: str, details: str = "") -> Mapping:
    addresses, permissions, offset, device, inode, *path = line.split(None, 5)
    start, _, end = addresses.partition("-")
    return Mapping(
        int(start, 16), int(end, 16), permissions, int(offset, 16), device, int(inode),
        path[0].replace("\\012", "\n") if path else "", details,
    )  # fmt: skip


def starting_at(starts: Set[int]) -> list[Mapping]:
    """The mappings of this process that start at the given addresses, with counters. Only these are
    parsed, which makes it several times faster than read_smaps()."""
    return [
        _mapping(line, details)
        for line, details in _blocks(_text("/proc/self/smaps"))
        if int(line.partition("-")[0], 16) in starts
    ]
