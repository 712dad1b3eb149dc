"""Put a Python server's machine code on huge pages and lock it in memory.

Examples:
    >>> import logging, page_primer
    >>> report = page_primer.prime()
    >>> report.log(logging.getLogger())

Importing this package loads no framework and starts no work.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident

from page_primer import reasons
from page_primer._lean import asdict, is_ours, let_go
from page_primer._loading import Loading, is_cut_off, threads
from page_primer.options import Options, unknown_variables
from page_primer.reasons import Reason, Refusal
from page_primer.report import Report
from page_primer.words import counted, mib, shortage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

    from typing_extensions import Unpack

    from page_primer.apply.process import Process
    from page_primer.options import OptionValues

    __version__: str

__all__ = ["Options", "Report", "__version__", "prime", "restore", "status"]


def prime(options: Options | None = None, /, **values: Unpack[OptionValues]) -> Report:
    """Bring this process to the primed state, and return a report of it.

    Call it near the top of the process, before threads and forks. Calling it again is cheap and
    handles only what is new: libraries loaded since, and in a forked child the locks, which are not
    inherited; with nothing new the report is that of the call before. It may be called from any
    thread.

    Args:
        options: ready-made options; then `values` must be empty.
        remap: move code onto huge pages.
        mlock: lock what ELF objects have mapped, the hottest code first: `all` of it (or true), the
            `code` alone, or off (false).
        backing: where code is moved to: `in_place`, `image`, `memfd`, `anonymous`, `hugetlb`, or
            `auto` for the first of the first four that works.
        merge: let read-only data share a huge page with code and so become executable, as it was in
            every binary before `-z separate-code`; off: only ranges of one protection are moved.
        keep_profilers: leave on the original file what profilers look for there, or map anchors to
            it (small files beside the images) where that is enough.
        perf_map: write `/tmp/perf-PID.map` with the symbols of code in memory without a file's
            name, for perf.
        include: only objects whose path or file name matches one of these fnmatch patterns
            (`libpython*,*/numpy/*`).
        exclude: no objects whose path or file name matches one of these fnmatch patterns.
        limit: bytes to copy at most for objects other than the interpreter, the hottest first;
            `64M` works too.
        private_limit: the same for objects at a random load address (overlayfs, without
            `page-primer align`), whose copies other processes can hardly share.
        memory_share: of the memory that is available to this process (of the machine, and within
            the limits of its memory cgroups), the share that copies and locks may take at most:
            above 0, up to 1.
        image_dir: absolute path of the directory for images; by default the first that gives huge
            pages.
        store_limit: bytes that the directory for images may take; the longest unused are removed
            first.
        heap: have the heap on huge pages, too: pymalloc's `arenas`; `auto` (or true): these and
            malloc's `[heap]`; `all`: large blocks as well; or off (false).
        heap_min_memory: bytes; with a smaller memory limit (a cgroup's, or the machine's memory)
            the heap is left alone.
        heap_unshare: collapse in a forked child what it shares with its parent as well, and so copy
            it.
        freeze: call `gc.collect()` and `gc.freeze()` once in a process that is about to fork, so
            that its children share the heap for longer.

    What is not given comes from the environment (`PAGE_PRIMER_REMAP` and so on), then from the
    defaults. `PAGE_PRIMER=0` switches everything off.

    Raises:
        TypeError, ValueError: an option that is unknown or does not make sense; the message names
            it. What the environment refuses is never an exception but an outcome in the report.
    """
    if options is None:
        options = Options.load(values)
    elif values:
        raise TypeError("prime() takes either Options or keyword arguments")
    if not options.enabled:
        return _nothing_done(reasons.SWITCHED_OFF)
    loaded = _process is not None
    return on_process(lambda process: _prime(process, options, loaded))


def restore() -> Report:
    """Put every moved range back on its original file and unlock what was locked.

    Returns:
        The report of the process as it then is.
    """
    return on_process(lambda process: process.restore())


_health: ModuleType | None = None


def status(*, measure: bool = False) -> dict[str, Any]:
    """Say how this process is primed, as plain data ready for `json.dumps()`: for a health
    endpoint. It primes nothing, and never raises for what the environment refuses.

    Args:
        measure: read smaps anew, which takes milliseconds (tens of them in a process with hundreds
            of mappings) and waits for a call of `prime()` that another thread is in. By default
            sizes are those of the last call of `prime()`, and it takes a tenth of a millisecond.

    Returns:
        `primed`, `pending` (something new has come since: a library, or a fork), `shortfalls` (what
        the log warned of), sizes in bytes; docs/health.md and `python -m page_primer.schema health`
        have every field. Where even asking is refused (this package's files are gone, no
        descriptor is left), `pid`, `primed`, `reason` and `detail` alone.
    """
    global _health
    try:
        if _health is None:
            with Loading():  # of those who ask alone
                from page_primer import health
            _health = health
        found: dict[str, Any] = asdict(_health.read(_refused, measure=measure))
    except Exception as error:
        if not is_ours(error):
            raise
        refused, shown = _refusal(error), _process.shown if _process else None
        objects = shown.objects if shown else ()
        locked = _process is not None and _process.mlocks.in_force  # a fork inherits none
        primed = any(obj.backing or (locked and obj.locked_bytes) for obj in objects)
        return {
            "pid": os.getpid(), "primed": primed, "reason": refused.reason, "detail": refused.detail
        }  # fmt: skip
    return found


def on_process(action: Callable[[Process], Report]) -> Report:
    """Do something to this process, one thing at a time; where that cannot be, the report says why.
    Whatever surprise the environment has, the server runs on; what a signal handler of the host
    raises reaches the host, after the call has come to its end."""
    outermost = get_ident() not in threads
    try:
        refused = _unsupported() or _load()
        if refused is None:
            return _alone(action)
    except Exception as error:
        if not is_ours(error):
            raise
        refused = _refusal(error)
    finally:
        # What a signal handler raised may have kept Loading() from its end. No Python code begins
        # here, at which another might.
        if outermost:
            threads.discard(get_ident())
    return _nothing_done(refused.reason, refused.detail)


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, reasons.Declined):
        return error.refusal
    if isinstance(error, ImportError):  # built without its C core
        return Refusal(reasons.NOT_AVAILABLE, str(error))
    if isinstance(error, MemoryError):
        return Refusal(reasons.TOO_LITTLE_MEMORY, "MemoryError")
    return Refusal(reasons.UNEXPECTED, f"{type(error).__name__}: {error}")


def _prime(process: Process, options: Options, loaded: bool) -> Report:
    # The heap may be here since before it was known how many processes there will be.
    refused = _no_room() if loaded and process.options is None else None
    return _nothing_done(refused.reason, refused.detail) if refused else process.prime(options)


_refused: Report | None = None  # the last call that did nothing, for status()


def _nothing_done(reason: Reason, detail: str | None = None) -> Report:
    global _refused
    _refused = Report(
        pid=os.getpid(), reason=reason, detail=detail, unknown_variables=unknown_variables()
    )
    return _refused


def _alone(action: Callable[[Process], Report]) -> Report:
    # Where there is no core, the import of this package says nothing: the report does.
    from page_primer import _core

    process = _process
    assert process is not None  # by _load()

    def otherwise(is_mine: bool) -> Report:
        return _nothing_done(reasons.IN_SIGNAL_HANDLER if is_mine else reasons.ANOTHER_CALL)

    try:
        return _core.alone(lambda: action(process), otherwise)
    except BaseException as error:
        let_go(error)
        raise


_process: Process | None = None  # once what a call needs is imported


def _load() -> Refusal | None:
    """Import what a call needs, unless memory is too short even for that."""
    global _process
    if is_cut_off():
        return Refusal(reasons.CUT_OFF)
    if _process is not None:
        return None
    with Loading():
        refused = _no_room()
        if refused is None:
            from page_primer.apply.process import process  # not for `import page_primer`

            _process = process
        return refused


def _no_room() -> Refusal | None:
    """The modules that prime take a few megabytes themselves, which may be the last ones; and more
    in each process that is to be forked. Mappings may be the last ones as well."""
    with Loading():  # not for `import page_primer`
        from page_primer import family
        from page_primer.kernel import memory

    memory.require_mappings()
    found = family.shortage(working=0 if _process else memory.WORKING)
    if found is None:
        return None
    detail = shortage(found)
    if found.available >= memory.WORKING:
        number = counted(family.size(), "process", "es")  # two at least: see needed()
        detail += f": {number} need {mib(family.needed())}"
    return Refusal(reasons.TOO_LITTLE_MEMORY, detail)


def _unsupported() -> Refusal | None:
    found = None
    if sys.platform != "linux":
        found = sys.platform
    elif sys.implementation.name != "cpython":
        found = sys.implementation.name
    else:
        try:
            machine = os.uname().machine
        except OSError as error:
            if not is_ours(error):
                raise
            return None  # a sandbox: on another our C core would not be here
        if machine not in ("x86_64", "aarch64") or sys.maxsize < 1 << 32:
            found = f"{machine}, {sys.maxsize.bit_length() + 1} bits"
    return Refusal(reasons.NOT_SUPPORTED, found) if found else None


if not TYPE_CHECKING:

    def __getattr__(name):
        """The version, found when it is asked for: importlib.metadata takes 20 ms to import."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        global __version__
        if is_cut_off():
            return "unknown"
        with Loading():  # 20 ms
            from importlib import metadata

        # Beside this package first: it need not be the one that sys.path leads to.
        places = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), *sys.path]
        found = metadata.distributions(name="page-primer", path=places)
        __version__ = next((distribution.version for distribution in found), "unknown")
        return __version__
