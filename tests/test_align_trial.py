"""The trial of `page-primer align`: programs that are not interpreters are mapped and relocated by
their loader, whichever it is, and not run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.elves import SOURCE, digest

from page_primer.align import files, trial
from page_primer.align.original import Refused

GLIBC = next((path for path in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")
              if os.path.exists(path)), "")  # fmt: skip
RUNS = """
#include <stdlib.h>
#include <fcntl.h>
__attribute__((constructor)) void begin(void) { close(creat(getenv("RAN"), 0600)); }
int main(int n, char **v) { return answer(n); }
"""


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a program of these leaves as soon as it is run."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    return tmp_path / "ran"


def program(tmp_path: Path, *options: str, compiler: str = "gcc") -> Path:
    """A program of one huge page of code or more, whose functions may be missing."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} (Debian's packages gcc and musl-tools)")
    (tmp_path / "place").mkdir()
    file, code = tmp_path / "place" / "program", tmp_path / "program.c"
    code.write_text(f"int close(int);\n{SOURCE}{RUNS}")
    subprocess.run([compiler, "-O1", *options, "-o", file, code], check=True)
    return file


@pytest.mark.parametrize("kind", ["-no-pie", "-pie"])
@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
def test_a_program_is_not_run(compiler: str, kind: str, tmp_path: Path, ran: Path) -> None:
    file = program(tmp_path, kind, compiler=compiler)
    expected = subprocess.run([file]).returncode
    assert ran.exists()
    ran.unlink()
    assert files.align(str(file), python=None) is None
    assert files.look(str(file)).state == files.ALIGNED and not ran.exists()
    assert subprocess.run([file]).returncode == expected and ran.exists()


def test_a_program_that_cannot_be_relocated(tmp_path: Path, ran: Path) -> None:
    """musl's list says more than that it can be mapped. (glibc's has such in its output alone.)"""
    code, library = tmp_path / "missing.c", tmp_path / "libmissing.so"
    code.write_text("int missing;")
    subprocess.run(["gcc", "-shared", "-nostdlib", "-o", library, code], check=True)
    (other := tmp_path / "other.c").write_text("extern int missing; int *needs = &missing;")
    options = ["-pie", "-fPIC", str(other), str(library), f"-Wl,-rpath,{tmp_path}"]
    file = program(tmp_path, *options, compiler="musl-gcc")
    assert files.align(str(file), python=None) is None
    files.undo(str(file))
    code.write_text("int another;")
    subprocess.run(["gcc", "-shared", "-nostdlib", "-o", library, code], check=True)
    note = files.align(str(file), python=None)
    assert note is not None and "not tried: the original cannot be loaded either" in note
    assert "missing" in note and not ran.exists()


@pytest.mark.parametrize(
    "loader", ["another", "missing", "ld-linux-x86-64.so.2"], ids=["another", "missing", "by name"]
)
def test_a_loader_that_would_run_it(loader: str, tmp_path: Path, ran: Path) -> None:
    """musl's under another name, which takes a program's path and nothing of glibc's variables."""
    musl = Path("/lib/ld-musl-x86_64.so.1")
    if not musl.exists():
        pytest.skip("no musl (Debian's package musl)")
    path = tmp_path / loader
    file = program(tmp_path, f"-Wl,--dynamic-linker={path}", compiler="musl-gcc")
    if loader != "missing":
        path.symlink_to(musl)
        subprocess.run([file])
        assert ran.exists()
        ran.unlink()
    before = digest(file)
    text = f"it cannot be tried without being run: {path} is not glibc's or musl's loader"
    with pytest.raises(Refused, match=re.escape(text)):
        files.align(str(file), python=None)
    state = files.look(str(file))
    assert (state.state, state.reason) == (files.REFUSED, text)
    assert digest(file) == before and os.listdir(file.parent) == [file.name] and not ran.exists()


def test_an_aligned_program_that_its_loader_refuses(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = program(tmp_path, compiler="musl-gcc")
    before, list_ = digest(file), trial._listed

    def broken(command: list[str], variables: dict[str, str]) -> trial.Answer:
        if command[-1] != str(file):
            os.truncate(command[-1], 4096)
        return list_(command, variables)

    monkeypatch.setattr(trial, "_listed", broken)
    with pytest.raises(Refused, match="the new file failed its trial"):
        files.align(str(file), python=None)
    assert digest(file) == before and not ran.exists()


def test_the_name_that_a_loader_has(tmp_path: Path) -> None:
    assert trial._soname(GLIBC) == os.path.basename(GLIBC)
    (text := tmp_path / "text").write_text("not ELF")
    for path in (text, tmp_path / "missing", tmp_path, "a\0b"):
        assert trial._soname(str(path)) == ""
