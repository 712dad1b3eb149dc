"""gunicorn's hooks: prime the master before it forks, lock again in each worker, log to gunicorn's
own logger.

In a configuration file of your own::

    on_starting = "page_primer.integrations.gunicorn.on_starting"
    on_reload = "page_primer.integrations.gunicorn.on_reload"
    post_fork = "page_primer.integrations.gunicorn.post_fork"
    post_worker_init = "page_primer.integrations.gunicorn.post_worker_init"

or let `page_primer.integrations.gunicorn_conf` do that and keep your hooks too.
"""

from __future__ import annotations

from typing import Any

from page_primer.integrations import prime_and_log


def on_starting(server: Any) -> None:
    """Prime the master: after a preloaded application, before sockets, threads and forks."""
    prime_and_log(server.log)


def on_reload(server: Any) -> None:
    """After a HUP: prime what the reloaded configuration or preloaded application brought in."""
    prime_and_log(server.log)


def post_fork(server: Any, worker: Any) -> None:
    """Lock again, since a fork does not inherit locks; before the worker drops its privileges."""
    prime_and_log(worker.log)


def post_worker_init(worker: Any) -> None:
    """Prime what an application that was not preloaded has brought in."""
    prime_and_log(worker.log)
