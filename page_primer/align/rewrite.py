"""Write the new file, and from it the original again.

At the end of the new file lies a record, a section of its own where there are section headers:

    what was copied where, and what else the original holds: 8 + 8 + 8 bytes a copy, 8 + 4 and its
        bytes a piece; compressed
    the trailer: magic, the record's size, the original's size and SHA-256

From these undo() makes the original bit by bit, gaps and padding included.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from page_primer.align.layout import Copy, Layout
from page_primer.align.original import Original, Refused
from page_primer.elf import file as elf
from page_primer.elf.file import SHT_PROGBITS, FileHeader, ProgramHeader, SectionHeader

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORD_SECTION = ".page-primer.original"
# What prelink(8) keeps in one: Elf64_Ehdr, the program headers, the section headers but the first.
UNDO_SECTION = ".gnu.prelink_undo"
_MAGIC = b"page-primer/1\0\0\0"
_TRAILER = struct.Struct("=16sQQ32s")  # magic, the record's bytes, original's size and digest
_COUNTS = struct.Struct("=QQ")
_COPY = struct.Struct("=QQQ")
_PIECE = struct.Struct("=QI")
_BLOCK = 1 << 20  # bytes, for reading
_PIECE_SIZE = 512  # what differs is kept in pieces of at most this
# Originals are not much larger than what was made of them; work is bounded by the file's size
# whatever the record claims.
_LARGEST_FACTOR, _LARGEST = 4, 64 << 20
_MOST_COPIES = 1 << 17  # more than segments and sections together can be


@dataclass(frozen=True)
class Record:
    """What undo() needs."""

    copies: list[Copy]
    pieces: list[tuple[int, bytes]]  # of the original: offset, bytes
    size: int
    sha256: bytes
    raw_size: int  # what the record takes in the file, trailer included


def write(original: Original, layout: Layout, target: int, block: int) -> None:
    """Write the new file, in whole blocks at their multiples, so that the page cache can take each
    as one huge page.

    Args:
        original: the file that is read.
        layout: what lay_out() says of it.
        target: an empty file, open for reading and writing.
        block: the huge page size, bytes.

    Raises:
        Refused: the original cannot be restored from what would be kept.
        OSError: reading or writing failed.
    """
    patches, end = _finish(original, layout)
    for at in range(0, end, block):
        size = min(block, end - at)
        data = bytearray(size)
        found = layout.written[0] < at + size and at < layout.written[1]
        for copy in layout.copies:
            low, high = max(at, copy.target), min(at + size, copy.target + copy.size)
            if low < high:
                found = True
                source = copy.source + low - copy.target
                read_into(original.fd, memoryview(data)[low - at : high - at], source)
        for offset, patch in patches:
            low, high = max(at, offset), min(at + size, offset + len(patch))
            if low < high:
                found = True
                data[low - at : high - at] = patch[low - offset : high - offset]
        if found:
            write_all(target, data, at)
    os.ftruncate(target, end)


def _finish(original: Original, layout: Layout) -> tuple[list[tuple[int, bytes]], int]:
    """What is written beside copies, all of it, and the file's size."""
    patches = list(layout.patches)
    header, sections, end = layout.header, list(layout.sections), -(-layout.end // 8) * 8
    if sections:
        names, at = _names_with_ours(original)
        patches.append((end, names))
        index = header.e_shstrndx
        sections[index] = sections[index]._replace(sh_offset=end, sh_size=len(names))
        end = -(-(end + len(names)) // 8) * 8
        undo = _original_headers(original)
        patches.append((end, undo))
        sections.append(SectionHeader(at[1], SHT_PROGBITS, 0, 0, end, len(undo), 0, 0, 8, 0))
        end += len(undo)
        header = header._replace(e_shoff=end, e_shnum=len(sections) + 1)
        end += header.e_shnum * elf.SECTION_HEADER.size
    for place in layout.header_places:
        patches.append((place, header.pack()))
    record = _pack_record(original, layout.copies, patches)
    if sections:
        ours = SectionHeader(at[0], SHT_PROGBITS, 0, 0, end, len(record), 0, 0, 8, 0)
        table = b"".join(section.pack() for section in (*sections, ours))
        patches.append((header.e_shoff, table))
    patches.append((end, record))
    return patches, end + len(record)


def _original_headers(original: Original) -> bytes:
    programs = [program.pack() for program in original.programs]
    sections = [section.pack() for section in original.sections[1:]]
    return b"".join([original.header.pack(), *programs, *sections])


def _names_with_ours(original: Original) -> tuple[bytes, tuple[int, int]]:
    """The section names with ours, and where these begin."""
    index = original.header.e_shstrndx
    if not 0 < index < len(original.sections):
        raise Refused("section headers without names")
    names = original.sections[index]
    if not names.in_file or names.allocated:
        raise Refused("section names where none are expected")
    data = os.pread(original.fd, names.sh_size, names.sh_offset)
    record, undo = (name.encode() + b"\0" for name in (RECORD_SECTION, UNDO_SECTION))
    return data + record + undo, (len(data), len(data) + len(record))


def _pack_record(original: Original, copies: list[Copy], patches: list[tuple[int, bytes]]) -> bytes:
    size, digest = original.size, hashlib.sha256()
    holes = _not_copied(copies, size)
    changed = [
        (low - copy.target + copy.source, high - copy.target + copy.source)
        for copy in copies
        for offset, patch in patches
        if (low := max(offset, copy.target)) < (high := min(offset + len(patch),
                                                            copy.target + copy.size))
    ]  # fmt: skip
    packed = zlib.compressobj(6)
    parts: list[bytes] = []
    pieces = 0
    for low, high, sparse in [*((*r, True) for r in holes), *((*r, False) for r in changed)]:
        for at in range(low, high, _PIECE_SIZE):
            data = os.pread(original.fd, min(_PIECE_SIZE, high - at), at)
            if sparse and not data.strip(b"\0"):
                continue
            if sparse and at + len(data.rstrip(b"\0")) > original.contents_end:
                raise Refused("data is appended behind the ELF file: a program may look for it")
            parts.append(packed.compress(_PIECE.pack(at, len(data)) + data))
            pieces += 1
    parts.append(packed.flush())
    for at in range(0, size, _BLOCK):
        digest.update(os.pread(original.fd, _BLOCK, at))
    head = _COUNTS.pack(len(copies), pieces)
    head += b"".join(_COPY.pack(copy.source, copy.target, copy.size) for copy in copies)
    record = head + b"".join(parts)
    return record + _TRAILER.pack(_MAGIC, len(record), size, digest.digest())


def _not_copied(copies: list[Copy], size: int) -> Iterator[tuple[int, int]]:
    at = 0
    for copy in sorted(copies, key=lambda copy: copy.source):
        if copy.source > at:
            yield at, copy.source
        at = max(at, copy.source + copy.size)
    if at < size:
        yield at, size


def read_record(fd: int) -> Record | None:
    """The record at the end of an aligned file; None where there is none."""
    size = os.fstat(fd).st_size
    raw = os.pread(fd, _TRAILER.size, max(0, size - _TRAILER.size))
    if len(raw) != _TRAILER.size:
        return None
    magic, length, original_size, digest = _TRAILER.unpack(raw)
    if magic != _MAGIC or not _COUNTS.size <= length <= size - _TRAILER.size:
        return None
    data = os.pread(fd, length, size - _TRAILER.size - length)
    if len(data) != length:
        return None
    count, pieces = _COUNTS.unpack_from(data)
    at = _COUNTS.size + count * _COPY.size
    if count > _MOST_COPIES or at > len(data):
        return None
    copies = [Copy(*fields) for fields in _COPY.iter_unpack(data[_COUNTS.size : at])]
    try:
        unpacked = zlib.decompressobj().decompress(data[at:], _LARGEST_FACTOR * size + _LARGEST)
    except zlib.error:
        return None
    found, at = [], 0
    for _ in range(pieces):
        if at + _PIECE.size > len(unpacked):
            return None
        offset, length_ = _PIECE.unpack_from(unpacked, at)
        at += _PIECE.size
        found.append((offset, unpacked[at : at + min(length_, _PIECE_SIZE)]))
        at += length_
    found.sort()
    if original_size > _LARGEST_FACTOR * size + _LARGEST:
        return None
    for copy in copies:
        if copy.source + copy.size > original_size or copy.target + copy.size > size:
            return None
    return Record(copies, found, original_size, digest, length + _TRAILER.size)


def original_bytes(fd: int, record: Record, at: int, size: int) -> bytearray:
    """Bytes of the original, made of the aligned file and its record."""
    data = bytearray(size)
    for copy in record.copies:
        low, high = max(at, copy.source), min(at + size, copy.source + copy.size)
        if low < high:
            place = memoryview(data)[low - at : high - at]
            read_into(fd, place, copy.target + low - copy.source)
    first = bisect_left(record.pieces, (at - _PIECE_SIZE, b""))
    for offset, piece in islice(record.pieces, first, None):
        if offset >= at + size:
            break
        low, high = max(at, offset), min(at + size, offset + len(piece))
        if low < high:
            data[low - at : high - at] = piece[low - offset : high - offset]
    return data


def original_programs(fd: int, record: Record) -> list[ProgramHeader]:
    """The original's program headers."""
    header = FileHeader.parse(bytes(original_bytes(fd, record, 0, elf.HEADER.size)))
    size = header.e_phnum * elf.PROGRAM_HEADER.size
    return ProgramHeader.parse_table(bytes(original_bytes(fd, record, header.e_phoff, size)))


def restore(fd: int, record: Record, target: int | None = None) -> None:
    """Make the original again, block by block.

    Args:
        fd: the aligned file.
        record: its record.
        target: the file to write it to; None only to see that it can be done.

    Raises:
        Refused: what comes out has another digest; what was written before is worth nothing.
    """
    digest = hashlib.sha256()
    for at in range(0, record.size, _BLOCK):
        data = original_bytes(fd, record, at, min(_BLOCK, record.size - at))
        digest.update(data)
        if target is not None:
            write_all(target, data, at)
    if digest.digest() != record.sha256:
        raise Refused("was changed since it was aligned: the original cannot be made of it")


def write_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    """Write everything."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def read_into(fd: int, place: memoryview, offset: int) -> None:
    """Read as much as there is room for, in as many calls as that takes.

    Raises:
        Refused: the file ends before.
    """
    while place:
        got = os.preadv(fd, [place], offset)
        if not got:
            raise Refused("became shorter while it was read")
        place, offset = place[got:], offset + got
