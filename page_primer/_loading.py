"""Imports in the midst of a call, which the forks of other threads wait for.

A child that is forked while another thread imports a module has that module's lock for ever, and
would wait for it at its own import. So what is imported by a call is imported under `Loading()`:
forks wait for its end, though not for long. A child that was forked all the same `is_cut_off()`:
its calls of prime() and restore() do nothing, and import nothing.
"""

from __future__ import annotations

import os
import time
from _thread import get_ident  # threading takes 2 ms to import

LONGEST_WAIT = 2.0  # seconds

threads: set[int] = set()  # that import
_cut_off = False
_watched = False  # forks are


class Loading:
    """A context in which modules are imported."""

    __slots__ = ("_me", "_outermost")

    def __init__(self) -> None:
        self._me = get_ident()
        self._outermost = self._me not in threads  # another is a signal handler's

    def __enter__(self) -> None:
        global _watched
        if not _watched:
            os.register_at_fork(before=_wait_for_others, after_in_child=_after_fork)
            _watched = True
        try:
            threads.add(self._me)
        except BaseException:  # a signal handler's
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._outermost:
            threads.discard(self._me)


def is_cut_off() -> bool:
    """Whether this process was forked amid another thread's import."""
    return _cut_off


def _wait_for_others() -> None:
    end = time.monotonic() + LONGEST_WAIT
    while threads - {get_ident()} and time.monotonic() < end:
        time.sleep(0.001)


def _after_fork() -> None:
    global _cut_off
    _cut_off = _cut_off or bool(threads - {get_ident()})
    threads.intersection_update({get_ident()})
