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
    from typing import TypeVar

    Result = TypeVar("Result")
else:
    from _thread import RLock, get_ident  # threading takes 2 ms to import

mutex = RLock()
# Whoever forks closes it until it has the mutex, so that threads that prime without pause do not
# starve it.
_turnstile = RLock()
_inside: set[int] = set()  # threads whose call is under way
_LONGEST_WAIT = 10.0  # seconds
_TIMES = 3  # that each hook is registered


def alone(action: Callable[[], Result], otherwise: Callable[[], Result]) -> Result:
    """Do something with the mutex held, behind forks that wait for it; or something else where it
    is not to be had."""
    if not mutex._is_owned():  # type: ignore[attr-defined]
        with _turnstile:
            pass
    # Never for ever: whatever left it held, the host goes on unprimed.
    if not mutex.acquire(timeout=_LONGEST_WAIT):
        return otherwise()
    try:
        outermost = get_ident() not in _inside
        _inside.add(get_ident())
        try:
            return action()
        finally:
            if outermost:
                _inside.discard(get_ident())
    finally:
        mutex.release()


def watch(in_child: Callable[[], None]) -> None:
    """Have forks wait, and `in_child` called in each child."""

    def after_in_child() -> None:
        in_child()
        _after_in_child()

    # A signal handler's exception may also come as a hook is entered, before a line of it has run.
    # Each can be done again, so the next of them does what that one did not.
    for _ in range(_TIMES):
        os.register_at_fork(
            before=_before, after_in_parent=_after_in_parent, after_in_child=after_in_child
        )


def _persist(step: Callable[[], None]) -> None:
    """Do a step, which may be done again, to its end, whatever signal handlers raise meanwhile.
    That is raised then; of a fork hook's exception the interpreter makes an "unraisable" one."""
    raised: BaseException | None = None
    while True:
        try:
            step()
            break
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


def _before() -> None:
    # A fork amid another thread's call would leave the child the loader's lock, which nobody there
    # would release.
    _persist(_take)


def _take() -> None:
    if not mutex._is_owned():  # type: ignore[attr-defined]
        with _turnstile:
            mutex.acquire()


def _after_in_parent() -> None:
    _persist(_release)


def _release() -> None:
    # A signal handler's fork amid its own thread's call took nothing.
    while get_ident() not in _inside and mutex._is_owned():  # type: ignore[attr-defined]
        mutex.release()


def _after_in_child() -> None:
    # Whoever else held something is not here.
    _inside.intersection_update({get_ident()})
    _turnstile._at_fork_reinit()  # type: ignore[attr-defined]
    if mutex._is_owned():  # type: ignore[attr-defined]
        _release()
    else:
        mutex._at_fork_reinit()  # type: ignore[attr-defined]
