"""page-primer align, the command: which files, the list, the table; and what must be refused or
goes wrong, after which the original is as it was and nothing else is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from harness.elves import (
    SOURCE,
    answers,
    digest,
    file,
    library,
    link,
    loaded,
    loads,
    same_in_memory,
)
from harness.interpreters import INTERPRETERS, KINDS, is_shared
from harness.outside import PMD
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from page_primer.align import aligned, rewrite, targets
from page_primer.align import files as align
from page_primer.align.files import ALIGNED, CAN_BE
from page_primer.align.original import Refused
from page_primer.cli import main as cli

__all__ = ["file", "library"]

ROOT = os.geteuid() == 0
needs_root = pytest.mark.root("have other users and file capabilities")


@pytest.fixture(autouse=True)
def own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of aligned files of the test's own, not the machine's."""
    path = tmp_path / "state" / "aligned"
    monkeypatch.setenv(aligned.VARIABLE, str(path))
    return path


def command(
    *arguments: str | Path, wrapper: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    line = [*wrapper, sys.executable, "-m", "page_primer", "align", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def rows(*arguments: str | Path) -> list[dict[str, Any]]:
    return json.loads(command(*arguments, "--json").stdout)


def unchanged(file: Path, before: str) -> bool:
    """Whether a file is as it was, alone in its directory."""
    return digest(file) == before and os.listdir(file.parent) == [file.name]


@pytest.mark.slow
def test_align_check_undo(file: Path, own_list: Path) -> None:
    before = digest(file)
    assert command("--check", file).returncode == 1
    assert "can be aligned" in command("--dry-run", file).stdout
    assert digest(file) == before and not own_list.exists()

    done = command(file)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(f"{file}: aligned: ")
    assert own_list.read_text() == f"{file}\n"
    assert aligned.listed(str(file))

    (row,) = rows("--check", file)
    assert row["state"] == ALIGNED and row["chunks"] == 1
    assert 0 == row["before"] < row["after"] <= row["code"]
    table = command("--check", file)
    assert table.returncode == 0 and str(file) in table.stdout

    now = digest(file)
    assert command(file).returncode == 0 and digest(file) == now
    assert own_list.read_text() == f"{file}\n"

    assert command("--undo", "--dry-run", file).returncode == 0 and digest(file) == now
    assert command("--undo", file).returncode == 0
    assert unchanged(file, before) and own_list.read_text() == ""
    again = command("--undo", file)
    assert again.returncode == 1 and "not aligned by page-primer" in again.stdout


@pytest.mark.parametrize("size", [PMD // 2, 2 * PMD, 16 * PMD], ids=["smaller", "larger", "huge"])
def test_undone_on_a_machine_with_huge_pages_of_another_size(
    size: int, tmp_path: Path, own_list: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A disk's image is made on one, and started on another."""
    source = SOURCE.replace(f".fill {PMD + PMD // 2}", f".fill {5 * PMD}")
    (tmp_path / "place").mkdir()
    file = link(tmp_path / "place/libx.so", "-Wl,-z,separate-code", source=source)
    file.with_suffix(".c").unlink()
    before = digest(file)
    assert cli.main(["align", str(file)]) == 0
    now = digest(file)
    monkeypatch.setattr(align, "pmd_size", lambda: size)
    # What is to be had is not laid over what there is, of which one undo would give that back.
    state = align.look(str(file))
    if size == 2 * PMD:
        assert cli.main(["align", str(file)]) == 1
        assert "for huge pages of another size: undo that first" in capsys.readouterr().err
        assert state.state == "refused"
    assert cli.main(["align", "--undo", "--dry-run", str(file)]) == 0
    assert "can be undone" in capsys.readouterr().out
    assert digest(file) == now and own_list.read_text() == f"{file}\n"
    assert cli.main(["align", "--undo", str(file)]) == 0
    assert unchanged(file, before) and own_list.read_text() == ""


def test_a_device_is_no_list(file: Path, own_list: Path) -> None:
    """PAGE_PRIMER_ALIGNED=/dev/null; the test's own link keeps /dev out of it."""
    own_list.parent.mkdir()
    own_list.symlink_to("/dev/null")
    assert command(file).returncode == 0
    assert align.look(str(file)).state == ALIGNED
    assert own_list.is_symlink() and own_list.is_char_device()


@pytest.mark.slow
def test_an_upgrade_is_noticed_and_mended(file: Path, library: Path) -> None:
    assert command(file).returncode == 0
    shutil.copy2(library, file.with_name("upgrade"))
    os.replace(file.with_name("upgrade"), file)
    found = command("--check")
    assert found.returncode == 1
    line = next(line for line in found.stdout.splitlines() if str(file) in line)
    assert line.endswith("no longer aligned")
    assert command("--again").returncode == 0
    assert align.look(str(file)).state == ALIGNED
    shutil.copy2(library, file.with_name("upgrade"))
    os.replace(file.with_name("upgrade"), file)
    assert command("--undo", file).stdout.startswith(f"{file}: not aligned")
    assert not command("--check").stdout.count(str(file))  # nor looked after any longer
    assert command(file).returncode == 0
    file.unlink()  # removed by its package: not an error
    done = command("--again")
    assert done.returncode == 0 and not done.stderr


def test_what_is_said_of_a_file_stays(file: Path) -> None:
    os.chmod(file, 0o751)
    names = {"user.note": b"kept"}
    if ROOT:  # a file of another user's root would not execute, and so not align
        os.chown(file, 0, 4003)
        # Of POSIX.1e: version 2; user::rwx, user 4004 r-x, group::r-x, mask r-x, other --x.
        entries = [(1, 7, -1), (2, 5, 4004), (4, 5, -1), (16, 5, -1), (32, 1, -1)]
        acl = b"\x02\0\0\0" + b"".join(struct.pack("<HHi", *entry) for entry in entries)
        names["system.posix_acl_access"] = acl
    try:
        for name, value in names.items():
            os.setxattr(file, name, value)
    except OSError as error:
        pytest.skip(f"no extended attributes in the temporary directory ({error.strerror})")
    os.utime(file, ns=(1_700_000_000_123_456_789, 1_600_000_000_987_654_321))

    def said() -> list[object]:
        status = os.stat(file)
        return [status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns,
                {name: os.getxattr(file, name) for name in sorted(os.listxattr(file))}]  # fmt: skip

    before, original = said(), digest(file)
    assert command(file).returncode == 0 and align.look(str(file)).state == ALIGNED
    assert said() == before
    if ROOT:
        os.chown(file, 4002, 4003)
        before[1] = 4002
    assert command("--undo", file).returncode == 0
    assert said() == before and unchanged(file, original)


def test_links(file: Path) -> None:
    """A symbolic link stays one; another hard link (uv's and conda's caches) keeps the old file."""
    before = digest(file)
    other, symbolic = file.with_name("other"), file.with_name("symbolic")
    os.link(file, other)
    symbolic.symlink_to("libx.so")
    done = command(symbolic)
    assert done.returncode == 0 and "1 other hard link" in done.stdout
    assert symbolic.is_symlink() and digest(other) == before
    assert align.look(str(file)).state == ALIGNED


def test_a_running_process_keeps_its_file(file: Path) -> None:
    program = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); print(lib.answer(0), flush=True)\n"
        "input(); lib.filling(); print(lib.answer(0))"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(file)], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout and process.stdout.readline()
        assert command(file).returncode == 0
        out, _ = process.communicate("\n")
    assert process.returncode == 0 and out.strip()


def test_default_is_the_interpreter() -> None:
    for python in KINDS.values():
        (row,) = rows("--dry-run", "--python", python)
        assert ("libpython" in os.path.basename(row["path"])) == is_shared(python)
        assert row["state"] != "refused"


def test_libraries(tmp_path: Path, library: Path) -> None:
    """Found in the environment's own site-packages, vendored ones under *.libs too; those without
    a whole huge page of code are not mentioned."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (site,) = home.glob("lib/python3*/site-packages")
    for name in ("package/extension.cpython.so", "package.libs/libx-1a2b.so.3", "package/data.txt"):
        (site / name).parent.mkdir(exist_ok=True)
        shutil.copy2(library, site / name)
    link(site / "small.so", source="int small;")
    (site / "text.so").write_text("INPUT(libc.so.6)" * PMD)
    python = str(home / "bin/python")
    found = {os.path.relpath(row["path"], site): row["state"]
             for row in rows("--dry-run", "--libraries", "--python", python)
             if row["path"].startswith(str(site))}  # fmt: skip
    expected = {"package/extension.cpython.so": CAN_BE, "package.libs/libx-1a2b.so.3": CAN_BE}
    assert {path: state for path, state in found.items() if path != "text.so"} == expected


def test_libraries_that_links_lead_to(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """uv's cache with --link-mode symlink, say: of other environments as well."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (site,) = home.glob("lib/python3*/site-packages")
    cache = site.with_name("site-packages-cache")
    for folder in (cache, site / "package"):
        folder.mkdir()
    shared = Path(shutil.copy2(library, cache / "shared.so"))
    (site / "shared.so").symlink_to(shared)
    own = Path(shutil.copy2(library, site / "package/own.so"))
    (site / "link.so").symlink_to(own)
    options = ["--libraries", "--python", str(home / "bin/python")]

    def states(*more: str) -> dict[str, tuple[str, bool]]:
        found = {row["path"]: row for row in rows(*more, *options)}
        return {path: (row["state"], "link leads there" in row["reason"])
                for path, row in found.items() if path in (str(shared), str(own))}  # fmt: skip

    before = digest(shared)
    for dry in ("--check", "--dry-run"):
        assert states(dry) == {str(shared): ("refused", True), str(own): (CAN_BE, False)}
    # The interpreter itself stays as it is, which others use, too.
    found = targets.Interpreter(sys.executable, sys.executable, str(own), [str(site)])
    monkeypatch.setattr(targets, "interpreter", lambda _: found)
    assert cli.main(["align", "--libraries"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{own}: aligned: ")
    assert (
        said.err.startswith(f"{shared}: refused: a link leads there") and digest(shared) == before
    )
    assert states("--check") == {str(shared): ("refused", True), str(own): (ALIGNED, False)}
    assert command(shared).returncode == 0
    now = digest(shared)
    assert states("--check")[str(shared)] == (ALIGNED, False)
    assert states("--undo", "--dry-run")[str(shared)] == ("refused", True)
    assert states("--undo", "--dry-run")[str(own)] == ("can be undone", False)
    assert digest(shared) == now and command("--undo", shared).returncode == 0
    assert digest(shared) == before


def test_another_python_is_an_error(tmp_path: Path) -> None:
    assert command("--python", "/bin/true").returncode == 2
    python = Path(shutil.copy2(next(iter(KINDS.values())), tmp_path / "python3"))
    edited(python, 1, 2, 16, 1 << 44)
    done = command("--python", python)
    assert done.returncode == 2 and "too far apart" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert command("--again", "/bin/true").returncode == 2


# What must be refused, each with one line.


def refused(file: Path, text: str) -> None:
    before = digest(file)
    # Work is bounded by the file's size: here, by 30 seconds of processor time.
    done = command(file, wrapper=["prlimit", "--cpu=30"])
    assert done.returncode == 1 and text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert unchanged(file, before)


@pytest.mark.parametrize("bit", [0o4755, 0o2755])
def test_set_id(bit: int, file: Path) -> None:
    os.chmod(file, bit)
    refused(file, "setuid or setgid")


@needs_root
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0), "capabilities"),
        ("security.ima", b"\x04\x04" + bytes(32), "IMA"),
    ],
)
def test_attributes_that_rest_on_content(name: str, value: bytes, text: str, file: Path) -> None:
    try:
        os.setxattr(file, name, value)
    except OSError as error:
        pytest.skip(f"{name} cannot be set here ({error.strerror})")
    refused(file, text)


@needs_root
@pytest.mark.parametrize("flag", ["i", "a"])
def test_flags_of_the_file_system(flag: str, file: Path) -> None:
    """Read as the one of fs-verity is, which few kernels have."""
    chattr = shutil.which("chattr", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if chattr is None:
        pytest.skip("no chattr (Debian's e2fsprogs)")
    done = subprocess.run([chattr, f"+{flag}", file], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no such flag here ({done.stderr.strip()})")
    try:
        refused(file, "immutable or append-only")
    finally:
        subprocess.run([chattr, f"-{flag}", file], check=True)


def edited(file: Path, kind: int, flag: int, field: int, change: int) -> None:
    """Change a field of the first program header of a kind that has a flag."""
    data = bytearray(file.read_bytes())
    (table,), (count,) = struct.unpack_from("=Q", data, 32), struct.unpack_from("=H", data, 56)
    for at in range(table, table + 56 * count, 56):
        if struct.unpack_from("=I", data, at)[0] == kind and data[at + 4] & flag:
            (value,) = struct.unpack_from("=Q", data, at + field)
            struct.pack_into("=Q", data, at + field, (value + change) % (1 << 64))
            break
    file.write_bytes(data)


@pytest.mark.parametrize("shift", [44, 62, 63])
def test_far_segments(shift: int, file: Path) -> None:
    edited(file, 1, 2, 16, 1 << shift)
    refused(file, "far apart" if shift < 63 else "")


@pytest.mark.parametrize("shift", [40, 62])
def test_huge_read_only_memory(shift: int, file: Path) -> None:
    edited(file, 1, 1, 40, 1 << shift)  # p_memsz of the code
    refused(file, "segments")


def test_headers_in_two_segments(file: Path) -> None:
    """What the second has of them must not change, and would."""
    (code,) = [load for load in loads(file) if load["p_flags"] & 1]
    edited(file, 1, 1, 8, -code["p_offset"])  # p_offset of the code
    refused(file, "two of its segments have its headers")


@pytest.mark.slow
def test_not_for_us(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:18] + b"\x08\x00" + data[20:])
    refused(file, "another machine")
    file.write_bytes(data[:4] + b"\x01" + data[5:])
    refused(file, "not a usable ELF file")
    file.write_bytes(data[:16] + b"\x04\x00" + data[18:])
    refused(file, "neither a program nor a shared library")
    file.write_text("#!/bin/sh\n")
    refused(file, "not an ELF file")
    file.write_bytes(b"")
    refused(file, "not an ELF file")
    file.write_bytes(data + b"PK appended, as self-extracting programs have it")
    refused(file, "appended")
    missing = command(tmp_path / "missing")
    assert missing.returncode == 1 and "No such file" in missing.stderr
    assert "not a regular file" in command(tmp_path).stderr


def test_text_relocations(tmp_path: Path) -> None:
    source = SOURCE + '__asm__(".text\\n.globl moved\\nmoved: .quad answer\\n");'
    (tmp_path / "place").mkdir()
    file = link(tmp_path / "place/libx.so", "-Wl,-z,notext", source=source)
    file.with_suffix(".c").unlink()
    refused(file, "text relocations")


@pytest.mark.parametrize("kind", ["-static", "-static-pie"])
def test_statically_linked(kind: str, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    source = SOURCE + "int main(void) { return 0; }"
    file = link(tmp_path / "place/program", kind, source=source)
    file.with_suffix(".c").unlink()
    refused(file, "statically linked")


def test_musl(tmp_path: Path) -> None:
    if shutil.which("musl-gcc") is None:
        pytest.skip("no musl-gcc (Debian's package musl-tools)")
    (tmp_path / "place").mkdir()
    file, code = tmp_path / "place/libx.so", tmp_path / "x.c"
    code.write_text(SOURCE)
    subprocess.run(["musl-gcc", "-shared", "-fPIC", "-o", file, code], check=True)
    with open(file, "rb") as handle:
        if b"libc.musl" not in handle.read():
            # Debian's musl-gcc links against a libc.so without the distribution's name.
            alpine = tmp_path / "libc.so"
            subprocess.run(["gcc", "-shared", "-nostdlib", "-Wl,-soname,libc.musl-x86_64.so.1",
                            "-o", alpine, "-x", "c", "/dev/null"], check=True)  # fmt: skip
            subprocess.run(["gcc", "-shared", "-fPIC", "-nostdlib", "-Wl,--no-as-needed",
                            "-o", file, code, alpine], check=True)  # fmt: skip
    refused(file, "musl")


def test_no_code_to_speak_of(tmp_path: Path) -> None:
    file = link(tmp_path / "small.so", source="int f(void) { return 1; }")
    before = digest(file)
    done = command(file)
    assert done.returncode == 0 and "no whole huge page" in done.stdout
    assert digest(file) == before
    assert command("--check", file).returncode == 0


# What goes wrong.


@needs_root
@pytest.mark.parametrize("kind", ["full", "read-only", "other's"])
def test_directories_that_do_not_take_it(kind: str, file: Path) -> None:
    before, place = digest(file), file.parent
    wrapper, text = ["unshare", "--mount", "sh", "-ec"], "No space left"
    if kind == "other's":
        # The user may read the file, and execute Python, but not write here.
        wrapper = ["setpriv", "--reuid", "4002", "--regid", "4002", "--clear-groups"]
        if subprocess.run([*wrapper, sys.executable, "-c", "import page_primer.cli.main"],
                          capture_output=True).returncode:  # fmt: skip
            pytest.skip("other users cannot execute this Python")
        for directory in (place, *place.parents):
            if not os.stat(directory).st_mode & 1:
                os.chmod(directory, 0o755)
        done = command(file, wrapper=wrapper)
        assert done.returncode == 1 and "Permission denied; run this as root" in done.stderr
    else:
        size = file.stat().st_size * 3 // 2
        mount = f"mount -t tmpfs -o size={size} tmpfs {place}; cp -p {place}/../copy {file};"
        if kind == "read-only":
            mount, text = f"mount --bind {place} {place}; mount -o remount,bind,ro {place};", "Read"
        shutil.copy2(file, place.parent / "copy")
        script = f"{mount} {sys.executable} -m page_primer align {file} || echo failed $?;" + (
            f"ls -A {place}; sha256sum {file}"
        )
        done = subprocess.run([*wrapper, script], capture_output=True, text=True)
        assert text in done.stderr and len(done.stderr.splitlines()) == 1
        failed, name, sum_ = done.stdout.splitlines()
        assert (failed, name, sum_.split()[0]) == ("failed 1", file.name, before)
    assert unchanged(file, before)


STEPS = ["rewrite.write", "verify.check", "replace.copy_attributes", "trial.run",
         "replace.put_in_place"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("step", STEPS)
def test_ended_at_a_step(step: str, number: signal.Signals, file: Path, own_list: Path) -> None:
    before = digest(file)
    module, name = step.split(".")
    program = (
        "import signal, sys, time\nfrom page_primer.cli import main as cli\n"
        # Whatever this runs under, a nohup for one, ignores.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"from page_primer.align import {module}\n"
        f"def wait(*arguments):\n    print('here', flush=True)\n    time.sleep(60)\n"
        f"{module}.{name} = wait\nsys.exit(cli.main(['align', {str(file)!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL) as process:  # fmt: skip
        assert process.stdout and process.stdout.readline() == "here\n"
        busy = command(file)
        assert busy.returncode == 1 and "by another process" in busy.stderr
        process.send_signal(number)
        assert process.wait(20) != 0
    assert digest(file) == before and not own_list.exists()
    left = set(os.listdir(file.parent)) - {file.name}
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    # The next one removes what a killed one has left, and is not kept from its work.
    assert command(file).returncode == 0
    assert align.look(str(file)).state == ALIGNED and os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("step", STEPS)
def test_failing_at_a_step(step: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    before = digest(file)
    monkeypatch.setattr(f"page_primer.align.{step}", fail)
    with pytest.raises(OSError, match="No space"):
        align.align(str(file), python=sys.executable)
    assert unchanged(file, before)


def test_a_new_file_that_does_not_work(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check by itself stops a file that was written wrong."""
    before, write = digest(file), rewrite.write

    def wrong(original: Any, layout: Any, target: int, block: int) -> None:
        write(original, layout, target, block)
        at = original.loads[1].p_vaddr + layout.delta + PMD // 2
        os.pwrite(target, b"\xcc", at)

    monkeypatch.setattr("page_primer.align.rewrite.write", wrong)
    with pytest.raises(Refused, match="failed its check"):
        align.align(str(file), python=sys.executable)
    assert unchanged(file, before)
    monkeypatch.setattr("page_primer.align.verify.check", Mock())
    with pytest.raises(Refused, match="cannot be made of it"):
        align.align(str(file), python=sys.executable)
    assert unchanged(file, before)

    def headless(original: Any, layout: Any, target: int, block: int) -> None:
        write(original, layout, target, block)
        os.pwrite(target, b"\0\0", 18)  # e_machine

    monkeypatch.setattr("page_primer.align.rewrite.write", headless)
    monkeypatch.setattr("page_primer.align.rewrite.restore", Mock())
    with pytest.raises(Refused, match="failed its trial"):
        align.align(str(file), python=sys.executable)
    assert unchanged(file, before)


def test_list_that_cannot_be_written(file: Path, own_list: Path) -> None:
    own_list.parent.write_text("in the way")
    done = command(file)
    assert done.returncode == 0 and "not written" in done.stdout
    assert align.look(str(file)).state == ALIGNED


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_mutated_files(library: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever a file says: it is refused, or what is loaded of it is the same, and it can be
    undone."""
    content = bytearray(library.read_bytes())
    (table,), (sections,) = struct.unpack_from("=Q", content, 32), struct.unpack_from(
        "=Q", content, 40)  # fmt: skip
    headers = st.one_of(st.integers(0, 63), st.integers(table, table + 56 * 9),
                        st.integers(sections, len(content) - 1))  # fmt: skip
    for at in data.draw(st.lists(headers, min_size=1, max_size=4)):
        content[at] = data.draw(st.sampled_from([0, 1, 2, 5, 7, 0x10, 0x40, 0x7F, 0x80, 0xFF]))
    file = tmp_path / "mutated.so"
    file.write_bytes(content)
    state = align.look(str(file))
    if state.state != CAN_BE:
        assert state.reason or state.state != "refused"
        return
    before, original = loaded(file), digest(file)
    try:
        align.align(str(file), python=None)
    except Refused:
        assert digest(file) == original
        return
    assert same_in_memory(before, loaded(file))
    align.undo(str(file))
    assert digest(file) == original


@pytest.mark.slow
@given(st.data())
@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_mutated_records(library: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A damaged record gives the original or nothing."""
    file = tmp_path / "recorded.so"
    shutil.copy2(library, file)
    align.align(str(file), python=None)
    content = bytearray(file.read_bytes())
    record = next(
        i for i in range(len(content) - 1, 0, -1) if content[i : i + 11] == b"page-primer"
    )
    for at in data.draw(st.lists(st.integers(record - 600, len(content) - 1), min_size=1)):
        content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        align.undo(str(file))
    except Refused:
        assert file.read_bytes() == content
    else:
        assert digest(file) == digest(library)


def test_answers_of_the_aligned(file: Path) -> None:
    expected = answers(file)
    assert command(file).returncode == 0
    assert answers(file) == expected
    assert INTERPRETERS
