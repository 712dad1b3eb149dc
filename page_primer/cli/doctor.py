"""`page-primer doctor`: what it is given, and what it shows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from page_primer import doctor
from page_primer.cli import terminal
from page_primer.cli.tables import Column, Table, render
from page_primer.doctor.render import Row
from page_primer.options import Options

_COLOURS = {
    "ok": terminal.GREEN,
    "info": terminal.CYAN,
    "warning": terminal.YELLOW,
    "problem": terminal.RED,
}
_COLUMNS = (Column("", left=True), Column("", left=True), Column("", left=True, wraps=True))


def run(given: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if given.user is not None:
        from page_primer.cli.user import run_as  # pwd, of this option alone

        flags = [name for name in ("json", "fix") if getattr(given, name)]
        return run_as(given.user, ["doctor", *(f"--{name}" for name in flags)])
    options = Options.load()
    checks = doctor.examine(options)
    if given.fix:
        print("".join(f"{line}\n" for line in doctor.fix_lines(checks)), end="")
    elif given.json:
        print(json.dumps(doctor.as_dict(checks, doctor.interpreter(options)), indent=2))
    else:
        print(doctor.render(checks, doctor.interpreter(options), _lay_out))
    return doctor.exit_status(checks)


def _lay_out(rows: Sequence[Row]) -> str:
    table = Table(
        _COLUMNS,
        tuple((terminal.styled(r.status, _COLOURS[r.status]), r.name, r.found) for r in rows),
        tuple(row.note for row in rows),
        tuple(row.section for row in rows),
    )
    return render(table)
