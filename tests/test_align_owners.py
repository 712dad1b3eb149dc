"""Whose the files are that `page-primer align` and `warm --rewrite` write, read and execute: what
other users can exchange meanwhile is refused, or is not what is written."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import recipes
from harness.elves import digest, file, library
from harness.service import USER, become, public, public_python

from page_primer.align import files, replace, targets
from page_primer.align.original import Refused
from page_primer.cli import main as cli
from page_primer.launcher import rewrite

__all__ = ["file", "library", "public", "public_python"]

as_root = pytest.mark.root("have files of several users")
OWNER = f"run this as its owner: sudo -u '#{USER}' page-primer ... (in a Dockerfile: USER {USER})"
CREATE = replace._create


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
    refused(file, f"others could exchange it: {place}; {both_ways(file.parent)}")


def both_ways(directory: Path) -> str:
    """With a file of root's below a service user's directory."""
    return (f"`chown 0 {directory}`, then `page-primer ...` as root; or `chown -R "
            f"{USER}:{USER} {directory}`, then `sudo -u '#{USER}' page-primer ...`")  # fmt: skip


@as_root
@pytest.mark.parametrize("owner", [0, USER], ids=["root", "user"])
@pytest.mark.parametrize("between", [False, True], ids=["beside", "below"])
def test_a_file_of_root_below_a_directory_of_a_service_user(
    between: bool, owner: int, library: Path, public: Path, public_python: str
) -> None:
    """As by root's `uv sync` in it: root and that user are told the same, both of which help."""
    give(public)
    place = public / "lib" if between else public
    place.mkdir(exist_ok=True)
    file = Path(shutil.copy2(library, place / "libx.so"))
    before = digest(file)
    told = align(file), align(file, python=public_python, wrapper=become(USER))
    assert "No module named" not in told[1].stderr
    reason = "failed: Permission denied" if between else "refused: its owner cannot be kept"
    assert told[1].stderr == f"{file}: {reason}; {both_ways(public)}\n"
    assert told[0].stderr.endswith(f"; {both_ways(public)}\n") and digest(file) == before
    subprocess.run(["chown", *["-R"] * bool(owner), f"{owner}:{owner}", public], check=True)
    done = align(file, python=public_python, wrapper=become(owner) if owner else None)
    assert (done.returncode, done.stderr) == (0, "")
    assert files.look(str(file)).state == files.ALIGNED and file.stat().st_uid == owner


@as_root
def test_a_file_of_a_service_user_in_a_directory_of_root(
    library: Path, public: Path, public_python: str
) -> None:
    file = give(Path(shutil.copy2(library, public / "libx.so")))
    done = align(file, python=public_python, wrapper=become(USER))
    assert done.stderr == (f"{file}: failed: Permission denied; its directory must be its owner's, "
                           "too, or the file root's\n")  # fmt: skip


@as_root
def test_a_file_of_root_where_others_may_not_write(
    library: Path, public: Path, public_python: str
) -> None:
    file = Path(shutil.copy2(library, public / "libx.so"))
    done = align(file, python=public_python, wrapper=become(USER))
    assert done.stderr == f"{file}: failed: Permission denied; run this as root\n"


@as_root
def test_a_group_that_its_owner_is_not_in(library: Path, public: Path, public_python: str) -> None:
    give(public)
    file = Path(shutil.copy2(library, public / "libx.so"))
    os.chown(file, USER, 0)
    done = align(file, python=public_python, wrapper=become(USER))
    assert done.stderr == (f"{file}: refused: its group 0 cannot be kept: run this as a member of "
                           "it\n")  # fmt: skip
    file.unlink()


@as_root
def test_libraries_that_others_could_exchange_are_counted(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What was found, not named: no failure, and said once more at the end."""
    monkeypatch.setenv("PAGE_PRIMER_ALIGNED", "/dev/null")
    places = []
    for name in ("own", "theirs", "written"):
        (tmp_path / name).mkdir()
        places.append(Path(shutil.copy2(library, tmp_path / name / "libx.so")))
    own, theirs, written = places
    found = targets.Interpreter(
        sys.executable, sys.executable, str(own), [str(theirs.parent), str(written.parent)]
    )
    monkeypatch.setattr(targets, "interpreter", lambda _: found)
    give(theirs.parent)
    written.chmod(0o777)
    assert cli.main(["align", "--libraries"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"{theirs}: refused: ") and lines[1].startswith(f"{written}: ref")
    assert lines[2].startswith("page-primer: 2 files left as found: others") and len(lines) == 3
    assert cli.main(["align", "--libraries", "--json"]) == 0 and capsys.readouterr().err == ""
    give(theirs.parent, 0)
    written.chmod(0o755)
    assert cli.main(["align", "--libraries"]) == 0 and capsys.readouterr().err == ""


@as_root
@pytest.mark.parametrize("above", [False, True], ids=["directory", "above"])
def test_root_aligns_nothing_where_others_can_write(above: bool, file: Path) -> None:
    directory = file.parent.parent if above else file.parent
    directory.chmod(0o775)
    which = f"{directory} above it" if above else "it"
    refused(file, f"others could exchange it: its directory is not ours alone: others can write "
                  f"to {which} (mode 0775); `chmod go-w {directory}`, then `page-primer ...` as "
                  "root")  # fmt: skip
    subprocess.run(["chmod", "go-w", directory], check=True)
    assert align(file).returncode == 0


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
    refused(file, f"it would be executed, and others can write to it; `chmod go-w {file}`, then")


@as_root
def test_nobody_is_an_owner_where_every_id_is_one_users(file: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    os.chown(file, nobody.pw_uid, nobody.pw_gid)
    what = f"it would be executed, and user {nobody.pw_uid} can write to it"
    where = f"(in a Dockerfile: USER {nobody.pw_uid})"
    refused(file, f"{what}; run this as its owner: sudo -u nobody page-primer ... {where}")


@as_root
def test_an_owner_without_a_name(file: Path) -> None:
    """In a user namespace all whom it does not map look like one, whom `nobody` is mostly."""
    give(file)
    namespace = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    done = align(file, wrapper=namespace)
    nameless = "its owner has no name here (65534 is anybody's): run this where it has one"
    text = f"{file}: refused: it would be executed, and user 65534 can write to it; {nameless}\n"
    assert (done.returncode, done.stderr) == (1, text)
    give(give(file, 0).parent)
    done = align(file, wrapper=namespace)
    assert done.returncode == 1 and done.stderr.endswith("; a file of root's belongs where root "
                                                         "alone can write\n")  # fmt: skip


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


@as_root
def test_one_list_of_root_and_a_service_user(
    library: Path, public: Path, public_python: str
) -> None:
    """As in docs/deploy/containers.md: root aligns, then the user, and the user's page-primer-warm
    reads what both have recorded in a directory of the user's."""
    recipe = recipes.block("containers.md", "FROM python", 1)
    home = recipe.partition("ENV PAGE_PRIMER_ALIGNED=")[2].partition("/aligned\n")[0]
    root, _, behind = recipe.partition("USER shop\n")
    assert home == "/home/shop" and f"WORKDIR {home}\n" in behind
    assert "page-primer align" in root and "page-primer align" in behind
    env = {**os.environ, "HOME": "/nonexistent", "PAGE_PRIMER_ALIGNED": str(public / "aligned")}
    files_ = []
    for user in (0, USER):
        (place := public.with_name(f"{public.name}-{user}")).mkdir()
        place.chmod(0o755)
        files_.append(give(Path(shutil.copy2(library, give(place, user) / "libx.so")), user))
    give(public)
    try:
        for user, file in zip((0, USER), files_, strict=True):
            done = subprocess.run(
                [*become(user), public_python, "-m", "page_primer", "align", file],
                capture_output=True, text=True, check=False, env=env,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "") and "not written" not in done.stdout
        warm = Path(sys.executable).with_name("page-primer-warm")
        done = subprocess.run([*become(USER), warm], capture_output=True, text=True, env=env)
        assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [
            str(file) for file in files_
        ], done.stdout + done.stderr
    finally:
        for file in files_:
            shutil.rmtree(file.parent)


@as_root
def test_a_file_that_cannot_be_looked_at_stays_in_the_list(
    file: Path, public: Path, public_python: str
) -> None:
    """It may be aligned as before: closed is not gone."""
    listed = public / "listed"
    listed.write_text(f"{file}\n")
    give(listed)
    give(public)
    file.parent.chmod(0o700)
    done = subprocess.run(
        [*become(USER), public_python, "-m", "page_primer", "align", "--undo", file],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PAGE_PRIMER_ALIGNED": str(listed)},
    )  # fmt: skip
    assert done.returncode == 1 and "struck" not in done.stdout + done.stderr
    assert listed.read_text() == f"{file}\n"


@as_root
def test_another_user_undoes_what_root_has_aligned(
    library: Path, public: Path, public_python: str
) -> None:
    """Root's list names the file until root strikes it, of which both are told."""
    (place := public / "place").mkdir()
    file = Path(shutil.copy2(library, place / "libx.so"))
    give(public)
    env = {**os.environ, "HOME": str(public), "XDG_STATE_HOME": str(public)}
    env.pop("PAGE_PRIMER_ALIGNED", None)
    align = f"{public_python} -m page_primer align"
    user = " ".join(become(USER))
    steps = [
        ("chown 0 PUBLIC", 0, ""),
        (f"{align} FILE", 0, "FILE: aligned: "),
        ("chown -R USER:USER PUBLIC", 0, ""),
        (f"{align} --undo FILE", 1, "FILE: refused: others could exchange it"),
        (f"{user} {align} --undo FILE", 0, "FILE: undone (root's list still names it: "
         "`page-primer align --undo FILE` as root)"),
        (f"{user} {align} --undo FILE", 1, "FILE: not aligned by page-primer (root's list still"),
        (f"{align} --again", 1, "FILE: refused: "),
        (f"{align} --undo --dry-run --json FILE", 0, "can be struck from the list"),
        (f"{align} --undo FILE", 0, "FILE: not aligned any more, struck from the list\n"),
        (f"{align} --again", 0, ""),
        (f"{align} --undo FILE", 1, "FILE: not aligned by page-primer\n"),
        ("echo FILE >/var/lib/page-primer/aligned; mv FILE FILE.moved", 0, ""),
        (f"{align} --undo FILE", 0, "FILE: not aligned any more, struck from the list\n"),
        ("cat /var/lib/page-primer/aligned", 0, ""),
    ]  # fmt: skip
    with subprocess.Popen(
        ["unshare", "--mount", "sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=env,
    ) as shell:  # fmt: skip
        names = {"FILE": str(file), "PUBLIC": str(public), "USER": str(USER)}
        script = ["mount -t tmpfs -o mode=755 tmpfs /var/lib || exit"]
        script += [f'{step}; echo "=$?="' for step, _, _ in steps]
        said, _ = shell.communicate(filled("\n".join(script), names))
    outputs = re.findall(r"(.*?)=(\d+)=\n", said, re.DOTALL)
    if not outputs:
        pytest.skip(f"no tmpfs can be mounted here: {said}")
    assert len(outputs) == len(steps), said
    for (step, status, text), (output, ended) in zip(steps, outputs, strict=True):
        assert int(ended) == status, (step, output)
        assert filled(text, names) in output and bool(text) == bool(output), (step, output)


def filled(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(name, value)
    return text


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
