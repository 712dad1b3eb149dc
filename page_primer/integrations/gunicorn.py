"""gunicorn's hooks: prime the master before it forks, lock again in each worker, log to gunicorn's
own logger.

In a configuration file of your own::

    on_starting = "page_primer.integrations.gunicorn.on_starting"
    on_reload = "page_primer.integrations.gunicorn.on_reload"
    post_fork = "page_primer.integrations.gunicorn.post_fork"
    post_worker_init = "page_primer.integrations.gunicorn.post_worker_init"
    on_dirty_starting = "page_primer.integrations.gunicorn.on_dirty_starting"  # --dirty-app
    dirty_worker_init = "page_primer.integrations.gunicorn.dirty_worker_init"

or let `page_primer.integrations.gunicorn_conf` do that and keep your hooks too. gunicorn ignores
the names of hooks that it does not have yet.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any

from page_primer.heap.freeze import collect_if_small
from page_primer.integrations import (
    expect_forks,
    in_force,
    prime_and_log,
    suggest_freeze,
    thaw,
    versions,
)

if TYPE_CHECKING:
    from page_primer.integrations.asgi import Message, Receive, Send


def on_starting(server: Any) -> None:
    """Prime the master: after a preloaded application, before sockets, threads and forks."""
    try:
        versions.require("gunicorn", sys.modules["gunicorn"].__version__)
    except ValueError as error:
        sys.exit(f"page-primer: {error}")
    _prime_before_forks(server)
    if server.cfg.preload_app:
        suggest_freeze(server.log, "the application is preloaded")


def on_reload(server: Any) -> None:
    """After a HUP: prime what the reloaded configuration or preloaded application brought in."""
    _prime_before_forks(server)


def _prime_before_forks(server: Any) -> None:
    expect_forks(server.num_workers)
    thaw()
    primes = in_force() is not None
    if primes:
        # Workers seed the generator, which since CPython 3.13 loads a library: here it is there for
        # all of them, and prime() finds nothing new in each.
        random.Random(b"")
    collects = primes and not server.cfg.preload_app
    if collects:  # before, too: what priming loads takes the room of what is freed
        collect_if_small()
    report = prime_and_log(server.log)
    if collects and report.reason is None:
        collect_if_small()


def post_fork(server: Any, worker: Any) -> None:
    """Lock again, since a fork does not inherit locks; before the worker drops its privileges."""
    prime_and_log(worker.log)


def post_worker_init(worker: Any) -> None:
    """Prime what an application that was not preloaded has brought in."""
    prime_and_log(worker.log)
    gasgi = sys.modules.get("gunicorn.workers.gasgi")  # since gunicorn 24
    if gasgi is not None and isinstance(worker, gasgi.ASGIWorker):
        _prime_in_lifespan(worker)


def on_dirty_starting(arbiter: Any) -> None:
    """Lock again in the dirty arbiter, which the master forks and which forks the dirty workers."""
    prime_and_log(arbiter.log)


def dirty_worker_init(worker: Any) -> None:
    """Lock again in a dirty worker, and prime what its applications have brought in.

    The first moment in that process: gunicorn calls `dirty_post_fork` in the arbiter."""
    prime_and_log(worker.log)


def _prime_in_lifespan(worker: Any) -> None:
    """Of gunicorn's own ASGI worker: prime once more when the application's start-up is complete.

    The lifespan runs after every hook. It gets the application from the worker, and so does each
    connection after it: that one is the application itself again, and requests cost nothing.
    """
    if worker.cfg.asgi_lifespan == "off":
        return
    from page_primer.integrations import asgi  # other workers have none

    app = worker.asgi

    async def lifespan(scope: Message, receive: Receive, send: Send) -> None:
        worker.asgi = app
        await app(scope, receive, asgi.before_complete(send, lambda: prime_and_log(worker.log)))

    worker.asgi = lifespan
