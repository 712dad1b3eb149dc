"""Which objects the options admit, which come first, and what memory allows: for plan.py, and for
mlock_plan.py."""

from __future__ import annotations

import os
import sys

from page_primer import hot
from page_primer._loading import Loading
from page_primer.elf.objects import Object, Range
from page_primer.kernel.memory import Memory
from page_primer.kernel.smaps import overlapping
from page_primer.options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def heat(obj: Object) -> tuple[bool, int]:
    # What was executed is resident; nothing better is known without running for a while.
    return (not obj.interpreter, -obj.resident_code)


def selects(options: Options, path: str) -> bool:
    """Whether `include` and `exclude` admit the object at a path."""
    if options.include and not _matches(path, options.include):
        return False
    return not _matches(path, options.exclude)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    if not patterns:
        return False
    with Loading():  # and with it re, only where there are patterns
        import fnmatch

    name = os.path.basename(path)
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(path, p) for p in patterns)


def memory_room(memory: Memory | None, options: Options, held: Iterable[Range]) -> int:
    """Bytes of memory that may yet be copied to, or locked.

    Args:
        memory: what is to be had; None where nothing is known.
        options: what the caller wants.
        held: what was copied or locked before. It is available no longer, and counts as taken.
    """
    if memory is None:
        return sys.maxsize
    taken = sum(part.length for part in disjoint(held))
    return int(options.memory_share * (memory.available + taken)) - taken


def size_of(obj: Object, moved: Iterable[Range] = ()) -> int:
    """Bytes of memory that an object takes once `moved` is copied of it, and it is locked: all of
    the interpreter; of others what is copied, and what they have in memory now."""
    if obj.in_chunks and obj.resident is not None:
        return sum(region.length for region in moved) + obj.resident
    return sum(segment.end - segment.start for segment in obj.segments)


def lock_size(obj: Object, options: Options, held: Sequence[Range], code_only: bool) -> int:
    if not options.mlock or not selects(options, obj.path):
        return 0
    code_only |= options.mlock == "code"
    wanted = [s for s in obj.segments if s.kind == "code" or not code_only]
    return int(hot.share(obj) * sum(outside(Range(s.start, s.end), held) for s in wanted))


def disjoint(ranges: Iterable[Range]) -> list[Range]:
    """The same addresses in ascending ranges, none of which overlap or touch."""
    found: list[Range] = []
    for start, end in sorted(map(tuple, ranges)):
        if found and start <= found[-1].end:
            start, last = found.pop()
            end = max(end, last)
        found.append(Range(start, end))
    return found


def outside(whole: Range, disjoint: Sequence[Range]) -> int:
    """Bytes of a range that none of `disjoint`, which disjoint() gave, covers."""
    start, end = whole
    here = overlapping(disjoint, start, end)  # of hundreds that a worker's parent has locked
    return end - start - sum(min(part.end, end) - max(part.start, start) for part in here)
