"""What `page-primer align` leaves alone since its headers contradict each other, or since it
changed meanwhile: files made of a sound one, one field at a time."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.elves import HEADERS_APART, SOURCE, answers, digest, link
from harness.outside import PMD

from page_primer.align import files, original, replace, rewrite, trial, verify
from page_primer.align.layout import best_span, lay_out
from page_primer.align.original import Refused
from page_primer.elf.file import HEADER, SHT_NOBITS, FileHeader, ProgramHeader, SectionHeader

PT_LOAD, PT_DYNAMIC, PT_NOTE, PT_GNU_STACK = 1, 2, 4, 0x6474E551


class Headers:
    """All headers of a file, to be changed and written over what is there."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, bytearray(path.read_bytes())
        self.file = FileHeader.parse(bytes(self.data[: HEADER.size]))
        self.programs = ProgramHeader.parse_table(
            self._table(self.file.e_phoff, self.file.e_phnum, 56)
        )
        self.sections = SectionHeader.parse_table(
            self._table(self.file.e_shoff, self.file.e_shnum, 64)
        )

    def _table(self, offset: int, count: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + count * size])

    def load(self, flags: int, **fields: int) -> None:
        """Change the PT_LOAD that has these flags."""
        index = next(n for n, p in enumerate(self.programs) if p[:2] == (PT_LOAD, flags))
        self.programs[index] = self.programs[index]._replace(**fields)

    def other(self, kind: int, **fields: int) -> None:
        index = next(n for n, p in enumerate(self.programs) if p.p_type == kind)
        self.programs[index] = self.programs[index]._replace(**fields)

    def names(self, **fields: int) -> None:
        """Change the section with the sections' names."""
        index = self.file.e_shstrndx
        self.sections[index] = self.sections[index]._replace(**fields)

    def write(self) -> None:
        parts = [
            (0, self.file.pack()),
            *((self.file.e_phoff + 56 * n, p.pack()) for n, p in enumerate(self.programs)),
            *((self.file.e_shoff + 64 * n, s.pack()) for n, s in enumerate(self.sections)),
        ]
        for offset, part in parts:
            self.data[offset : offset + len(part)] = part
        self.path.write_bytes(self.data)


def header(headers: Headers, **fields: Any) -> None:
    headers.file = headers.file._replace(**fields)


def each_load(headers: Headers, **fields: int) -> None:
    """Change every PT_LOAD of a file that has no dynamic section any more."""
    kinds = {PT_LOAD: fields, PT_DYNAMIC: {"p_type": 0}}
    headers.programs = [p._replace(**kinds.get(p.p_type, {})) for p in headers.programs]


def long_section(headers: Headers) -> None:
    headers.sections[5] = headers.sections[5]._replace(sh_size=1 << 40)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ["-fuse-ld=bfd", "-Wl,-z,separate-code"]
    return link(tmp_path_factory.mktemp("sound") / "libx.so", *options, source=SOURCE)


@pytest.fixture
def file(sound: Path, tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return Path(shutil.copy2(sound, tmp_path / "place"))


def test_the_file_that_they_are_made_of_is_sound(file: Path) -> None:
    Headers(file).write()
    assert files.look(str(file)).state == files.CAN_BE
    assert files.align(str(file), python=None) == "not tried: no interpreter to load it with"
    assert files.look(str(file)).state == files.ALIGNED


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h: header(h, e_phnum=0), "no program headers"),
        (lambda h: header(h, e_phnum=600), "no program headers, or too many"),
        (lambda h: header(h, e_shnum=0), "too many section headers"),
        (lambda h: each_load(h, p_type=0), "nothing to load"),
        (lambda h: each_load(h, p_filesz=0), "none of its segments has anything in the file"),
        (lambda h: h.other(PT_NOTE, p_filesz=1 << 40), "a segment reaches beyond the file's end"),
        (lambda h: h.load(5, p_align=3 << 12), "no power of two"),
        (lambda h: h.load(5, p_align=1 << 40), "no power of two, or too large"),
        (lambda h: h.load(5, p_vaddr=0x1234), "do not fit together"),
        (lambda h: h.load(4, p_memsz=16), "do not fit together"),
        (lambda h: h.load(6, p_memsz=1 << 63), "too far apart"),
        (lambda h: h.load(4, p_memsz=1 << 20), "segments overlap, or are out of order"),
        (long_section, "a section reaches beyond the file's end"),
        (lambda h: h.load(5, p_flags=1), "would make code or data readable that is not"),
        (
            lambda h: h.other(PT_GNU_STACK, p_filesz=64, p_offset=h.file.e_shoff),
            "bytes of no segment and no section",
        ),
        (lambda h: header(h, e_shstrndx=0), "section headers without names"),
        (lambda h: h.names(sh_flags=2), "section names where none are expected"),
    ],
)
def test_headers_that_contradict_each_other(
    change: Callable[[Headers], None], text: str, file: Path
) -> None:
    change(headers := Headers(file))
    headers.write()
    before = digest(file)
    with pytest.raises(Refused, match=text):
        files.align(str(file), python=None)
    assert digest(file) == before and os.listdir(file.parent) == [file.name]


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """A library whose headers no segment has, so that every offset changes."""
    (tmp_path / "script").write_text(HEADERS_APART)
    (tmp_path / "apart").mkdir()
    source = SOURCE.replace("static __thread", "static")
    options = ["-fuse-ld=bfd", "-nostdlib", f"-Wl,-T,{tmp_path}/script"]
    file = link(tmp_path / "apart/libx.so", *options, source=source)
    file.with_suffix(".c").unlink()
    return file


def test_headers_apart(apart: Path) -> None:
    (load,) = [p for p in Headers(apart).programs if p[:2] == (PT_LOAD, 5)]
    assert load.p_vaddr == 0 and load.p_offset  # which is not kept for what is in the file
    expected, before = answers(apart), digest(apart)
    assert files.align(str(apart), python=sys.executable) is None
    assert files.look(str(apart)).state == files.ALIGNED and answers(apart) == expected
    files.undo(str(apart))
    assert digest(apart) == before


@pytest.mark.parametrize("address", [(1 << 64) - 0x1000, (1 << 64) - 1, 1 << 63])
@pytest.mark.parametrize("kind", ["segment", "section"])
def test_nothing_at_an_address_beyond_all_files(kind: str, address: int, apart: Path) -> None:
    """With what is in the file moved up, its offset would not fit into 64 bits, or no file."""
    headers = Headers(apart)
    if kind == "segment":
        headers.other(PT_GNU_STACK, p_vaddr=address)
    else:
        number = next(n for n, s in enumerate(headers.sections) if s.sh_type == SHT_NOBITS)
        headers.sections[number] = headers.sections[number]._replace(sh_addr=address)
    headers.write()
    assert files.look(str(apart)).state == files.CAN_BE
    before = digest(apart)
    files.align(str(apart), python=None)
    now = Headers(apart)
    found = [p.p_offset for p in now.programs] + [s.sh_offset for s in now.sections]
    assert max(found) < apart.stat().st_size
    files.undo(str(apart))
    assert digest(apart) == before


def test_two_dynamic_sections(file: Path) -> None:
    """Loaders do not agree which one is it, and a file may have hundreds, to be read each."""
    headers = Headers(file)
    number = next(n for n, p in enumerate(headers.programs) if p.p_type == PT_NOTE)
    headers.programs[number] = next(p for p in headers.programs if p.p_type == PT_DYNAMIC)
    headers.write()
    assert files.look(str(file)).reason == "not a usable ELF file: two dynamic sections"


# The record in an aligned file, as rewrite.py describes it.
TRAILER = struct.Struct("=16sQQ32s")
MAGIC = b"page-primer/1\0\0\0"


def with_record(path: Path, record: bytes, size: int, length: int | None = None) -> None:
    """A file that ends in a record which says that the original was of this size."""
    length = len(record) if length is None else length
    path.write_bytes(bytes(512) + record + TRAILER.pack(MAGIC, length, size, bytes(32)))


@pytest.mark.parametrize(
    ("record", "size", "length"),
    [
        (struct.pack("=QQ", 0, 0), 512, 1 << 40),  # longer than the file
        (struct.pack("=QQ", 9, 0), 512, None),  # more copies than there is room for
        (struct.pack("=QQ", 1 << 20, 0) + bytes(24 << 20), 512, None),  # more than there can be
        (struct.pack("=QQ", 0, 0) + b"not compressed", 512, None),
        (struct.pack("=QQ", 0, 3) + bytes.fromhex("789c030000000001"), 512, None),  # no pieces
        (struct.pack("=QQ", 0, 0) + bytes.fromhex("789c030000000001"), 1 << 50, None),
        (struct.pack("=QQQQQ", 1, 0, 0, 0, 1024) + bytes.fromhex("789c030000000001"), 512, None),
    ],
)
def test_a_record_that_is_none(
    record: bytes, size: int, length: int | None, tmp_path: Path
) -> None:
    with_record(path := tmp_path / "file", record, size, length)
    with open(path, "rb") as opened:
        assert rewrite.read_record(opened.fileno()) is None
    before = digest(path)
    with pytest.raises(Refused, match="was not aligned by page-primer"):
        files.undo(str(path))
    assert digest(path) == before


def test_a_record_without_anything_is_one(tmp_path: Path) -> None:
    """What the ones above are made of."""
    empty = struct.pack("=QQ", 0, 0) + bytes.fromhex("789c030000000001")
    with_record(path := tmp_path / "file", empty, 512)
    with open(path, "rb") as opened:
        record = rewrite.read_record(opened.fileno())
    assert record is not None and (record.size, record.copies, record.pieces) == (512, [], [])
    with pytest.raises(Refused, match="changed since"):
        files.undo(str(path))


@pytest.fixture
def opened(file: Path) -> Iterator[int]:
    fd = os.open(file, os.O_RDWR)
    yield fd
    os.close(fd)


def test_a_file_that_is_cut_short_while_it_is_read(opened: int, tmp_path: Path) -> None:
    read = original.read(opened)
    span = best_span(read, PMD)
    assert span is not None
    layout = lay_out(read, span, PMD)
    os.ftruncate(opened, PMD)
    with open(tmp_path / "new", "w+b") as target, pytest.raises(Refused, match="became shorter"):
        rewrite.write(read, layout, target.fileno(), PMD)


def test_a_file_that_is_changed_or_replaced_meanwhile(opened: int, file: Path) -> None:
    status, old = os.fstat(opened), replace.Old(opened, str(file))
    with replace.beside(str(file)) as new:
        os.pwrite(opened, b"x", 100)
        with pytest.raises(Refused, match="was changed while it was being rewritten"):
            files.finish(new, old, status)
        shutil.copy2(file, other := file.with_name("other"))
        os.replace(other, file)
        with pytest.raises(Refused, match="was replaced while it was being rewritten"):
            files.finish(new, old, os.fstat(opened))
    assert os.listdir(file.parent) == [file.name]


def test_no_descriptor_is_left_when_it_is_in_place(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To have the directory on disk: a file that is replaced is not one that has failed."""
    limits, rename = resource.getrlimit(resource.RLIMIT_NOFILE), os.replace

    def last(old: str, new: str) -> None:
        rename(old, new)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))

    monkeypatch.setattr(os, "replace", last)
    try:
        files.align(str(file), python=None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert files.look(str(file)).state == files.ALIGNED


def test_a_record_that_cannot_be_read_back(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(file)
    monkeypatch.setattr(rewrite, "read_record", lambda _: None)
    with pytest.raises(Refused, match=r"failed its check \(record\)"):
        files.align(str(file), python=None)
    assert digest(file) == before and os.listdir(file.parent) == [file.name]


def test_a_disk_that_fails_is_not_the_files_fault(file: Path) -> None:
    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open(file, "rb") as old, pytest.raises(OSError, match="Input/output error"):
        verify.check(old, Failing(), PMD)


def test_a_file_system_without_attributes() -> None:
    with open("/proc/self/status", "rb") as opened:
        assert replace._attributes(opened.fileno()) == []


def test_a_trial_that_does_not_end(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the original neither: so it was not tried."""
    monkeypatch.setattr(trial, "_SECONDS", 0.2)
    (python := tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    note = files.align(str(file), python=str(python))
    assert note is not None and "not tried: the original cannot be loaded either (no end" in note


def test_a_trial_without_its_interpreter(file: Path, tmp_path: Path) -> None:
    note = files.align(str(file), python=str(tmp_path / "missing"))
    assert note is not None and "No such file or directory" in note
