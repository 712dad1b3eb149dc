"""ELF objects in memory: ranges, segments and what is known of the file."""

from __future__ import annotations

from itertools import pairwise

from page_primer._lean import Record, replace, set_attribute
from page_primer.elf.file import PF_R, PF_W, PF_X, PT_LOAD, PT_NULL, ProgramHeader
from page_primer.reasons import Reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterator


# No linker leaves more between segments than the largest page of its machine, so a file whose
# addresses reach further than this does not come from one; what is done for it is bounded by it.
_FARTHEST_FACTOR, _FARTHEST = 4, 64 << 20


def is_out_of_proportion(extent: int, file_size: int) -> bool:
    """Whether so many bytes of addresses are more than a linker makes of so many of a file."""
    return extent > _FARTHEST_FACTOR * file_size + _FARTHEST


class Range(Record):
    """Addresses from `start` up to, not including, `end`. Unpacks as (start, end)."""

    start: int
    end: int

    def __init__(self, start: int, end: int) -> None:
        # As Record does it, without its loop: each prime() makes a thousand.
        set_attribute(self, "start", start)
        set_attribute(self, "end", end)

    def __iter__(self) -> Iterator[int]:
        return iter((self.start, self.end))

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start

    def overlaps(self, other: Range) -> bool:
        """Whether they share a byte."""
        return self.start < other.end and other.start < self.end

    def contains(self, other: Range) -> bool:
        return self.start <= other.start and other.end <= self.end

    def clip(self, other: Range) -> Range:
        """What both have; empty, at `start`, where they share nothing."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Range(start, end) if start < end else Range(self.start, self.start)

    def huge(self, pmd: int) -> Range:
        """The part that whole huge pages can cover; empty, at `start`, where none fits."""
        start, end = -(-self.start // pmd) * pmd, self.end // pmd * pmd
        return Range(start, end) if start < end else Range(self.start, self.start)


class Region(Range):
    """A range with one protection (PF_R, perhaps with PF_X)."""

    flags: int

    def __init__(self, start: int, end: int, flags: int) -> None:
        set_attribute(self, "start", start)
        set_attribute(self, "end", end)
        set_attribute(self, "flags", flags)


class Source(Record):
    """The identity of a file's content: whoever changes the content changes one of these."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> Source:
        return cls(
            path, status.st_dev, status.st_ino, status.st_size,
            status.st_mtime_ns, status.st_ctime_ns,
        )  # fmt: skip


class Segment(Record):
    """A PT_LOAD in memory, rounded out to the pages that the loader maps for it."""

    start: int
    end: int
    file_end: int  # the end of what comes from the file; beyond are zeroes (.bss)
    offset: int  # of `start` in the file
    flags: int  # PF_R | PF_W | PF_X
    address: int  # load bias + p_vaddr, not rounded
    size: int  # p_memsz, bytes, not rounded
    # The machine code in it, where that is not all: of an aligned file, whose one executable
    # PT_LOAD stands for several. Empty: all of it.
    inner_code: tuple[Range, ...] = ()

    @property
    def code(self) -> bool:
        return bool(self.flags & PF_X)

    @property
    def writable(self) -> bool:
        return bool(self.flags & PF_W)

    @property
    def accessible(self) -> bool:
        return bool(self.flags & (PF_R | PF_X))

    @property
    def measured(self) -> tuple[Range, ...]:
        """What is measured of it: its machine code, or all that is not code."""
        return self.inner_code or (Range(self.address, self.address + self.size),)

    @property
    def kind(self) -> str:
        if self.writable:
            return "data"
        return "code" if self.code else "rodata"


class Object(Record):
    """A loaded ELF object.

    `path` is the file it was loaded from; `problem` says why it must be left alone, if it must.
    """

    name: str
    path: str
    base: int  # load bias: address = base + p_vaddr
    headers: bytes  # the program header table in memory
    segments: tuple[Segment, ...]
    main: bool = False
    interpreter: bool = False
    by_chance: bool = False  # at a multiple of a huge page, where the next process hardly has it
    source: Source | None = None
    problem: Reason | None = None
    bti: bool = False  # arm64: code is mapped PROT_BTI
    resident_code: int = 0  # bytes
    resident: int | None = None  # bytes of all its mappings; None: not known
    # Of each chunk (a whole huge page of a read-only span with code) its start, and bytes that this
    # process has touched; None: not known, or not asked.
    touched: tuple[tuple[int, int], ...] | None = None

    @property
    def start(self) -> int:
        return self.segments[0].start

    @property
    def end(self) -> int:
        return self.segments[-1].end

    @property
    def fixed(self) -> bool:
        """Whether this is an ET_EXEC: linked for one address, so never a load bias."""
        return self.main and self.base == 0

    @property
    def in_chunks(self) -> bool:
        """Whether only chunks of it move (hot.py): not the interpreter, and it is known what was
        touched."""
        return not self.interpreter and self.touched is not None

    @property
    def code_bytes(self) -> int:
        code = [segment for segment in self.segments if segment.code]
        return sum(part.length for segment in code for part in segment.measured)

    @property
    def span_bytes(self) -> int:
        """Bytes of addresses in its read-only PT_LOADs."""
        return sum(s.end - s.start for s in self.segments if not s.writable)

    def spans(self) -> list[tuple[Segment, ...]]:
        """The runs of PT_LOADs without PF_W that are contiguous in memory. One that may be neither
        read nor executed is a run of its own: it must not become readable."""
        runs: list[list[Segment]] = []
        for segment in self.segments:
            if segment.writable:
                continue
            joins = runs and runs[-1][-1].end == segment.start
            if joins and segment.accessible and runs[-1][-1].accessible:
                runs[-1].append(segment)
            else:
                runs.append([segment])
        return [tuple(run) for run in runs]


def segments_of(headers: bytes, base: int, page: int) -> tuple[Segment, ...]:
    """The PT_LOADs of a program header table, in the order of their addresses."""
    segments = []
    table = ProgramHeader.parse_table(headers)
    # Of an aligned file the entries that its one executable PT_LOAD stands for (align/layout.py).
    inner = [
        Range(base + header.p_vaddr, base + header.end)
        for header in table
        if header.p_type == PT_NULL and header.executable and header.p_memsz
    ]
    for header in table:
        if header.p_type != PT_LOAD or not header.p_memsz:
            continue
        whole = Range(base + header.p_vaddr, base + header.end)
        start, end = whole.start & -page, (whole.end + page - 1) & -page
        # The kernel refuses a file with more bytes of a segment than addresses for them.
        file_end = min(end, (base + header.file_end + page - 1) & -page)
        code = inner if header.executable else []
        segments.append(
            Segment(
                start=start,
                end=end,
                file_end=file_end if header.p_filesz else start,
                offset=header.p_offset & -page,
                flags=header.p_flags,
                address=whole.start,
                size=header.p_memsz,
                inner_code=tuple(part for part in code if whole.contains(part)),
            )
        )
    segments.sort(key=lambda segment: segment.start)
    # Where two share a page, the loader's later mapping is the one that is there.
    for index, (this, following) in enumerate(pairwise(segments)):
        if this.end > following.start:
            file_end = min(this.file_end, following.start)
            segments[index] = replace(this, end=following.start, file_end=file_end)
    return tuple(segments)
