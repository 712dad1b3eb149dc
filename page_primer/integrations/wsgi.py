"""WSGI middleware: primes at once, since WSGI has no start-up event, and again in each new process.

from page_primer.integrations.wsgi import primed
app = primed(app)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from page_primer.integrations import Wrapper

if TYPE_CHECKING:
    from page_primer.logs import Logger

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Primed(Wrapper):
    """A WSGI application that primes the process it runs in; attributes are the application's."""

    def __init__(self, app: Application, logger: Logger | logging.Logger | None) -> None:
        super().__init__(app, logger)
        self._prime()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if self._process != os.getpid():
            self._prime()
        if self._unheard is not None:
            self._say_again()
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer


def primed(app: Application, logger: Logger | logging.Logger | None = None) -> Primed:
    """Wrap a WSGI application and prime this process.

    Args:
        app: the application.
        logger: where the report goes; by default the logger "page_primer", or the server's where
            nobody listens to that.

    Raises:
        ValueError: a PAGE_PRIMER_* variable has a value that does not make sense.
    """
    return Primed(app, logger)
