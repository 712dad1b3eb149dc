"""Which 2 MiB pages an address space has, and could have: from a copy of smaps (mapsnap.c)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HUGE = 2 << 20
PT_LOAD, PT_GNU_RELRO, PF_W = 1, 0x6474E552, 2


def spread(chunks: Sequence[int], share: float) -> set[int]:
    """A share of some pages, evenly taken."""
    number = min(len(chunks), round(share * len(chunks)))
    return {chunks[at * len(chunks) // number] for at in range(number)}


@dataclass
class Area:
    """A mapping; `huge` has the bytes that huge page table entries map."""

    start: int
    end: int
    permissions: str
    offset: int
    path: str
    huge: int = 0
    resident: int = 0

    @property
    def chunks(self) -> range:
        """The 2 MiB pages that lie wholly inside."""
        return range(-(-self.start // HUGE), self.end // HUGE)

    def part(self, start: int, end: int) -> Area:
        """A part of it, as huge and as resident as the whole."""
        its = (end - start) / (self.end - self.start)
        return Area(start, end, self.permissions, 0, self.path, int(self.huge * its),
                    int(self.resident * its))  # fmt: skip

    @property
    def huge_chunks(self) -> set[int]:
        """Those that are one page. smaps has only their number: where it is not all, they are
        taken to be evenly spread."""
        return spread(self.chunks, self.huge / HUGE / max(1, len(self.chunks)))


@dataclass
class Snapshot:
    """An address space, and how many marks its program made (calls of time.process_time())."""

    marks: int
    areas: list[Area]
    arenas: list[tuple[int, int]]  # where they start and end
    by_name: dict[str, list[Area]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        first, _, text = path.read_text(errors="replace").partition("\n")
        areas: list[Area] = []
        arenas: list[tuple[int, int]] = []
        for line in text.splitlines():
            words = line.split(None, 5)
            if words[0] == "arena":
                start = int(words[1], 16)
                arenas.append((start, start + int(words[2], 16)))
                continue
            if words[0].endswith(":"):
                if words[0] in ("AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:"):
                    areas[-1].huge += int(words[1]) << 10
                elif words[0] == "Rss:":
                    areas[-1].resident = int(words[1]) << 10
                continue
            low, _, high = words[0].partition("-")
            areas.append(Area(int(low, 16), int(high, 16), words[1], int(words[2], 16),
                              words[5].strip() if len(words) > 5 else ""))  # fmt: skip
        found = cls(int(first.split()[1]), areas, sorted(arenas))
        for area in areas:
            if area.path.startswith("/"):
                found.by_name.setdefault(os.path.basename(area.path), []).append(area)
        return found

    def base(self, name: str) -> int | None:
        """Where an object begins; an image of it has its name."""
        areas = self.by_name.get(name)
        return min(area.start for area in areas) if areas else None

    def area_of(self, address: int) -> Area | None:
        return next((area for area in self.areas if area.start <= address < area.end), None)

    def find(self, name: str, offset: int, *, code: bool) -> int | None:
        """The address of a byte of a file."""
        found = None
        for area in self.by_name.get(name, ()):
            if area.offset <= offset < area.offset + area.end - area.start:
                found = area.start + offset - area.offset
                if ("x" in area.permissions) == code:
                    break
        return found

    def kinds(self) -> list[tuple[Area, str]]:
        """Writable memory without a file, by what it is for: pymalloc's arenas, what brk(2)
        extends, stacks, and other. Of a mapping that has arenas and other memory, either is taken
        to be as resident and as huge as the whole."""
        found = []
        program = self.areas[0].path
        before = None
        for area in self.areas:
            before, previous = area, before
            if "w" not in area.permissions or area.path.startswith("/"):
                continue
            # QEMU does not name the heap; it follows the program's data.
            follows = previous and previous.end == area.start and previous.path == program
            if area.path == "[heap]" or follows:
                found.append((area, "brk"))
            elif area.path.startswith("[stack"):
                found.append((area, "stack"))
            else:
                found += self._split(area)
        return found

    def _split(self, area: Area) -> Iterator[tuple[Area, str]]:
        """The arenas in a mapping, and what lies between."""
        at = area.start
        for start, end in self.arenas:
            if at < end and start < area.end:
                start, end = max(start, at), min(end, area.end)
                if at < start:
                    yield area.part(at, start), "other"
                yield area.part(start, end), "arena"
                at = end
        if at < area.end:
            yield area.part(at, area.end), "other"

    def share(self, kind: str) -> float:
        """How much of a kind's memory is on huge pages."""
        areas = [area for area, its in self.kinds() if its == kind]
        resident = sum(area.resident for area in areas)
        return sum(area.huge for area in areas) / resident if resident else 0.0


def per_segment(space: Snapshot) -> set[int]:
    """The rule of the known tools: chunks wholly inside one executable segment."""
    return {chunk for area in space.areas
            if "x" in area.permissions and area.path.startswith("/")
            for chunk in area.chunks}  # fmt: skip


def spans(space: Snapshot) -> set[int]:
    """Chunks wholly inside the read-only run of an object that has code: what is attainable."""
    found: set[int] = set()
    for areas in space.by_name.values():
        limit = _read_only_limit(areas[0].path)
        start = end = 0
        code = False
        for area in [*sorted(areas, key=lambda one: one.start), Area(0, 0, "-w--", 0, "")]:
            fits = "w" not in area.permissions and "r" in area.permissions and area.offset < limit
            if end and not (fits and area.start == end):
                if code:
                    found.update(Area(start, end, "", 0, "").chunks)
                start = end = 0
                code = False
            if fits:
                start, end = start or area.start, area.end
                code = code or "x" in area.permissions
    return found


def _read_only_limit(path: str) -> int:
    """The file offset at which an object's writable part (RELRO included) begins."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            (table,) = struct.unpack_from("<Q", head, 32)
            size, count = struct.unpack_from("<HH", head, 54)
            file.seek(table)
            headers = file.read(size * count)
    except (OSError, struct.error):
        return 0
    limit = 1 << 62
    for number in range(count if head.startswith(b"\x7fELF") else 0):
        kind, flags, offset = struct.unpack_from("<IIQ", headers, number * size)
        if kind == PT_GNU_RELRO or (kind == PT_LOAD and flags & PF_W):
            limit = min(limit, offset & ~0xFFF)
    return limit
