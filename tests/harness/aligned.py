"""An interpreter's copy that `page-primer align` has aligned; the interpreter stays as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness.interpreters import python_of

__all__ = ["Copy", "NotAligned", "align", "copy_of", "rewritten", "unaligned_copy_of"]

# The program without virtual environments, and the libpython if it has one.
_QUESTION = """
import json, os, re, sys
found = re.search(r" (/.*/libpython3\\.\\d+\\S*\\.so\\S*)", open("/proc/self/maps").read())
print(json.dumps([os.path.realpath(sys._base_executable), found and found[1]]))
"""


class NotAligned(Exception):
    """`page-primer align` refused; the message is what it said."""


@dataclass(frozen=True)
class Copy:
    """`python` is in a virtual environment, `code` the file with the interpreter's code; `env` is
    what the loader needs to find a libpython."""

    python: str
    code: Path
    env: Mapping[str, str] = field(default_factory=dict)


def align(path: str, python: str, env: Mapping[str, str] | None = None) -> None:
    """Align a file by the command, run by an interpreter that has the package. The machine's list
    of aligned files stays as it is."""
    done = subprocess.run(
        [python, "-m", "page_primer", "align", path], capture_output=True, text=True,
        env={**os.environ, **(env or {}), "PAGE_PRIMER_ALIGNED": f"{path}.list"}, timeout=300,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise NotAligned((done.stdout + done.stderr).strip())


def copy_of(python: str, directory: Path) -> Copy:
    """Copy an interpreter into a directory and align it.

    Args:
        python: the interpreter, in a virtual environment or not.
        directory: on a file system that takes huge pages for files.

    Raises:
        NotAligned: it cannot be aligned.
    """
    copy = unaligned_copy_of(python, directory)
    align(str(copy.code), python, env={**copy.env, "PAGE_PRIMER": "0"})
    return copy


def unaligned_copy_of(python: str, directory: Path) -> Copy:
    """Copy an interpreter into a directory: what is done to its file concerns nobody else."""
    program, library = where(python)
    twin = python_of(directory, program)
    original = library or os.path.realpath(python)
    code = (directory if library else Path(twin).parent) / os.path.basename(original)
    code.unlink(missing_ok=True)  # in a virtual environment it is a link
    shutil.copy2(original, code)
    env = {"LD_LIBRARY_PATH": str(directory)} if library else {}
    return Copy(twin if library else str(code), code, env)


def rewritten(copy: Copy, directory: Path, block: int) -> Copy:
    """A copy of an aligned one that is written in pieces of `block` bytes, which decide its pages
    in the cache."""
    twin = unaligned_copy_of(copy.python, directory)
    with copy.code.open("rb") as source, twin.code.open("wb", buffering=0) as target:
        while piece := source.read(block):
            target.write(piece)
    return twin


def where(python: str) -> tuple[str, str | None]:
    """The program of an interpreter, outside virtual environments, and its libpython if it has
    one."""
    program, library = json.loads(subprocess.check_output([python, "-c", _QUESTION], text=True))
    return program, library
