"""What happens in each Python process that starts under `page-primer run`, before its own code.

Called by site/sitecustomize.py: the process is primed, its children lock for themselves, and
libraries that it imports later are primed as they arrive.
"""

from __future__ import annotations

import os
import sys

from page_primer import _unsupported, on_process, prime
from page_primer._lean import suppress
from page_primer._loading import Loading
from page_primer.options import Options, flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from page_primer.report import Report

SITE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")
LATE, VERBOSE = "PAGE_PRIMER_LATE", "PAGE_PRIMER_VERBOSE"

_started_here = False


def start() -> None:
    """Prime this process. With PAGE_PRIMER_VERBOSE the outcome is a line on stderr, and so is that
    of libraries that come later, and of a fork."""
    global _started_here
    if _started_here:  # another installation's sitecustomize is on PYTHONPATH too
        return
    _started_here = True
    options = Options.load()
    if not options.enabled:
        return
    if options.heap:
        _start_arenas(options)
    report = prime(options)
    os.register_at_fork(after_in_child=_lock_in_child)
    if report.reason is None and _wants(LATE, True):
        with Loading():  # not of processes that want none
            from page_primer.launcher import imports as late

        late.watch(options, _tell)
    _tell(report)


def _start_arenas(options: Options) -> None:
    """Have the modules that prime() imports, and all after them, in huge arenas. Whatever is in the
    way, prime() has to say."""
    with suppress(ImportError, OSError):
        with Loading():  # of this option alone
            from page_primer.heap import arenas
            from page_primer.heap.refusal import refusal
            from page_primer.kernel import memory, thp

        huge = thp.pmd_size()
        if _unsupported() is None and refusal(options, huge, list(memory.bounds())) is None:
            arenas.install(huge)


def _tell(report: Report) -> None:
    """With PAGE_PRIMER_VERBOSE, say what a call did."""
    if _wants(VERBOSE, False):
        say(f"page-primer[{os.getpid()}]: {report.summary()}")


def say(line: str) -> None:
    """Write a line to stderr, if it takes it; otherwise nothing comes of it.

    By the descriptor: what a full disk refuses would stay in sys.stderr's buffer, and the flush at
    exit fail with status 120. The signals for a closed pipe and a file that may not grow are
    consumed, since a host that embeds Python may not ignore them.
    """
    with Loading():  # with enum: milliseconds, for the few that have something to say
        import signal

    stderr = sys.__stderr__
    if stderr is None:  # closed: its number may be another file's by now
        return
    fatal = {signal.SIGPIPE, signal.SIGXFSZ}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, fatal)
    try:
        os.write(stderr.fileno(), f"{line}\n".encode(stderr.encoding, "backslashreplace"))
    except (OSError, ValueError):
        while signal.sigtimedwait(fatal, 0):
            pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wants(name: str, default: bool) -> bool:
    return flag(name, os.environ.get(name) or default)


def _lock_in_child() -> None:
    """A fork inherits no locks. Only locks: the child of a thread must not ask the loader."""
    try:
        report = on_process(lambda process: process.lock_in_child())
        if _wants(VERBOSE, False):
            with Loading():  # only for this line
                from page_primer.words import mib

            locked = mib(report.lock_wanted_bytes - report.lock_refused_bytes)
            say(f"page-primer[{os.getpid()}]: forked from {os.getppid()}, {locked} locked again")
    except BaseException:  # a signal handler's: a fork hook has nobody to raise it to
        return
