"""Reading ELF files: what pyelftools reads, and Malformed for whatever else a file may hold."""

import contextlib
import os
import struct
import sys

import pytest
from elftools.elf.elffile import ELFFile
from harness import fuzz_loop, outside
from hypothesis import given, settings
from hypothesis import strategies as st

from page_primer import _core
from page_primer.elf import file as elf
from page_primer.elf.objects import Object, Region, Source, segments_of
from page_primer.images import layout as image
from page_primer.images import store

FILES = sorted({outside.interpreter_file(os.getpid()), _core.__file__, os.path.realpath("/bin/sh")})
SMALL = open(_core.__file__, "rb").read()
WORDS = [0, 1, 3, 0x40, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


@pytest.mark.parametrize("path", FILES)
def test_reads_what_pyelftools_reads(path):
    with open(path, "rb") as file:
        found, known = elf.File(file.fileno()), ELFFile(file)
        sections = found.sections()
        wanted = elf.SectionHeader._fields[2:]
        assert [[s[field] for field in wanted] for s in known.iter_sections()] == [
            [getattr(section, field) for field in wanted] for section in sections
        ]
        names = [s.name for s in known.iter_sections()]
        assert found.section_names(sections) == names
        headers = elf.ProgramHeader.parse_table(found.program_headers())
        wanted = elf.ProgramHeader._fields[1:]
        assert [[s[field] for field in wanted] for s in known.iter_segments()] == [
            [getattr(header, field) for field in wanted] for header in headers
        ]
        wanted = (
            "e_entry",
            "e_phoff",
            "e_shoff",
            "e_phentsize",
            "e_phnum",
            "e_shnum",
            "e_shstrndx",
        )
        assert [known[field] for field in wanted] == [getattr(found.header, f) for f in wanted]
        build_ids = [
            s["p_offset"]
            for s in known.iter_segments("PT_NOTE")
            if any(note["n_type"] == "NT_GNU_BUILD_ID" for note in s.iter_notes())
        ]
        notes = [h for h in headers if h.p_type == elf.PT_NOTE]
        assert [h.p_offset for h in notes if found.build_id(h)] == build_ids


def write_image(directory, data):
    """Have an image written of a file with this content, of which the loader would have mapped
    what the sound one has."""
    path = directory / "object.so"
    path.write_bytes(data)
    headers = SMALL[64 : 64 + 56 * int.from_bytes(SMALL[56:58], "little")]
    base = 0x7F0000000000
    segments = segments_of(headers, base, outside.PAGE)
    source = Source.of(str(path), os.stat(path))
    obj = Object("object.so", str(path), base, headers, segments, source=source)
    (span, *_) = obj.spans()
    layout = image.lay_out(obj, [Region(span[0].start, span[-1].end, elf.PF_R | elf.PF_X)], 1 << 16)
    with open(path, "rb") as original, open(directory / "image", "wb") as target:
        return layout.write(original.fileno(), target.fileno())


def test_a_sound_file_is_laid_out(tmp_path):
    assert write_image(tmp_path, SMALL) > len(SMALL) // 2


FAR = 1 << 62


def far_layout(tmp_path):
    """Of an object whose data are far away from its code."""
    path = tmp_path / "object.so"
    path.write_bytes(SMALL)
    rows = [(elf.PF_R | elf.PF_X, 0, 0), (elf.PF_R | elf.PF_W, 0x5000, FAR)]
    headers = b"".join(
        elf.ProgramHeader(elf.PT_LOAD, flags, offset, vaddr, vaddr, 0x5000, 0x5000, 4096).pack()
        for flags, offset, vaddr in rows
    )
    base = 0x7F0000000000
    source = Source.of(str(path), os.stat(path))
    obj = Object("object.so", str(path), base, headers, segments_of(headers, base, outside.PAGE),
                 source=source)  # fmt: skip
    region = Region(obj.start, obj.segments[0].end, elf.PF_R | elf.PF_X)
    return image.lay_out(obj, [region], 1 << 16)


def test_what_an_image_has_is_bounded_by_its_file(tmp_path):
    layout = far_layout(tmp_path)
    with fuzz_loop.within(20):
        found = list(image.content(layout))
    start = layout.offset(layout.object.start)
    assert found == [
        (start, [(0, 0x5000)]),
        (start + FAR, [(0x5000, 0x5000)]),
    ]


@pytest.mark.images
def test_an_image_out_of_proportion_is_refused(tmp_path):
    """Before anything is written, or room is made for it in a store, of which it says that the
    limit is too low."""
    layout = far_layout(tmp_path)
    opened = store.Store(str(tmp_path / "images"), limit=1 << 20)
    with opened, pytest.raises(image.CannotLayOut, match="segments too far apart"):
        opened.get(layout)
    with open(layout.object.path, "rb") as original, open(tmp_path / "image", "wb") as target:
        with pytest.raises(image.CannotLayOut, match="segments too far apart"):
            layout.write(original.fileno(), target.fileno())
        assert os.fstat(target.fileno()).st_size == 0


def test_a_segment_has_no_more_bytes_than_addresses():
    """As the kernel has it, which refuses other programs."""
    header = elf.ProgramHeader(elf.PT_LOAD, elf.PF_R, 0, 0, 0, 1 << 50, 0x1234, 4096)
    (segment,) = segments_of(header.pack(), 0x10000, outside.PAGE)
    assert (segment.start, segment.end, segment.file_end) == (0x10000, 0x12000, 0x12000)


@pytest.mark.parametrize("size", [0, 16, 63, 64, 4096, len(SMALL) - 1])
def test_a_file_cut_short(tmp_path, size):
    with pytest.raises(image.CannotLayOut, match="not a well-formed ELF file: cut short"):
        write_image(tmp_path, SMALL[:size])


@pytest.mark.parametrize(("at", "value"), [(0, 0), (4, 1), (5, 0 if sys.byteorder == "big" else 2)])
def test_another_kind_of_file(tmp_path, at, value):
    data = bytearray(SMALL)
    data[at] = value
    with pytest.raises(image.CannotLayOut, match="another kind of file"):
        write_image(tmp_path, bytes(data))


def header_with(**changed):
    return (
        elf.FileHeader.parse(SMALL[: elf.HEADER.size])._replace(**changed).pack()
        + SMALL[elf.HEADER.size :]
    )


def names_in_another_section(at):
    """With the name of the last section at another place of its strings."""
    header = elf.FileHeader.parse(SMALL[: elf.HEADER.size])
    last = header.e_shoff + (header.e_shnum - 1) * header.e_shentsize
    return SMALL[:last] + struct.pack("I", at) + SMALL[last + 4 :]


def dynamic_with(tag, value):
    """With another value of the dynamic section's entries of one tag."""
    (header,) = [
        each
        for each in elf.ProgramHeader.parse_table(header_bytes(SMALL))
        if each.p_type == elf.PT_DYNAMIC
    ]
    data = bytearray(SMALL)
    for at in range(header.p_offset, header.p_offset + header.p_filesz, 16):
        if struct.unpack_from("Q", data, at) == (tag,):
            struct.pack_into("Q", data, at + 8, value)
    return bytes(data)


def header_bytes(data):
    header = elf.FileHeader.parse(data[: elf.HEADER.size])
    return data[header.e_phoff : header.e_phoff + header.e_phnum * header.e_phentsize]


def read_all(found):
    found.program_headers()
    found.section_names(found.sections())
    found.dynamic_strings(elf.DT_NEEDED)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (header_with(e_phoff=len(SMALL)), "cut short"),
        (header_with(e_phentsize=57), "headers of another size"),
        (header_with(e_shentsize=65), "headers of another size"),
        (header_with(e_shstrndx=0xFFF0), "section names are in no section"),
        (names_in_another_section(1 << 30), "section name out of bounds"),
        (dynamic_with(elf.DT_NEEDED, len(SMALL) * 2), "a name out of bounds"),
        (dynamic_with(elf.DT_STRTAB, 1 << 40), "an address in no segment"),
    ],
)
def test_what_a_file_says_of_places_that_it_has_not(tmp_path, data, why):
    path = tmp_path / "file.so"
    path.write_bytes(data)
    with open(path, "rb") as file, pytest.raises(elf.Malformed, match=f"^{why}$"):
        read_all(elf.File(file.fileno()))


def test_of_two_segments_in_one_page_the_later_is_there():
    def load(flags, start, size):
        return elf.ProgramHeader(elf.PT_LOAD, flags, start, start, start, size, size, 0x1000)

    table = load(elf.PF_R | elf.PF_X, 0, 0x1800).pack() + load(elf.PF_R, 0x1800, 0x800).pack()
    found = segments_of(table, 0x40000000, 0x1000)
    assert [(s.start, s.end, s.file_end) for s in found] == [
        (0x40000000, 0x40001000, 0x40001000),
        (0x40001000, 0x40002000, 0x40002000),
    ]


def test_many_sections_that_are_the_whole_file(tmp_path):
    """What is copied of a file is never more than the file."""
    count = 1000
    symtab = elf.SECTION_HEADER.pack(0, elf.SHT_SYMTAB, 0, 0, 0, len(SMALL), 0, 0, 0, 0)
    data = bytearray(SMALL + symtab * count)
    struct.pack_into("=Q", data, 40, len(SMALL))  # e_shoff
    struct.pack_into("=HH", data, 60, count, 0)  # e_shnum, e_shstrndx
    with pytest.raises(image.CannotLayOut, match="overlap"):
        write_image(tmp_path, bytes(data))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_file_may_say_anything_of_itself(tmp_path_factory, data):
    """Every field of the header and of the section headers, and every byte of the rest."""
    shoff, shnum = int.from_bytes(SMALL[40:48], "little"), int.from_bytes(SMALL[60:62], "little")
    ranges = [(16, 64), (shoff, shoff + 64 * shnum), (64, len(SMALL))]
    changed = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 6))):
        low, high = data.draw(st.sampled_from(ranges))
        at = data.draw(st.integers(low, high - 8))
        form = data.draw(st.sampled_from("BHIQ"))
        word = data.draw(st.sampled_from(WORDS)) & (256 ** struct.calcsize("=" + form) - 1)
        struct.pack_into("=" + form, changed, at, word)
    directory = tmp_path_factory.mktemp("hostile")
    with contextlib.suppress(image.CannotLayOut):
        assert write_image(directory, bytes(changed)) < 4 * len(SMALL) + (1 << 20)


def test_text_relocations_of_a_sound_file():
    with open(_core.__file__, "rb") as file:
        found = elf.File(file.fileno())
        headers = elf.ProgramHeader.parse_table(found.program_headers())
        dynamic = next(h for h in headers if h.p_type == elf.PT_DYNAMIC)
        assert not elf.has_text_relocations(found.dynamic(dynamic))
        with pytest.raises(elf.Malformed):
            found.dynamic(elf.ProgramHeader(2, 0, 1 << 63, 0, 0, 64, 64, 8))
