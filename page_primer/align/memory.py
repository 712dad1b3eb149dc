"""Aligned files in the page cache: what is said by `page-primer-warm`, which brings them in."""

from __future__ import annotations

import os
import sys

PROGRAM = "page-primer-warm"
_SECONDS = 120
_ON_HUGE_PAGES = " on huge pages"


def program() -> str | None:
    """The path of `page-primer-warm`, or None.

    An installer puts it beside the command `page-primer`, in the directory of scripts: that of the
    prefix which has this package (a virtual environment's, `--user`, `--prefix`), of `--target`, or
    of the running interpreter where the installation is editable.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    packages = os.path.dirname(package)
    places = [
        os.path.join(packages, "..", "..", "..", "bin"),
        os.path.join(packages, "bin"),
        os.path.join(sys.prefix, "bin"),
    ]
    if sys.argv and "/" in sys.argv[0]:  # of `-c` and `-` there is no directory
        places.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
    for place in places:
        path = os.path.normpath(os.path.join(place, PROGRAM))
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def left_small(path: str) -> str:
    """Bring a file in, and return what is said of it where it is not on huge pages then, without
    its path; nothing of others, and where the program is not installed."""
    found = program()
    if found is None:
        return ""
    import subprocess  # `page-primer run` only asks where the program is

    path = os.path.join(os.curdir, path)  # what begins with `-` is an option
    try:
        done = subprocess.run(
            [found, path], stdout=subprocess.PIPE, text=True, errors="replace", check=False,
            timeout=_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):  # it cannot be executed, or the disk has stopped
        return ""
    return done.stdout.strip().removeprefix(f"{path}: ") if done.returncode else ""


def missing(path: str) -> str | None:
    """Bring a new file in; the note where memory had huge pages for a part of it only. (Where it
    had none, the kernel or the file system hardly gives files any.)"""
    said = left_small(path)
    if _ON_HUGE_PAGES not in said or said.startswith("0 "):
        return None
    return f"{said}: `page-primer warm` tries again"
