"""One module per framework: when to prime, where the options come from, who logs the report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import page_primer
from page_primer import reasons
from page_primer.logs import say
from page_primer.options import Options
from page_primer.report import Report
from page_primer.words import FREEZE_REMEDY

if TYPE_CHECKING:
    from page_primer.logs import Logger

_last: Report | None = None
on_report: list[Callable[[], None]] = []  # called whenever a process was primed


def prime_and_log(logger: Logger | logging.Logger, options: Options | None = None) -> Report:
    """Prime this process and say what came of it, as announce() does. Options that were fine at
    start-up and are bad now (somebody changed the environment) do not stop a server that runs."""
    try:
        report = page_primer.prime(options)
    except (TypeError, ValueError) as error:
        report = Report(os.getpid(), reasons.INVALID_OPTION, detail=str(error))
    announce(report, logger)
    return report


def in_force(options: Options | None = None) -> Options | None:
    """The options given, or the environment's; None where all is off, or one of them is bad, which
    prime_and_log() says."""
    try:
        options = options or Options.load()
    except ValueError:
        return None
    return options if options.enabled else None


def expect_forks(children: int) -> None:
    """In a parent: say how many processes it will fork, which share what memory is to be had."""
    from page_primer import family  # whose imports are for Linux alone

    family.expect(children)


def thaw(options: Options | None = None) -> None:
    """In a parent that has loaded its application, before it forks: have prime_and_log() freeze all
    of it, whatever was frozen before, if that is asked for."""
    options = in_force(options)
    if options is not None and options.freeze:
        page_primer.on_process(lambda process: process.thaw())


def suggest_freeze(
    logger: Logger | logging.Logger, preloaded: str, options: Options | None = None
) -> None:
    """In a parent that has loaded its application and is about to fork: one line on `freeze`,
    unless somebody decided on it.

    Args:
        preloaded: what it loaded for whom, for people.
    """
    options = in_force(options)
    if options is not None and not options.freeze and "freeze" not in options.explicit:
        say(logger.info, "freeze_suggested", f"{preloaded}: {FREEZE_REMEDY}; =0: no such line")


def announce(report: Report, logger: Logger | logging.Logger) -> None:
    """Log what differs from the last report, which may be one of the process that this one was
    forked from. However many hooks call it, each thing is said once."""
    global _last
    if report is not _last:  # as it is where there was nothing new
        report.log(logger, since=_last)
        for listener in on_report:
            try:
                listener()
            except Exception as error:  # somebody's file system is full: the server runs on
                line = f"figures not exported: {error}"
                say(logger.warning, "figures_not_exported", line, error=str(error))
    _last = report


# Of servers whose configuration of logging has no place for other loggers.
_OF_SERVERS = (
    "hypercorn.error", "waitress", "_granian", "uvicorn.error", "gunicorn.error", "daphne.server",
)  # fmt: skip


def find_logger() -> logging.Logger:
    """The logger "page_primer", if somebody listens to its INFO lines; else that of the server that
    runs here."""
    own = logging.getLogger("page_primer")
    known = logging.root.manager.loggerDict
    servers = [logging.getLogger(name) for name in _OF_SERVERS if name in known]
    return next(filter(_is_heard, (own, *servers)), own)


def _is_heard(logger: logging.Logger) -> bool:
    return logger.isEnabledFor(logging.INFO) and logger.hasHandlers()


class Wrapper:
    """What ASGI and WSGI middleware share: an application, the logger for the report, and in which
    process it was primed. Attributes are the application's."""

    def __init__(self, app: Any, logger: Logger | logging.Logger | None) -> None:
        Options.load()  # a setting that makes no sense stops the start
        self._app = app
        self._logger = logger
        self._process = 0
        self._unheard: Report | None = None  # its INFO line reached nobody: logging is not set up

    def _prime(self) -> None:
        if self._logger is not None:
            prime_and_log(self._logger)
        else:
            found = find_logger()
            report = prime_and_log(found)
            self._unheard = None if _is_heard(found) else report
        self._process = os.getpid()  # a forked one is another

    def _say_again(self) -> None:
        """At a request, when servers have set up their logging: what was not heard before."""
        report, self._unheard = self._unheard, None
        found = find_logger()
        if report is not None and _is_heard(found):
            report.log_state(found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._app, name)
