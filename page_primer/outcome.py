"""Parts of the report: what came of an object, of a segment of it, and of the heap."""

from __future__ import annotations

from _struct import Struct

from page_primer._lean import Record
from page_primer.kernel.anonymous import Use
from page_primer.logs import say
from page_primer.reasons import Reason, Refusal
from page_primer.words import image_place, store_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from page_primer.logs import AnyLogger

MIB = 1 << 20


class SegmentReport(Record):
    """One PT_LOAD: addresses, bytes, and what was left alone of it and why."""

    start: int
    end: int
    kind: str  # "code", "rodata" or "data"
    bytes: int  # p_memsz; of an aligned file's executable segment what is machine code
    huge_bytes: int  # of them on huge pages
    locked_bytes: int
    left: dict[Reason, int]  # bytes left on small pages


_KINDS = ("code", "rodata", "data")
_FORM = Struct("6Q")  # as SegmentReport has them
_LEFT = Struct("=HHQ")  # number of the segment, of the reason, bytes


class Segments(tuple["SegmentReport", ...]):
    """The segments of an object: a tuple, packed until they are looked at. A report stays as long
    as its process, which has hundreds of them, and each takes half a kilobyte otherwise."""

    __slots__ = ()

    if not TYPE_CHECKING:  # to others it is what it derives from

        def __new__(cls, segments):
            packed, left, reasons = bytearray(), bytearray(), {}
            for index, segment in enumerate(segments):
                packed += _FORM.pack(
                    segment.start, segment.end, _KINDS.index(segment.kind), segment.bytes,
                    segment.huge_bytes, segment.locked_bytes,
                )  # fmt: skip
                for reason, size in segment.left.items():
                    number = reasons.setdefault(reason, len(reasons))
                    left += _LEFT.pack(index, number, size)
            return tuple.__new__(cls, (bytes(packed), bytes(left), tuple(reasons)))

        def __iter__(self):
            packed, left, reasons = tuple.__iter__(self)
            for index, (start, end, kind, *sizes) in enumerate(_FORM.iter_unpack(packed)):
                mine = {reasons[n]: size for i, n, size in _LEFT.iter_unpack(left) if i == index}
                yield SegmentReport(start, end, _KINDS[kind], *sizes, mine)

        def __len__(self):
            return len(tuple.__getitem__(self, 0)) // _FORM.size

        def __getitem__(self, index):
            return tuple(iter(self))[index]

        def __contains__(self, one):
            return one in tuple(iter(self))

        def __eq__(self, other):
            return tuple(iter(self)) == tuple(iter(other)) if isinstance(other, tuple) else False

        def __ne__(self, other):
            return not self == other

        __hash__ = None  # as a tuple of these, of which each has a dict

        def __repr__(self):
            return repr(tuple(iter(self)))

        def __getnewargs__(self):
            return (tuple(iter(self)),)


class ObjectReport(Record):
    """One ELF object. Byte counts are measured in smaps, not what was asked for."""

    path: str
    interpreter: bool
    # Where its code lies now: "already" and "in_place" are huge pages of its own file, None is its
    # own file without them.
    backing: str | None
    where: str | None  # the image's path, for one
    code_bytes: int
    code_huge_bytes: int
    huge_bytes: int
    locked_bytes: int
    copied_bytes: int  # on another backing than its own file
    written_bytes: int  # what this process wrote for that; 0 where an image was there
    segments: tuple[SegmentReport, ...]
    notes: tuple[str, ...]  # attempts that failed, in order
    # Whether other processes map the same pages of a copy: "shared" where a fork inherited it or an
    # image is at a load address that recurs, else "private"; None where there is no copy.
    sharing: str | None = None
    attainable_bytes: int = 0  # of the interpreter's code, what its layout lets be huge
    aligned: bool = False  # its own mappings can have huge pages, without a copy
    no_longer_aligned: bool = False  # recorded as aligned, but another file has taken its place

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def place(self) -> str:
        """The backing, for people: an image's store rather than its long path."""
        if self.backing == "image" and self.where:
            return image_place(self.where)
        return {"already": "huge already", "in_place": "in place"}.get(
            self.backing or "", self.backing or "its own file"
        )

    @property
    def store(self) -> str | None:
        """The directory of its image, for one."""
        return store_of(self.where) if self.backing == "image" and self.where else None

    @property
    def whereabouts(self) -> str:
        """The backing, with an image's whole path."""
        return f"image {self.where}" if self.backing == "image" else self.place

    @property
    def remedy(self) -> str:
        """What spares a copy, where there is one."""
        if self.backing in (None, "already", "in_place"):
            return ""
        if self.aligned:
            return ", aligned but in memory on small pages: `page-primer warm` before it starts"
        return ", no copy with `page-primer align`"


def code_reasons(obj: ObjectReport) -> list[Reason]:
    """The reasons that concern code, each once."""
    return list(dict.fromkeys(why for s in obj.segments if s.kind == "code" for why in s.left))


class HeapReport(Record):
    """What `heap` did to this process. Sizes are in bytes."""

    mode: str  # the option: "auto", "arenas" or "all"
    reason: Reason | None = None  # why nothing was done, where nothing was
    detail: str | None = None  # what the reason was in this case
    use: Use = Use()
    collapsed_bytes: int = 0  # by this call
    resident_before: int = 0  # all of the process, before and after this call
    resident_after: int = 0
    regions: int = 0  # huge pages that pymalloc's arenas are parts of
    small_regions: int = 0  # that were not huge when they were made, since the start
    spare_bytes: int = 0  # free in these regions, and kept
    slowest_region: float = 0.0  # milliseconds: the longest that the kernel took for one
    least_memory: int = 0  # heap_min_memory
    notes: tuple[str, ...] = ()
    milliseconds: float = 0.0

    def log(self, logger: AnyLogger, before: HeapReport | None, *, named: bool) -> None:
        """Write the one line: a WARNING where a `heap` that was named is refused, DEBUG where
        reason and notes are those of the report before."""
        if before and (self.reason, self.notes) == (before.reason, before.notes):
            method = logger.debug
        else:
            method = logger.warning if self.reason and named else logger.info
        names = ("mode", "reason", "detail", "collapsed_bytes", "resident_before", "resident_after")
        fields = {name: getattr(self, name) for name in names}
        use = {"heap_bytes": self.use.bytes, "heap_huge_bytes": self.use.huge}
        say(method, "heap", str(self), **fields, **use, milliseconds=self.milliseconds)

    def __str__(self) -> str:
        """The one line for people."""
        if self.reason is not None:
            return f"heap left alone: {Refusal(self.reason, self.detail)}"
        text = (
            f"heap: {self.use}; resident {self.resident_before / MIB:.1f} -> "
            f"{self.resident_after / MIB:.1f} MiB; {self.milliseconds:.1f} ms"
        )
        return "; ".join([text, *self.notes])
