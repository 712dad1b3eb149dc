"""pymalloc's arenas: whether there are any, where those older than ours lie, and why not."""

from __future__ import annotations

import gc
import os
import sys

from page_primer import _core
from page_primer.kernel.smaps import overlapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from page_primer.kernel.smaps import Mapping

# Of larger huge pages (arm64 with 16 and 64 KiB pages) one would hold more arenas than most
# processes ever have.
LARGEST = 4 << 20

_SAMPLE = 20_000

# Since then CPython advises each arena by itself (Objects/obmalloc.c).
_ADVISES_ITSELF = (3, 15)


def unavailable(huge: int) -> str | None:
    """Why new arenas cannot be parts of huge pages here, or None.

    Args:
        huge: the size of a huge page, bytes.
    """
    if not _is_pymalloc():
        return "no arenas: pymalloc is not in use (PYTHONMALLOC, or how Python was built)"
    if sys.version_info >= _ADVISES_ITSELF:
        return "arenas: this CPython advises them by itself"
    if huge > LARGEST:
        return f"arenas: huge pages of {huge >> 20} MiB are too large for them"
    return None


def _is_pymalloc() -> bool:
    """Whether small objects are pymalloc's. It is not asked what a program that embeds Python has
    chosen by itself (PyPreConfig.allocator), of which Python does not tell."""
    # Blocks of malloc's are not counted; mimalloc's are: that of free-threaded builds ("t"), and
    # since CPython 3.13 of others where the environment says so.
    if not sys.getallocatedblocks() or "t" in sys.abiflags:
        return False
    chosen = "" if sys.flags.ignore_environment else os.environ.get("PYTHONMALLOC", "")
    return not chosen.startswith("mimalloc")


def install(huge: int) -> str | None:
    """Have new arenas made of huge pages. Returns why not, or None."""
    if (reason := unavailable(huge)) is not None:
        return reason
    outcome = _core.arenas_install(huge)
    return {
        "active": None,
        "below": "arenas: another allocator was installed over page-primer's",
        "none": "no arenas: this Python does not let others exchange their allocator",
        "fork": "arenas: forks cannot be watched, or one was under way",
    }[outcome]


def find(mappings: Sequence[Mapping]) -> list[Mapping]:
    """The mappings that arenas lie in, whoever made them: those that hold some of the small objects
    that there are. An arena holds thousands, so one without any in the sample is unlikely."""
    if not _is_pymalloc():
        return []
    low, high = 0, 0
    found: dict[int, Mapping] = {}
    # By address, so that each mapping is looked up once.
    for address in sorted({id(value) & -(1 << 12) for value in _objects()}):
        if low <= address < high:
            continue
        for mapping in overlapping(mappings, address, address + 1):
            low, high = mapping.start, mapping.end
            found[low] = mapping
    return list(found.values())


def _objects() -> Iterator[object]:
    """Objects that the collector knows, and what modules define: strings, for one, it does not.
    Only plain modules: looking into lazy ones would load them."""
    tracked = gc.get_objects()
    sample = tracked[:: 1 + len(tracked) // _SAMPLE]
    # Up to CPython 3.10 our own frame is among them: what it holds would live until a collection.
    del tracked
    while sample:
        yield sample.pop()
    for module in list(sys.modules.values()):
        if type(module) is type(sys):
            yield from list(vars(module).values())
