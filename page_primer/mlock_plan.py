"""Decide what is locked, and in which order: pure functions, as plan.py's."""

from __future__ import annotations

from page_primer import hot
from page_primer._lean import Record
from page_primer.budget import disjoint, heat, outside, selects
from page_primer.elf.objects import Object, Range
from page_primer.kernel.smaps import Mapping, overlapping
from page_primer.options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Lock(Record):
    """A range to lock. Of the interpreter what is read-only is brought into memory whole; all else
    is locked `on_fault`, as far as it is touched: the rest of a library may never be, and private
    writable memory would be copied."""

    object: Object
    start: int
    end: int
    kind: str
    on_fault: bool

    @property
    def range(self) -> Range:
        return Range(self.start, self.end)


def locks(
    objects: Iterable[Object], mappings: Sequence[Mapping], options: Options, pmd: int
) -> tuple[Lock, ...]:
    """The mappings to lock, in the order of their worth: a small RLIMIT_MEMLOCK is spent well.

    Args:
        objects: the survey's.
        mappings: the process's, in the order of their addresses, as they are after the moves.
        options: what the caller wants.
        pmd: the size of a huge page, so that no lock ends inside one; 0: whole mappings alone.
    """
    if not options.mlock:
        return ()
    wanted: tuple[list[Lock], ...] = ([], [], [], [])  # by their worth
    for obj in sorted(objects, key=heat):
        if not selects(options, obj.path):
            continue
        for mapping in overlapping(mappings, obj.start, obj.end):
            if not mapping.permissions.startswith("r"):
                continue  # the loader's PROT_NONE gaps
            if not any(s.start < mapping.end and mapping.start < s.end for s in obj.segments):
                continue  # others' memory in a gap, as the vdso's in arm64's ld.so
            on_fault = mapping.writable or not obj.interpreter
            for start, end, kind in _parts(obj, mapping, pmd):
                if options.mlock == "code" and kind != "code":
                    continue
                worth = {"code": 0 if obj.interpreter else 1, "rodata": 2, "data": 3}[kind]
                wanted[worth].append(Lock(obj, start, end, kind, on_fault))
    return tuple(lock for worth in wanted for lock in worth)


def _parts(obj: Object, mapping: Mapping, pmd: int) -> list[tuple[int, int, str]]:
    """What to lock of an object in a mapping, and what it is: all, unless the mapping grew beyond
    the object (.bss beside other memory). Of an aligned interpreter, whose read-only data is in the
    same mapping, the huge pages with its code by themselves: with a small RLIMIT_MEMLOCK they may
    be all that fits."""
    start, end = max(mapping.start, obj.start), min(mapping.end, obj.end)
    kind = "data" if mapping.writable else "code" if mapping.executable else "rodata"
    inner = [part for segment in obj.segments for part in segment.inner_code]
    if kind != "code" or not obj.interpreter or not inner or not pmd:
        return [(start, end, kind)]
    code = [part for part in inner if part.overlaps(Range(start, end))]
    if not code:  # beside code that was locked by itself
        return [(start, end, "rodata")]
    low = max(start, min(part.start for part in code) // pmd * pmd)
    high = min(end, -(-max(part.end for part in code) // pmd) * pmd)
    parts = [(low, high, "code"), (start, low, "rodata"), (high, end, "rodata")]
    return [part for part in parts if part[0] < part[1]]


def affordable(
    wanted: Iterable[Lock], room: int, held: Iterable[Range]
) -> tuple[list[Lock], list[Lock]]:
    """Divide locks, in the order of their worth, into those that memory allows, and the rest.

    Args:
        wanted: what locks() says.
        room: bytes of memory that may be taken.
        held: ranges that take no more, for they were copied or locked before.
    """
    held = disjoint(held)
    allowed: list[Lock] = []
    withheld: list[Lock] = []
    for lock in wanted:
        cost = int(hot.share(lock.object) * outside(lock.range, held))
        if cost > max(room, 0):
            withheld.append(lock)
            continue
        room -= cost
        allowed.append(lock)
    return allowed, withheld
