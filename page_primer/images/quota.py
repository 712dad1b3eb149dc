"""What a store may take: room for an image is made, where that can be done."""

from __future__ import annotations

import errno
import os

from page_primer.images import inventory, names
from page_primer.images.trust import Unusable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from page_primer.images.layout import Layout


def make_room(store: int, wanted: Layout, original: int, *, limit: int, spare: int) -> int:
    """Make room in a store for an image, where that can be done.

    Args:
        store: the open directory.
        wanted: the image.
        original: the open file that it is made of.
        limit: bytes that the store may take.
        spare: how many times the room that the image needs must be free.

    Returns:
        The bytes that are left beside it.

    Raises:
        Unusable: there is no room for it.
        layout.CannotLayOut: the file has a form that no image can be written of.
        OSError: it cannot be read, or no image there can be mapped.
    """
    status = os.fstatvfs(store)
    if wanted.regions and status.f_flag & os.ST_NOEXEC:
        raise OSError(errno.EACCES, "mounted noexec")
    needed = wanted.size(original)
    free = status.f_bavail * status.f_frsize
    if free < spare * needed and spare > 1:
        raise Unusable(f"left to the application: {free >> 20} MiB are free")
    if needed > limit:  # whatever else is there
        raise _refusal(f"an image of {_mib(needed)} MiB is", limit, needed)
    taken = inventory.prune(store, room=needed, limit=limit)
    if taken + needed > limit:
        what = (
            f"{taken >> 20} MiB are taken there, too much of it in use: with this image it would be"
        )
        raise _refusal(what, limit, taken + needed)
    # Of what is written at each start, and gone after it, the debug information is not worth the
    # time and the page cache.
    return 0 if names.is_transient(wanted.name) else limit - taken - needed


def _refusal(what: str, limit: int, enough: int) -> Unusable:
    remedy = f"PAGE_PRIMER_STORE_LIMIT={_mib(enough)}M"
    return Unusable(f"{what} more than {limit >> 20} MiB", remedy)


def _mib(size: int) -> int:
    """As many as it takes."""
    return -(-size >> 20)
