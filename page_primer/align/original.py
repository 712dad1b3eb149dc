"""Read the ELF file that is to be aligned, and refuse what must not be rewritten."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise

from page_primer.elf import file as elf
from page_primer.elf.file import (
    DT_NEEDED,
    PN_XNUM,
    PT_INTERP,
    PT_LOAD,
    SHF_EXECINSTR,
    SHN_LORESERVE,
    FileHeader,
    ProgramHeader,
    SectionHeader,
)
from page_primer.elf.objects import is_out_of_proportion

# Every wheel and interpreter seen has fewer than twenty; what they cost is linear in them.
_MOST_PROGRAM_HEADERS = 512
_LARGEST_ALIGNMENT = 1 << 30
# e_machine by the kernel's name for the machine.
_MACHINES = {"x86_64": 62, "aarch64": 183}
_DT_TEXTREL, _DT_FLAGS, _DF_TEXTREL = 22, 30, 4
_DT_FLAGS_1, _DF_1_PIE = 0x6FFFFFFB, 0x08000000


class Refused(Exception):
    """The file is left as it is; the message says why, without the file's name."""


@dataclass(frozen=True)
class Original:
    """What an ELF file says of itself, checked against its size.

    `names` are those of `sections`, shortened; `interpreter` is PT_INTERP's path or "".
    """

    fd: int
    size: int
    header: FileHeader
    programs: list[ProgramHeader]
    sections: list[SectionHeader]
    names: list[str]
    interpreter: str
    needed: list[str]

    @property
    def loads(self) -> list[ProgramHeader]:
        """The PT_LOADs, in ascending order of their addresses."""
        return [program for program in self.programs if program.p_type == PT_LOAD]

    @property
    def contents_end(self) -> int:
        """The offset behind everything that the headers tell of."""
        header = self.header
        return max(
            elf.HEADER.size,
            header.e_phoff + header.e_phnum * elf.PROGRAM_HEADER.size,
            header.e_shoff + header.e_shnum * elf.SECTION_HEADER.size,
            *(program.p_offset + program.p_filesz for program in self.programs),
            *(s.sh_offset + s.sh_size for s in self.sections if s.in_file),
        )

    @property
    def is_program(self) -> bool:
        """Whether the kernel starts it (a PIE has PT_INTERP as well as an ET_EXEC; libc.so.6 has
        it too, and may be started)."""
        return bool(self.interpreter) or self.header.e_type == elf.ET_EXEC

    def code_ranges(self) -> list[tuple[int, int]]:
        """The addresses of its machine code: the executable sections, or without section headers
        the executable segments."""
        found = [
            (section.sh_addr, section.sh_addr + section.sh_size)
            for section in self.sections
            if section.allocated and section.sh_flags & SHF_EXECINSTR and section.in_file
        ]
        return found or [(load.p_vaddr, load.file_end) for load in self.loads if load.executable]


def read(fd: int) -> Original:
    """Read an open file's headers.

    Raises:
        Refused: it is not an ELF file of this machine's kind, or contradicts itself.
        OSError: reading failed.
    """
    try:
        return _read(fd)
    except elf.Malformed as error:
        raise Refused(f"not a usable ELF file: {error}") from error


def _read(fd: int) -> Original:
    if os.pread(fd, 4, 0) != b"\x7fELF":
        raise Refused("not an ELF file")
    file = elf.File(fd)
    header = file.header
    if header.e_machine != _MACHINES.get(os.uname().machine):
        raise Refused("made for another machine")
    if header.e_type not in (elf.ET_EXEC, elf.ET_DYN):
        raise Refused("neither a program nor a shared library")
    if not 0 < header.e_phnum <= _MOST_PROGRAM_HEADERS or header.e_phnum == PN_XNUM:
        raise Refused("no program headers, or too many")
    programs = ProgramHeader.parse_table(file.program_headers())
    sections = file.sections()
    if len(sections) >= SHN_LORESERVE - 2 or (header.e_shoff and not header.e_shnum):
        raise Refused("too many section headers")
    interpreter = ""
    for program in programs:
        if program.p_type == PT_INTERP:
            path = file.read(program.p_offset, min(program.p_filesz, 4096))
            interpreter = os.fsdecode(path.partition(b"\0")[0])
    original = Original(
        fd,
        file.size,
        header,
        programs,
        sections,
        file.section_names(sections),
        interpreter,
        file.dynamic_strings(DT_NEEDED),
    )
    _check_loads(original)
    _check_headers(original)
    _check_sections(original)
    dynamic = file.only_dynamic(programs)
    for tag, value in dynamic:
        if tag == _DT_TEXTREL or (tag == _DT_FLAGS and value & _DF_TEXTREL):
            raise Refused("text relocations")
    pie = any(tag == _DT_FLAGS_1 and value & _DF_1_PIE for tag, value in dynamic)
    if not interpreter and (pie or header.e_type == elf.ET_EXEC):
        raise Refused("statically linked: it cannot be tried without being run")
    return original


def _check_loads(original: Original) -> None:
    loads = original.loads
    if not loads:
        raise Refused("nothing to load")
    for program in original.programs:
        if program.p_filesz and program.p_offset + program.p_filesz > original.size:
            raise Refused("a segment reaches beyond the file's end")
    for load in loads:
        alignment = max(load.p_align, 4096)
        if alignment & (alignment - 1) or alignment > _LARGEST_ALIGNMENT:
            raise Refused("a segment's alignment is no power of two, or too large")
        if (load.p_vaddr - load.p_offset) % alignment or load.p_filesz > load.p_memsz:
            raise Refused("a segment's address, offset and sizes do not fit together")
        if load.end >= 1 << 63:
            raise Refused("segments too far apart")
    for low, high in pairwise(loads):
        if high.p_vaddr < low.end:
            raise Refused("segments overlap, or are out of order")
    # What is read-only will be in the file whole.
    last = max(load.file_end if load.writable else load.end for load in loads)
    if is_out_of_proportion(last - loads[0].p_vaddr, original.size):
        raise Refused("segments too far apart")


def _check_headers(original: Original) -> None:
    """Refuse headers that are loaded twice: they change, and the loader's are in one place only."""
    table = original.header.e_phoff, original.header.e_phnum * elf.PROGRAM_HEADER.size
    for offset, size in ((0, elf.HEADER.size), table):
        end = offset + size
        if sum(x.p_offset < end and offset < x.p_offset + x.p_filesz for x in original.loads) > 1:
            raise Refused("two of its segments have its headers")


def _check_sections(original: Original) -> None:
    for section in original.sections:
        if section.in_file and section.sh_offset + section.sh_size > original.size:
            raise Refused("a section reaches beyond the file's end")
