"""Lay out an image for native load: one that the kernel and the loader map themselves.

By the rule of image.py, but that the pad is the first address modulo the huge page size, and that
the program headers lie where the original's lie: inside the span, so that the kernel (AT_PHDR) and
the loader find them in memory. They say one r-x PT_LOAD over the whole read-only span, p_align a
huge page, which Linux >= 5.10 honours for programs and glibc >= 2.35 for libraries; the writable
ones follow, at their addresses. The PT_LOADs that it takes the place of stay in the table, as
PT_NULL, which nobody looks at but who wants to know what of the span is code. The build-id is
overwritten in place.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise

from page_primer import elf
from page_primer.elf import PF_R, PF_X, PROGRAM_HEADER, PT_LOAD
from page_primer.image import LAYOUT_VERSION, CannotLayOut, Layout, build_id
from page_primer.plan import NO_CHUNK, Region
from page_primer.survey import TEXT_RELOCATIONS, Object, Source, page_size, segments_of


class NativeLayout(Layout):
    """Where an object's bytes lie in its image for native load."""

    headers_at: int = 0  # the original's e_phoff
    build_ids: tuple[tuple[int, int], ...] = ()  # addresses of build-ids, and their sizes

    @property
    def pad(self) -> int:
        return self.object.start % self.pmd

    def build_id_note(self, file: elf.File) -> int | None:  # noqa: ARG002
        return None

    def head(self, file: elf.File, section_headers: int) -> list[tuple[int, bytes]]:
        fields = list(file.header)
        fields[5], fields[6] = self.pad + self.headers_at, section_headers
        table = _program_headers(self)
        identities = [
            (self.offset(address), build_id(self, size)) for address, size in self.build_ids
        ]
        return [(0, elf.HEADER.pack(*fields)), (fields[5], table), *identities]


def lay_out(path: str, fd: int, pmd: int) -> NativeLayout:
    """Lay out a program or a library for native load.

    Args:
        path: the file's.
        fd: the open file.
        pmd: the size of a huge page, bytes.

    Raises:
        CannotLayOut: the file has a form that cannot be started from an image.
        OSError: reading failed.
    """
    try:
        return _lay_out(path, fd, pmd)
    except (elf.Malformed, struct.error) as error:
        raise CannotLayOut(f"not a well-formed ELF file: {error}") from error


def _lay_out(path: str, fd: int, pmd: int) -> NativeLayout:
    file = elf.File(fd)
    require_own_kind(file)
    table = file.program_headers()
    headers = list(PROGRAM_HEADER.iter_unpack(table))
    segments = segments_of(table, 0, page_size())
    source = Source.of(path, os.fstat(fd))
    obj = Object(path, path, 0, table, segments, interpreter=True, source=source)
    spans = obj.spans()
    if not spans or len(spans) > 1 or spans[0][0] != segments[0]:
        raise CannotLayOut("its code and read-only data are not in one piece, before its data")
    span = spans[0]
    if segments[0].offset or file.header[5] + len(table) > segments[0].size:
        raise CannotLayOut("its program headers are not at its beginning")
    if not any(segment.code for segment in span):
        raise CannotLayOut("no code")
    if len(span) > 1 and span[0].code:
        raise CannotLayOut("its headers are among its code")
    page = page_size()
    loads = sorted(h[3] & -page for h in headers if h[0] == PT_LOAD and h[6])
    ends = sorted(-(-(h[3] + h[6]) // page) * page for h in headers if h[0] == PT_LOAD and h[6])
    if any(start < end for (_, start), end in zip(pairwise(loads), ends, strict=False)):
        raise CannotLayOut("its segments share a page")
    if any(not segment.flags & PF_R for segment in span):
        raise CannotLayOut("execute-only code")
    dynamic = [entry for h in headers if h[0] == elf.PT_DYNAMIC for entry in file.dynamic(h)]
    if elf.has_text_relocations(dynamic):
        raise CannotLayOut(TEXT_RELOCATIONS)
    strings = file.dynamic_strings()
    if any(
        "$" in entry for tag in (elf.DT_RPATH, elf.DT_RUNPATH) for entry in strings.get(tag, ())
    ):
        raise CannotLayOut("it looks for libraries beside itself ($ORIGIN)")
    region = Region(span[0].start, span[-1].end, PF_R | PF_X)
    low, high = region.huge(pmd)
    if low == high:
        raise CannotLayOut(NO_CHUNK)
    notes = [(h, *found) for h in headers if h[0] == elf.PT_NOTE and (found := file.build_id(h))]
    identity = b"".join(os.pread(fd, size, at) for _, at, size in notes).hex() or "0"
    # Segments may be shifted against their offsets, each by another amount (lld).
    build_ids = tuple((h[3] + at - h[2], size) for h, at, size in notes)
    if any(not span[0].start <= at <= at + size <= span[-1].end for at, size in build_ids):
        raise CannotLayOut("a build-id outside its read-only data")
    name = f"{LAYOUT_VERSION}-native-{identity}-{source.size:x}-{pmd:x}-{os.path.basename(path)}"
    return NativeLayout(obj, (region,), pmd, name, file.header[5], build_ids)


def require_own_kind(file: elf.File) -> None:
    """Raise CannotLayOut for a file that this machine's loader does not load."""
    with open("/proc/self/exe", "rb") as own:
        mine = elf.File(own.fileno())
    if file.header[2] != mine.header[2]:
        raise CannotLayOut("for another kind of processor")
    if file.header[1] not in (elf.ET_EXEC, elf.ET_DYN):
        raise CannotLayOut("neither a program nor a library")


def _program_headers(layout: NativeLayout) -> bytes:
    """As many as the original has: the first of the read-only PT_LOADs stands for all."""
    obj = layout.object
    region = layout.regions[0]
    last = max((s for s in obj.segments if not s.writable), key=lambda s: s.end)
    size = last.address + last.size - region.start
    table = []
    merged = False
    for header in PROGRAM_HEADER.iter_unpack(obj.headers):
        kind, flags, offset, vaddr, paddr, filesz, memsz, alignment = header
        if kind == PT_LOAD and memsz and not flags & elf.PF_W:
            if merged:
                kind, offset = elf.PT_NULL, layout.offset(vaddr)
            else:
                merged = True
                flags, filesz, memsz, alignment = region.flags, size, size, layout.pmd
                vaddr = paddr = region.start
        if kind not in (elf.PT_NULL, elf.PT_GNU_STACK):
            offset = layout.offset(vaddr)
        table.append((kind, flags, offset, vaddr, paddr, filesz, memsz, alignment))
    return b"".join(PROGRAM_HEADER.pack(*header) for header in table)
