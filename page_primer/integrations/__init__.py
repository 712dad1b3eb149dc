"""One module per framework: when to prime, where the options come from, who logs the report."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import page_primer
from page_primer.report import Report

if TYPE_CHECKING:
    import logging

    from page_primer.options import Options
    from page_primer.report import Logger

_last: Report | None = None


def prime_and_log(logger: Logger | logging.Logger, options: Options | None = None) -> Report:
    """Prime this process and say what came of it, as announce() does. Options that were fine at
    start-up and are bad now (somebody changed the environment) do not stop a server that runs."""
    try:
        report = page_primer.prime(options)
    except (TypeError, ValueError) as error:
        report = Report(os.getpid(), f"{error}")
    announce(report, logger)
    return report


def announce(report: Report, logger: Logger | logging.Logger) -> None:
    """Log what differs from the last report, which may be one of the process that this one was
    forked from. However many hooks call it, each thing is said once."""
    global _last
    report.log(logger, since=_last)
    _last = report
