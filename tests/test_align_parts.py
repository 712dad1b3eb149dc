"""Parts of `page-primer align` that its command comes to seldom, with real files."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness.outside import PMD

from page_primer import _core
from page_primer.align import files, replace, targets, trial
from page_primer.align.aligned import aligned_span
from page_primer.align.original import Refused
from page_primer.elf.file import PF_R, PF_W, PF_X, ProgramHeader

PT_LOAD = 1
NOBODY = 65534


def test_a_file_without_a_huge_page_of_code(tmp_path: Path) -> None:
    path = tmp_path / "small.so"
    path.write_bytes(Path(_core.__file__).read_bytes())
    with pytest.raises(Refused, match="no whole huge page of code"):
        files.align(str(path), python=None)
    assert os.listdir(tmp_path) == ["small.so"]


def test_read_only_memory_beyond_the_file_ends_a_span() -> None:
    def load(start: int, size: int, memory: int, flags: int = PF_R | PF_X) -> ProgramHeader:
        return ProgramHeader(PT_LOAD, flags, start, start, start, size, memory, PMD)

    def span(*loads: ProgramHeader) -> tuple[int, int] | None:
        return aligned_span(b"".join(each.pack() for each in loads), PMD)

    half = PMD // 2
    assert span(load(0, half, half), load(half, half, half)) == (0, PMD)
    # What the file does not fill is no page of it: no huge page reaches across.
    assert span(load(0, half - 4096, half), load(half, half, half)) is None
    assert span(load(0, PMD, PMD), load(PMD, half, half, PF_R | PF_W)) == (0, PMD)


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_what_lies_where_the_new_file_goes_stays(kind: str, tmp_path: Path) -> None:
    new = tmp_path / "new"
    if kind == "link":
        new.symlink_to(tmp_path / "elsewhere")
    elif kind == "directory":
        new.mkdir()
    else:
        os.mkfifo(new)
    with pytest.raises(Refused, match=f"^{new} is in the way$"):
        replace._create(str(new))
    assert os.listdir(tmp_path) == ["new"]


def test_what_a_killed_process_has_left_is_replaced(tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.write_bytes(b"left")
    fd = replace._create(str(new))
    try:
        assert os.fstat(fd).st_size == 0
        # While its lock is held it is nobody else's to remove.
        with pytest.raises(Refused, match=f"^{replace.BUSY}$"):
            replace._create(str(new))
        assert os.path.samestat(os.fstat(fd), new.stat())
    finally:
        os.close(fd)


@pytest.mark.parametrize("stale", [False, True], ids=["new", "stale"])
def test_where_files_cannot_be_locked(stale: bool, tmp_path: Path) -> None:
    """As on NFS for want of a file that is open for writing: nothing of ours stays behind."""
    if stale:
        (tmp_path / "new").write_bytes(b"left")
    program = (
        "import errno, os, sys\n"
        "from harness.refused import refuse\n"
        "from page_primer.align import original, replace\n"
        "refuse({'x86_64': 73, 'aarch64': 32}[os.uname().machine], errno.EBADF)\n"
        "try:\n    replace._create(sys.argv[1])\n"
        "except original.Refused as why:\n    print(why)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "new"], text=True,
                          capture_output=True, cwd=Path(__file__).parent)  # fmt: skip
    if "no seccomp filter" in done.stderr:
        pytest.skip("no seccomp filter can be put up here")
    assert done.stdout == "a new file cannot be locked here (Bad file descriptor)\n", done.stderr
    assert os.listdir(tmp_path) == ["new"] * stale


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something done by another, once, before a lock is asked for."""

    def do(act: Callable[[], object]) -> None:
        rest = [act]

        def flock(fd: int, operation: int) -> None:
            if rest:
                rest.pop()()
            fcntl.flock(fd, operation)

        monkeypatch.setattr(replace, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": flock}))

    return do


def test_a_new_file_that_is_taken_for_stale(
    between: Callable[[Callable[[], object]], None], tmp_path: Path
) -> None:
    """Removed between its creation and its lock: another one is created."""
    new = tmp_path / "new"
    between(lambda: replace._remove_stale(str(new)))
    fd = replace._create(str(new))
    try:
        assert os.path.samestat(os.fstat(fd), new.stat())
    finally:
        os.close(fd)


def test_a_stale_file_that_another_has_replaced(
    between: Callable[[Callable[[], object]], None], tmp_path: Path
) -> None:
    """Found stale by two: the second leaves the file that the first works on."""
    new, fds = tmp_path / "new", []
    new.write_bytes(b"left")
    between(lambda: fds.append(replace._create(str(new))))
    try:
        with pytest.raises(Refused, match=f"^{replace.BUSY}$"):
            replace._create(str(new))
        assert os.path.samestat(os.fstat(fds[0]), new.stat())
    finally:
        for fd in fds:
            os.close(fd)


def test_a_file_that_was_renamed_into_place_is_not_stale(
    between: Callable[[Callable[[], object]], None], tmp_path: Path
) -> None:
    """Opened while another had its lock, who has finished since."""
    new, file = tmp_path / "new", tmp_path / "file"
    new.write_bytes(b"whole")
    between(lambda: new.rename(file))
    replace._remove_stale(str(new))
    assert file.read_bytes() == b"whole"


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Descriptors of two files, old and new."""
    with ExitStack() as stack:
        fds = []
        for name in ("old", "new"):
            fds.append(os.open(tmp_path / name, os.O_RDWR | os.O_CREAT, 0o600))
            stack.callback(os.close, fds[-1])
        yield fds[0], fds[1]


@contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def set_attribute(fd: int, name: str, value: bytes) -> None:
    try:
        os.setxattr(fd, name, value)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EPERM):
            raise
        pytest.skip(f"the file system of temporary files has no attribute {name}")


def attributes(fd: int) -> dict[str, bytes]:
    return {name: os.getxattr(fd, name) for name in os.listxattr(fd)}


def test_attributes_are_copied(two: tuple[int, int]) -> None:
    old, new = two
    os.fchmod(old, 0o750)
    os.utime(old, ns=(1_000_000_007, 2_000_000_009))
    set_attribute(old, "user.same", b"1")
    set_attribute(new, "user.same", b"1")
    set_attribute(old, "user.other", b"2")
    set_attribute(new, "user.other", b"3")
    set_attribute(new, "user.more", b"4")
    replace.copy_attributes(old, new)
    assert attributes(new) == attributes(old)
    assert attributes(new)["user.other"] == b"2"
    status = os.fstat(new)
    assert stat.S_IMODE(status.st_mode) == 0o750
    assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_007, 2_000_000_009)


@pytest.mark.root("act as another user")
def test_an_owner_that_cannot_be_kept(two: tuple[int, int]) -> None:
    old, new = two
    os.fchown(new, NOBODY, NOBODY)
    with as_nobody(), pytest.raises(Refused, match="its owner cannot be kept"):
        replace.copy_attributes(old, new)
    assert os.fstat(new).st_uid == NOBODY


@pytest.mark.root("act as another user")
def test_an_attribute_that_cannot_be_kept(two: tuple[int, int]) -> None:
    old, new = two
    for fd in two:
        os.fchown(fd, NOBODY, NOBODY)
    set_attribute(old, "security.page_primer_test", b"1")
    with as_nobody(), pytest.raises(Refused, match=r"attribute security\.page_primer_test cannot"):
        replace.copy_attributes(old, new)


def test_a_file_system_without_attributes() -> None:
    with open("/proc/self/comm", "rb") as file:
        assert replace._attributes(file.fileno()) == []


@pytest.mark.parametrize(
    "said",
    ["", "3", "null", "{}", "[]", '["a", "b"]', '["a", "/b", "c"]', '["a", 3, []]',
     "[[], null, []]", '["a", "/b", [3]]', "[1, 2, 3, 4]", "text", "\ufeff[]", "[" * 5000],
)  # fmt: skip
def test_what_no_interpreter_says(said: str, tmp_path: Path) -> None:
    """A script around one that says something more, or another program."""
    (tmp_path / "said").write_text(said)
    (python := tmp_path / "python").write_text(f"#!/bin/sh\necho first\ncat {tmp_path}/said\n")
    python.chmod(0o755)
    with pytest.raises(ValueError, match="does not answer as a Python interpreter"):
        targets.interpreter(str(python))


def test_libraries_of_a_directory_with_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.so").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.so").write_bytes(bytes(100))
    (tmp_path / "c.so.1").symlink_to("b.so")
    assert list(targets.libraries([str(tmp_path)], smallest=100)) == [str(tmp_path / "b.so")]
    assert list(targets.libraries([str(tmp_path)], smallest=101)) == []


def test_what_a_program_needs_that_cannot_be_read(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not ELF")
    assert trial._needed(str(text)) == trial._needed(str(tmp_path / "nowhere")) == []
