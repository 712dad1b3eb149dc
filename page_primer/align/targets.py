"""Find the files that aligning is for: an interpreter's code, and the libraries it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

from page_primer.align.original import Refused, read
from page_primer.align.replace import opened

if TYPE_CHECKING:
    from collections.abc import Iterator

# Asked of the interpreter itself: a virtual environment's python is a link, a launcher or a copy.
# The type objects lie in the data of whatever file holds the interpreter's code.
_QUESTION = """
import json, os, sys, sysconfig
code = None
with open("/proc/self/maps", errors="surrogateescape") as maps:
    for line in maps:
        parts = line.rstrip("\\n").split(None, 5)
        low, high = (int(part, 16) for part in parts[0].split("-"))
        if low <= id(type) < high and len(parts) > 5:
            code = parts[5]
places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
ends = ("lib-dynload", "site-packages", "dist-packages")
places = [p for p in places if os.path.basename(p.rstrip("/")) in ends and os.path.isdir(p)]
base = getattr(sys, "_base_executable", None) or sys.executable
places = list(dict.fromkeys(map(os.path.realpath, places)))
print(json.dumps([os.path.realpath(base), code, places]))
"""
_SECONDS = 60
# Files that are smaller have no whole huge page whatever their layout: most of them, unread.
_SHARED_OBJECT = ".so"


class Interpreter(NamedTuple):
    """`program` is the executable outside any virtual environment; `code` the file that holds the
    interpreter's machine code: the program or its libpython."""

    python: str
    program: str
    code: str
    places: list[str]


def interpreter(python: str | None) -> Interpreter:
    """Ask an interpreter, by default the one that is running, what it consists of.

    Raises:
        ValueError: it gives no answer.
    """
    python = python or sys.executable
    command = [python, "-I", "-c", _QUESTION]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PAGE_PRIMER")}
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False,
                              env=environment, stdin=subprocess.DEVNULL)  # fmt: skip
        program, code, places = _answer(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError, RecursionError) as error:
        why = _defect(python)
        raise ValueError(
            f"{python} does not answer as a Python interpreter{f': {why}' if why else ''}"
        ) from error
    if not code or not code.startswith("/"):
        raise ValueError(f"the file with the code of {python} was not found")
    if code.endswith(" (deleted)"):
        raise ValueError(f"{code.removesuffix(' (deleted)')} was replaced just now; try again")
    return Interpreter(python, program, os.path.realpath(code), places)


def _answer(output: bytes) -> tuple[str, str | None, list[str]]:
    """The answer to _QUESTION, which is the last line; ValueError where that is something else."""
    found = json.loads((output.decode(errors="surrogateescape").splitlines() or [""])[-1])
    match found:
        case [str(program), str() | None as code, [*places]] if all(
            isinstance(place, str) for place in places
        ):
            return program, code, places
    raise ValueError("no answer to what was asked")


def _defect(python: str) -> str:
    """What is wrong with a program's file, if that can be said."""
    try:
        with opened(os.path.realpath(python)) as fd:
            read(fd)
    except Refused as why:
        return str(why)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def libraries(places: list[str], smallest: int) -> Iterator[str]:
    """The shared objects below some directories that are large enough, each file once, and those
    that links there lead to.

    Args:
        places: directories.
        smallest: bytes.
    """
    seen: set[tuple[int, int]] = set()
    for place in places:
        for directory, subdirectories, names in os.walk(place):
            subdirectories.sort()
            for name in sorted(names):
                if _SHARED_OBJECT not in name or name.startswith("."):
                    continue
                path = os.path.realpath(os.path.join(directory, name))
                try:
                    status = os.stat(path)
                except OSError:
                    continue
                key = status.st_dev, status.st_ino
                if status.st_size >= smallest and key not in seen:
                    seen.add(key)
                    yield path


def is_below(path: str, places: list[str]) -> bool:
    """Whether a file lies in one of the directories or below, by real paths: a link in them may
    lead to one that others have links to as well, as an installer's cache."""
    real = [os.path.join(os.path.realpath(place), "") for place in places]
    return os.path.realpath(path).startswith(tuple(real))
