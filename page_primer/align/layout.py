"""Lay an ELF file out so that the loader itself places its read-only span on huge pages.

    file offset = address - (address of the span's first page) + a multiple of the huge page size

holds for the span, the longest run of read-only PT_LOADs with code, and for every segment behind
it, so that a huge page's worth of addresses is a huge page's worth of file. Nothing in memory
changes its address, so symbols, relocations, the dynamic section, notes and debug information stay
as they are; only file offsets do.

The span becomes one `R E` PT_LOAD with p_align = the huge page size, by which glibc (2.35) and the
kernel (5.10) choose the address. It has to be one: adjacent PT_LOADs with the same protection
become one mapping on most file systems, but not on overlayfs, where the kernel compares files
before it has exchanged overlayfs' for the real one. The entries that it takes the place of become
PT_NULL, so that e_phnum and PT_PHDR stay as they are; strip and patchelf accept that.

elfutils (eu-stack, pystack, systemd-coredump, drgn) matches a file and its separate debug
information by where the first PT_LOAD ends, unless a section .gnu.prelink_undo has the headers that
the file had when they were separated (libdwfl, find_prelink_address_sync). So there is one.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from page_primer.align.original import Original, Refused
from page_primer.elf import file as elf
from page_primer.elf.file import (
    PF_R,
    PF_X,
    PT_LOAD,
    PT_NULL,
    FileHeader,
    ProgramHeader,
    SectionHeader,
)

# The smallest page: what ends in one can be followed by what begins in the next.
_PAGE = 4096
_BEYOND = 1 << 63  # every file's end, as off_t has it


@dataclass(frozen=True)
class Copy:
    """Bytes of the original that the new file holds elsewhere."""

    source: int
    target: int
    size: int


@dataclass(frozen=True)
class Layout:
    """Where everything goes.

    `patches` are (offset, bytes) to be written over what is copied; `written` the file offsets of
    the span, holes included; `end` is the first offset behind all of it, where the section headers
    follow, of which `sections` are the original's in their new places.
    """

    copies: list[Copy]
    patches: list[tuple[int, bytes]]
    written: tuple[int, int]
    end: int
    header: FileHeader
    header_places: list[int]
    sections: list[SectionHeader]
    delta: int  # file offset - address, of the span and what follows


@dataclass(frozen=True)
class Span:
    """A run of read-only PT_LOADs: programs[first:last] of the loads; addresses in bytes."""

    first: int
    last: int
    start: int
    end: int
    joins: bool  # whether read-only data becomes executable

    def chunks(self, pmd: int) -> range:
        """The addresses of the whole huge pages."""
        return range(-(-self.start // pmd) * pmd, self.end // pmd * pmd, pmd)


def spans(loads: list[ProgramHeader]) -> list[Span]:
    """The runs of read-only PT_LOADs that hold code."""
    found: list[Span] = []
    first = 0
    for index in range(len(loads) + 1):
        if index < len(loads) and not loads[index].writable:
            continue
        run = loads[first:index]
        if any(load.executable for load in run):
            start = run[0].p_vaddr & -_PAGE
            joins = not all(load.executable for load in run)
            found.append(Span(first, index, start, -(-run[-1].end // _PAGE) * _PAGE, joins))
        first = index + 1
    return found


def covered(ranges: list[tuple[int, int]], chunks: range) -> int:
    """Bytes of `ranges` that lie on whole huge pages."""
    if not chunks:
        return 0
    return sum(max(0, min(end, chunks.stop) - max(start, chunks.start)) for start, end in ranges)


def best_span(original: Original, pmd: int) -> Span | None:
    """The span with most code on whole huge pages; None where none has any."""
    code = original.code_ranges()
    best = max(
        spans(original.loads), key=lambda span: covered(code, span.chunks(pmd)), default=None
    )
    return best if best and covered(code, best.chunks(pmd)) else None


def lay_out(original: Original, span: Span, pmd: int, *, merge: bool = True) -> Layout:
    """Plan the new file.

    Raises:
        Refused: it cannot be laid out; with merge=False also where read-only data would become
            executable.
    """
    if span.joins and not merge:
        raise Refused("would join read-only data to code (--no-merge)")
    loads = original.loads
    if not all(load.p_flags & PF_R for load in loads[span.first : span.last]):
        raise Refused("would make code or data readable that is not")
    offsets = _offsets(original, span, pmd)
    delta = offsets[span.first] - loads[span.first].p_vaddr
    copies = _copies(loads, offsets)
    places = Places(loads, offsets)
    if not copies:
        raise Refused("none of its segments has anything in the file")
    end = max(copy.target + copy.size for copy in copies)
    end = max(end, span.end + delta)
    blobs, end = _unloaded(original, places, end)
    copies += blobs
    places.add(blobs)
    programs = _program_headers(original, span, places, pmd)
    table = b"".join(program.pack() for program in programs)
    e_phoff = places.of_offset(original.header.e_phoff, len(table))
    patches = []
    if e_phoff is None:
        e_phoff = -(-end // 8) * 8
        end = e_phoff + len(table)
    patches.append((e_phoff, table))
    header_places = [0]
    loaded = places.of_offset(0, elf.HEADER.size)
    if loaded:
        header_places.append(loaded)
    sections = [_section(section, places) for section in original.sections]
    return Layout(
        copies,
        patches,
        (span.start + delta, span.end + delta),
        end,
        original.header._replace(e_phoff=e_phoff),
        header_places,
        sections,
        delta,
    )


def _offsets(original: Original, span: Span, pmd: int) -> list[int]:
    """The new file offset of each PT_LOAD."""
    loads = original.loads
    alignment = max([pmd, *(load.p_align for load in loads)])
    offsets: list[int] = []
    cursor = 0
    for load in loads[: span.first]:
        # What precedes the span (patchelf puts headers there) only has to fit its own alignment.
        own = max(load.p_align, _PAGE)
        if load.p_offset:
            cursor = max(cursor, elf.HEADER.size)
        offset = cursor + (load.p_vaddr - cursor) % own
        offsets.append(offset)
        cursor = offset + load.p_filesz
    start = span.start
    if offsets or start != loads[span.first].p_vaddr or loads[span.first].p_offset:
        cursor = max(cursor, elf.HEADER.size)  # the file's first bytes are not the span's
    delta = cursor + (start - cursor) % alignment - start
    return offsets + [load.p_vaddr + delta for load in loads[span.first :]]


def _copies(loads: list[ProgramHeader], offsets: list[int]) -> list[Copy]:
    return [
        Copy(load.p_offset, offset, load.p_filesz)
        for load, offset in zip(loads, offsets, strict=True)
        if load.p_filesz
    ]


class Places:
    """Where bytes of the original went, asked by address or by offset; `of_loads` is of each
    PT_LOAD, in their order."""

    def __init__(self, loads: list[ProgramHeader], offsets: list[int]) -> None:
        self._loads = loads
        self._addresses = [load.p_vaddr for load in loads]
        self.of_loads = offsets
        self._by_offset: list[Copy] = []
        self.add(_copies(loads, offsets))

    def add(self, copies: list[Copy]) -> None:
        self._by_offset += copies

    def of_address(self, address: int, offset: int, size: int) -> int | None:
        """The offset of `size` bytes at an address whose place in the original was `offset`."""
        index = bisect_right(self._addresses, address) - 1
        if index < 0:
            return None
        load = self._loads[index]
        inside = address - load.p_vaddr
        if inside + size > load.p_filesz or offset - load.p_offset != inside:
            return None
        return self.of_loads[index] + inside

    def of_offset(self, offset: int, size: int) -> int | None:
        """The new offset of `size` bytes at an offset of the original."""
        for copy in self._by_offset:
            if copy.source <= offset and offset + size <= copy.source + copy.size:
                return copy.target + offset - copy.source
        return None

    def of_nothing(self, address: int, offset: int) -> int:
        """The offset to name for what has no bytes in the file (.bss, .tbss): as before where its
        address is none of memory's."""
        index = bisect_right(self._addresses, address) - 1
        if not address or index < 0:
            return offset
        place = self.of_loads[index] + address - self._loads[index].p_vaddr
        return place if place < _BEYOND else offset


def _unloaded(original: Original, places: Places, end: int) -> tuple[list[Copy], int]:
    """Copies of what no segment loads: symbol tables, debug information, names."""
    wanted = sorted(
        (section.sh_offset, section.sh_offset + section.sh_size)
        for section in original.sections
        if section.in_file and not _is_loaded(section, places)
    )
    joined: list[list[int]] = []
    for low, high in wanted:
        # With what lies between: alignments stay as they are.
        if joined and low <= joined[-1][1] + _PAGE:
            joined[-1][1] = max(high, joined[-1][1])
        else:
            joined.append([low, high])
    copies = []
    for low, high in joined:
        target = end + (low - end) % _PAGE
        copies.append(Copy(low, target, high - low))
        end = target + high - low
    return copies, end


def _is_loaded(section: SectionHeader, places: Places) -> bool:
    place = places.of_address(section.sh_addr, section.sh_offset, section.sh_size)
    return section.allocated and place is not None


def _section(section: SectionHeader, places: Places) -> SectionHeader:
    if not section.in_file:
        if section.sh_type == elf.SHT_NOBITS and section.allocated:
            offset = places.of_nothing(section.sh_addr, section.sh_offset)
            return section._replace(sh_offset=offset)
        return section
    place = places.of_address(section.sh_addr, section.sh_offset, section.sh_size)
    if not section.allocated or place is None:
        place = places.of_offset(section.sh_offset, section.sh_size)
    assert place is not None, "every section's bytes are copied"
    return section._replace(sh_offset=place)


def _program_headers(
    original: Original, span: Span, places: Places, pmd: int
) -> list[ProgramHeader]:
    loads = original.loads
    first, *rest = loads[span.first : span.last]
    size = loads[span.last - 1].end - first.p_vaddr
    found = []
    offsets = iter(places.of_loads)
    for program in original.programs:
        if program.p_type != PT_LOAD:
            found.append(_other(program, places))
            continue
        changed = program._replace(p_offset=next(offsets))
        if program == first:
            changed = changed._replace(
                p_flags=PF_R | PF_X,
                p_filesz=size,
                p_memsz=size,
                p_align=max(program.p_align, pmd),
            )
        elif program in rest:
            changed = changed._replace(p_type=PT_NULL)
        found.append(changed)
    return found


def _other(program: ProgramHeader, places: Places) -> ProgramHeader:
    if not program.p_filesz:
        offset = places.of_nothing(program.p_vaddr, program.p_offset)
        return program._replace(p_offset=offset)
    place = places.of_address(program.p_vaddr, program.p_offset, program.p_filesz)
    if place is None:
        place = places.of_offset(program.p_offset, program.p_filesz)
    if place is None:
        raise Refused("a program header describes bytes of no segment and no section")
    return program._replace(p_offset=place)
