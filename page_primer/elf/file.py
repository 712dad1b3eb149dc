"""Read ELF files: the headers, sections and notes that an image needs, as elf(5) describes them.

A file may say anything of itself, so every offset and length is held against the file's size before
it is followed, and what does not fit is `Malformed`. Files are of this machine's own kind: 64 bits,
its byte order.

pyelftools would do, but its import and its reading took more time than copying an interpreter; it
is what checks the outcome instead.
"""

from __future__ import annotations

import os
import struct
import sys
from itertools import takewhile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ET_EXEC, ET_DYN = 2, 3
PT_NULL, PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_PHDR = 0, 1, 2, 3, 4, 6
PT_GNU_STACK = 0x6474E551
PF_X, PF_W, PF_R = 1, 2, 4
SHT_SYMTAB, SHT_NOBITS, SHT_DYNSYM = 2, 8, 11
SHF_ALLOC = 2
NT_GNU_BUILD_ID = 3

# Elf64_Ehdr: e_ident, e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize,
# e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx.
HEADER = struct.Struct("=16sHHIQQQIHHHHHH")
# Elf64_Phdr: p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align.
PROGRAM_HEADER = struct.Struct("=IIQQQQQQ")
# Elf64_Shdr: sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info,
# sh_addralign, sh_entsize.
SECTION_HEADER = struct.Struct("=IIQQQQIIQQ")
_DYNAMIC_ENTRY = struct.Struct("=qQ")  # d_tag, d_val
_NOTE = struct.Struct("=III")  # n_namesz, n_descsz, n_type

_IDENT = b"\x7fELF\x02" + (b"\x01" if sys.byteorder == "little" else b"\x02")
DT_NEEDED, DT_STRTAB = 1, 5
_DT_NULL, _DT_TEXTREL, _DT_FLAGS, _DF_TEXTREL = 0, 22, 30, 4
_LONGEST_PATH = 4096
_LONGEST_NAME = 64  # more than any section has whose name matters here
_LONGEST_TABLE = 1 << 16  # the same of a PT_NOTE and a PT_DYNAMIC, bytes


class Malformed(Exception):
    """Not an ELF file of this machine's kind, or one that contradicts itself; the message says
    how."""


class File:
    """An ELF file, open for reading.

    `header` holds the fields of Elf64_Ehdr, in their order; `names_index` is the number of the
    section with the sections' names, 0 for none; `size` is in bytes. Every method raises Malformed,
    and OSError where reading fails.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size
        raw = self.read(0, HEADER.size)
        if not raw.startswith(_IDENT):
            raise Malformed("another kind of file")
        self.header: tuple[int, ...] = HEADER.unpack(raw)
        *_, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = self.header
        self.names_index = shstrndx
        self._program_headers = phoff, phentsize, phnum
        self._sections = shoff, shentsize, shnum

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes."""
        if offset + size > self.size:
            raise Malformed("cut short")
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise Malformed("cut short")
        return data

    def program_headers(self) -> bytes:
        """The program header table."""
        return self._table(*self._program_headers, PROGRAM_HEADER)

    def sections(self) -> list[tuple[int, ...]]:
        """The section headers, the fields of Elf64_Shdr in their order; empty where there are
        none."""
        return list(SECTION_HEADER.iter_unpack(self._table(*self._sections, SECTION_HEADER)))

    def _table(self, offset: int, size: int, count: int, entry: struct.Struct) -> bytes:
        if not offset or not count:
            return b""
        if size != entry.size:
            raise Malformed("headers of another size")
        return self.read(offset, count * size)

    def section_names(self, sections: list[tuple[int, ...]]) -> list[str]:
        """The names of sections(), in its order; of a very long one the beginning."""
        if not self.names_index:
            return [""] * len(sections)
        if self.names_index >= len(sections):
            raise Malformed("section names are in no section")
        strings = self.read(*sections[self.names_index][4:6])
        names = []
        for at, *_ in sections:
            if at > len(strings):
                raise Malformed("section name out of bounds")
            name, _, _ = strings[at : at + _LONGEST_NAME].partition(b"\0")
            names.append(name.decode("latin-1"))
        return names

    def build_id(self, program_header: tuple[int, ...]) -> tuple[int, int] | None:
        """Where in the file the build-id of a PT_NOTE lies, and its size; None if it has none."""
        _, _, offset, _, _, size, _, alignment = program_header
        data = self.read(offset, min(size, _LONGEST_TABLE))
        for name, kind, at, length in _notes(data, 8 if alignment == 8 else 4):
            if (name, kind) == (b"GNU\0", NT_GNU_BUILD_ID) and at + length <= len(data):
                return offset + at, length
        return None

    def dynamic(self, program_header: tuple[int, ...]) -> list[tuple[int, int]]:
        """(d_tag, d_val) of a PT_DYNAMIC, up to DT_NULL."""
        data = self.read(program_header[2], min(program_header[5], _LONGEST_TABLE))
        whole = len(data) // _DYNAMIC_ENTRY.size * _DYNAMIC_ENTRY.size
        entries = _DYNAMIC_ENTRY.iter_unpack(data[:whole])
        return list(takewhile(lambda entry: entry[0] != _DT_NULL, entries))

    def dynamic_strings(self, tag: int) -> list[str]:
        """What the dynamic section names under one tag, such as DT_NEEDED."""
        headers = list(PROGRAM_HEADER.iter_unpack(self.program_headers()))
        entries = [e for h in headers if h[0] == PT_DYNAMIC for e in self.dynamic(h)]
        tables = [value for found, value in entries if found == DT_STRTAB]
        names = []
        for found, value in entries:
            if found == tag and tables:
                at = self._offset_of(tables[0], headers) + value
                raw = os.pread(self._fd, _LONGEST_PATH, at).partition(b"\0")[0]
                names.append(os.fsdecode(raw))
        return names

    def _offset_of(self, address: int, headers: list[tuple[int, ...]]) -> int:
        for kind, _, offset, vaddr, _, size, _, _ in headers:
            if kind == PT_LOAD and vaddr <= address < vaddr + size:
                return offset + address - vaddr
        raise Malformed("an address in no segment")


def has_text_relocations(dynamic: Iterable[tuple[int, int]]) -> bool:
    """DT_TEXTREL, or DF_TEXTREL in DT_FLAGS: the loader writes into the code."""
    return any(
        tag == _DT_TEXTREL or (tag == _DT_FLAGS and value & _DF_TEXTREL) for tag, value in dynamic
    )


def _notes(data: bytes, alignment: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Of each note its name, its type, and where its description lies: offset and size."""
    at = 0
    while at + _NOTE.size <= len(data):
        name_size, size, kind = _NOTE.unpack_from(data, at)
        name = at + _NOTE.size
        description = -(-(name + name_size) // alignment) * alignment
        yield data[name : name + min(name_size, _LONGEST_NAME)], kind, description, size
        at = -(-(description + size) // alignment) * alignment
