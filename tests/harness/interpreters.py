"""Interpreters to test under."""

from __future__ import annotations

import atexit
import functools
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

import page_primer

__all__ = ["BASE", "INTERPRETERS", "KINDS", "MEASURED", "is_shared", "python_of"]


# Of an environment that is made anew, what `make coverage` needs.
MEASURED = {name: os.environ[name] for name in ["COVERAGE_PROCESS_START"] if name in os.environ}

# The one that the running virtual environment is of.
BASE: str = sys._base_executable  # type: ignore[attr-defined]


def _interpreters() -> dict[str, str]:
    """Every CPython since 3.10 on this machine: version and a number -> path."""
    places = [
        "/usr/bin/python3.[0-9]*",
        "/usr/local/bin/python3.[0-9]*",
        os.path.expanduser("~/.pyenv/versions/*/bin/python3.[0-9]*"),
        BASE,
    ]
    found: dict[str, str] = {}
    seen = set()
    for path in [path for place in places for path in sorted(glob.glob(place))]:
        real = os.path.realpath(path)
        named = re.fullmatch(r"python(3(\.\d+)?)?", os.path.basename(path))
        if real in seen or not named or not os.access(path, os.X_OK):
            continue
        seen.add(real)
        question = (
            "import sys, sysconfig, json; print(json.dumps([sys.version_info[:3], "
            "sys.implementation.name, bool(sysconfig.get_config_var('Py_GIL_DISABLED'))]))"
        )
        answer = subprocess.run(
            [path, "-I", "-S", "-c", question], capture_output=True, text=True, check=False
        )
        if answer.returncode:
            continue
        version, implementation, free_threaded = json.loads(answer.stdout)
        # The stable ABI that the tests' own build has does not cover free-threaded builds.
        if implementation == "cpython" and tuple(version) >= (3, 10) and not free_threaded:
            number = ".".join(map(str, version))
            found.setdefault(f"{number}-{len(found)}", path)
    return found


INTERPRETERS = _interpreters()


def is_shared(python: str) -> bool:
    """Whether an interpreter's code is in a libpython."""
    with open(os.path.realpath(python), "rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        needed = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")] if dynamic else []
    return any(name.startswith("libpython") for name in needed)


# One interpreter of each kind; of the version that the tests' packages are installed for, if there
# is one.
KINDS = {
    "shared" if is_shared(path) else "static": path
    for path in sorted(
        INTERPRETERS.values(),
        key=lambda path: f"python{sys.version_info[0]}.{sys.version_info[1]}" in path,
    )
}


@functools.cache
def _empty(base: str) -> Path:
    """A virtual environment without anything in it, which is copied: to make one takes 70 ms of
    processor time, and the suite has hundreds."""
    directory = tempfile.mkdtemp(prefix="page-primer-venv-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    subprocess.run([base, "-m", "venv", "--without-pip", f"{directory}/venv"], check=True)
    return Path(directory, "venv")


def python_of(tmp: Path, base: str) -> str:
    """A virtual environment of an interpreter that sees what this test run has installed: all of it
    is pure Python, or built for the stable ABI."""
    home = tmp / "venv"
    if not home.exists():
        if base in (BASE, *INTERPRETERS.values()):
            # Of its own path it has only what the shell's `activate` sets.
            shutil.copytree(_empty(base), home, symlinks=True)
        else:
            subprocess.run([base, "-m", "venv", "--without-pip", str(home)], check=True)
        packages = next(home.glob("lib/python3.*/site-packages"))
        paths = [str(Path(page_primer.__file__).parents[1]), sysconfig.get_path("purelib")]
        if MEASURED:
            paths.append("import measured")
        (packages / "tests.pth").write_text("\n".join(paths) + "\n")
    return str(home / "bin" / "python")
