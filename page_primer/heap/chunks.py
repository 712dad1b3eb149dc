"""Aligned pieces of anonymous memory, one huge page each: which are full enough, and making them
huge.

MADV_COLLAPSE (Linux 6.1) copies a chunk's pages into one huge page at once, whatever `defrag` says:
it may compact memory, so it is done at the hooks, never in a request, and within a time limit. What
it leaves, khugepaged finds later: the chunks are advised.
"""

from __future__ import annotations

import errno
import os
import time

from page_primer import _core
from page_primer._lean import Record, ours, suppress
from page_primer.kernel.pagemap import Pagemap
from page_primer.kernel.thp import page_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from page_primer.kernel.pagemap import Pages
    from page_primer.kernel.smaps import Mapping

# Somebody has other plans for these: MADV_NOHUGEPAGE, MADV_DONTFORK, MADV_WIPEONFORK, hugetlb,
# devices' memory.
_NOT_OURS = frozenset(("nh", "dc", "wf", "ht", "io", "pf"))

# Collapsing takes a third of a millisecond a chunk, and Celery waits four seconds for a child.
TIME_LIMIT = 0.25  # seconds


class Chunk(Record):
    start: int
    missing: int  # bytes that are not resident
    shared: int  # bytes that other processes have too, and that a collapse would copy


class Collapsed(Record):
    """What came of collapsing: bytes, and why not more."""

    bytes: int
    grown: int  # by so much memory became resident
    notes: tuple[str, ...]


def candidates(mappings: Iterable[Mapping], huge: int) -> list[Chunk]:
    """The chunks of some mappings that are not all on huge pages, and of which more is resident
    than not; nothing of it swapped out."""
    found: list[Chunk] = []
    with Pagemap() as pages:
        for mapping in mappings:
            low, high = within(mapping, huge)
            if low < high and mapping.huge < high - low and not mapping.flags & _NOT_OURS:
                if pages.closed:
                    found += _alike(mapping, low, high, huge)
                else:
                    found += _full_enough(pages.chunks(low, high, huge), huge)
    return found


def within(mapping: Mapping, huge: int) -> tuple[int, int]:
    """The part of a mapping that whole huge pages can cover."""
    return (mapping.start + huge - 1) & -huge, mapping.end & -huge


def _full_enough(found: Iterable[Pages], huge: int) -> Iterator[Chunk]:
    page = page_size()
    for chunk in found:
        if chunk.swapped == 0 and 2 * chunk.present * page > huge:
            shared = (chunk.present - chunk.exclusive) * page
            yield Chunk(chunk.start, huge - chunk.present * page, shared)


def _alike(mapping: Mapping, low: int, high: int, huge: int) -> Iterator[Chunk]:
    """Where pagemap is closed to us, each chunk is taken to be like its mapping."""
    if mapping.count("Swap"):
        return
    shared = mapping.count("Shared_Clean") + mapping.count("Shared_Dirty")
    part = huge / mapping.size
    for start in range(low, high, huge):
        missing = int((mapping.size - mapping.count("Rss")) * part)
        if 2 * missing < huge:
            yield Chunk(start, missing, int(shared * part))


def collapse(chunks: Sequence[Chunk], huge: int, growth: int, *, unshare: bool) -> Collapsed:
    """Advise and collapse chunks, those that cost least memory first.

    Args:
        huge: the size of a huge page, bytes.
        growth: bytes of resident memory that all of it may take.
        unshare: what is shared is to be copied whatever that takes; otherwise it counts as growth.
    """
    began = time.monotonic()
    done, grown, failures, notes = 0, 0, {}, []  # type: ignore[var-annotated]
    for chunk in sorted(chunks, key=lambda c: c.missing + (0 if unshare else c.shared)):
        cost = chunk.missing + (0 if unshare else chunk.shared)
        if cost > growth:
            break
        if time.monotonic() - began > TIME_LIMIT:
            notes.append(f"stopped collapsing after {TIME_LIMIT * 1000:.0f} ms")
            break
        number = _collapse(chunk.start, huge)
        if number:
            failures[number] = failures.get(number, 0) + 1
        else:
            done += huge
            grown += chunk.missing
            growth -= cost
    for number, count in failures.items():
        notes.append(f"{count} of {len(chunks)} not collapsed: {_reason(number)}")
    return Collapsed(done, grown, tuple(notes))


def advise(start: int, end: int) -> None:
    """Tell the kernel that huge pages are wanted."""
    with suppress(OSError):
        _core.advise(start, end - start, _core.MADV_HUGEPAGE)


def _collapse(start: int, huge: int) -> int:
    """0, or an error's number."""
    advise(start, start + huge)
    number = 0
    for _ in range(2):
        try:
            _core.advise(start, huge, _core.MADV_COLLAPSE)
        except ours(OSError) as error:
            number = error.errno or errno.EINVAL
            if number == errno.EAGAIN:  # pages on their way to somewhere: once more
                continue
            return number
        return 0
    return number


def _reason(number: int) -> str:
    if number == errno.EINVAL:
        return "this kernel does not (Linux 6.1), khugepaged may"
    if number == errno.ENOMEM:
        return "no huge page is free"
    return os.strerror(number)
