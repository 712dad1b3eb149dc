"""Which command it is, and what each is given.

Only what every command needs is imported here: `run` is in the way of a server's start.
"""

from __future__ import annotations

import errno
import os
import sys

import page_primer
from page_primer._lean import suppress
from page_primer.options import TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from typing import TypeAlias

    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if "_ARGCOMPLETE" in os.environ:
            from page_primer.cli import completion  # of a shell's question alone

            return completion.run(_parser())
        if words and (run := {"warm": _warm, "bench": _bench, "build": _build}.get(words[0])):
            return run(words[1:])
        if words[:1] == ["--version"]:
            print(f"page-primer {page_primer.__version__}")
            return 0
        command = _plainly_run(words)
        return _execute(command, {}) if command else _parse_and_run(words)
    except ValueError as error:
        from page_primer.launcher.child import say  # only where something is wrong

        say(f"page-primer: {error}")
        return 2
    except BrokenPipeError:
        return 0  # the reader of our output went away (`| head`): not our error
    except OSError as error:
        if _is_of_usage(error):
            return 2
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        with suppress(OSError):
            print(f"page-primer: standard output: {error.strerror}", file=sys.stderr)
        return 1
    finally:
        _settle()


def _is_of_usage(error: OSError) -> bool:
    """Whether stderr did not take argparse's message, of which later than 3.11.2 argparse itself
    says nothing."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "argparse":
            return True
        trace = trace.tb_next
    return False


def _say(line: str) -> None:
    # Only where something is wrong.
    from page_primer.launcher.child import say

    say(line)


def _settle() -> None:
    """What stdout or stderr does not take (a full disk, a reader that went away) is lost, and does
    not become the exit status, as it would at the interpreter's last flush."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _plainly_run(words: Sequence[str]) -> Sequence[str]:
    """COMMAND of `run [--] COMMAND`, which is in the way of every start of a server: argparse,
    which takes 10 ms, has nothing to do for it. Empty for anything else."""
    if words[:1] == ["run"] and words[1:2] == ["--"]:
        return words[2:]
    return words[1:] if words[:1] == ["run"] and words[1:] and words[1][:1] != "-" else []


def _parse_and_run(words: Sequence[str]) -> int:
    import io  # for the commands that are not in the way of a start

    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    given, unknown = parser.parse_known_args(words)
    if unknown:  # of which argparse would tell in the words of the whole command
        given.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names are bytes
    status = int(given.run(given))
    if sys.stdout is not None:  # closed
        sys.stdout.flush()  # here, where a reader that went away is caught
    return status


def _parser() -> argparse.ArgumentParser:
    import argparse  # 10 ms, which a plain `run` does without

    parser = argparse.ArgumentParser(
        prog="page-primer",
        description="Machine code on huge pages and locked in memory, for Python servers.",
    )
    # What main() has seen to: argparse would want the version itself, which takes a while to find.
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", required=True)

    _add_run(commands)
    _add_status(commands)

    doctor = commands.add_parser(
        "doctor", help="what will work here, what will not, and the line that fixes it",
        description="Examine this machine, this user and this interpreter, changing nothing. Exit "
        "status: 0 all is fine; 1 something falls short; 2 something that is needed, or was asked "
        "for, cannot be had here (or the command line is wrong).",
    )  # fmt: skip
    doctor.add_argument("--user", metavar="USER", help="as that user sees it (root only)")
    what = doctor.add_mutually_exclusive_group()
    what.add_argument("--fix", action="store_true",
                      help="print the lines that mend what falls short, alone")  # fmt: skip
    what.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    doctor.set_defaults(run=_doctor)

    # As argparse: a plain `run` does not come here.
    from page_primer.align import command as align_command
    from page_primer.cli.tables import show_table

    align_command.add_parser(commands).set_defaults(
        run=lambda given: align_command.run(given, show_table)
    )

    _add_images(commands)
    # With a parser of its own, beside modules that this one imports, and with them their libraries.
    commands.add_parser(
        "build", help="fill a store with the images that servers will use", add_help=False
    )

    # With parsers of their own, for argparse does not tell COMMAND from what is before `--`.
    commands.add_parser(
        "bench", help="measure a server of yours with and without priming", add_help=False
    )
    commands.add_parser(
        "warm", help="bring aligned files into memory on huge pages", add_help=False
    )
    for command in commands.choices.values():
        command.set_defaults(parser=command)  # whose words tell what is wrong
        command.allow_abbrev = False  # an error names the option as it was written
    return parser


def _add_run(commands: Commands) -> None:
    run = commands.add_parser(
        "run", help="start a command, and prime every Python process it leads to",
        usage="page-primer run [options] [--] COMMAND ...",
        description="Execute COMMAND, which may be any program: each Python that it is, or starts, "
        "primes itself as it starts. Options set the variables that are named with them.",
    )  # fmt: skip
    for option in TABLE:
        text = f"{option.help} (default: {option.default}; {option.variable})".replace("%", "%%")
        run.add_argument(option.flag, metavar=option.value, help=text)
    late = run.add_mutually_exclusive_group()
    late.add_argument("--late", action="store_const", const="1", dest="late",
                      help="prime libraries that are imported later as well: the default, and "
                      "stronger than PAGE_PRIMER_LATE=0")  # fmt: skip
    late.add_argument("--no-late", action="store_const", const="0", dest="late",
                      help="only what is loaded when a process starts")  # fmt: skip
    run.add_argument("-v", "--verbose", action="store_const", const="1",
                     help="one line on stderr for each process")  # fmt: skip
    run.add_argument("argv", nargs="...", metavar="COMMAND ...")
    run.set_defaults(run=_run)


def _add_status(commands: Commands) -> None:
    parser = commands.add_parser(
        "status", help="what a live process and its children have on huge pages, locked, shared"
    )
    parser.set_defaults(run=_status)
    try:
        from page_primer.cli import status  # re, textwrap, dataclasses
    except ImportError as error:  # built without its C core
        parser.add_argument("words", nargs="*")
        parser.set_defaults(why=str(error))
    else:
        status.add_arguments(parser)
        parser.set_defaults(why="")


def _add_images(commands: Commands) -> None:
    images = commands.add_parser(
        "images", help="list the images that this user has or uses, or remove unused ones"
    )
    images.add_argument(
        "action", nargs="?", choices=("list", "prune", "clear"), default="list",
        help="list them (the default); prune: remove what is due, as happens whenever one is "
        "written; clear: remove all that nobody uses",
    )  # fmt: skip
    images.add_argument("--dir", metavar="DIRECTORY", help="that store alone")
    images.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    images.set_defaults(run=_images)


def _warm(words: Sequence[str]) -> int:
    from page_primer.launcher import warm  # of this command alone

    return warm.main(words)


def _bench(words: Sequence[str]) -> int:
    try:
        # Of this command alone.
        from page_primer.bench import command
        from page_primer.cli.tables import say, show_table
    except ImportError as error:
        print(f"page-primer: not available here: {error}", file=sys.stderr)
        return 1

    return command.main(words, show_table, say)


def _run(given: argparse.Namespace) -> int:
    command = given.argv[1:] if given.argv[:1] == ["--"] else given.argv
    if not command:
        raise ValueError("run: no command")
    settings = {}
    for option in TABLE:
        value = getattr(given, option.name)
        if value:  # as in the environment, empty is unset
            option.parse(option.flag, value)  # so that an error names the flag
        if value is not None:
            settings[option.variable] = value
    for name in ("late", "verbose"):
        if (value := getattr(given, name)) is not None:
            settings[f"PAGE_PRIMER_{name.upper()}"] = value
    return _execute(command, settings)


def _execute(command: Sequence[str], settings: Mapping[str, str]) -> int:
    from page_primer.launcher import run as launch  # of this command alone

    return launch.run(command, settings)


def _status(given: argparse.Namespace) -> int:
    if sys.platform != "linux":
        _say(f"page-primer: not supported on {sys.platform}")
        return 1
    if given.why:
        _say(f"page-primer: not available here: {given.why}")
        return 1
    from page_primer.cli import status  # of this command alone

    return status.run(given)


def _images(given: argparse.Namespace) -> int:
    try:
        from page_primer.cli import images  # of this command alone
    except ImportError as error:  # not Linux, or built without its C core
        print(f"page-primer: not available here: {error}", file=sys.stderr)
        return 1
    return images.run(given.action, given.dir, as_json=given.json)


def _build(words: Sequence[str]) -> int:
    try:
        from page_primer.cli import build  # of this command alone
    except ImportError as error:
        print(f"page-primer: not available here: {error}", file=sys.stderr)
        return 1
    return build.main(words)


def _doctor(given: argparse.Namespace) -> int:
    from page_primer.cli import doctor  # all that page-primer has

    return doctor.run(given)
