"""ASGI middleware: primes each process when its application starts up.

    from page_primer.integrations.asgi import primed
    app = primed(app)

The moment is the server's lifespan: once as it begins, before the application starts threads, and
once when start-up is complete, for the libraries that it brought in. A server without lifespan
events primes at the first request. After that the middleware only passes calls on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from page_primer.integrations import Wrapper

if TYPE_CHECKING:
    from page_primer.logs import Logger

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class Primed(Wrapper):
    """An ASGI application that primes the process it runs in; attributes are the application's."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if self._process != os.getpid():
            self._prime()
            if scope["type"] == "lifespan":
                send = before_complete(send, self._prime)
        if self._unheard is not None and scope["type"] != "lifespan":
            self._say_again()
        await self._app(scope, receive, send)


def before_complete(send: Send, prime: Callable[[], object]) -> Send:
    """A `send` for a lifespan that calls `prime` when the application says that start-up is
    complete, before the server hears of it and accepts requests."""

    async def prime_and_send(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            prime()
        await send(message)

    return prime_and_send


def primed(app: Application, logger: Logger | logging.Logger | None = None) -> Primed:
    """Wrap an ASGI 3 application.

    Args:
        app: the application.
        logger: where the report goes; by default the logger "page_primer", or the server's where
            nobody listens to that.

    Raises:
        ValueError: a PAGE_PRIMER_* variable has a value that does not make sense.
    """
    return Primed(app, logger)
