"""Sizes, times, shares and remedies, for people."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from page_primer.kernel.memory import Memory

# The limit permits, it reserves nothing; and what is mapped differs from one process of a server to
# another. Advice that followed each would change with each.
_MEMLOCK = 256 << 20

# For a parent that has loaded what its children work with.
FREEZE_REMEDY = "PAGE_PRIMER_FREEZE=1 lets forked workers share it for longer (docs/heap.md)"


def image_place(path: str) -> str:
    """An image's path, for people: its store, rather than the folder named after its content."""
    return f"image in {store_of(path)}"


def store_of(path: str) -> str:
    """The directory that an image's path is in: a store has a folder for each image."""
    return path.rsplit("/", 2)[0] or "/"


def memlock_for(size: int) -> int:
    """The RLIMIT_MEMLOCK to advise where so many bytes are to be locked: the same for nearly every
    process, and twice as much, and so on, where less than a quarter of it would be left."""
    limit = _MEMLOCK
    while 3 * limit < 4 * size:
        limit *= 2
    return limit


def memlock_remedy(size: int) -> str:
    """The lines that let a process lock so many bytes."""
    limit = memlock_for(size)
    if "KUBERNETES_SERVICE_HOST" in os.environ:  # a pod has no such limit of its own to set
        return (
            "securityContext: {capabilities: {add: [IPC_LOCK]}} where the container runs as root, "
            f"or LimitMEMLOCK={limit >> 20}M for the node's container runtime"
        )
    return (
        f"LimitMEMLOCK={limit >> 20}M (systemd), --ulimit memlock={limit} (Docker) "
        f"or ulimit -l {limit >> 10}"
    )


def memlock_lines(size: int) -> tuple[str, ...]:
    """The same one by one, as they are to be written, with what reads each."""
    limit = memlock_for(size)
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return (
            "securityContext: {capabilities: {add: [IPC_LOCK]}}  # a container run by root",
            f"LimitMEMLOCK={limit >> 20}M  # systemd, the node's container runtime",
        )
    return (
        f"LimitMEMLOCK={limit >> 20}M  # systemd",
        f"--ulimit memlock={limit}  # Docker",
        f"ulimit -l {limit >> 10}  # the shell that starts it",
    )


def shortage(memory: Memory) -> str:
    """What is available, and where the limit is, for people."""
    return f"{mib(memory.available)} available of {mib(memory.limit)} ({memory.where})"


def mib(size: int) -> str:
    """A size for people."""
    return f"{size / (1 << 20):.1f} MiB"


def counted(number: int, noun: str, ending: str = "s") -> str:
    """A number of things for people: "1 object", "2 objects", "3 processes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{ending}"


def percent(part: int, whole: int) -> str:
    """A share for people; 100 % only when nothing is missing."""
    if not whole:
        return "-"
    if part >= whole:
        return "100 %"
    return f"{min(100 * part / whole, 99.9):.1f} %"


def milliseconds_since(began: float) -> float:
    """How long it is since time.perf_counter() was `began`."""
    return (time.perf_counter() - began) * 1000
