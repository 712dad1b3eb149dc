"""Bring the heap onto huge pages, as the options say, and measure what came of it."""

from __future__ import annotations

import os
import sys
import time

from page_primer import _core, survey
from page_primer._lean import suppress
from page_primer.heap import arenas, chunks, malloc
from page_primer.heap.refusal import refusal
from page_primer.kernel import memory, smaps
from page_primer.kernel.anonymous import is_anonymous, use_of
from page_primer.kernel.smaps import overlapping
from page_primer.outcome import HeapReport
from page_primer.words import milliseconds_since

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from page_primer.kernel.smaps import Mapping
    from page_primer.options import Options

# All collapses together may add so much to what is resident: a share of it, or a part of a huge
# page, whichever is more. (Half of one is, on average, free in the last region.)
_GROWTH = 0.015, 0.25
_GROWTH_OF_ALL = 0.03, 1.0  # where `all` is asked for

# How often a process moves its break to the end of a huge page: before its application is loaded
# and after, and when libraries arrive late. Each may cost a quarter of a megabyte of addresses.
_ALIGNMENTS = 8


class Heap:
    """What was done to this process's heap. A forked child inherits all of it."""

    def __init__(self) -> None:
        self.primed = False
        self.mark = -1  # heap_mark() when it was last looked at
        self.older: list[tuple[int, int]] = []  # mappings of arenas that are not ours
        self.searched = False
        self.malloc: str | None = None  # the allocator that is not glibc's
        self.grown = 0  # bytes that collapsing made resident
        self.aligned = (0, 0)  # the process, and how often it moved its break

    def is_new(self) -> bool:
        """Whether there may be something to do. Takes a tenth of a microsecond."""
        return self.primed and self.mark != _core.heap_mark()

    def start(self, options: Options, huge: int) -> None:
        """Have new arenas huge from now on, and leave the rest to prime(). The earlier the better:
        arenas that were mapped singly seldom lie side by side."""
        if refusal(options, huge, list(memory.bounds())) is None:
            self._search(smaps.read_maps())
            arenas.install(huge)
            self._align(options, huge)

    def _search(self, mappings: Sequence[Mapping]) -> None:
        """Once, before new arenas are ours: find those that there are."""
        if not self.searched:
            # Objects too large for pymalloc are malloc's.
            found = [m for m in arenas.find(mappings) if is_anonymous(m) and m.path != "[heap]"]
            self.older = [(m.start, m.end) for m in found]
            self.malloc = malloc.other_allocator()
            self.searched = True

    def prime(self, options: Options, huge: int) -> HeapReport | None:
        """Install what serves new memory, and collapse what is there.

        Args:
            options: with `heap` off, what was installed is retired, and there is no report.
            huge: the size of a huge page, bytes; 0 without THP.
        """
        if not options.heap:
            self.restore()
            return None
        began = time.perf_counter()
        found = list(memory.bounds())
        refused = refusal(options, huge, found)
        least = options.heap_min_memory
        if refused is not None:
            _core.arenas_retire()
            self._done()
            return HeapReport(str(options.heap), refused.reason, refused.detail, least_memory=least)
        self._align(options, huge)
        before = smaps.read_smaps()
        self._search(before)
        notes = [note for note in (arenas.install(huge), self._malloc_note(options)) if note]
        available = min((bound.available for bound in found), default=sys.maxsize)
        done = self._collapse(before, options, huge, int(available * options.memory_share))
        after = smaps.read_smaps() if done.bytes else before
        self._done()
        regions, _, spare, _, small, _, slowest = _core.arenas_counts()
        return HeapReport(
            mode=str(options.heap),
            use=use_of(after, self._is_arena()),
            collapsed_bytes=done.bytes,
            resident_before=smaps.total(before, "Rss"),
            resident_after=smaps.total(after, "Rss"),
            regions=regions,
            small_regions=small,
            spare_bytes=spare,
            slowest_region=slowest / 1e6,
            least_memory=least,
            notes=(*notes, *done.notes),
            milliseconds=milliseconds_since(began),
        )

    def _done(self) -> None:
        self.primed, self.mark = True, _core.heap_mark()

    def restore(self) -> None:
        """Make no more arenas. What was collapsed stays: it is the same memory."""
        _core.arenas_retire()
        self.__init__()  # type: ignore[misc]

    def _align(self, options: Options, huge: int) -> None:
        """Have [heap] end where a huge page does, so that what is below can be collapsed, and what
        a forked child adds, which the kernel keeps in a mapping of its own, begins with one."""
        process, count = self.aligned
        count = count if process == os.getpid() else 0
        if (
            options.heap == "arenas"
            or huge > arenas.LARGEST
            or count == _ALIGNMENTS
            or malloc.other_allocator() is not None
            or malloc.tunable_in_force()  # glibc grows it as if it began with a huge page
            or survey.threads() != 1  # one of which may be in malloc(3), whose lock is not ours
        ):
            return
        with suppress(OSError):  # a limit of the address space
            moved = _core.heap_align(huge)
            self.aligned = os.getpid(), count + bool(moved)

    def _malloc_note(self, options: Options) -> str | None:
        if options.heap == "arenas":
            return None
        if self.malloc is not None:
            return f"malloc is {self.malloc}, left alone"
        return "glibc advises malloc's memory itself" if malloc.tunable_in_force() else None

    def _collapse(
        self, mappings: Sequence[Mapping], options: Options, huge: int, room: int
    ) -> chunks.Collapsed:
        """Advise and collapse what the options name and what is full enough."""
        is_arena = self._is_arena()
        mine, heap, other = [], [], []
        for mapping in filter(is_anonymous, mappings):
            if is_arena(mapping):
                mine.append(mapping)
            elif mapping.path == "[heap]":
                heap.append(mapping)
            else:
                other.append(mapping)
        if options.heap == "arenas" or self.malloc is not None:
            heap = []
        wanted = [*mine, *heap, *(other if options.heap == "all" and not self.malloc else ())]
        for mapping in heap:  # what is touched next in it, too
            low, high = chunks.within(mapping, huge)
            if low < high and "hg" not in mapping.flags:
                chunks.advise(low, high)
        growth = growth_allowed(options.heap, smaps.total(mappings, "Rss"), huge)
        # A fork has less than its parent: what is free is free.
        growth = max(0, growth - self.grown)
        found = chunks.candidates(wanted, huge)
        if not options.heap_unshare:
            growth = min(growth, room)
        else:
            found = [chunk for chunk in found if (room := room - chunk.shared) >= 0]
        done = chunks.collapse(found, huge, growth, unshare=options.heap_unshare)
        self.grown += done.grown
        return done

    def _is_arena(self) -> _IsArena:
        return _IsArena([*self.older, *_regions()])


def growth_allowed(mode: str | bool | None, resident: int, huge: int) -> int:
    """How much collapses may add to so much resident memory; bytes."""
    share, of_page = _GROWTH_OF_ALL if mode == "all" else _GROWTH
    return max(int(of_page * huge), int(share * resident))


class _IsArena:
    """Whether arenas lie in a mapping."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = [smaps.Mapping(a, b, "", 0, "", 0, "") for a, b in sorted(ranges)]

    def __call__(self, mapping: Mapping) -> bool:
        return next(overlapping(self._ranges, mapping.start, mapping.end), None) is not None


def _regions() -> list[tuple[int, int]]:
    bases = _core.arenas_regions()
    size = _core.region_size()
    return [(base, base + size) for base in bases]
