"""`page-primer warm --rewrite`, its copying: what is read in pieces, or not at all, or changes
meanwhile, is copied whole or not at all."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness.elves import digest
from harness.outside import PMD

from page_primer.align import rewrite as writing
from page_primer.align.original import Refused
from page_primer.launcher import rewrite


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of which page-primer-warm would say that others map it in small pages."""
    path = tmp_path / "held.so"
    path.write_bytes(random.Random(1).randbytes(2 * PMD + 12345))
    said = {str(path): rewrite._HELD}
    monkeypatch.setattr(rewrite, "left_small", lambda path: said.get(path, ""))
    return path


@pytest.mark.parametrize("most", [PMD // 4, 100_000])
def test_reads_that_end_early(most: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal, a page that cannot be read, memory that is short: read(2) returns what it has."""
    pread, preadv = os.pread, os.preadv

    def short(fd: int, size: int, offset: int) -> bytes:
        return pread(fd, min(size, most), offset)

    def shortv(fd: int, places: Sequence[bytearray], offset: int) -> int:
        return preadv(fd, [memoryview(place)[:most] for place in places], offset)

    before, inode = digest(file), file.stat().st_ino
    monkeypatch.setattr(os, "pread", short)
    monkeypatch.setattr(os, "preadv", shortv)
    assert rewrite.rewrite_held(str(file))
    assert digest(file) == before and file.stat().st_ino != inode


def test_a_page_that_cannot_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read that reaches it returns what is before it, and the next one fails."""
    pread, preadv, bad = os.pread, os.preadv, PMD + 8 * 4096

    def until(offset: int, size: int) -> int:
        if offset == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return min(size, bad - offset) if offset < bad else size

    def pread_(fd: int, size: int, offset: int) -> bytes:
        return pread(fd, until(offset, size), offset)

    def preadv_(fd: int, places: Sequence[bytearray], offset: int) -> int:
        (place,) = places
        return preadv(fd, [memoryview(place)[: until(offset, len(memoryview(place)))]], offset)

    before, inode = digest(file), file.stat().st_ino
    monkeypatch.setattr(os, "pread", pread_)
    monkeypatch.setattr(os, "preadv", preadv_)
    with pytest.raises(OSError, match="Input/output error"):
        rewrite.rewrite_held(str(file))
    assert (digest(file), file.stat().st_ino) == (before, inode)
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("at", [0, PMD, 2 * PMD + 12344])
def test_a_byte_that_is_written_wrong(at: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = writing.write_all

    def wrong(fd: int, data: bytes, offset: int) -> None:
        write_all(fd, data, offset)
        if offset <= at < offset + len(data):
            os.pwrite(fd, bytes([data[at - offset] ^ 1]), at)

    before, inode = digest(file), file.stat().st_ino
    monkeypatch.setattr(writing, "write_all", wrong)
    with pytest.raises(Refused, match=r"^the copy differs from it$"):
        rewrite.rewrite_held(str(file))
    assert (digest(file), file.stat().st_ino) == (before, inode)
    assert os.listdir(file.parent) == [file.name]


def test_a_file_that_is_cut_meanwhile(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = writing.write_all

    def cut(fd: int, data: bytes, offset: int) -> None:
        write_all(fd, data, offset)
        os.truncate(file, PMD + 1)

    monkeypatch.setattr(writing, "write_all", cut)
    with pytest.raises(Refused, match="became shorter while it was read"):
        rewrite.rewrite_held(str(file))
    assert os.listdir(file.parent) == [file.name] and file.stat().st_size == PMD + 1
