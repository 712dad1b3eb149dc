"""The headers of a 64-bit ELF file as records, with the names of elf(5)."""

from __future__ import annotations

from typing import NamedTuple

from page_primer.elf import file as elf

PT_TLS = 7
PT_GNU_EH_FRAME, PT_GNU_RELRO, PT_GNU_PROPERTY = 0x6474E550, 0x6474E552, 0x6474E553
SHN_LORESERVE = 0xFF00
SHT_NULL, SHT_PROGBITS = 0, 1
SHF_EXECINSTR = 4
PN_XNUM = 0xFFFF


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
        return cls(*elf.HEADER.unpack(data))

    def pack(self) -> bytes:
        return elf.HEADER.pack(*self)


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
        return [cls(*fields) for fields in elf.PROGRAM_HEADER.iter_unpack(data)]

    def pack(self) -> bytes:
        return elf.PROGRAM_HEADER.pack(*self)

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
        return bool(self.p_flags & elf.PF_W)

    @property
    def executable(self) -> bool:
        return bool(self.p_flags & elf.PF_X)


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
        return [cls(*fields) for fields in elf.SECTION_HEADER.iter_unpack(data)]

    def pack(self) -> bytes:
        return elf.SECTION_HEADER.pack(*self)

    @property
    def allocated(self) -> bool:
        return bool(self.sh_flags & elf.SHF_ALLOC)

    @property
    def in_file(self) -> bool:
        """Whether bytes of the file belong to it."""
        return self.sh_type not in (SHT_NULL, elf.SHT_NOBITS) and self.sh_size > 0
