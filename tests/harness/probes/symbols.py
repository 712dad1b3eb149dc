"""Symbol tables, of which pyelftools reads a hundred entries while this reads all."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from elftools.elf.elffile import ELFFile

__all__ = ["FUNCTION", "symbols"]

# Elf64_Sym: st_name, st_info, st_other, st_shndx, st_value, st_size
ENTRY = struct.Struct("<IBBHQQ")
FUNCTION = 2  # STT_FUNC


def symbols(elf: ELFFile, table: str) -> Iterator[tuple[str, int, int, int]]:
    """The symbols of a section, if it is there: name, type, value and size."""
    section: Any = elf.get_section_by_name(table)
    if section is None:
        return
    names: bytes = elf.get_section(section["sh_link"]).data()
    for name, info, _, _, value, size in ENTRY.iter_unpack(section.data()):
        yield names[name : names.index(b"\0", name)].decode(), info & 15, value, size
