"""Freeze the heap before forks, so that children share it for longer.

The garbage collector writes to the header of every object that it looks at, and so makes a child
copy the pages of all that it inherited. gc.freeze() puts these objects where it does not look
(documentation of module gc). Freezing once, before the first fork, is enough: done around every
fork it leaks, since what is frozen is never collected. So it is thawed and collected before it is
frozen again, which a parent does that has loaded its application anew.
"""

from __future__ import annotations

import gc
import sys

# Objects of a parent that has loaded more than its configuration: a primed one of gunicorn's has
# 90 000, with pandas 310 000, which take 70 ms to collect.
_LARGE = 400_000


def collect_if_small() -> None:
    """In a parent that is about to fork, and has not loaded the application: collect.

    What priming allocates brings the next full collection nearer. It would come in each child, as
    that loads the application, and copy what the child has inherited. In a large parent it takes
    long (half a second with two million objects), and freezing is for that.

    What was freed lies between what is in use, and a child that allocates there copies a page for
    a few bytes: so it is called before priming as well, which then fills these places.
    """
    # None are counted where they are malloc's (PYTHONMALLOC=malloc).
    if gc.isenabled() and sys.getallocatedblocks() < _LARGE:
        gc.collect()


class Frozen:
    """Whether this process, or the one that it was forked from, was frozen."""

    def __init__(self) -> None:
        self.objects: int | None = None  # frozen; None: to be frozen, or again

    def freeze(self) -> None:
        """Collect, and freeze what is left, unless that was done."""
        if self.objects is not None:
            return
        gc.collect()
        gc.freeze()
        self.objects = gc.get_freeze_count()

    def thaw(self) -> None:
        """Have the collector look at everything again, if we froze it."""
        if self.objects is not None:
            self.objects = None
            gc.unfreeze()
