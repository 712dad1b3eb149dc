"""The command: page-primer run | build | status | doctor."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from page_primer.options import NAMES, Options
from page_primer.report import image_place, mib, percent

if TYPE_CHECKING:
    from page_primer.status import ObjectStatus


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="page-primer",
        description="Machine code on huge pages and locked in memory, for Python servers.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser(
        "run", help="start a command, and prime every Python process it leads to",
        usage="page-primer run [options] [--] COMMAND ...",
    )  # fmt: skip
    for name in sorted(NAMES):
        flag = f"--{name.replace('_', '-')}"
        run.add_argument(flag, metavar="VALUE", help=f"as PAGE_PRIMER_{name.upper()}")
    native = run.add_mutually_exclusive_group()
    native.add_argument("--native", action="store_const", const="1", dest="native",
                        help="start interpreters from their images: the default where it works; "
                        "with this option it is said where it does not")  # fmt: skip
    native.add_argument("--no-native", action="store_const", const="0", dest="native",
                        help="prime interpreters after their start")  # fmt: skip
    run.add_argument("--late", action="store_const", const="1",
                     help="move libraries as well that are loaded later")  # fmt: skip
    run.add_argument("-v", "--verbose", action="store_const", const="1",
                     help="one line on stderr for each process")  # fmt: skip
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    run.set_defaults(run=_run)

    build = commands.add_parser(
        "build", help="write an interpreter's image for native load, for a container's image"
    )
    build.add_argument("--python", default=sys.executable, metavar="PATH",
                       help="the interpreter (default: this one)")  # fmt: skip
    build.add_argument("directory", metavar="DIR", help="an absolute path, made if it is missing")
    build.set_defaults(run=_build)

    status = commands.add_parser(
        "status", help="what a live process and its children have on huge pages, locked, shared"
    )
    status.add_argument("pid", type=int, metavar="PID")
    status.add_argument("--all", action="store_true", help="every object, not only the large ones")
    status.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    status.set_defaults(run=_status)

    doctor = commands.add_parser(
        "doctor", help="what will work here, what will not, and the line that fixes it"
    )
    doctor.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    doctor.set_defaults(run=_doctor)

    given = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names are bytes
    try:
        result = int(given.run(given))
        sys.stdout.flush()  # here, where a reader that went away is caught
        return result
    except ValueError as error:
        print(f"page-primer: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not our error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(given: argparse.Namespace) -> int:
    from page_primer import launch

    command = given.argv[1:] if given.argv[:1] == ["--"] else given.argv
    if not command:
        raise ValueError("run: no command")
    settings = {
        f"PAGE_PRIMER_{name.upper()}": value
        for name in (*NAMES, "native", "late", "verbose")
        if (value := getattr(given, name)) is not None
    }
    return launch.run(command, settings, explicit=given.native == "1")


def _build(given: argparse.Namespace) -> int:
    from page_primer.build import build
    from page_primer.starts import Refusal

    try:
        print(build(given.python, given.directory))
    except Refusal as why:
        print(f"page-primer: {why}", file=sys.stderr)
        return 1
    return 0


def _status(given: argparse.Namespace) -> int:
    if sys.platform != "linux":
        print(f"page-primer: not supported on {sys.platform}", file=sys.stderr)
        return 1
    try:
        from page_primer.status import examine, family
    except ImportError as error:  # built without its C core
        print(f"page-primer: not available here: {error}", file=sys.stderr)
        return 1

    processes = [examine(pid) for pid in family(given.pid)]
    if not processes:
        print(f"page-primer: no process {given.pid}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps([process.as_dict() for process in processes], indent=2))
        return 0
    for process in processes:
        print(f"{process.pid}  {process.command}")
        if process.problem:
            print(f"  {process.problem}")
            continue
        objects = [
            obj
            for obj in process.objects
            if given.all or obj.copied_bytes or obj.code_huge_bytes or obj.code_bytes >= 1 << 20
        ]
        rows = [
            [
                os.path.basename(obj.path),
                mib(obj.code_bytes),
                percent(obj.code_huge_bytes, obj.code_bytes),
                mib(obj.locked_bytes),
                mib(obj.copied_bytes),
                mib(obj.shared_bytes),
                mib(obj.pss_bytes),
                _place(obj),
            ]
            for obj in sorted(objects, key=lambda obj: -obj.code_bytes)
        ]
        others = len(process.objects) - len(objects)
        rows.append(
            [
                f"all {len(process.objects)} objects" if others else "all",
                mib(process.sum("code_bytes")),
                percent(process.sum("code_huge_bytes"), process.sum("code_bytes")),
                mib(process.sum("locked_bytes")),
                mib(process.sum("copied_bytes")),
                mib(process.sum("shared_bytes")),
                mib(process.sum("pss_bytes")),
                "",
            ]
        )
        _show_table(("object", "code", "huge", "locked", "copied", "shared", "PSS", "on"), rows)
        if process.unlocked:
            print(f"  {process.unlocked}")
    return 0 if any(process.problem is None for process in processes) else 1


def _place(obj: ObjectStatus) -> str:
    """Where an object's read-only span lies, if not on its own file."""
    backing = obj.backing or ""
    same_name = os.path.basename(backing) == os.path.basename(obj.path)
    return image_place(backing) if same_name else backing


def _doctor(given: argparse.Namespace) -> int:
    from page_primer import doctor

    options = Options.load()
    checks, layout = doctor.examine(options), doctor.interpreter(options)
    if given.json:
        print(json.dumps(doctor.as_dict(checks, layout), indent=2))
    else:
        print(doctor.render(checks, layout))
    return 0


def _show_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns: the first and the last aligned to the left, numbers to the right."""
    last = len(titles) - 1
    if sys.stdout.isatty():
        # With the extra `cli` long names fold to the width of the terminal.
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table

            table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1), header_style="bold")
            for column, title in enumerate(titles):
                left = column in (0, last)
                table.add_column(title, justify="left" if left else "right", overflow="fold")
            for row in rows:
                table.add_row(*map(escape, row))
            Console(highlight=False).print(table)
            return
    widths = [max(len(line[i]) for line in (titles, *rows)) for i in range(len(titles))]
    for line in (titles, *rows):
        cells = [
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
