"""Symbol tables, of which pyelftools reads a hundred entries while this reads all."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

__all__ = ["FUNCTION", "debug_file", "symbols"]

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


def debug_file(path: str) -> Path | None:
    """Where the debug information of an object's file is installed apart from it, by build-id (a
    -dbg package)."""
    with open(path, "rb") as file:
        section: Any = ELFFile(file).get_section_by_name(".note.gnu.build-id")
        build_id = next(section.iter_notes())["n_desc"] if section else ""
    there = Path(f"/usr/lib/debug/.build-id/{build_id[:2]}/{build_id[2:]}.debug")
    return there if build_id and there.exists() else None
