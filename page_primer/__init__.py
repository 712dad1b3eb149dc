"""Put a Python server's machine code on huge pages and lock it in memory.

>>> import logging, page_primer
>>> report = page_primer.prime()
>>> report.log(logging.getLogger())

Importing this package loads no framework and starts no work.
"""

from __future__ import annotations

import os
import sys

from page_primer.options import Options
from page_primer.report import Report, shortage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

    from page_primer.apply.process import Process
    from page_primer.options import OptionValues

__all__ = ["Options", "Report", "prime", "restore"]


def prime(options: Options | None = None, /, **values: Unpack[OptionValues]) -> Report:
    """Bring this process to the primed state, and return what came of it.

    Call it near the top of the process, before threads and forks. Calling it again is cheap and
    handles only what is new: libraries loaded since, and in a forked child the locks, which are not
    inherited; with nothing new the report is that of the call before. It may be called from any
    thread.

    Args:
        options: ready-made options; then `values` must be empty.
        remap: move code onto huge pages.
        mlock: lock what ELF objects have mapped, the hottest code first: "all" of it (or True), or
            the "code" alone; False for nothing.
        backing: "auto", or one of "image", "memfd", "anonymous", "hugetlb".
        merge: let read-only data share a huge page with code, and so become executable. Without it,
            only ranges of one protection are moved.
        keep_profilers: leave on the original file what profilers need to see there, or map
            anchors to it (small files beside the images) where that will do.
        perf_map: write /tmp/perf-PID.map with the symbols of code in memory without a file's name.
        include: only objects whose path or file name matches one of these fnmatch patterns.
        exclude: no objects whose path or file name matches one of these fnmatch patterns.
        limit: bytes to copy at most for objects other than the interpreter; "64M" works too.
        memory_share: of the memory that is available to this process (of the machine, and within
            the limits of its memory cgroups), the share that copies and locks may take at most.
        image_dir: the directory for images, absolute; by default the first that fits.
        heap: have the heap on huge pages, too: pymalloc's "arenas", or "all": malloc's heap and
            large blocks as well; "auto" (or True) leaves large blocks alone; False for nothing.
        heap_min_memory: bytes; with a smaller memory limit the heap is left alone.
        heap_unshare: collapse in a forked child what it shares with its parent, and so copy it.
        freeze: gc.collect() and gc.freeze(), once, in a process that is about to fork.

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
        return Report(pid=os.getpid(), reason="switched off")
    return on_process(lambda process: process.prime(options))


def restore() -> Report:
    """Put every moved range back on its original file and unlock what was locked.

    Returns:
        The report of the process as it then is.
    """
    return on_process(lambda process: process.restore())


def on_process(action: Callable[[Process], Report]) -> Report:
    """Do something to this process, one thing at a time; where that cannot be, the report says why.
    Whatever surprise the environment has, the server runs on."""
    reason = _unsupported()
    if reason is None:
        try:
            reason = _too_little_memory()
            if reason is None:
                return _alone(action)
        except ImportError as error:  # built without its C core
            reason = f"not available here: {error}"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    return Report(pid=os.getpid(), reason=reason)


def _alone(action: Callable[[Process], Report]) -> Report:
    from _thread import get_ident  # threading takes 2 ms to import

    from page_primer.apply import fork
    from page_primer.apply.process import process

    fork.enter()
    try:
        if process.owner == get_ident():
            reason = "called by a signal handler while it was under way"
            return Report(pid=os.getpid(), reason=reason)
        process.owner = get_ident()
        try:
            return action(process)
        finally:
            process.owner = 0
    finally:
        fork.mutex.release()


def _too_little_memory() -> str | None:
    """The modules that prime take a few megabytes themselves, which may be the last ones."""
    if "page_primer.apply.process" in sys.modules:
        return None
    from page_primer.kernel import memory

    found = memory.read()
    if found is None or found.available >= memory.WORKING:
        return None
    return f"too little memory, {shortage(found)}"


def _unsupported() -> str | None:
    if sys.platform != "linux":
        return f"not supported on {sys.platform}"
    if sys.implementation.name != "cpython":
        return f"not supported on {sys.implementation.name}"
    machine = os.uname().machine
    if machine not in ("x86_64", "aarch64") or sys.maxsize < 1 << 32:
        return f"not supported on {machine}, {sys.maxsize.bit_length() + 1} bits"
    return None
