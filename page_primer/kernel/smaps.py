"""Read /proc/PID/smaps: what the kernel says of each mapping, of any process.

smaps is the only truth about huge pages: AnonHugePages, ShmemPmdMapped and FilePmdMapped count what
is mapped by a PMD entry, not what was advised (Linux, Documentation/filesystems/proc.rst).
"""

from __future__ import annotations

import sys
from _struct import Struct

from page_primer._lean import is_ours

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence, Set
    from typing import Any, Protocol, TypeAlias, TypeVar

    class _Placed(Protocol):
        @property
        def start(self) -> int: ...
        @property
        def end(self) -> int: ...

    One = TypeVar("One", bound=_Placed)
    _Fields: TypeAlias = tuple[int, int, str, int, str, int, str, str]  # of a Mapping, in order

HUGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Private_Hugetlb", "Shared_Hugetlb")

# A read gives so many bytes, and what is made of them takes the place of the last one's. The whole
# text, a kilobyte a mapping, would stay in the heap of every worker.
_PIECE = 16 << 10


class Mapping:
    """One mapping of an address space. What smaps says below its first line is parsed when it is
    asked for: a process has hundreds of mappings, and few of them matter. (No Record, whose fields
    take twice the room.)"""

    __slots__ = ("details", "device", "end", "inode", "offset", "path", "permissions", "start")

    def __init__(
        self,
        start: int,
        end: int,
        permissions: str,
        offset: int,
        device: str,
        inode: int,
        path: str,
        details: str = "",
    ) -> None:
        self.start = start
        self.end = end
        self.permissions = permissions
        self.offset = offset
        self.device = device
        self.inode = inode
        self.path = path
        self.details = details

    def __repr__(self) -> str:
        return f"Mapping({self.start:#x}-{self.end:#x} {self.permissions} {self.path!r})"

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

    @property
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


if TYPE_CHECKING:
    _Sequence = Sequence[Mapping]
else:
    _Sequence = object


class Mappings(_Sequence):
    """Mappings in the order of their addresses, packed: a process has hundreds of them, and what
    they take for a moment stays in its heap."""

    __slots__ = ("_length", "_numbers", "_rows", "_strings")

    def __init__(self, found: Iterable[_Fields]) -> None:
        rows, pack = bytearray(), _ROW.pack
        strings: dict[str, int] = {}
        number = strings.setdefault
        for start, end, permissions, offset, device, inode, path, details in found:
            rows += pack(
                start, end, offset, inode,
                number(permissions, len(strings)), number(device, len(strings)),
                number(path, len(strings)), number(details, len(strings)),
            )  # fmt: skip
        self._rows, self._strings = bytes(rows), [*strings]
        self._numbers = memoryview(self._rows).cast("Q")  # to find one, without unpacking others
        self._length = len(rows) // _ROW.size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Mapping]:
        for row in _ROW.iter_unpack(self._rows):
            yield self._unpacked(row)

    def __getitem__(self, index: Any) -> Any:
        if type(index) is slice:
            return [self[each] for each in range(self._length)[index]]
        at = range(self._length)[index] * _ROW.size
        return self._unpacked(_ROW.unpack_from(self._rows, at))

    def _unpacked(self, row: tuple[int, ...]) -> Mapping:
        start, end, offset, inode, permissions, device, path, details = row
        text = self._strings
        return Mapping(
            start, end, text[permissions], offset, text[device], inode, text[path], text[details]
        )

    def overlapping(self, start: int, end: int) -> Iterator[Mapping]:
        """Those that share a byte with [start, end)."""
        numbers, size, unpack = self._numbers, _ROW.size // 8, _ROW.unpack_from
        low, high = 0, self._length
        while low < high:
            middle = (low + high) // 2
            if numbers[middle * size + 1] <= start:  # its end
                low = middle + 1
            else:
                high = middle
        while low < self._length and numbers[low * size] < end:
            yield self._unpacked(unpack(self._rows, low * _ROW.size))
            low += 1


_ROW = Struct("=4Q4I")


def read_maps(pid: int | str = "self") -> Sequence[Mapping]:
    """The mappings of a process, without counters."""
    known: dict[str, str] = {}
    return Mappings(_fields(line, known) for line in _parts(f"/proc/{pid}/maps", b"\n") if line)


def read_smaps(pid: int | str = "self") -> list[Mapping]:
    """The mappings of a process, with counters and flags.

    Raises:
        OSError: no such process, or not allowed to look (ptrace(2), PTRACE_MODE_READ).
    """
    known: dict[str, str] = {}
    return [
        _mapping(line, known, details.decode("ascii", "replace"))
        for line, details in _blocks(f"/proc/{pid}/smaps")
    ]


def read_own() -> Sequence[Mapping]:
    """The mappings of this process, with what is resident and huge of each (Rss, and the counters
    of HUGE), and flags: a tenth of what read_smaps() keeps."""
    known: dict[str, str] = {}
    essences: dict[bytes, str] = {}
    return Mappings(
        _fields(line, known, _essence(details, essences))
        for line, details in _blocks("/proc/self/smaps")
    )


def overlapping(mappings: Sequence[One], start: int, end: int) -> Iterator[One]:
    """Those of mappings or ranges, which are in the order of their addresses and do not overlap,
    that share a byte with [start, end)."""
    if isinstance(mappings, Mappings):
        packed: Any = mappings  # which are the one kind of what there is
        yield from packed.overlapping(start, end)
        return
    low, high = 0, len(mappings)
    while low < high:
        middle = (low + high) // 2
        if mappings[middle].end <= start:
            low = middle + 1
        else:
            high = middle
    while low < len(mappings) and (mapping := mappings[low]).start < end:
        yield mapping
        low += 1


def total(mappings: Iterable[Mapping], counter: str) -> int:
    """The sum of one counter, bytes."""
    return sum(mapping.count(counter) for mapping in mappings)


def starting_at(starts: Set[int]) -> list[Mapping]:
    """The mappings of this process that start at the given addresses, as read_own() has them. Only
    these are parsed, which makes it several times faster."""
    return [
        _mapping(line, {}, _essence(details, {}))
        for line, details in _blocks("/proc/self/smaps")
        if int(line[: line.index(b"-")], 16) in starts
    ]


def _parts(path: str, separator: bytes) -> Iterator[bytes]:
    """What a file has between separators."""
    with open(path, "rb", buffering=0) as file:
        try:
            rest = b""
            while piece := file.read(_PIECE):
                *whole, rest = (rest + piece).split(separator)
                yield from whole
            yield rest
        except OSError as error:
            if error.errno is None or not is_ours(error):
                raise
            # Of reading, it does not say which file.
            raise type(error)(error.errno, error.strerror, path) from error


def _blocks(path: str) -> Iterator[tuple[bytes, bytes]]:
    """Each mapping's own line in smaps, and the lines below it, of which "Size:" is the first."""
    parts = _parts(path, b"\nSize:")
    line = next(parts)
    for part in parts:
        details, _, following = part.rpartition(b"\n")
        yield line, details
        line = following


def _essence(details: bytes, known: dict[bytes, str]) -> str:
    """The lines that read_own() keeps, those of huge pages only where there are any."""
    at = details.find(b"\nRss:")
    flags = details.rfind(b"\nVmFlags:")
    low = details.find(b"\nAnonHugePages:", at)
    huge = details[low : details.find(b"\nSwap:", low)]
    kept = details[at : details.find(b"\n", at + 1)] + details[flags:]
    if huge not in known:
        none = huge.count(b" 0 kB") == huge.count(b" kB")
        known[huge] = "" if none else huge.decode("ascii", "replace")
    if kept not in known:
        known[kept] = kept.decode("ascii", "replace")
    return known[huge] + known[kept]


def _mapping(line: bytes, known: dict[str, str], details: str = "") -> Mapping:
    return Mapping(*_fields(line, known, details))


def _fields(line: bytes, known: dict[str, str], details: str = "") -> _Fields:
    """Parse a line into a mapping's fields; strings that were `known` before are not made anew."""
    # As os.fsdecode() does it, of which there is a call a line.
    text = line.decode(_ENCODING, _ERRORS)
    addresses, permissions, offset, device, inode, *path = text.split(None, 5)
    start, _, end = addresses.partition("-")
    name = path[0].replace("\\012", "\n") if path else ""
    return (
        int(start, 16), int(end, 16), known.setdefault(permissions, permissions), int(offset, 16),
        known.setdefault(device, device), int(inode), known.setdefault(name, name), details,
    )  # fmt: skip


_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
