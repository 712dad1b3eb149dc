"""Freeze the heap before forks, so that children share it for longer.

The garbage collector writes to the header of every object that it looks at, and so makes a child
copy the pages of all that it inherited. gc.freeze() puts these objects where it does not look
(documentation of module gc). Freezing once, before the first fork, is enough; what is frozen is
never collected, so it is thawed and collected before it is frozen again.
"""

from __future__ import annotations

import gc

_frozen = False  # which forks inherit


def freeze(*, again: bool = False) -> int:
    """Collect, and freeze what is left, unless this process or the one that it was forked from did.

    Args:
        again: thaw first what is frozen; for a parent that loaded its application anew.

    Returns:
        The number of frozen objects.
    """
    global _frozen
    if again or not _frozen:
        if _frozen:
            gc.unfreeze()
        gc.collect()
        gc.freeze()
        _frozen = True
    return gc.get_freeze_count()
