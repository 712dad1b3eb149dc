"""Read ELF files: the headers, sections and notes that an image needs, as elf(5) describes them.

A file may say anything of itself, so every offset and length is held against the file's size before
it is followed, and what does not fit is `Malformed`. Files are of this machine's own kind: 64 bits,
its byte order.

pyelftools would do, but its import and its reading took more time than copying an interpreter; it
is what checks the outcome instead.
"""

from __future__ import annotations

import os
import sys
from _struct import Struct
from itertools import takewhile

from page_primer._lean import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ET_EXEC, ET_DYN = 2, 3
PT_NULL, PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_PHDR = 0, 1, 2, 3, 4, 6
PT_GNU_STACK = 0x6474E551
PF_X, PF_W, PF_R = 1, 2, 4
PN_XNUM = 0xFFFF
SHN_LORESERVE = 0xFF00
SHT_NULL, SHT_PROGBITS, SHT_SYMTAB, SHT_DYNAMIC, SHT_NOTE = 0, 1, 2, 6, 7
SHT_NOBITS, SHT_DYNSYM = 8, 11
SHT_GNU_VERSIONS = 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF  # verdef, verneed, versym
SHF_ALLOC, SHF_EXECINSTR = 2, 4
NT_GNU_BUILD_ID = 3

HEADER = Struct("=16sHHIQQQIHHHHHH")  # FileHeader
PROGRAM_HEADER = Struct("=IIQQQQQQ")  # ProgramHeader
SECTION_HEADER = Struct("=IIQQQQIIQQ")  # SectionHeader
_DYNAMIC_ENTRY = Struct("=qQ")  # d_tag, d_val
_NOTE = Struct("=III")  # n_namesz, n_descsz, n_type

_IDENT = b"\x7fELF\x02" + (b"\x01" if sys.byteorder == "little" else b"\x02")
DT_NEEDED, DT_STRTAB, DT_SONAME = 1, 5, 14
_DT_NULL, _DT_TEXTREL, _DT_FLAGS, _DF_TEXTREL = 0, 22, 30, 4
_LONGEST_PATH = 4096
_LONGEST_NAME = 64  # more than any section has whose name matters here
_LONGEST_TABLE = 1 << 16  # the same of a PT_NOTE and a PT_DYNAMIC, bytes


class Malformed(Exception):
    """Not an ELF file of this machine's kind, or one that contradicts itself; the message says
    how."""


class FileHeader(NamedTuple):
    """Elf64_Ehdr."""

    e_ident: bytes
    e_type: int
    e_machine: int
    e_version: int
    e_entry: int
    e_phoff: int
    e_shoff: int
    e_flags: int
    e_ehsize: int
    e_phentsize: int
    e_phnum: int
    e_shentsize: int
    e_shnum: int
    e_shstrndx: int

    @classmethod
    def parse(cls, data: bytes) -> FileHeader:
        return cls._make(HEADER.unpack(data))

    def pack(self) -> bytes:
        return HEADER.pack(*self)


class ProgramHeader(NamedTuple):
    """Elf64_Phdr."""

    p_type: int
    p_flags: int
    p_offset: int
    p_vaddr: int
    p_paddr: int
    p_filesz: int
    p_memsz: int
    p_align: int

    @classmethod
    def parse_table(cls, data: bytes) -> list[ProgramHeader]:
        return [cls._make(fields) for fields in PROGRAM_HEADER.iter_unpack(data)]

    def pack(self) -> bytes:
        return PROGRAM_HEADER.pack(*self)

    @property
    def end(self) -> int:
        """The address behind its memory."""
        return self.p_vaddr + self.p_memsz

    @property
    def file_end(self) -> int:
        """The address behind what the file fills."""
        return self.p_vaddr + self.p_filesz

    @property
    def writable(self) -> bool:
        return bool(self.p_flags & PF_W)

    @property
    def executable(self) -> bool:
        return bool(self.p_flags & PF_X)


class SectionHeader(NamedTuple):
    """Elf64_Shdr."""

    sh_name: int
    sh_type: int
    sh_flags: int
    sh_addr: int
    sh_offset: int
    sh_size: int
    sh_link: int
    sh_info: int
    sh_addralign: int
    sh_entsize: int

    @classmethod
    def parse_table(cls, data: bytes) -> list[SectionHeader]:
        return [cls._make(fields) for fields in SECTION_HEADER.iter_unpack(data)]

    def pack(self) -> bytes:
        return SECTION_HEADER.pack(*self)

    @property
    def allocated(self) -> bool:
        return bool(self.sh_flags & SHF_ALLOC)

    @property
    def in_file(self) -> bool:
        """Whether bytes of the file belong to it."""
        return self.sh_type not in (SHT_NULL, SHT_NOBITS) and self.sh_size > 0


class File:
    """An ELF file, open for reading; `size` is in bytes. Every method raises Malformed, and OSError
    where reading fails."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size
        raw = self.read(0, HEADER.size)
        if not raw.startswith(_IDENT):
            raise Malformed("another kind of file")
        self.header = FileHeader.parse(raw)

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
        header = self.header
        return self._table(header.e_phoff, header.e_phentsize, header.e_phnum, PROGRAM_HEADER)

    def sections(self) -> list[SectionHeader]:
        """The section headers; empty where there are none."""
        header = self.header
        return SectionHeader.parse_table(
            self._table(header.e_shoff, header.e_shentsize, header.e_shnum, SECTION_HEADER)
        )

    def _table(self, offset: int, size: int, count: int, entry: Struct) -> bytes:
        if not offset or not count:
            return b""
        if size != entry.size:
            raise Malformed("headers of another size")
        return self.read(offset, count * size)

    def section_names(self, sections: list[SectionHeader]) -> list[str]:
        """The names of sections(), in its order; of a very long one the beginning."""
        index = self.header.e_shstrndx
        if not index:
            return [""] * len(sections)
        if index >= len(sections):
            raise Malformed("section names are in no section")
        strings = self.read(sections[index].sh_offset, sections[index].sh_size)
        names = []
        for section in sections:
            if section.sh_name > len(strings):
                raise Malformed("section name out of bounds")
            raw = strings[section.sh_name : section.sh_name + _LONGEST_NAME]
            name, _, _ = raw.partition(b"\0")
            names.append(name.decode("latin-1"))
        return names

    def build_id(self, note: ProgramHeader) -> tuple[int, int] | None:
        """Where in the file the build-id of a PT_NOTE lies, and its size; None if it has none."""
        data = self.read(note.p_offset, min(note.p_filesz, _LONGEST_TABLE))
        for name, kind, at, length in _notes(data, 8 if note.p_align == 8 else 4):
            if (name, kind) == (b"GNU\0", NT_GNU_BUILD_ID) and at + length <= len(data):
                return note.p_offset + at, length
        return None

    def dynamic(self, section: ProgramHeader) -> list[tuple[int, int]]:
        """(d_tag, d_val) of a PT_DYNAMIC, up to DT_NULL."""
        data = self.read(section.p_offset, min(section.p_filesz, _LONGEST_TABLE))
        whole = len(data) // _DYNAMIC_ENTRY.size * _DYNAMIC_ENTRY.size
        entries = ((tag, value) for tag, value in _DYNAMIC_ENTRY.iter_unpack(data[:whole]))
        return list(takewhile(lambda entry: entry[0] != _DT_NULL, entries))

    def only_dynamic(self, headers: list[ProgramHeader]) -> list[tuple[int, int]]:
        """dynamic() of the one PT_DYNAMIC that there may be: of several one would have to know
        which the loader takes, and reading all has no bound."""
        found = [header for header in headers if header.p_type == PT_DYNAMIC]
        if len(found) > 1:
            raise Malformed("two dynamic sections")
        return self.dynamic(found[0]) if found else []

    def dynamic_strings(self, tag: int) -> list[str]:
        """What the dynamic section names under one tag, such as DT_NEEDED."""
        headers = ProgramHeader.parse_table(self.program_headers())
        entries = self.only_dynamic(headers)
        tables = [value for found, value in entries if found == DT_STRTAB]
        names = []
        for found, value in entries:
            if found == tag and tables:
                at = self._offset_of(tables[0], headers) + value
                if at >= self.size:
                    raise Malformed("a name out of bounds")
                raw = os.pread(self._fd, _LONGEST_PATH, at).partition(b"\0")[0]
                names.append(os.fsdecode(raw))
        return names

    @staticmethod
    def _offset_of(address: int, headers: list[ProgramHeader]) -> int:
        for header in headers:
            if header.p_type == PT_LOAD and header.p_vaddr <= address < header.file_end:
                return header.p_offset + address - header.p_vaddr
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
