"""The processes of a server that forks, which share what memory there is.

What is available to a parent before it forks says nothing of what its application will take in each
child. The parent's integration says how many there will be; the rest follows from what priming adds
to each.
"""

from __future__ import annotations

import os

from page_primer.kernel import memory
from page_primer.kernel.memory import WORKING, Memory

# What priming adds to each process, bytes: our modules, which a process comes to have for itself at
# its end at the latest, when it clears them away. And to all of them together, at least: a copy of
# the interpreter's code.
EACH, COPY = 7 << 18, 4 << 20
# An application is thought to leave a tenth of its own peak free within its limit.
_OURS = 11

_size = 1
_parent = 0  # PID of the process that said so


def expect(children: int) -> None:
    """In a parent: note how many children it will fork."""
    global _size, _parent
    _size, _parent = 1 + children, os.getpid()


def size() -> int:
    """How many processes there will be, with the parent; 1 where nobody said."""
    return _size


def copies() -> int:
    """How many of them will each have what this one copies for itself alone: as a child all of
    them; what the parent copies its children inherit."""
    return 1 if os.getpid() == _parent else _size


def needed() -> int:
    """The limit that they need at least, bytes; 0 for one process.

    The application fits its limit, and so does what is ours where the limit is eleven times that.
    """
    return _OURS * (_size * EACH + COPY) if _size > 1 else 0


def shortage(root: str = "", working: int = WORKING) -> Memory | None:
    """The bound that leaves too little to prime at all, if one does.

    Args:
        root: where /proc and /sys are to be found.
        working: what this process needs for itself, bytes.
    """
    if not working and not needed():
        return None
    for bound in sorted(memory.bounds(root), key=lambda bound: bound.available):
        if bound.available < working or bound.limit < needed():
            return bound
    return None
