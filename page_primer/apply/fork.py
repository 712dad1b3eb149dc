"""One call at a time, also over forks.

A fork waits for a call that is under way in another thread, or the child would inherit a half-kept
registry and a mutex that nobody holds. The mutex is reentrant for signal handlers, which run in the
midst of a call and may fork.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import RLock, get_ident
else:
    from _thread import RLock, get_ident  # threading takes 2 ms to import

mutex = RLock()
# Whoever forks closes it until it has the mutex, so that threads that prime without pause do not
# starve it.
_turnstile = RLock()
_forking: set[int] = set()  # threads that fork, and hold the mutex for it


def enter() -> None:
    """Take the mutex, behind forks that wait for it."""
    if not mutex._is_owned():  # type: ignore[attr-defined]
        with _turnstile:
            pass
    mutex.acquire()


def watch(in_child: Callable[[], None]) -> None:
    """Have forks wait, and `in_child` called in each child."""

    def after_in_child() -> None:
        in_child()
        _after_in_child()

    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=after_in_child
    )


def _before() -> None:
    # Whatever a signal handler raises while this waits: a fork amid another thread's call would
    # leave the child the loader's lock, which nobody there would release.
    raised: BaseException | None = None
    if mutex._is_owned():  # type: ignore[attr-defined]
        mutex.acquire()
    else:
        with _turnstile:
            while not mutex._is_owned():  # type: ignore[attr-defined]
                try:
                    mutex.acquire()
                except BaseException as error:
                    raised = error
    _forking.add(get_ident())
    if raised is not None:
        raise raised  # of which the interpreter makes an "unraisable" one


def _after_in_parent() -> None:
    if get_ident() in _forking:
        _forking.discard(get_ident())
        mutex.release()


def _after_in_child() -> None:
    # Whoever held a mutex is not here: a thread of the parent, or this one, if its wait was
    # interrupted.
    mine = get_ident() in _forking
    _forking.clear()
    _turnstile._at_fork_reinit()  # type: ignore[attr-defined]
    if mine:
        mutex.release()
    else:
        mutex._at_fork_reinit()  # type: ignore[attr-defined]
