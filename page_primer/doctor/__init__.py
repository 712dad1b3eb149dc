"""Explain an environment: what of page-primer works here, what does not and why, and for each
shortfall the line that fixes it.

`facts` reads /proc and /sys, `probes` tries at scratch addresses; functions named `judge_...` are
pure and turn facts into checks. Nothing is believed to work, or not to, where it can be tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from page_primer import _unsupported, reasons
from page_primer.doctor.findings import PROBLEM, Check, exit_status, fix_lines
from page_primer.doctor.render import as_dict, render
from page_primer.options import Options
from page_primer.reasons import Refusal

try:
    from page_primer import plan, survey
    from page_primer.backing.pieces import reason_of
    from page_primer.doctor import coverage
    from page_primer.doctor.examination import Examination
except ImportError as error:  # not Linux, or built without the C core: examine() says so
    _missing: str | None = str(error)
else:
    _missing = None

if TYPE_CHECKING:
    from page_primer.doctor.coverage import Interpreter

__all__ = [
    "Check", "as_dict", "examine", "exit_status", "fix_lines", "interpreter", "render",
]  # fmt: skip


def examine(options: Options) -> tuple[Check, ...]:
    """Examine the environment of this process for what `options` ask of it.

    Nothing outside scratch mappings and short-lived files is changed. What the environment refuses
    is a check that says so, never an exception.
    """
    refused = _unsupported() or (_missing and Refusal(reasons.NOT_AVAILABLE, str(_missing)))
    if refused:
        return (Check("platform", PROBLEM, str(refused), code="platform"),)
    # What one check cannot find out is no reason to go without the others.
    found = Examination(options)
    checks: list[Check] = []
    for name, check in found.checks():
        try:
            checks += check()
        except Exception as error:
            text = f"not examined: {_words(error)}"
            checks.append(Check(name, PROBLEM, text, code="not-examined"))
    return tuple(checks)


def interpreter(options: Options) -> Interpreter | None:
    """Describe the interpreter's layout and the coverage to expect; None where that is unknown."""
    if _unsupported() or _missing:
        return None
    try:
        found = survey.take()
    except OSError:
        return None
    return coverage.describe(found, plan.make(found, options), coverage.has_directory(options))


def _words(error: Exception) -> str:
    return reason_of(error) if isinstance(error, OSError) else f"{error!r}"
