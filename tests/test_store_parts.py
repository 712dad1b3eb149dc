"""What of a store one meets only when somebody else is at work in it, part by part."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.privileges import has_images

from page_primer import processes
from page_primer.images import directory, inventory, locks, places, store, trust
from page_primer.images.trust import Unusable
from page_primer.kernel import credentials

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "image").mkdir()
    fd = os.open(tmp_path / "image", DIRECTORY)
    yield fd
    os.close(fd)


def test_locks_of_a_folder_that_was_removed(folder: int, tmp_path: Path) -> None:
    (tmp_path / "image").rmdir()
    with pytest.raises(FileNotFoundError):
        locks.share(folder)
    assert locks.for_writing(folder) == (None, False)
    assert not locks.is_used(folder)


def test_a_lock_that_somebody_has(folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user keeps others from pruning, one who prunes keeps users out; a writer is waited for."""
    user = locks.share(folder)
    assert user and user.fileno() > 2 and locks.is_used(folder)
    user.close()
    assert not locks.is_used(folder)
    held = locks.exclude(folder)
    with pytest.raises(FileNotFoundError, match="being pruned"):
        locks.share(folder)
    monkeypatch.setattr(locks, "_WAIT_FOR_WRITER", 0.05)
    fd, mine = locks.for_writing(folder)
    assert fd and not mine
    assert len(held) == 2


def test_a_lock_that_somebody_has_for_a_moment(
    folder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks whether an image is used keeps no user out."""
    held = locks.exclude(folder)
    monkeypatch.setattr(locks, "_WAIT_FOR_ASKER", 60.0)
    monkeypatch.setattr(time, "sleep", lambda _: held.clear())
    assert locks.share(folder)


def test_locks_where_there_are_none(folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock(2), as some that are mounted over a network."""

    def refused(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    assert locks.share(folder) is None
    fd, mine = locks.for_writing(folder)
    assert fd and not mine


def test_locks_as_nfs_has_them(folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes locks of ranges of them, of which an exclusive one needs a file that is open for
    writing (flock(2))."""
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and access == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    user = locks.share(folder)
    assert user and locks.is_used(folder)
    user.close()
    assert not locks.is_used(folder)
    writer, mine = locks.for_writing(folder)
    assert writer and mine
    writer.close()
    assert len(locks.exclude(folder)) == 2


def test_a_lock_is_not_in_a_standard_streams_place(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.close(0)\n"
        "from page_primer.images import locks\n"
        f"folder = os.open({str(tmp_path)!r}, os.O_RDONLY | os.O_DIRECTORY)\n"
        "os.dup2(folder, 9); os.close(folder)\n"
        "print(locks.share(9))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 2


def test_no_image_is_used_by_nobody(tmp_path: Path) -> None:
    fd = os.open(tmp_path, DIRECTORY)
    assert not inventory.is_used(fd, "missing")
    os.close(fd)


def test_drafts_of_killed_writers_are_removed(tmp_path: Path, folder: int) -> None:
    old, new = (tmp_path / "image" / f"{store.DRAFT}{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half of it")
    os.utime(old, (time.time() - 3600,) * 2)
    store._remove_drafts(folder)
    assert new.exists() and not old.exists()


def test_a_store_is_made_where_its_parents_parent_is_there(tmp_path: Path) -> None:
    who = credentials.read()
    with pytest.raises(FileNotFoundError if has_images() else Unusable):
        directory.open_or_make("/nowhere/store", who, make=True)
    with pytest.raises(FileNotFoundError):
        directory.open_or_make(str(tmp_path / "store"), who, make=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        directory.open_or_make(str(tmp_path / "file"), who, make=True)


def test_whose_files_may_be_anybodys_makes_no_store(tmp_path: Path) -> None:
    """Nor is it told that there is none, which it would make and have refused."""
    nobody = credentials.Credentials(65534)
    with pytest.raises(Unusable, match=trust.UNTRUSTED) as refused:
        directory.open_or_make(str(tmp_path / "store"), nobody, make=True)
    assert refused.value.remedy == trust.BUILD
    with pytest.raises(FileNotFoundError):
        directory.open_or_make(str(tmp_path / "store"), nobody, make=False)
    assert not (tmp_path / "store").exists()


@pytest.mark.images
def test_a_store_is_not_too_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_DEEPEST", 1)
    (tmp_path / "a/b").mkdir(parents=True, mode=0o755)
    fd = os.open(tmp_path / "a/b", DIRECTORY)
    with pytest.raises(Unusable, match="too many directories"):
        trust.check_directory(fd, credentials.read())
    os.close(fd)


@pytest.mark.images
def test_a_unit_has_its_own_directory_for_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path}:/other")
    assert f"{tmp_path}/page-primer" in [place.path for place in places.candidates(1 << 30)]


def test_a_process_that_has_ended_is_no_python() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert not processes.is_python(process.pid)
