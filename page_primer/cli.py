"""The command: page-primer status | doctor."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from page_primer.options import Options
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
        return int(given.run(given))
    except ValueError as error:
        print(f"page-primer: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not our error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
