"""`page-primer status`: what it is given, and what it shows."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

from page_primer.cli import bars, terminal
from page_primer.cli.tables import Column, Table, folded, render
from page_primer.processes import (
    NO_PROCESS,
    ObjectStatus,
    ProcessStatus,
    examine,
    family,
    is_python,
    topmost_python,
)
from page_primer.words import counted, image_place, mib, percent

MEANINGS = """
columns:
  object   file name; small ones are only in the sum (--all shows them)
  memory   all that the object has mapped: how much of it is on huge pages
           (shared, or of this process alone), on small pages and locked, or
           merely on small pages
  code     machine code
  huge     how much of the code is on huge pages
  locked   how much of the object cannot be reclaimed (mlock)
  copied   of the read-only part, what is mapped from elsewhere than its file
  shared   of the read-only part, what is resident and mapped by others too
  PSS      of the read-only part, what is resident, divided by the processes
           that map it
  on       where it is mapped from, if not from its own file
  heap     private anonymous memory: what of it is huge, of how much

Columns for which the terminal is too narrow are left out. Exit status: 0, or 1
where nothing can be said of the process.
"""
_BAR, _SHORT_BAR = 16, 10  # characters
_NARROW = 100  # columns of a terminal
_MOST = 40  # lines for other processes
_LARGE = 1 << 20  # bytes of code
_PIECE = 1.0  # seconds that are waited at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Show what a process has on huge pages, locked and shared, and, one line each,\n"
        "its descendants. Of a process that is not Python (an init, a shell), the Python\n"
        "processes below it are only named."
    )
    parser.epilog = MEANINGS
    parser.add_argument("pid", type=_pid, metavar="PID")
    parser.add_argument("--all", action="store_true", help="every object, not only the large ones")
    parser.add_argument("--each", action="store_true", help="a table of objects for each process")
    parser.add_argument("--python-only", action="store_true",
                        help="of PID and all its descendants, those that are Python")  # fmt: skip
    parser.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    parser.add_argument("--interval", type=_seconds, default=2.0, metavar="SECONDS",
                        help="with --watch: how often (default: 2)")  # fmt: skip
    parser.add_argument("--json", action="store_true",
                        help="as JSON, sizes in bytes; with --watch a line each time")  # fmt: skip


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"invalid process id: {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"not a number of seconds above 0: {text!r}")
    return number


def run(given: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if not given.watch:
        return _show_once(given)
    try:
        return _watch(given)
    except KeyboardInterrupt:  # how one ends it
        if terminal.can_draw() and not given.json:
            print(terminal.LEAVE, end="")
        return 0


def _show_once(given: argparse.Namespace) -> int:
    found = _look(given)
    if not found:
        print(f"page-primer: {_nothing(given)}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps([process.as_dict() for process in found], indent=2))
        return 0
    print("\n".join(_screen(given, found)))
    return 0 if any(process.problem is None for process in found) else 1


def _watch(given: argparse.Namespace) -> int:
    """Show it again and again, until the process has ended."""
    draws = terminal.can_draw() and not given.json
    if draws:
        print(terminal.CLEAR, end="")
    # Held back, so that it is there to be waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
    seen = False
    while (found := _look(given)) and any(process.problem is None for process in found):
        seen = True
        if given.json:
            print(json.dumps([process.as_dict() for process in found]), flush=True)
        elif draws:
            print(terminal.screen(_screen(given, found)), end="", flush=True)
        else:
            print("\n".join([*_screen(given, found), ""]), flush=True)
        until = time.monotonic() + given.interval
        while (left := until - time.monotonic()) > 0:
            # In pieces: a Ctrl-C that comes just before it does not end it.
            if signal.sigtimedwait([signal.SIGWINCH], min(left, _PIECE)) and draws:
                break  # the terminal has another size
    if not seen:
        return _show_once(given)
    print(f"page-primer: {_nothing(given)} any more", file=sys.stderr)
    return 0


def _nothing(given: argparse.Namespace) -> str:
    return f"no {'Python ' * given.python_only}process {given.pid}"


def _look(given: argparse.Namespace) -> list[ProcessStatus]:
    """The processes to show, the one that was named first."""
    pids = family(given.pid)
    if given.python_only:
        pids = [pid for pid in pids if is_python(pid)]
    elif pids and not is_python(given.pid):
        pids = pids[:1]
    return [process for process in map(examine, pids) if process.problem != NO_PROCESS]


def _screen(given: argparse.Namespace, found: Sequence[ProcessStatus]) -> list[str]:
    with_tables = found if given.each else [p for p in found if p.pid == given.pid]
    lines: list[str] = []  # ends with an empty one
    for process in with_tables:
        lines += [*_one(process, everything=given.all), ""]
    others = [process for process in found if process not in with_tables]
    if others:
        table = Table(_PROCESS, tuple(tuple(_process_row(one)) for one in others[:_MOST]))
        lines += [*render(table).splitlines(), ""]
    if len(others) > _MOST:
        lines[-1:] = [f"  and {counted(len(others) - _MOST, 'process', 'es')} more (--json)", ""]
    if any(process.objects for process in found):
        lines += bars.legend(terminal.width())
    if not given.python_only and not is_python(given.pid):
        lines += [*([""] if lines[-1] else []), *_below(given.pid)]
    while not lines[-1]:
        lines.pop()
    return lines


def _below(pid: int) -> Iterator[str]:
    """Of a process that is not Python: where to look instead."""
    below = [one for one in topmost_python(pid) if one[0] != os.getpid()]
    if not below:
        return
    number = counted(len(below), "Python process", "es")
    yield f"not Python itself; below it {number}, with more below them:"
    for one, command in below[:_MOST]:
        yield _titled(one, command)
    if len(below) > _MOST:
        yield f"  and {len(below) - _MOST} more"


def _titled(pid: int, command: str) -> str:
    return terminal.cut(f"{pid}  {terminal.one_line(command)}", terminal.width())


_SIZES = ("locked_bytes", "copied_bytes", "shared_bytes", "pss_bytes")
_OBJECT = (
    Column("object", left=True, cuts="end"), Column("memory", left=True, goes=-4),
    Column("code", goes=-3), Column("huge"), Column("locked", goes=-2), Column("copied", goes=1),
    Column("shared", goes=3), Column("PSS", goes=2), Column("on", left=True, cuts="path", goes=-1),
)  # fmt: skip
_PROCESS = (
    Column("process"), Column("memory", left=True, goes=-3), Column("code", goes=-1),
    Column("huge"), Column("locked", goes=-2), Column("copied", goes=1), Column("shared", goes=3),
    Column("PSS", goes=2), Column("heap", goes=4), Column("command", left=True, cuts="end"),
)  # fmt: skip


def _one(process: ProcessStatus, *, everything: bool) -> Iterator[str]:
    """A process with its objects."""
    yield terminal.styled(_titled(process.pid, process.command), terminal.BOLD)
    if process.problem:
        yield f"  {process.problem}"
        return
    rows = tuple(tuple(row) for row in _object_rows(process, everything=everything))
    yield from render(Table(_OBJECT, rows)).splitlines()
    for line in filter(None, (f"heap: {process.heap}", process.added, process.unlocked)):
        yield from folded(line, "  ")


def _object_rows(process: ProcessStatus, *, everything: bool) -> Iterator[list[str]]:
    """A row for each object, the large ones alone or all, and one for their sum."""
    objects = [
        obj
        for obj in process.objects
        if everything or obj.copied_bytes or obj.code_huge_bytes or obj.code_bytes >= _LARGE
    ]
    for obj in sorted(objects, key=lambda obj: -obj.code_bytes):
        yield [
            terminal.one_line(os.path.basename(obj.path)),
            bars.bar(_kinds(obj), _bar()),
            mib(obj.code_bytes),
            percent(obj.code_huge_bytes, obj.code_bytes),
            *(mib(getattr(obj, name)) for name in _SIZES),
            terminal.one_line(_place(obj)),
        ]
    others = len(process.objects) - len(objects)
    name = f"all {counted(len(process.objects), 'object')}" if others else "all"
    yield [name, *_sums(process), ""]


def _process_row(process: ProcessStatus) -> list[str]:
    """All of a process in one row."""
    words = terminal.one_line(process.command).split(" ")
    # Of `/a/long/path/python3 /another/gunicorn ...` the names tell most.
    command = " ".join([*map(os.path.basename, words[:2]), *words[2:]])
    if process.problem:
        return [str(process.pid), *[""] * 8, f"({process.problem}) {command}"]
    heap = f"{mib(process.heap.huge)} of {mib(process.heap.bytes)}"
    return [str(process.pid), *_sums(process), heap, command]


def _sums(process: ProcessStatus) -> list[str]:
    kinds = dict.fromkeys(bars.NAMES, 0)
    for obj in process.objects:
        for name, size in _kinds(obj).items():
            kinds[name] += size
    return [
        bars.bar(kinds, _bar()),
        mib(process.sum("code_bytes")),
        percent(process.sum("code_huge_bytes"), process.sum("code_bytes")),
        *(mib(process.sum(name)) for name in _SIZES),
    ]


def _kinds(obj: ObjectStatus) -> dict[str, int]:
    """An object's memory by the kinds of a bar."""
    huge = obj.huge_bytes - obj.huge_private_bytes
    small = max(0, obj.lockable_bytes - obj.huge_bytes)
    locked = min(obj.small_locked_bytes, small)
    return {
        "huge": huge, "private": obj.huge_private_bytes, "locked": locked, "small": small - locked,
    }  # fmt: skip


def _bar() -> int:
    return _SHORT_BAR if (terminal.width() or _NARROW) < _NARROW else _BAR


def _place(obj: ObjectStatus) -> str:
    """Where an object's read-only span lies, if not on its own file."""
    backing = obj.backing or ""
    same_name = os.path.basename(backing) == os.path.basename(obj.path)
    return image_place(backing) if same_name else backing
