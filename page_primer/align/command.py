"""page-primer align: which files, what is done with each, and what is printed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypedDict, cast

from page_primer.align import aligned, owners, targets
from page_primer.align import files as align
from page_primer.align.files import CAN_BE, REFUSED, TOO_SMALL, State
from page_primer.align.original import Refused
from page_primer.words import counted, mib, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Table = Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[str]], None]

NO_LONGER = "no longer aligned"
NOT_ALIGNED = "not aligned by page-primer"  # nothing to undo
UNLISTED = "not aligned any more, struck from the list"
DONE, UNDONE, FAILED = "aligned now", "undone", "failed"
_SHARED = "a link leads there, and others may use it (a cache?); name it to have it done"


class Row(TypedDict):
    """One file, as --json has it: files.State, and what was done. Sizes are in bytes."""

    path: str
    state: str
    reason: str
    span: int
    chunks: int
    code: int
    before: int
    after: int
    note: str
    named: bool  # asked for by name, or the interpreter
    exposed: bool  # others could exchange it, or write to it


_HELP = """
Rewrites ELF files so that the loader places their read-only part, code included, on huge page
boundaries. Without PATH: the interpreter. Exit status: 0 all is done, or with --check all is
aligned; 1 something was refused or failed, or with --check something could be aligned; 2 the
command line is wrong.
"""


def add_parser(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Add the subcommand to the command line's parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "align", help="rewrite interpreter and libraries so that their code is on huge pages in "
        "every process", description=_HELP,
    )  # fmt: skip
    parser.add_argument("paths", nargs="*", metavar="PATH", help="an ELF file")
    parser.add_argument("--python", metavar="PATH",
                        help="the interpreter (default: the one that runs this)")  # fmt: skip
    parser.add_argument("--libraries", action="store_true",
                        help="also the libraries in its lib-dynload and site-packages")  # fmt: skip
    parser.add_argument("--no-merge", action="store_true",
                        help="refuse where read-only data would become executable")  # fmt: skip
    verb = parser.add_mutually_exclusive_group()
    verb.add_argument("--check", action="store_true", help="only say what is aligned")
    verb.add_argument("--undo", action="store_true", help="put the original files back")
    verb.add_argument("--again", action="store_true",
                      help="align the files again that an upgrade has replaced")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    return parser


def run(given: argparse.Namespace, show_table: Table) -> int:
    """Do what the command line says; returns the exit status.

    Raises:
        ValueError: the command line is wrong.
    """
    if given.again and (given.paths or given.libraries):
        raise ValueError("align: --again takes the files that were aligned before, no others")
    if given.python:
        _check_python(given.python)
    rows: list[Row] = []
    with _ended_by_signals():
        for file in _files(given):
            row = _one(given, file)
            if row["state"] in (TOO_SMALL, NOT_ALIGNED) and not file.named:
                continue
            rows.append(row)
            if given.verb_changes and not given.json:
                _say(row)
    if given.json:
        print(json.dumps(rows, indent=2))
    elif not given.verb_changes:
        _show(rows, show_table)
    elif left := sum(row["exposed"] and not row["named"] for row in rows):
        text = f"{counted(left, 'file')} left as found: others could exchange or write to them"
        print(f"page-primer: {text}; the lines above say what to do", file=sys.stderr)
    return _status(given, rows)


def _check_python(python: str) -> None:
    """Raise ValueError where asking it would execute, as root, what others write."""
    try:
        owners.check_program(shutil.which(python) or python)
    except Refused as why:
        raise ValueError(f"--python {python}: {why}") from why
    except OSError as error:  # it is not asked: it might be there by then
        raise ValueError(f"--python {python}: {error.strerror}") from error


class File(NamedTuple):
    """`python` is the interpreter that it belongs to; `named`: it was asked for by name; `shared`:
    a link leads to it, out of the directories that were searched."""

    path: str
    python: str | None
    named: bool
    shared: bool = False


def _files(given: argparse.Namespace) -> Iterator[File]:
    """Each file that the command line means."""
    given.verb_changes = not (given.check or given.dry_run)
    if given.again:
        for path in aligned.all_listed():
            if os.path.exists(path):
                yield File(path, given.python or sys.executable, named=True)
        return
    if given.paths and not given.libraries:
        for path in given.paths:
            yield File(os.path.realpath(path), given.python or sys.executable, named=True)
        return
    yield from _of_interpreter(given)


def _of_interpreter(given: argparse.Namespace) -> Iterator[File]:
    """_files() of an interpreter, with what else was named or is in the list."""
    found = targets.interpreter(given.python)
    once = dict.fromkeys([found.code, *map(os.path.realpath, given.paths)])
    for path in once:
        yield File(path, found.program if path == found.code else found.python, named=True)
    if given.libraries:
        for path in targets.libraries(found.places, align.pmd_size()):
            if path not in once:
                shared = not targets.is_below(path, found.places)
                yield File(path, found.python, named=False, shared=shared)
    elif given.check:
        for path in aligned.all_listed():
            if path not in once and os.path.exists(path):
                yield File(path, found.python, named=True)


def _one(given: argparse.Namespace, file: File) -> Row:
    path = file.path
    state = align.look(path, merge=not given.no_merge)
    row = cast(Row, {**state.as_dict(), "note": "", "named": file.named, "exposed": False})
    if given.check and state.state in (CAN_BE, REFUSED) and path in aligned.all_listed():
        row["state"] = NO_LONGER
        return row
    to_do = align.can_be_undone(path) if given.undo else state.state == CAN_BE
    if file.shared and to_do:
        row["state"], row["reason"] = REFUSED, _SHARED
        return row
    if given.check:
        return row
    try:
        if given.undo:
            _undo(state, row, change=not given.dry_run)
        elif to_do and given.dry_run:
            align.check_place(path, executed=True)
        elif to_do:
            row["note"] = align.align(path, python=file.python, merge=not given.no_merge) or ""
            row["state"] = DONE
            _record(path, row, listed=True)
    except Refused as why:
        row["state"], row["reason"] = REFUSED, str(why)
        row["exposed"] = isinstance(why, owners.Exposed)
    except OSError as error:
        row["state"], row["reason"] = FAILED, error.strerror or str(error)
        if isinstance(error, PermissionError) and os.geteuid():
            row["reason"] += f"; {owners.instead(path)}"
    return row


def _undo(state: State, row: Row, *, change: bool) -> None:
    if align.can_be_undone(state.path):
        if change:
            align.undo(state.path)
            _record(state.path, row, listed=False)
        else:
            align.check_place(state.path)
        row["state"], row["reason"] = UNDONE if change else "can be undone", ""
    elif _is_listed_for_nothing(state.path):
        row["state"], row["reason"] = "not aligned any more, can be struck from the list", ""
        if change:
            written = _record(state.path, row, listed=False)
            row["state"] = UNLISTED if written else NOT_ALIGNED
    elif state.state != REFUSED:
        row["state"] = NOT_ALIGNED
    if change and os.geteuid() and state.path in aligned.all_listed(aligned.SYSTEM_LIST):
        _note(row, f"root's list still names it: `page-primer align --undo {state.path}` as root")


def _is_listed_for_nothing(path: str) -> bool:
    """Whether a file without a record is in this user's list: undone by another user, replaced by
    an upgrade, or gone."""
    return align.has_no_record(path) and path in aligned.all_listed(aligned.list_file())


def _record(path: str, row: Row, *, listed: bool) -> bool:
    try:
        aligned.change_list(path, listed=listed)
    except OSError as error:
        _note(row, f"{aligned.list_file()} not written ({error.strerror})")
        return False
    return True


def _note(row: Row, text: str) -> None:
    row["note"] = "; ".join(filter(None, [row["note"], text]))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal ends the command with what was begun removed, and no traceback; a signal that is
    ignored (nohup) stays so."""

    def end(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {
        number: signal.signal(number, end)
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(row: Row) -> None:
    """One line of what was done with a file."""
    path, state = row["path"], row["state"]
    if state == DONE:
        text = (
            f"aligned: {percent(row['after'], row['code'])} of {mib(row['code'])} code can be on "
            f"huge pages, {percent(row['before'], row['code'])} before"
        )
    elif state in (REFUSED, FAILED):
        text = f"{state}: {row['reason']}"
    else:
        text = str(state)
    if row["note"]:
        text += f" ({row['note']})"
    stream = sys.stderr if state in (REFUSED, FAILED) else sys.stdout
    print(f"{path}: {text}", file=stream)


def _show(rows: list[Row], show_table: Table) -> None:
    cells = [
        [
            row["path"],
            mib(row["span"]),
            str(row["chunks"]),
            mib(row["code"]),
            percent(row["before"], row["code"]),
            percent(row["after"], row["code"]),
            f"{row['state']}: {row['reason']}" if row["reason"] else row["state"],
        ]
        for row in rows
    ]
    titles = ("file", "span", "huge pages", "code", "before", "after", "")
    show_table(titles, cells, ("span", "huge pages", "code"))  # what may be left out


def _status(given: argparse.Namespace, rows: list[Row]) -> int:
    states = [row["state"] for row in rows]
    if given.check:
        return 1 if CAN_BE in states or NO_LONGER in states else 0
    if FAILED in states:
        return 1
    if given.undo and given.paths and NOT_ALIGNED in states:
        return 1
    return 1 if any(row["state"] == REFUSED and row["named"] for row in rows) else 0
