"""Write an object's image: an ELF file that holds the object laid out by address.

    file offset(address) = pad + (address - first page of the object)

pad is at least one huge page and makes offset and address equal modulo the huge page size, which is
what a huge page table entry asks of a file mapping. From pad on, the file holds the PT_LOADs'
content at their addresses, byte for byte what the loader mapped; of an object of which only chunks
are mapped from it, these, and what tools read of the rest, which is a hole. Before it, within the
first 4 KiB, an ELF header describes *this* file to the tools that find it in /proc/PID/maps:

- PT_LOADs with shifted offsets, the executable one exactly as wide as the executable mapping, since
  py-spy takes (start of the first executable mapping) - (p_vaddr of the first executable PT_LOAD)
  for the load bias;
- a build-id of its own, since perf caches files by build-id and would symbolise with the original's
  offsets.

After the loadable part come the sections that tools read (.symtab and its strings, USDT's notes,
and debug information where there is room) and the section headers, those left out marked SHT_NULL
so that section numbers keep their meaning.
"""

from __future__ import annotations

import _struct
import os

from page_primer._lean import Record, replace
from page_primer.elf import file as elf
from page_primer.elf.file import PF_R, PF_X, PROGRAM_HEADER, PT_LOAD, ProgramHeader, SectionHeader
from page_primer.elf.objects import Object, Region, is_out_of_proportion
from page_primer.images import names
from page_primer.images.copying import copy, write_all
from page_primer.images.room import NO_LIMIT, for_debug_information
from page_primer.kernel.limits import check_file_size
from page_primer.kernel.thp import page_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

    from page_primer.images.copying import Part

_KEPT_SECTIONS = (".gnu_debuglink", ".gnu_debugaltlink", ".gnu_debugdata", ".note.stapsdt")
_TOOLS_KINDS = (elf.SHT_DYNSYM, elf.SHT_DYNAMIC, elf.SHT_NOTE, *elf.SHT_GNU_VERSIONS)
_TOOLS_SECTIONS = (".eh_frame", ".eh_frame_hdr")
_DEBUG_SECTIONS = (".debug_", ".zdebug_")
_COPY_BLOCK = 8 << 20  # bytes
_HEADER_ROOM = 4096  # the kernel looks for a build-id in the first page only

_NOTE = _struct.Struct(f"=III4s{names.BUILD_ID_SIZE}s")


class CannotLayOut(Exception):
    """The file is not one this module can write an image of; the message says why."""


class Layout(Record):
    """Where an object's bytes lie in its image."""

    object: Object
    regions: tuple[Region, ...]
    pmd: int
    name: str  # identifies content and layout: the same name, the same bytes

    @property
    def pad(self) -> int:
        return self.pmd + self.object.start % self.pmd

    def holds(self, start: int, end: int) -> bool:
        """Whether bytes of the loadable part, by file offsets, are in the image: all, or of an
        object of which only chunks are mapped, these."""
        return not self.object.in_chunks or any(
            self.offset(region.start) < end and start < self.offset(region.end)
            for region in self.regions
        )

    def as_built(self) -> Self:
        """The same for a file that was copied since, as layers of a container do."""
        obj, source = self.object, self.object.source
        assert source is not None, "only objects with a file are planned"
        if names.is_built(self.name):
            return self
        whole = bool(self.regions) and not obj.interpreter
        name = names.as_built(self.name, source, obj.headers, whole=whole)
        return replace(self, name=name)

    def offset(self, address: int) -> int:
        """The file offset of an address of the object."""
        return self.pad + address - self.object.start

    @property
    def content_end(self) -> int:
        return max(self.offset(segment.file_end) for segment in self.object.segments)

    def check_extent(self) -> None:
        """Raise CannotLayOut where the image would be out of proportion to the file, since
        segments are far apart, or longer than what the file holds of them."""
        source = self.object.source
        assert source is not None, "only objects with a file are planned"
        if is_out_of_proportion(self.content_end - 2 * self.pmd, source.size):
            raise CannotLayOut("segments too far apart")

    def build_id_note(self, file: elf.File) -> int:
        """The offset of the image's own build-id note."""
        return elf.HEADER.size + len(_program_headers(self, file)) * PROGRAM_HEADER.size

    def head(self, file: elf.File, section_headers: int) -> bytes:
        """The beginning of the image, which describes it.

        Args:
            file: the object's file.
            section_headers: the offset of the image's section header table.
        """
        table = _program_headers(self, file)
        header = file.header._replace(
            e_phoff=elf.HEADER.size, e_shoff=section_headers, e_phnum=len(table)
        )
        first_page = header.pack() + b"".join(table) + _build_id_note(self)
        if len(first_page) > _HEADER_ROOM:
            raise CannotLayOut("too many program headers")
        return first_page

    def size(self, original: int) -> int:
        """The bytes that write() writes, but for debug information. Raises what that raises."""
        _, copies, table, head = self._plan(original, 0)
        loadable = sum(size for _, parts in content(self) for _, size in parts)
        return loadable + sum(size for _, _, size in copies) + len(table) + len(head)

    def write(self, original: int, target: int, room: int = NO_LIMIT) -> int:
        """Write the image from the open file `original` to the empty file `target`.

        Args:
            room: bytes that the store has left beside it, as for debug information.

        Returns:
            The number of bytes written.

        Raises:
            CannotLayOut: the original is not an ELF file of the expected form.
            OSError: reading or writing failed.
        """
        end, copies, table, head = self._plan(original, for_debug_information(target, room))
        written = 0
        for offset, parts in content(self):
            written += copy(original, parts, target, offset)
        for source, offset, size in copies:
            for done in range(0, size, _COPY_BLOCK):
                part = source + done, min(_COPY_BLOCK, size - done)
                written += copy(original, [part], target, offset + done)
        for offset, data in ((end, table), (0, head)):
            written += write_all(target, data, offset)
        # Chunks that stay on the original are holes, and nothing may follow the last one.
        if os.fstat(target).st_size < end:
            os.ftruncate(target, end)
        return written

    def _plan(
        self, original: int, room: int
    ) -> tuple[int, list[tuple[int, int, int]], bytes, bytes]:
        """What _sections() says, and the image's beginning."""
        self.check_extent()
        if len(self.object.headers) > _HEADER_ROOM:  # each may have notes to be read
            raise CannotLayOut("too many program headers")
        try:
            file = elf.File(original)
            end, copies, table = _sections(self, file, room)
            head = self.head(file, end)
        except (elf.Malformed, _struct.error) as error:  # type: ignore[attr-defined]  # the latter: numbers too large
            raise CannotLayOut(f"not a well-formed ELF file: {error}") from error
        check_file_size(end + len(table))
        return end, copies, table, head


def lay_out(obj: Object, regions: Sequence[Region], pmd: int) -> Layout:
    """Lay an object out so that its regions can be mapped with huge pages."""
    source = obj.source
    assert source is not None, "only objects with a file are planned"
    name = names.of(source, *names.placement(obj, pmd), ".".join(_cuts(obj, regions)))
    if obj.interpreter and obj.main and not obj.fixed:
        # py-spy takes what stays on the original for the whole program, but libpython as well.
        name = names.as_libpython(name)
    return Layout(obj, tuple(regions), pmd, name)


def _cuts(obj: Object, regions: Sequence[Region]) -> Iterator[str]:
    """Where each region begins, and what it is: code, read-only data, or a hole."""
    for region, following in zip(regions, [*regions[1:], None], strict=True):
        yield f"{region.start - obj.start:x}{'x' if region.flags & PF_X else 'r'}"
        if obj.in_chunks and (following is None or following.start > region.end):
            yield f"{region.end - obj.start:x}h"


def _build_ids(layout: Layout, file: elf.File) -> list[int]:
    """p_offset of the PT_NOTEs that hold a build-id."""
    headers = ProgramHeader.parse_table(layout.object.headers)
    return [h.p_offset for h in headers if h.p_type == elf.PT_NOTE and file.build_id(h)]


def content(layout: Layout) -> Iterator[tuple[int, list[Part]]]:
    """The loadable part in blocks of one huge page: where a block goes, and what it consists of."""
    pmd = layout.pmd
    segments = [
        (layout.offset(s.start), layout.offset(s.file_end), s.offset)
        for s in layout.object.segments
    ]
    for block in _blocks(segments, pmd):
        if not layout.holds(block, block + pmd):
            continue
        inside = [
            (max(start, block), min(end, block + pmd), start, offset)
            for start, end, offset in segments
            if start < block + pmd and block < end
        ]
        at = inside[0][0]
        parts: list[Part] = []
        for start, end, segment, offset in inside:
            if at < start:
                parts.append((None, start - at))
            parts.append((offset + start - segment, end - start))
            at = end
        yield inside[0][0], parts


def _blocks(segments: Sequence[tuple[int, int, int]], pmd: int) -> Iterator[int]:
    """The blocks that segments have bytes in, in ascending order; never those between, of which
    there are as many as whoever wrote the file chose."""
    following = 0
    for start, end, _ in segments:
        for block in range(max(following, start // pmd * pmd), end, pmd):
            yield block
            following = block + pmd


def _sections(
    layout: Layout, file: elf.File, room: int
) -> tuple[int, list[tuple[int, int, int]], bytes]:
    """Where the section headers go, what is copied before them (offset there, offset here, bytes),
    and the headers. Debug information comes along where there is room for all of it."""
    at = align(layout.content_end)
    note = layout.build_id_note(file)
    copies: list[tuple[int, int, int]] = []
    table = []
    sections = file.sections()
    titles = file.section_names(sections)
    linked = {s.sh_link for s in sections if s.sh_type in (elf.SHT_SYMTAB, elf.SHT_DYNSYM)}
    linked.add(file.header.e_shstrndx)
    debug = {index for index, title in enumerate(titles) if title.startswith(_DEBUG_SECTIONS)}
    if debug and sum(sections[index].sh_size for index in debug) <= room:
        linked |= debug
    left = file.size
    for index, (title, section) in enumerate(zip(titles, sections, strict=True)):
        offset, size = section.sh_offset, section.sh_size
        if title == ".note.gnu.build-id":
            offset, size = note, _NOTE.size
        elif section.allocated:
            there = layout.offset(layout.object.base + section.sh_addr)
            if layout.object.in_chunks and (_is_for_tools(title, section) or index in linked):
                left -= size
                if left < 0 or there < layout.pad or there + size > layout.content_end:
                    raise elf.Malformed("sections overlap")
                copies.append((offset, there, size))
            offset = there
        elif section.sh_type == elf.SHT_SYMTAB or index in linked or title in _KEPT_SECTIONS:
            left -= size
            if left < 0 or offset + size > file.size:
                raise elf.Malformed("sections overlap" if left < 0 else "cut short")
            copies.append((offset, at, size))
            offset, at = at, align(at + size)
        else:
            table.append(bytes(elf.SECTION_HEADER.size))
            continue
        table.append(section._replace(sh_offset=offset, sh_size=size).pack())
    return at, copies, b"".join(table)


def _is_for_tools(title: str, section: SectionHeader) -> bool:
    """Whether tools read it in the file, though it is loaded."""
    return section.sh_type in _TOOLS_KINDS or title in _TOOLS_SECTIONS


def align(offset: int) -> int:
    """Where the next section may begin."""
    return -(-offset // 16) * 16


def _program_headers(layout: Layout, file: elf.File) -> list[bytes]:
    """The program header table that describes the image."""
    obj = layout.object
    build_ids = _build_ids(layout, file)
    loads, rest = [], []
    for header in ProgramHeader.parse_table(obj.headers):
        shifted = header._replace(p_offset=layout.offset(obj.base + header.p_vaddr))
        if header.p_type == PT_LOAD and header.writable and header.p_memsz:
            loads.append(shifted)
        elif header.p_type == elf.PT_NOTE and header.p_offset in build_ids:
            continue
        elif header.p_type not in (PT_LOAD, elf.PT_NULL, elf.PT_PHDR):
            rest.append(header if header.p_type == elf.PT_GNU_STACK else shifted)
    for start, end, flags in _read_only(layout):
        vaddr, size = start - obj.base, end - start
        offset = layout.offset(start)
        loads.append(ProgramHeader(PT_LOAD, flags, offset, vaddr, vaddr, size, size, page_size()))
    # In the order of addresses, but what is not mapped before the first region comes last: elfutils
    # takes (start of the mapping) - (p_vaddr of the first PT_LOAD) for the load bias, and py-spy's
    # symboliser wants the lowest one to be there.
    first = layout.regions[0].start - obj.base
    loads.sort(key=lambda load: (load.p_vaddr < first, load.p_vaddr))
    count = len(loads) + len(rest) + 1
    at = elf.HEADER.size + count * PROGRAM_HEADER.size
    note = ProgramHeader(elf.PT_NOTE, PF_R, at, at, at, _NOTE.size, _NOTE.size, 4)
    return [header.pack() for header in (*loads, *rest, note)]


def _read_only(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """The read-only PT_LOADs: the regions as they are mapped from the image, and as R alone what
    stays mapped from the original, so that the executable ones are exactly the image's."""
    for span in layout.object.spans():
        # Up to the last byte the file gives, not to the end of its page.
        end = min(span[-1].end, span[-1].file_end)
        at = span[0].start
        for region in layout.regions:
            if not span[0].start <= region.start < span[-1].end:
                continue
            if at < region.start:
                yield at, region.start, PF_R
            yield region.start, min(region.end, end), region.flags
            at = region.end
        if at < end:
            yield at, end, PF_R


def _build_id_note(layout: Layout) -> bytes:
    return _NOTE.pack(
        4, names.BUILD_ID_SIZE, elf.NT_GNU_BUILD_ID, b"GNU\0", names.build_id(layout.name)
    )
