"""uvicorn: prime each worker process as it loads the application.

By name, where the target is an application or a factory of one::

    PAGE_PRIMER_APP=shop.main:app uvicorn --factory page_primer.integrations.uvicorn:create_app

In code::

    from page_primer.integrations.uvicorn import primed
    app = primed(app)                # or: create_app = primed(create_app)

The report goes to uvicorn's own logger, "uvicorn.error".
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from page_primer.integrations import asgi, prime_and_log, versions
from page_primer.options import Options

_VARIABLE = "PAGE_PRIMER_APP"
_LOGGER = logging.getLogger("uvicorn.error")


def create_app() -> Any:
    """Load the application that PAGE_PRIMER_APP names, and prime this process.

    What is wrong with the target is said in uvicorn's own words, as if it had been given to uvicorn
    itself.
    """
    # primed() is of use under other servers, too.
    from uvicorn.importer import ImportFromStringError, import_from_string

    target = os.environ.get(_VARIABLE, "")
    if not target:
        _stop(f"page-primer: {_VARIABLE} must name the application, as in {_VARIABLE}=main:app")
    try:
        found = import_from_string(target)
    except ImportFromStringError as error:
        _stop(f"Error loading ASGI app. {error}")
    try:
        loaded = primed(found)
    except ValueError as error:
        _stop(f"page-primer: {error}")
    return loaded() if _is_factory(found) else loaded


def primed(target: Callable[..., Any]) -> Any:
    """Wrap an application, or a factory of one, so that its process is primed.

    Raises:
        ValueError: a PAGE_PRIMER_* variable has a value that does not make sense, or uvicorn is
            too old.
    """
    versions.require("uvicorn", getattr(sys.modules.get("uvicorn"), "__version__", ""))
    Options.load()
    if not _is_factory(target):
        return _prime_for(target)

    @functools.wraps(target)
    def create() -> Any:
        return _prime_for(target())

    return create


def _prime_for(app: Any) -> Any:
    prime_and_log(_LOGGER)
    # Only ASGI 3 has start-up events to wait for; what is older, or WSGI, is left as it is.
    function = app if inspect.isfunction(app) or inspect.ismethod(app) else type(app).__call__
    return asgi.primed(app, _LOGGER) if inspect.iscoroutinefunction(function) else app


def _is_factory(target: Callable[..., Any]) -> bool:
    """Whether it can be called without arguments, which no application can."""
    try:
        inspect.signature(target).bind()
    except (TypeError, ValueError):
        return False
    return True


def _stop(message: str) -> Any:
    import uvicorn.config  # as above

    _LOGGER.error(message)
    # What uvicorn itself exits with, which was 1 before it got a name.
    sys.exit(getattr(uvicorn.config, "STARTUP_FAILURE", 1))
