"""Celery: prime the worker before its pool forks, lock again in each child, and handle the
libraries that tasks bring in.

In the application's configuration::

    imports = ["page_primer.integrations.celery"]
    page_primer = True                     # or False, or {"limit": "128M", ...}
    page_primer_backing = "image"          # the same options one by one

With a namespace, as in Django's settings, they are CELERY_IMPORTS and CELERY_PAGE_PRIMER. Or in
code: `page_primer.integrations.celery.setup(app)`. Only worker processes are primed, never the
processes that send tasks. The report goes to the logger "celery.worker.page_primer".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from billiard.process import current_process
from celery import __version__, current_app, signals
from celery.concurrency import ALIASES
from celery.utils.log import get_logger

import page_primer
from page_primer._lean import replace
from page_primer.integrations import (
    announce,
    expect_forks,
    prime_and_log,
    suggest_freeze,
    thaw,
    versions,
)
from page_primer.logs import say
from page_primer.options import NAMES, Options
from page_primer.report import Report

_LOGGER = get_logger("celery.worker.page_primer")

# Celery replaces a child of the pool that has been larger than a limit; it looks after each task.
_NEAR = 0.8  # of the limit

_options: Options | None = None
_most_memory = 0  # that limit, KiB; 0: none
_first: Report | None = None  # made before logging was set up
_forking = 0  # PID of the parent of a pool of forks


def setup(app: Any) -> None:
    """Connect to the application's workers. Importing this module connects to those of every
    application of the process; this also checks the options at once.

    Raises:
        TypeError, ValueError: an option is unknown or does not make sense, or Celery is too old.
    """
    versions.require("celery", __version__)
    options_of(app.conf)


def options_of(conf: Mapping[str, Any]) -> Options:
    """The options in an application's configuration, over the environment's.

    Raises:
        TypeError, ValueError: an option is unknown or does not make sense; the message names it.
    """
    given = conf.get("page_primer")
    if given is None or isinstance(given, bool):
        values: dict[str, Any] = {}
    elif isinstance(given, Mapping):
        values = dict(given)
    else:
        raise TypeError(f"page_primer must be True, False or a dict of options, not {given!r}")
    for name in NAMES:
        value = conf.get(f"page_primer_{name}")
        if value is not None:
            values[name] = value
    options = Options.load(values)
    return replace(options, enabled=False) if given is False else options


def _prime_parent(conf: Any = None, options: Any = None, **_: Any) -> None:
    """Before the pool forks or starts threads."""
    global _options, _first
    try:
        versions.require("celery", __version__)
        conf = current_app.conf if conf is None else conf
        _options = options_of(conf)
    except (TypeError, ValueError) as error:
        # Celery swallows exceptions of receivers; this one is to stop the worker.
        sys.exit(f"page-primer: {error}")
    expect_forks(_pool_size(conf, options or {}))
    _first = page_primer.prime(_options)


def _pool_size(conf: Any, options: Mapping[str, Any]) -> int:
    """How many children a worker will fork at most; options are what it was started with."""
    pool = options.get("pool") or options.get("pool_cls") or conf.get("worker_pool")
    where = ALIASES.get(pool, pool) if isinstance(pool, str) else getattr(pool, "__module__", "")
    if not str(where).startswith("celery.concurrency.prefork"):
        return 0
    sizes = options.get("autoscale")  # "most,least", or both as numbers
    if isinstance(sizes, str):
        sizes = sizes.split(",")
    concurrency = options.get("concurrency") or conf.get("worker_concurrency")
    try:
        return max(int(size or 0) for size in sizes or [concurrency or os.cpu_count() or 1])
    except (TypeError, ValueError):  # it is Celery's to say so
        return 0


def _log_parent(instance: Any = None, **_: Any) -> None:
    """The first moment that logging works; modules that came since are primed as well."""
    global _most_memory
    _most_memory = getattr(instance, "max_memory_per_child", None) or 0
    if _first is not None:
        announce(_first, _LOGGER)
    thaw(_options)  # what was loaded since is to be frozen, too
    _prime()
    if _forks(instance):
        _prime_before_forks()
        suggest_freeze(_LOGGER, "the pool is forked from what is loaded here", _options)


def _prime_before_forks() -> None:
    """Have this process primed whenever it forks a child, which takes microseconds unless it has
    loaded a library since (Celery loads some after its last signal): otherwise each child finds it,
    and looks at everything again."""
    global _forking
    if not _forking:  # once: nothing takes it back
        os.register_at_fork(before=_prime_before_fork)
    _forking = os.getpid()


def _prime_before_fork() -> None:
    if os.getpid() == _forking:
        _prime()


def _forks(worker: Any) -> bool:
    """Whether a worker's pool consists of its forks."""
    pool = getattr(worker, "pool_cls", None)
    prefork = getattr(pool, "__module__", "") == "celery.concurrency.prefork"
    return prefork and getattr(worker, "pool_start_method", "fork") == "fork"  # since 5.7


def _prime(**_: Any) -> None:
    """In a child of the pool: lock again after a fork, prime after a spawn. After each task: it
    may have imported large libraries; when it did not, this takes microseconds."""
    global _options
    if _options is None:  # a spawned child: a fresh interpreter, in which no worker started
        _options = options_of(current_app.conf)
    prime_and_log(_LOGGER, _options)


def _prime_after_task(**_: Any) -> None:
    """In a worker's process: Celery sends this signal for eager tasks in others, too."""
    if _options is not None:
        _prime()


def _prime_child(**_: Any) -> None:
    """In each child of the pool, before its first task."""
    from resource import RUSAGE_SELF, getrusage  # not on Windows, where no pool forks

    _prime()
    limit = _most_memory or current_app.conf.worker_max_memory_per_child or 0
    # One speaks for all.
    if limit and getattr(current_process(), "index", None) == 0:
        warning = memory_warning(limit, getrusage(RUSAGE_SELF).ru_maxrss)
        if warning:
            say(_LOGGER.warning, "small_memory_limit", warning, limit_bytes=limit << 10)


def memory_warning(limit: int, size: int) -> str | None:
    """What to say of a child that has not had a task yet, if it is near the size at which Celery
    replaces it, which it measures as here.

    Args:
        limit: worker_max_memory_per_child, KiB.
        size: the child's, KiB: the most it has had in memory (getrusage(2), ru_maxrss).
    """
    if size < _NEAR * limit:
        return None
    advice = -(-2 * size // 1024) * 1024
    return (
        f"a child takes {size} KiB before its first task, worker_max_memory_per_child is {limit}: "
        f"it is replaced {'after each task' if size > limit else 'after few tasks'}; "
        f"set worker_max_memory_per_child to {advice} or more"
    )


for _signal, _receiver in (
    (signals.celeryd_init, _prime_parent),
    (signals.celeryd_after_setup, _log_parent),
    (signals.worker_process_init, _prime_child),
    (signals.task_postrun, _prime_after_task),
):
    _signal.connect(_receiver, weak=False, dispatch_uid=f"page_primer.{_signal.name}")
