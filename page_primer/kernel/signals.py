"""Signals while something must not be interrupted half-way."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal  # signal itself imports enum, which costs a short-lived process 2 ms

# Of the thread's own doing: to block them would be to die of them without a trace.
_SYNCHRONOUS = {
    _signal.SIGSEGV, _signal.SIGBUS, _signal.SIGFPE, _signal.SIGILL, _signal.SIGTRAP,
    _signal.SIGABRT, _signal.SIGSYS,
}  # fmt: skip


class deferred:  # noqa: N801  # a context manager, as contextlib's are named
    """Deliver this thread's signals when the block is left.

    What a handler raises then comes out of the block's end, to whoever called, with nothing left
    half-done: an exception between a system call and the assignment of what it returned would leak
    a mapping or a descriptor. Where other threads take the process's signals, the main thread's
    handlers run at any time all the same.
    """

    def __enter__(self) -> None:
        self._before = _signal.pthread_sigmask(
            _signal.SIG_BLOCK, set(_signal.valid_signals()) - _SYNCHRONOUS
        )

    def __exit__(self, *exception: object) -> None:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, self._before)
