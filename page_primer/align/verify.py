"""Hold a rewritten file against its original, with pyelftools, which wrote neither: every loaded
byte at its address, every section under its number, with its name and content."""

from __future__ import annotations

import errno
from typing import Any, BinaryIO

from elftools.elf.elffile import ELFFile

from page_primer.align.original import Refused
from page_primer.elf import file as elf

Range = tuple[int, int]  # an offset and a size

_BLOCK = 1 << 20  # bytes
_SAME_FIELDS = ("e_ident", "e_type", "e_machine", "e_version", "e_entry", "e_flags", "e_ehsize",
                "e_phentsize", "e_phnum", "e_shentsize", "e_shstrndx")  # fmt: skip


def check(old: BinaryIO, new: BinaryIO, pmd: int) -> None:
    """Raise Refused at the first difference beside file offsets.

    Args:
        old: the original.
        new: the rewritten file.
        pmd: the huge page size.
    """
    try:
        before, after = ELFFile(old), ELFFile(new)
        for field in _SAME_FIELDS:
            _require(before[field] == after[field], field)
        _check_segments(before, after, pmd)
        _check_sections(before, after)
    except Refused:
        raise
    except Exception as error:  # whatever a reader of ELF files stumbles over
        # EINVAL is a seek to where a file cannot be.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise Refused(f"the new file failed its check ({error})") from error


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(f"the new file failed its check ({what})")


def _check_segments(before: Any, after: Any, pmd: int) -> None:
    old = [before.get_segment(index).header for index in range(before.num_segments())]
    new = [after.get_segment(index).header for index in range(after.num_segments())]
    loads = [segment for segment in new if segment["p_type"] == "PT_LOAD"]
    table = after["e_phoff"], after["e_phnum"] * elf.PROGRAM_HEADER.size
    headers = _headers_in(after.stream, loads, table)
    for one, other in zip(old, new, strict=True):
        what = f"{one['p_type']} at {one['p_vaddr']:#x}"
        _require(one["p_vaddr"] == other["p_vaddr"], what)
        if one["p_type"] == "PT_LOAD":
            _require(other["p_type"] in ("PT_LOAD", "PT_NULL"), what)
            _check_load(before, after, one, loads, headers)
            continue
        _require(one["p_type"] == other["p_type"], what)
        _require(one["p_memsz"] == other["p_memsz"], what)
        _require(one["p_filesz"] == other["p_filesz"], what)
        if one["p_filesz"] and one["p_type"] != "PT_PHDR":
            pair = (before.stream, one["p_offset"]), (after.stream, other["p_offset"])
            _compare(pair, one["p_filesz"], headers, what)
    for load in loads:
        alignment = max(load["p_align"], 1)
        _require((load["p_vaddr"] - load["p_offset"]) % alignment == 0, "alignment")
    aligned = [load for load in loads if load["p_align"] >= pmd and load["p_flags"] == 5]
    _require(bool(aligned), "no aligned segment")


def _check_load(before: Any, after: Any, load: Any, loads: list[Any], headers: list[Range]) -> None:
    """Require that a PT_LOAD's memory is one's of the new file, with the same bytes, and zeroes
    where it has no bytes."""
    start, end = load["p_vaddr"], load["p_vaddr"] + load["p_memsz"]
    what = f"PT_LOAD at {start:#x}"
    (new,) = [x for x in loads if x["p_vaddr"] <= start and end <= x["p_vaddr"] + x["p_memsz"]]
    file_end = start + load["p_filesz"]
    new_file_end = new["p_vaddr"] + new["p_filesz"]
    _require(file_end <= new_file_end, what)
    place = new["p_offset"] + start - new["p_vaddr"]
    pair = (before.stream, load["p_offset"]), (after.stream, place)
    _compare(pair, load["p_filesz"], headers, what)
    after.stream.seek(place + load["p_filesz"])
    rest = after.stream.read(max(0, min(end, new_file_end) - file_end))
    _require(not rest.strip(b"\0"), what)


def _check_sections(before: Any, after: Any) -> None:
    count = before.num_sections()
    _require(after.num_sections() == (count + 2 if count else 0), "number of sections")
    for index in range(count):
        one, other = before.get_section(index), after.get_section(index)
        what = f"section {one.name}"
        _require(one.name == other.name, what)
        for field in ("sh_type", "sh_flags", "sh_addr", "sh_link", "sh_info", "sh_addralign",
                      "sh_entsize"):  # fmt: skip
            _require(one[field] == other[field], what)
        size = one["sh_size"]
        names = index == before["e_shstrndx"]
        _require(other["sh_size"] == size or (names and other["sh_size"] > size), what)
        if one["sh_type"] not in ("SHT_NOBITS", "SHT_NULL"):
            pair = (before.stream, one["sh_offset"]), (after.stream, other["sh_offset"])
            _compare(pair, size, [], what)


def _compare(
    pair: tuple[tuple[BinaryIO, int], tuple[BinaryIO, int]],
    size: int,
    headers: list[Range],
    what: str,
) -> None:
    """Compare `size` bytes, but for the headers of the new file."""
    (old, source), (new, target) = pair
    for at in range(0, size, _BLOCK):
        length = min(_BLOCK, size - at)
        old.seek(source + at)
        new.seek(target + at)
        one, other = old.read(length), new.read(length)
        for low, count in headers:
            low -= target + at
            first, last = max(0, low), min(length, low + count)
            if first < last:
                one = one[:first] + bytes(last - first) + one[last:]
                other = other[:first] + bytes(last - first) + other[last:]
        _require(len(one) == length and one == other, what)


def _headers_in(stream: BinaryIO, loads: list[Any], table: tuple[int, int]) -> list[Range]:
    """Where the new file's own headers lie: at its beginning, and once more where they are loaded
    if the span does not begin at a multiple of the huge page size."""
    stream.seek(0)
    header = stream.read(elf.HEADER.size)
    found = [(0, len(header)), table]
    for load in loads:
        stream.seek(load["p_offset"])
        if stream.read(len(header)) == header:
            found.append((load["p_offset"], len(header)))
    return found
