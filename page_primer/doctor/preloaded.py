"""Applications that a parent loads before it forks: of the server that this directory and
environment configure, and of those that run."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from page_primer.doctor.facts import read
from page_primer.doctor.findings import INFO, OK, Check
from page_primer.options import Options, flag
from page_primer.words import FREEZE_REMEDY, counted

_ARGUMENTS = "GUNICORN_CMD_ARGS"
_CONF = "gunicorn.conf.py"
_LONGEST = 1 << 20  # bytes of it that are read
_FREEZE = "PAGE_PRIMER_FREEZE"


@dataclass(frozen=True)
class Preloaded:
    """An application that is loaded before forks."""

    where: str  # what says so
    frozen: bool | None = (
        None  # of a process that runs: as its environment says; None: as ours does
    )


def find() -> list[Preloaded]:
    """Those of the configuration here, and of processes that we may look at."""
    here = configured([], os.environ, os.getcwd())
    return [*([Preloaded(here)] if here else []), *_running()]


def judge(found: Sequence[Preloaded], options: Options) -> Iterator[Check]:
    """Nothing where nothing is preloaded."""
    if not found:
        return
    thawed = [one for one in found if not (options.freeze if one.frozen is None else one.frozen)]
    if not thawed:
        yield Check("preloading", OK, f"{_names(found)}: frozen before forks")
    elif "freeze" in options.explicit and not options.freeze:
        yield Check("preloading", OK, f"{_names(thawed)}: not frozen, as {_FREEZE} says")
    else:
        text = f"{_names(thawed)}: loaded before forks, not frozen"
        yield Check("preloading", INFO, text, FREEZE_REMEDY, "not-frozen")


def _names(found: Sequence[Preloaded]) -> str:
    more = f" and {counted(len(found) - 3, 'other')}" if len(found) > 3 else ""
    return ", ".join(one.where for one in found[:3]) + more


def configured(command: Sequence[str], environ: Mapping[str, str], directory: str) -> str | None:
    """What says that gunicorn is to preload: its arguments, which come first, or its configuration
    file, as far as it can be read without being run."""
    arguments = environ.get(_ARGUMENTS, "")
    with contextlib.suppress(ValueError):  # an open quote, which gunicorn will name
        if "--preload" in shlex.split(arguments):
            return _ARGUMENTS
    if "--preload" in command:
        return "--preload"
    file = _conf_of(command) or environ.get("PAGE_PRIMER_GUNICORN_CONF") or _CONF
    path = os.path.join(directory, file.removeprefix("file:"))
    return path if sets_preload(_read_file(path)) else None


def _read_file(path: str) -> str:
    """A configuration file. It is another user's perhaps: no FIFO is waited for, and no end of what
    has none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return ""
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return file.read(_LONGEST).decode("utf-8", "surrogateescape")


def _conf_of(command: Sequence[str]) -> str | None:
    """The configuration file that a command names; ours reads another in its turn."""
    for option, value in itertools.pairwise(command):
        if option in ("-c", "--config") and not value.startswith("python:"):
            return value.removeprefix("file:")
    return None


def sets_preload(source: str) -> bool:
    """Whether a configuration file says `preload_app = True`, or what is not plainly false."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    value = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "preload_app" for target in node.targets
        ):
            value = node.value
    return value is not None and not (isinstance(value, ast.Constant) and not value.value)


def _running() -> Iterator[Preloaded]:
    """gunicorn's masters among the processes that we may look at. One that names itself anew
    (setproctitle) hides its command and its environment. (What a Celery worker's configuration says
    of freezing cannot be seen from here: its own log has the line.)"""
    masters: set[int] = set()
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        command = read(f"/proc/{pid}/cmdline").split("\0")
        if not _is_gunicorn(command):
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(read(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])
            lines = read(f"/proc/{pid}/environ").split("\0")
            environ = dict(line.split("=", 1) for line in lines if "=" in line)
            if configured(command, environ, os.readlink(f"/proc/{pid}/cwd")):
                masters.add(pid)
                if parent not in masters:  # else it is a worker
                    frozen = bool(environ.get(_FREEZE)) and flag(_FREEZE, environ[_FREEZE])
                    yield Preloaded(f"gunicorn (PID {pid})", frozen)


def _is_gunicorn(command: Sequence[str]) -> bool:
    """Whether a command is gunicorn's script, or `python -m gunicorn`."""
    return any(
        os.path.basename(argument) == "gunicorn" and (number == 0 or "python" in command[0])
        for number, argument in enumerate(command[:6])
    )
