"""`page-primer warm`: bring aligned files into memory on huge pages, by `page-primer-warm`.

The work is done by that program (warm.c beside this module), for an interpreter maps the very pages
that may have to be dropped from the page cache. Here it is found and executed.
"""

from __future__ import annotations

import os
import sys

from page_primer.align.aligned import VARIABLE, all_listed, is_aligned

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_PATH_MAX, _MOST_PATHS = 4096, 1000


def through_warm(command: Sequence[str]) -> list[str]:
    """Return a command that warms the recorded aligned files and then executes another.

    Args:
        command: an argv; returned as it is where no file is recorded as aligned, or where
            `page-primer-warm` was not built or is not installed beside this package.
    """
    if listed := all_listed():
        from page_primer.align.memory import program  # of machines with aligned files alone

        if path := program():
            return [path, "-q", *_of_user(listed), "--", *command]
    return list(command)


def _of_user(listed: Sequence[str]) -> list[str]:
    """What has to be named of the recorded files: nothing where the program reads all of them by
    itself, the list that PAGE_PRIMER_ALIGNED names, or root's."""
    if os.environ.get(VARIABLE) or os.geteuid() == 0:
        return []
    # Of a list of garbage execv(2) would not take everything.
    return [path for path in listed if len(path) < _PATH_MAX and "\0" not in path][:_MOST_PATHS]


def main(arguments: Sequence[str]) -> int:
    """Find the files, and execute `page-primer-warm` in this process's place.

    Args:
        arguments: what follows `warm` on the command line.

    Returns:
        An exit status, if that program cannot be executed.

    Raises:
        ValueError: an interpreter that cannot be used; the message says why.
    """
    from page_primer.align.memory import PROGRAM, program  # `run` imports this module

    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    words, command = words[:at], words[at + 1 :]
    parsing = parser()
    given = parsing.parse_args(words)
    if given.hold and command:
        parsing.error("--hold stays in the foreground, so there is no COMMAND after it")
    path = program()
    if path is None:
        print(f"page-primer: {PROGRAM} is not installed", file=sys.stderr)
        return _execute(command) if command else 1
    files = [*given.path]
    if given.python or given.libraries:
        files += targets(given.python, given.libraries)
    if given.rewrite:
        _rewrite(files or all_listed(), quiet=given.q, command=bool(command))
    options = [*["-q"] * given.q, *["--hold"] * given.hold]
    # `./-name`, for the program takes what begins with `-` for an option.
    files = [os.path.join(".", file) if file.startswith("-") else file for file in files]
    files = files or _of_user(all_listed())
    return _execute([path, *options, *files, *(["--", *command] if command else [])])


def _rewrite(files: Sequence[str], *, quiet: bool, command: bool) -> None:
    """Print a line about each file that is rewritten, or cannot be: as the program does, before a
    command only failures, on stderr."""
    from page_primer.align.original import Refused  # of this option alone
    from page_primer.launcher.child import say
    from page_primer.launcher.rewrite import rewrite_held

    for file in files:
        why, rewritten = None, False
        try:
            rewritten = rewrite_held(file)
        except (OSError, ValueError) as error:  # the latter for a name that no file has
            why = getattr(error, "strerror", None) or str(error)
        except Refused as refusal:
            why = str(refusal)
        if quiet or (why is None and (command or not rewritten)):
            continue
        line = f"{file}: not rewritten: {why}" if why else f"{file}: rewritten"
        if command:
            say(line)
        else:
            print(line, flush=True)


def _execute(command: Sequence[str]) -> int:
    """Returns only if it cannot be executed: an exit status, as a shell's."""
    import signal  # likewise

    # An interpreter ignores these, and what it executes would inherit that.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        print(f"page-primer: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, (FileNotFoundError, NotADirectoryError)) else 126


def parser() -> argparse.ArgumentParser:
    import argparse  # likewise

    parser = argparse.ArgumentParser(
        prog="page-primer warm",
        usage="page-primer warm [options] [PATH ...] [-- COMMAND ...]",
        description="Bring aligned files into memory on huge pages, then execute COMMAND, or stay "
        "and keep them there. By default all files that `page-primer align` has recorded.",
        epilog="Exit status: 0 all on huge pages, 1 not all, 2 usage; or COMMAND's.",
        allow_abbrev=False,
    )
    parser.add_argument("--python", metavar="P", help="the file with this interpreter's code")
    parser.add_argument("--libraries", action="store_true",
                        help="also its aligned extension modules and libraries")  # fmt: skip
    parser.add_argument("--hold", action="store_true",
                        help="stay until SIGTERM, and keep them in memory (mlock)")  # fmt: skip
    parser.add_argument("--rewrite", action="store_true",
                        help="rewrite a file that others map in small pages")  # fmt: skip
    parser.add_argument("-q", action="store_true", help="print nothing of files")
    parser.add_argument("path", nargs="*", metavar="PATH", help="an aligned ELF file")
    return parser


def targets(python: str | None, libraries: bool) -> list[str]:
    """Return the file with an interpreter's code and, if wanted, its aligned libraries.

    Raises:
        ValueError: it gives no answer; the message says why.
    """
    # Likewise, and they import much.
    from page_primer.align import files as align
    from page_primer.align.targets import interpreter
    from page_primer.align.targets import libraries as libraries_of

    found = interpreter(python)
    pmd = align.pmd_size()
    candidates = libraries_of(found.places, pmd) if libraries else ()
    return [found.code, *(path for path in candidates if _is_aligned(path, pmd))]


def _is_aligned(path: str, pmd: int) -> bool:
    from page_primer.elf import file as elf  # likewise

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        file = elf.File(fd)
        fixed = file.header.e_type == elf.ET_EXEC
        return is_aligned(file.program_headers(), pmd, fixed=fixed)
    except (OSError, elf.Malformed):
        return False
    finally:
        os.close(fd)
