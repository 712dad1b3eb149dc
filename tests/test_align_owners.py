"""Whose the files are that `page-primer align` and `warm --rewrite` write, read and execute: what
other users can exchange meanwhile is refused, or is not what is written."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.elves import digest, link
from harness.service import USER, become, public, public_python

from page_primer.align import files, replace
from page_primer.align.original import Refused
from page_primer.launcher import rewrite

__all__ = ["public", "public_python"]

as_root = pytest.mark.root("have files of several users")
OWNER = f"run this as its owner: sudo -u '#{USER}' page-primer ..."
CREATE = replace._create


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to be copied."""
    return link(tmp_path_factory.mktemp("library") / "libx.so", "-Wl,-z,separate-code")


@pytest.fixture
def file(library: Path, tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return Path(shutil.copy2(library, tmp_path / "place" / "libx.so"))


def give(path: Path, user: int = USER) -> Path:
    os.chown(path, user, user)
    return path


def align(
    *words: str | Path, python: str = sys.executable, wrapper: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(wrapper or []), python, "-m", "page_primer", "align", *map(str, words)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PAGE_PRIMER_ALIGNED": "/dev/null"},
    )  # fmt: skip


def refused(file: Path, text: str) -> None:
    """By align, the same with --dry-run."""
    before = digest(file)
    done = align(file)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{file}: refused: {text}") and done.stderr.count("\n") == 1
    dry = align("--dry-run", "--json", file)
    assert dry.returncode == 1 and text in dry.stdout
    assert digest(file) == before and os.listdir(file.parent) == [file.name]


@as_root
def test_root_aligns_nothing_that_a_service_user_can_exchange(file: Path) -> None:
    give(give(file).parent)
    place = f"its directory is not ours alone: it belongs to user {USER}, this process runs as 0"
    refused(file, f"others could exchange it: {place}; {OWNER}")
    assert align("--check", file).returncode == 1  # it can be aligned, by somebody else
    give(file, 0)  # as by root's pip in that user's environment
    refused(file, f"others could exchange it: {place}; a file of root's belongs where root alone")


@as_root
@pytest.mark.parametrize("above", [False, True], ids=["directory", "above"])
def test_root_aligns_nothing_where_others_can_write(above: bool, file: Path) -> None:
    directory = file.parent.parent if above else file.parent
    directory.chmod(0o775)
    which = f"{directory} above it" if above else "it"
    refused(file, f"others could exchange it: its directory is not ours alone: others can write "
                  f"to {which} (mode 0775)")  # fmt: skip


@as_root
def test_in_a_sticky_directory_others_exchange_their_own_alone(file: Path) -> None:
    file.parent.chmod(0o1777)
    files.check_place(str(file))
    give(file)
    refused(file, "others could exchange it: its directory is not ours alone: others can write")


@as_root
def test_root_executes_nothing_that_others_write(file: Path) -> None:
    give(file)
    refused(file, f"it would be executed, and user {USER} can write to it; {OWNER}")
    give(file, 0).chmod(0o775)
    refused(file, "it would be executed, and others can write to it; ")


@as_root
def test_root_undoes_nothing_that_a_service_user_can_exchange(file: Path) -> None:
    files.align(str(file), python=None)
    give(give(file).parent)
    before = digest(file)
    for words in (["--undo"], ["--undo", "--dry-run"]):
        done = align(*words, "--json", file)
        assert done.returncode == 1 and "others could exchange it: " in done.stdout
    assert digest(file) == before
    give(file.parent, 0)  # that file's content alone is that user's: nothing executes it here
    assert align("--undo", file).returncode == 0
    assert (file.stat().st_uid, file.stat().st_gid) == (USER, USER)


@as_root
@pytest.mark.parametrize("mode", [0o777, 0o300], ids=oct)
def test_its_owner_aligns_it_where_they_like(
    mode: int, library: Path, public: Path, public_python: str
) -> None:
    """In a directory that others can write, too: it is theirs. In one that can be written, but not
    read, it is not on disk at once, and done."""
    place = public / "own"
    place.mkdir()
    give(place).chmod(mode)
    file = give(Path(shutil.copy2(library, place / "libx.so")))
    before = digest(file)
    done = align(file, python=public_python, wrapper=become(USER))
    if "No module named 'elftools'" in done.stderr:
        pytest.skip("no pyelftools for the interpreter that other users may run")
    assert (done.returncode, done.stderr) == (0, "")
    assert files.look(str(file)).state == files.ALIGNED
    assert align("--undo", file, python=public_python, wrapper=become(USER)).returncode == 0
    assert digest(file) == before


@as_root
def test_root_asks_no_python_that_a_service_user_can_exchange(tmp_path: Path) -> None:
    """A link to root's own is that user's, with the environment that it is in."""
    (home := tmp_path / "venv").mkdir()
    python, ran = home / "python", tmp_path / "ran"
    python.write_text(f"#!/bin/sh\necho ran >{ran}\n")
    python.chmod(0o755)
    for words in ([], ["--libraries"], ["--again"]):
        give(home)
        done = align("--python", python, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"--python {python}: others could exchange it" in done.stderr
        assert not ran.exists()
        give(home, 0)
    give(python)
    done = align("--python", python)
    assert done.returncode == 2 and f"and user {USER} can write to it" in done.stderr
    give(python, 0)
    assert not ran.exists()
    align("--python", python)
    assert ran.exists()


@as_root
def test_root_asks_no_python_by_way_of_what_a_service_user_can_exchange(tmp_path: Path) -> None:
    """A link in the middle, a directory, and what `..` is taken of: each by itself."""
    (root := tmp_path / "root").mkdir()
    (app := tmp_path / "app").mkdir()
    (root / "bin").mkdir()
    (python := root / "bin" / "python").write_text(f"#!/bin/sh\necho ran >{tmp_path / 'ran'}\n")
    python.chmod(0o755)
    (root / "twice").symlink_to(app / "python")
    (app / "python").symlink_to(python)
    (root / "current").symlink_to(app / "venv")
    (app / "venv").symlink_to("../root")
    (app / "deep").mkdir()
    ways = ["root/twice", "root/current/bin/python", "app/venv/bin/python", "app/python",
            "app/deep/../../root/bin/python"]  # fmt: skip
    give(app)
    for way in ways:
        for start in (f"{tmp_path}/", "./"):
            done = subprocess.run(
                [sys.executable, "-m", "page_primer", "align", "--python", start + way],
                cwd=tmp_path, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert f"{app}/" in done.stderr and "leads there, and others could" in done.stderr
            assert not (tmp_path / "ran").exists()
    give(app, 0)
    for way in ways:
        align("--python", tmp_path / way)
        (tmp_path / "ran").unlink()


@as_root
def test_root_asks_no_python_that_is_not_there(tmp_path: Path) -> None:
    (loop := tmp_path / "loop").symlink_to("loop")
    reasons = {tmp_path / "missing": "No such file or directory", loop: "too many links"}
    for path, why in reasons.items():
        done = align("--python", path)
        assert done.returncode == 2 and f"--python {path}: {why}" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.fixture
def held(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that page-primer-warm would say of that others map it in small pages."""

    said = {str(file): rewrite._HELD}
    monkeypatch.setattr(rewrite, "left_small", lambda path: said.get(path, ""))
    return file


def test_what_is_held_is_rewritten(held: Path) -> None:
    before, inode = digest(held), held.stat().st_ino
    assert rewrite.rewrite_held(str(held))
    assert digest(held) == before and held.stat().st_ino != inode


@as_root
def test_root_rewrites_nothing_that_a_service_user_can_exchange(held: Path) -> None:
    give(give(held).parent)
    inode = held.stat().st_ino
    with pytest.raises(Refused, match=f"others could exchange it: .* {USER}.*sudo -u"):
        rewrite.rewrite_held(str(held))
    assert held.stat().st_ino == inode and os.listdir(held.parent) == [held.name]
    give(held.parent, 0)  # who owns the file alone exchanges nothing, and nothing is executed
    assert rewrite.rewrite_held(str(held)) and held.stat().st_uid == USER


# Whatever the check says, nothing is looked up by its name a second time.


def align_it(path: str) -> None:
    files.align(path, python=None)


@pytest.fixture
def theirs(file: Path) -> Path:
    """Somebody's, in the same directory."""
    path = file.with_name("theirs")
    path.write_bytes(b"theirs")
    os.utime(path, ns=(1, 2))
    return path


@pytest.fixture
def exchanged(
    file: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """The new file is exchanged for another, or a link to one, as soon as there is one."""
    create = replace._create

    def exchange(new: str) -> int:
        fd = create(new)
        os.unlink(new)
        (os.link if request.param == "file" else os.symlink)(theirs, new)
        return fd

    monkeypatch.setattr(replace, "_create", exchange)
    yield file
    status = theirs.stat()
    assert theirs.read_bytes() == b"theirs" and status.st_mtime_ns == 2
    assert stat.S_IMODE(status.st_mode) == 0o644


@pytest.mark.parametrize("exchanged", ["file", "link"], indirect=True)
@pytest.mark.parametrize("verb", ["align", "undo", "rewrite"])
def test_a_new_file_that_is_exchanged(
    verb: str, library: Path, exchanged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if verb == "undo":
        with monkeypatch.context() as patched:
            patched.setattr(replace, "_create", CREATE)
            files.align(str(exchanged), python=None)
    said = {str(exchanged): rewrite._HELD}
    monkeypatch.setattr(rewrite, "left_small", lambda path: said.get(path, ""))
    before = digest(exchanged)
    act = {"align": align_it, "undo": files.undo, "rewrite": rewrite.rewrite_held}[verb]
    with pytest.raises(Refused, match="was replaced by another file"):
        act(str(exchanged))
    assert digest(exchanged) == before


def test_an_original_that_has_become_a_link(file: Path, tmp_path: Path) -> None:
    """Between the resolution of its path and its opening."""
    secret = tmp_path / "secret"
    file.rename(secret)
    file.symlink_to(secret)
    for act in (files.undo, align_it, files.check_place):
        with pytest.raises(Refused, match=r"^a symbolic link by now$"):
            act(str(file))
    assert files.look(str(file)).reason == "a symbolic link by now"


def test_a_directory_that_has_become_a_link(file: Path, tmp_path: Path) -> None:
    """What is written, executed and renamed lies in the directory that was checked."""
    place = file.parent
    with replace.to_replace(f"{tmp_path}/./place/libx.so") as old:
        assert old.path == str(file)
        place.rename(moved := tmp_path / "moved")
        place.symlink_to("/nonexistent")
        with pytest.raises(FileNotFoundError), replace.beside(old.path):
            pass
    assert os.listdir(moved) == [file.name]
