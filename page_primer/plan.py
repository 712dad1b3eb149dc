"""Decide what moves where: a pure function of the survey and the options.

A huge page table entry has one protection and covers one aligned range of pmd_size bytes, so the
plan works on *chunks*: the aligned ranges that lie wholly inside an object's read-only span. A
chunk that holds any code becomes r-x, another r--; around them the span keeps its protections.
"""

from __future__ import annotations

from itertools import pairwise

from page_primer import hot, reasons
from page_primer._lean import Record, replace
from page_primer.budget import disjoint, heat, lock_size, memory_room, selects, size_of
from page_primer.elf.file import PF_R, PF_X
from page_primer.elf.objects import Object, Range, Region, Segment
from page_primer.kernel.memory import WORKING
from page_primer.kernel.smaps import overlapping
from page_primer.kernel.thp import page_size
from page_primer.options import IN_PLACE, Options
from page_primer.reasons import Reason
from page_primer.survey import Survey

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# These forbid replacing a mapping, but not huge pages where it is, or others of the object are.
_NOT_REPLACEABLE = (reasons.FILE_GONE, reasons.SEALED, reasons.MAPPED_OTHERWISE)

# Where an anchor goes: above every program that is linked for one address, with room for its heap
# to grow, and within what the smallest address space has (arm64, 39 bits).
FAR = 256 << 30


class Move(Record):
    """One object's move: the regions for memory that carries the object's name, and for other.

    An image describes itself to profilers, so the whole span can go there, edges included; memory
    without a name takes only whole chunks, and none that a profiler needs to see on the file,
    unless there are anchors to it (anchor.py). Where the loader's own mappings can have huge
    pages (in_place.py), that is tried first if they cover as much as a copy (`aligned`), and last
    otherwise. `image` is empty where nothing can be replaced.
    """

    object: Object
    image: tuple[Region, ...]
    memory: tuple[Region, ...]
    signed: tuple[Region, ...] = ()  # in memory's place, with both anchors put up
    near: int = 0  # addresses for anchors; 0: it is not needed, or there is no room
    far: int = 0
    in_place: tuple[Region, ...] = ()  # whole mappings
    aligned: bool = False
    notes: tuple[str, ...] = ()  # attempts so far
    hot: tuple[Region, ...] = ()  # of `in_place` what is to be huge, if that is not all

    @property
    def bytes(self) -> int:
        """What the move copies or brings into memory at most."""
        return sum(region.end - region.start for region in self.wanted)

    def sizes(self, pmd: int) -> list[int]:
        """Of each mapping of `in_place`, the bytes that are to be huge."""
        wanted = [region.huge(pmd) for region in self.hot or self.in_place]
        return [sum(mapping.clip(part).length for part in wanted) for mapping in self.in_place]

    @property
    def wanted(self) -> tuple[Region, ...]:
        """What is to be on huge pages."""
        return self.image or self.hot or self.in_place


class Remainder(Record):
    """A range that stays as it is, or stays on small pages, and why."""

    object: Object
    start: int
    end: int
    kind: str
    reason: Reason


class Plan(Record):
    moves: tuple[Move, ...]
    remainders: tuple[Remainder, ...]
    already: tuple[Move, ...] = ()  # on huge pages where they are: nothing is to be done


def make(  # Longer: by a line, and mostly of arguments
    survey: Survey,
    options: Options,
    used: int = 0,
    held: Iterable[Range] = (),
    used_private: int = 0,
) -> Plan:
    """Plan the moves, the hottest object first.

    Args:
        survey: the process as found.
        options: what the caller wants.
        used: bytes of the limit that earlier moves of this process have taken.
        held: what this process has copied or locked before.
        used_private: the same as `used`, of the limit for private copies.
    """
    moves: list[Move] = []
    already: list[Move] = []
    left: list[Remainder] = []
    allowance = hot.Allowance(options, survey.pmd_size, used, used_private)
    held = disjoint(held)
    memory = memory_room(survey.memory, options, held)
    spare = survey.memory.available - WORKING if survey.memory else memory
    for obj in sorted(survey.objects, key=heat):
        reason = _refusal(obj, survey, options)
        move = None if reason else _move(obj, survey, options)
        if reason is None or reason in _NOT_REPLACEABLE:
            move = _in_place(move, obj, survey)
        fits = allowance.fit(obj, move.image) if move else ()
        size = size_of(obj, fits) + _others(obj, fits, survey, options)
        if move is None:
            reason = reason or (reasons.COLD if obj.touched else reasons.NO_CHUNK)
        elif move.aligned and is_huge(move, survey):
            already.append(move)
            left += explain(obj, move.hot or move.in_place, survey.pmd_size)
            memory -= min(memory, lock_size(obj, options, held, code_only=False))
            continue
        elif options.backing == IN_PLACE and not move.in_place:
            reason = reasons.NOT_CONGRUENT
        elif move.image and not fits:
            shared = hot.is_shared(obj, survey.pmd_size)
            reason = reasons.OVER_LIMIT if shared else reasons.OVER_PRIVATE_LIMIT
        elif size > min(memory, spare // 2):
            # Half: of the object that moves there may be two copies, the best and the one tried.
            reason = reasons.OVER_MEMORY
        else:
            reason = None
        if move is not None and not reason:
            if fits != move.image:
                move = replace(move, image=fits, memory=_common(move.memory, fits))
            moves.append(move)
            allowance.take(obj, fits)
            left += explain(obj, move.wanted, survey.pmd_size)
        else:
            # It will be locked where it is; if it must be less than all, then the code.
            size = lock_size(obj, options, held, code_only=reason == reasons.OVER_MEMORY)
            left += [Remainder(obj, s.start, s.end, s.kind, _why(s, reason)) for s in obj.segments]
        if size <= memory:
            memory -= size
            spare -= size
    return Plan(tuple(moves), tuple(left), tuple(already))


def _others(obj: Object, moved: Sequence[Region], survey: Survey, options: Options) -> int:
    """Bytes that its siblings will copy for themselves, each as this process does. Who of them has
    already is not known: what these have taken is not to be had any more, and is counted again."""
    if survey.siblings == 1 or not moved:
        return 0
    if options.backing in ("auto", "image", IN_PLACE) and hot.is_shared(obj, survey.pmd_size):
        return 0
    return (survey.siblings - 1) * sum(region.length for region in moved)


def explain(obj: Object, regions: Sequence[Region], pmd: int) -> list[Remainder]:
    """Every byte of an object that does not go onto a huge page when `regions` move, and why."""
    moved = [region.huge(pmd) for region in regions]
    head = [] if obj.in_chunks or obj.problem else _head(obj, pmd)
    kept = [page for page in head if page.end <= regions[0].start]
    left: list[Remainder] = []
    for span in obj.spans():
        reachable = Range(span[0].start, span[-1].end).huge(pmd)
        has_code = any(segment.code for segment in span)
        edges = [reachable] if has_code and obj.in_chunks else []
        for segment in span:
            cuts = {edge for pair in (*moved, *kept, *edges) for edge in pair}
            cuts = {segment.start, segment.end} | {
                cut for cut in cuts if segment.start < cut < segment.end
            }
            for low, high in pairwise(sorted(cuts)):
                part = Range(low, high)
                if _inside(part, moved):
                    continue
                reason = obj.problem or reasons.NO_CHUNK if has_code else reasons.NO_CODE
                if _inside(part, kept) and reachable.contains(part):
                    reason = reasons.PROFILERS_HEAD
                elif edges and reachable.contains(part):
                    reason = reasons.COLD
                last = left[-1] if left else None
                if last and (last.end, last.reason) == (low, reason) and segment.start < low:
                    low = left.pop().start
                left.append(Remainder(obj, low, high, segment.kind, reason))
    left += [
        Remainder(obj, s.start, s.end, s.kind, reasons.WRITABLE) for s in obj.segments if s.writable
    ]
    return left


def _inside(part: Range, ranges: Iterable[Range]) -> bool:
    return any(whole.contains(part) for whole in ranges)


def _why(segment: Segment, reason: Reason | None) -> Reason:
    return reasons.WRITABLE if segment.writable else reason or reasons.NO_CHUNK


def _refusal(obj: Object, survey: Survey, options: Options) -> Reason | None:
    if not options.remap:
        return reasons.REMAP_OFF
    if not selects(options, obj.path):
        return reasons.EXCLUDED
    if not survey.pmd_size:
        return reasons.SIZE_UNKNOWN if survey.size_unknown else reasons.NO_HUGE_PAGES
    if survey.thp_disabled and options.backing != "hugetlb":
        return reasons.THP_DISABLED
    if not any(segment.code and not segment.writable for segment in obj.segments):
        return reasons.NO_CODE
    return obj.problem


def _move(obj: Object, survey: Survey, options: Options) -> Move | None:
    """The regions to move, or None where no chunk is to be had."""
    image: list[Region] = []
    memory: list[Region] = []
    signed: list[Region] = []
    pmd, head = survey.pmd_size, _head(obj, survey.pmd_size)
    for span in obj.spans():
        if not any(segment.code for segment in span):
            continue
        start = span[0].start
        # A tool finds a PIE main program through /proc/PID/exe, so the mapping of its first code
        # must stay on that file.
        if options.keep_profilers and obj.main and not obj.fixed:
            start = max(start, *(page.end for page in head))
        if start >= span[-1].end:
            continue
        regions = _regions(span, start, pmd, options.merge)
        whole = [(region.huge(pmd), region.flags) for region in regions]
        chunks = [Region(low, high, flags) for (low, high), flags in whole if low < high]
        if obj.in_chunks:
            regions = chunks = list(hot.chunks_of(obj, chunks, pmd))
        if any(chunk.flags & PF_X for chunk in chunks):
            image += regions
            keep = head if options.keep_profilers and (obj.main or obj.interpreter) else []
            signed += chunks
            for chunk in chunks:
                memory += _without(chunk, keep)
    if not image:
        return None
    move = Move(obj, tuple(image), tuple(memory))
    if not (options.keep_profilers and obj.fixed and obj.interpreter):
        return move
    near, far = (
        0 if any(overlapping(survey.mappings, at, at + 1)) else at
        for at in (max(0, obj.start - page_size()), FAR)
    )
    return replace(move, signed=tuple(signed) if near and far else (), near=near, far=far)


def _in_place(move: Move | None, obj: Object, survey: Survey) -> Move | None:
    """A move with the mappings that can have huge pages as they are, if there are any: those of one
    file's whole chunks, at an address that equals the file offset modulo the huge page size."""
    pmd = survey.pmd_size
    found = [
        Region(m.start, m.end, PF_R | PF_X if m.executable else PF_R)
        for m in overlapping(survey.mappings, obj.start, obj.end)
        if m.inode
        and m.permissions.startswith("r-")
        and obj.start <= m.start
        and m.end <= obj.end
        and (m.start - m.offset) % pmd == 0
        and Range(m.start, m.end).huge(pmd).length
    ]
    if not any(region.flags & PF_X for region in found):
        return move
    touched = hot.chunks_of(obj, found, pmd) if obj.in_chunks else ()
    if obj.in_chunks and not touched:
        return move
    if move is None:
        return Move(obj, (), (), in_place=tuple(found), aligned=True, hot=touched)
    covered = [region.huge(pmd) for region in found]
    copied = [region.huge(pmd) for region in move.image if region.flags & PF_X]
    aligned = all(_inside(part, covered) for part in copied)
    return replace(move, in_place=tuple(found), aligned=aligned, hot=touched)


def attainable(move: Move, pmd: int) -> int:
    """Bytes of an object's code that whole huge pages can cover where it moves."""
    huge = [region.huge(pmd) for region in move.wanted]
    code = [part for segment in move.object.segments if segment.code for part in segment.measured]
    return sum(part.clip(whole).length for part in code for whole in huge)


def is_huge(move: Move, survey: Survey) -> bool:
    """Whether all that is to be huge of an object's own mappings is."""
    huge = {mapping.start: mapping.huge for mapping in survey.mappings}
    return all(
        huge.get(mapping.start, 0) >= size
        for mapping, size in zip(move.in_place, move.sizes(survey.pmd_size), strict=True)
    )


def _head(obj: Object, pmd: int) -> list[Range]:
    """The huge pages of the ELF header and of the first code: where tools look for the object."""
    code = next(segment for segment in obj.segments if segment.code)
    starts = (at // pmd * pmd for at in (obj.start, code.start))
    return [Range(start, start + pmd) for start in starts]


def _without(chunk: Region, keep: Iterable[Range]) -> list[Region]:
    parts = [chunk]
    for start, end in keep:
        parts = [
            Region(low, high, part.flags)
            for part in parts
            for low, high in (
                (part.start, min(part.end, start)),
                (max(part.start, end), part.end),
            )
            if low < high
        ]
    return parts


def _common(regions: Iterable[Region], others: Iterable[Region]) -> tuple[Region, ...]:
    """The parts of the first that the second have too."""
    return tuple(
        Region(max(region.start, other.start), min(region.end, other.end), region.flags)
        for region in regions
        for other in others
        if region.overlaps(other)
    )


def _regions(span: Sequence[Segment], start: int, pmd: int, merge: bool) -> list[Region]:
    """Cut [start, end of span) into ranges of one protection each, merging what chunks need."""
    end = span[-1].end
    code = [Range(s.start, s.end) for s in span if s.code]
    cuts = {start, end} | {s.start for s in span if start < s.start}
    if merge:
        whole = Range(start, end).huge(pmd)
        rounded = [Range(s.start // pmd * pmd, -(-s.end // pmd) * pmd) for s in code]
        code += [chunks.clip(whole) for chunks in rounded if chunks.overlaps(whole)]
        cuts |= {edge for part in code for edge in part if start < edge < end}
    regions: list[Region] = []
    for low, high in pairwise(sorted(cuts)):
        flags = PF_R | PF_X if _inside(Range(low, high), code) else PF_R
        if regions and regions[-1].flags == flags:
            low = regions.pop().start
        regions.append(Region(low, high, flags))
    return regions
