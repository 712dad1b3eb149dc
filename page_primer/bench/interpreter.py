"""The variant `aligned`: the user's command on an aligned copy of its interpreter.

The user's files are left alone. Of an interpreter whose code is in a libpython the library is
copied, aligned, and found through LD_LIBRARY_PATH; of one that is a single program, the program,
into a virtual environment whose packages are the user's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from page_primer.align import files as align
from page_primer.align import targets
from page_primer.align.original import Refused
from page_primer.bench.failures import Failure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LONG_SHEBANG = re.compile(rb"#!/bin/sh\n'''exec' \"?([^\"\n]+?)\"? \"\$0\"")  # pip's
_DISK = "/var/tmp"  # /tmp may be a tmpfs, which does not have huge pages by itself
_SECONDS = 60


@dataclass(frozen=True)
class Start:
    """A command, taken apart: the interpreter, its options of a `#!` line, and the rest."""

    python: str
    options: tuple[str, ...]
    rest: tuple[str, ...]


@dataclass(frozen=True)
class Aligned:
    """How to start the command on the aligned interpreter."""

    command: list[str]
    environment: dict[str, str]


def start_of(command: Sequence[str], environ: Mapping[str, str]) -> Start:
    """Find the interpreter that a command is run by.

    Raises:
        Failure: it is not started by a Python.
    """
    path = shutil.which(command[0], path=environ.get("PATH"))
    if path is None:
        raise Failure(f"{command[0]}: command not found")
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    if not head.startswith(b"#!"):
        return Start(path, (), tuple(command[1:]))
    words = os.fsdecode(head[2:].split(b"\n")[0]).split()
    if found := _LONG_SHEBANG.match(head):
        words = [os.fsdecode(found[1])]
    elif words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if word != "-S"] or [""]
        words[0] = shutil.which(words[0], path=environ.get("PATH")) or words[0]
    runs = words[0] if words else ""
    if not os.path.basename(runs).startswith("python"):
        raise Failure(
            f"aligned: {command[0]} is run by {runs or 'nothing'}, not by a Python; name the "
            f"interpreter, for example `python -m {os.path.basename(command[0])}`"
        )
    return Start(words[0], tuple(words[1:]), (path, *command[1:]))


class Copy:
    """A directory with the aligned copy, for as long as the context lasts."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._command, self._environ = command, environ

    def __enter__(self) -> Aligned:
        place = _DISK if os.access(_DISK, os.W_OK) else None
        self._directory = tempfile.TemporaryDirectory(prefix="page-primer-bench-", dir=place)
        try:
            return self._make(self._directory.name)
        except BaseException as error:
            self._directory.cleanup()
            if isinstance(error, OSError | subprocess.TimeoutExpired):
                raise Failure(f"aligned: {error}") from None
            raise

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    def _make(self, directory: str) -> Aligned:
        start = start_of(self._command, self._environ)
        try:
            found = targets.interpreter(start.python)
        except ValueError as error:
            raise Failure(f"aligned: {error}") from None
        environment: dict[str, str] = {}
        if found.code == found.program:
            copy = os.path.join(directory, "bin", os.path.basename(start.python))
            _lay_out(directory, start.python, found.program)
            python = copy
        else:
            library = os.path.join(directory, "lib")
            os.mkdir(library)
            copy = os.path.join(library, os.path.basename(found.code))
            before = self._environ.get("LD_LIBRARY_PATH", "")
            environment["LD_LIBRARY_PATH"] = f"{library}:{before}".rstrip(":")
            python = start.python
        shutil.copy(found.code, copy)
        try:
            if align.look(copy).state != align.ALIGNED:
                align.align(copy, python=start.python)
        except (Refused, OSError) as error:
            raise Failure(f"aligned: {found.code}: {error}") from None
        self._check(python, environment, copy)
        return Aligned([python, *start.options, *start.rest], environment)

    def _check(self, python: str, environment: Mapping[str, str], copy: str) -> None:
        """The copy is what an interpreter that is started so executes."""
        done = subprocess.run(
            [python, "-c", "print(open('/proc/self/maps').read())"], text=True, check=False,
            env={**self._environ, **environment}, capture_output=True, timeout=_SECONDS,
        )  # fmt: skip
        if copy not in done.stdout:
            raise Failure(
                f"aligned: {python} does not load the aligned copy (DT_RPATH?); align the "
                "interpreter itself (`page-primer align`, `--undo` later) and bench `off` with it"
            )


def _lay_out(directory: str, python: str, program: str) -> None:
    """Make a virtual environment of links around where the copied program will be: with the
    packages of the one that `python` is of, or with the system's."""
    os.mkdir(os.path.join(directory, "bin"))
    name = os.path.basename(python)
    for other in {"python", "python3", os.path.basename(program)} - {name}:
        os.symlink(name, os.path.join(directory, "bin", other))
    home = os.path.dirname(os.path.dirname(os.path.abspath(python)))
    configuration = os.path.join(home, "pyvenv.cfg")
    lines = [f"home = {os.path.dirname(program)}", "include-system-site-packages = true"]
    if os.path.exists(configuration):
        with open(configuration, encoding="utf-8") as file:
            own = [line.rstrip("\n") for line in file if line.split("=")[0].strip() != "home"]
        lines = [lines[0], *own]
        for library in ("lib", "lib64"):
            if os.path.isdir(os.path.join(home, library)):
                os.symlink(os.path.join(home, library), os.path.join(directory, library))
    with open(os.path.join(directory, "pyvenv.cfg"), "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
