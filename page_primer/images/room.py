"""How much room an image may take."""

from __future__ import annotations

import os

from page_primer import _core
from page_primer.kernel import memory
from page_primer.kernel.limits import soft_limit

NO_LIMIT = 1 << 62  # bytes
_DEBUG_LIMIT = 64 << 20  # bytes; at most a quarter of the room on disk, an eighth of memory's


def for_debug_information(target: int, left: int) -> int:
    """Bytes of debug information that an image may have: without it tools name the functions, but
    not those that the compiler inlined, nor source lines. Neither disk nor memory is to become
    short by it (on a tmpfs it cannot be reclaimed), nor what the store has left for others."""
    status = os.fstatvfs(target)
    room = min(_DEBUG_LIMIT, status.f_bavail * status.f_frsize // 4, left // 4)
    found = memory.read()
    if found is not None:
        room = min(room, found.available // 8)
    limit = soft_limit(_core.RLIMIT_FSIZE)
    return room if limit is None else min(room, limit // 4)
