"""How much this process may lock (mlock(2)), and how much of that is left to the host.

RLIMIT_MEMLOCK is on addresses, resident or not. An application may want to lock something itself,
if only the 64 bytes of a key, so a part of the limit is never taken.
"""

from __future__ import annotations

import os

from page_primer import _core
from page_primer._lean import ours, suppress
from page_primer.kernel.limits import soft_limit
from page_primer.kernel.thp import page_size

OVER = "over RLIMIT_MEMLOCK"
_LEAST_MARGIN = 512 << 10


def margin(limit: int) -> int:
    """What is left of a limit to the host, bytes."""
    return max(limit // 8, _LEAST_MARGIN)


def room() -> int | None:
    """Bytes that may yet be locked beside the host's part, below zero if that is touched already;
    None where no limit is in force."""
    limit = soft_limit(_core.RLIMIT_MEMLOCK)
    if limit is None or try_lock(limit + page_size()) is None:
        return None
    return limit - _locked() - margin(limit)


def try_lock(size: int) -> str | None:
    """Lock as many bytes of address space that has no memory behind it, and unlock them.

    MLOCK_ONFAULT needs no memory, so this is the kernel's own answer and costs nothing. A
    capability inside a user namespace, for one, does not count (mlock(2)).

    Returns:
        None, or why the kernel refused.
    """
    if not size:
        return None
    try:
        area = _core.reserve(size, page_size(), 0)
        # Readable: Linux 5.10 does not lock what nobody can touch.
        _core.protect(area.address, size, _core.PROT_READ)
        _core.lock(area.address, size, _core.MLOCK_ONFAULT)
        _core.unlock(area.address, size)
    except ours(OverflowError):  # more than there are addresses
        return OVER
    except ours(OSError) as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return None


def _locked() -> int:
    """VmLck, bytes."""
    with suppress(OSError), open("/proc/self/status", "rb", buffering=0) as file:
        _, _, rest = file.readall().partition(b"\nVmLck:")
        number, _, _ = rest.partition(b" kB")
        return int(number) << 10 if number.strip().isdigit() else 0
    return 0
