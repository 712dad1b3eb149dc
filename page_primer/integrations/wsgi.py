"""WSGI middleware: primes at once, since WSGI has no start-up event, and again in each new process.

from page_primer.integrations.wsgi import primed
app = primed(app)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from page_primer.integrations import prime_and_log
from page_primer.options import Options
from page_primer.report import Logger

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Primed:
    """A WSGI application that primes the process it runs in; attributes are the application's."""

    def __init__(self, app: Application, logger: Logger | logging.Logger) -> None:
        self._app = app
        self._logger = logger
        self._process = 0  # the process that was primed: a forked one is another
        self._prime()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if self._process != os.getpid():
            self._prime()
        return self._app(environ, start_response)

    def _prime(self) -> None:
        prime_and_log(self._logger)
        self._process = os.getpid()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._app, name)


def primed(app: Application, logger: Logger | logging.Logger | None = None) -> Primed:
    """Wrap a WSGI application and prime this process.

    Args:
        app: the application.
        logger: where the report goes; the logger "page_primer" by default.

    Raises:
        ValueError: a PAGE_PRIMER_* variable has a value that does not make sense.
    """
    Options.load()
    return Primed(app, logger or logging.getLogger("page_primer"))
