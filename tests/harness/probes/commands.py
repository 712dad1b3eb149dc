"""Tools as commands: found, run, and what they print."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.probes.target import NotHere

__all__ = ["gdb", "last_line", "run", "tool"]


def run(
    *command: str, seconds: int = 120, stdin: str = "", env: Mapping[str, str] | None = None
) -> str:
    """What a tool says, on both its outputs."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, errors="replace", timeout=seconds,
        env={**os.environ, "NO_COLOR": "1", **(env or {})}, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def tool(name: str) -> str:
    """A tool's path: beside the interpreter that runs this, or where the shell or root's shell
    finds it."""
    beside = Path(sys.executable).with_name(name)
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = str(beside) if beside.exists() else shutil.which(name, path=places)
    if not found:
        raise NotHere(f"no {name} here")
    return found


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")[:200]


@functools.cache
def _indexes() -> str:
    """A directory of ours where gdb keeps, by build-id, its index of a file's debug information. To
    make it is half of the work of a short session."""
    directory = tempfile.mkdtemp(prefix="page-primer-gdb-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def gdb(*commands: str, target: Sequence[str], **options: Any) -> str:
    arguments = [part for command in commands for part in ("-ex", command)]
    before = ["set debuginfod enabled off", "set auto-load safe-path /",
              f"set index-cache directory {_indexes()}", "set index-cache enabled on"]  # fmt: skip
    first = [part for setting in before for part in ("-iex", setting)]
    return run(tool("gdb"), "-nx", *first, *target, "-batch", *arguments, **options)
