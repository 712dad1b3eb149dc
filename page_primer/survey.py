"""What is mapped: the ELF objects of this process, as the loader and the kernel see them."""

from __future__ import annotations

import os

from page_primer import _core, family, reasons
from page_primer._lean import Record, ours, replace
from page_primer.elf import file as elf
from page_primer.elf.file import PF_R, ProgramHeader
from page_primer.elf.objects import (
    Object,
    Range,
    Segment,
    Source,
    is_out_of_proportion,
    segments_of,
)
from page_primer.kernel import memory
from page_primer.kernel.address_space import map_new, places_on
from page_primer.kernel.memory import Memory
from page_primer.kernel.pagemap import Pagemap
from page_primer.kernel.smaps import Mapping, overlapping, read_maps, read_own
from page_primer.kernel.thp import has_no_huge_pages, page_size, pmd_size
from page_primer.reasons import Reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


class Survey(Record, aside=("mappings",)):
    """The process as found: input of the plan."""

    objects: tuple[Object, ...]
    pmd_size: int  # bytes; 0 where the kernel has no transparent huge pages
    thp_disabled: bool  # PR_SET_THP_DISABLE
    threads: int
    loads: tuple[int, int]  # the loader's counters
    memory: Memory | None = None  # what is to be had, where known
    mappings: Sequence[Mapping] = ()
    size_unknown: bool = False  # pmd_size is 0 since it cannot be read
    siblings: int = 1  # processes, with this one, that will each have copies of their own


def take(read: Callable[[], Sequence[Mapping]] = read_own, known: Iterable[Object] = ()) -> Survey:
    """Survey this process.

    Args:
        read: what reads its mappings. With read_maps, which is faster, what only smaps tells
            (resident code, VmFlags) counts as none.
        known: objects to be taken over as they are, where they are still loaded. With them it is
            not asked again what memory is to be had.

    Raises:
        OSError: /proc is not readable.
    """
    adds, subs, found = _core.objects()
    mappings = read()
    pmd = pmd_size()
    interpreter = _core.interpreter_address()
    objects = []
    as_known = {(obj.base, obj.headers): obj for obj in known}
    for index, (name, base, headers) in enumerate(found):
        if (base, headers) in as_known:
            objects.append(as_known[base, headers])
        elif segments := segments_of(headers, base, page_size()):
            objects.append(
                _object(os.fsdecode(name), base, headers, segments, mappings, pmd,
                        main=index == 0, inside=interpreter)
            )  # fmt: skip
    return Survey(
        tuple(objects),
        pmd,
        _thp_disabled(),
        threads(),
        (adds, subs),
        None if as_known else memory.read(),
        mappings,
        not pmd and not has_no_huge_pages(),
        family.copies(),
    )


def threads() -> int:
    """The number of threads; 0 where we may not ask."""
    try:
        return _core.threads()
    except ours(OSError):
        return 0


def _thp_disabled() -> bool:
    try:
        return _core.thp_disabled()
    except ours(OSError):  # a sandbox: smaps tells what comes of trying
        return False


def _object(
    name: str,
    base: int,
    headers: bytes,
    segments: tuple[Segment, ...],
    mappings: Sequence[Mapping],
    pmd: int,
    *,
    main: bool,
    inside: int,
) -> Object:
    here = list(overlapping(mappings, segments[0].start, segments[-1].end))
    # Writable segments are never replaced, so they tell the file the object was loaded from even
    # when its code lies elsewhere by now.
    data = next((s for s in segments if s.writable and s.file_end > s.start), segments[0])
    origin = next(overlapping(here, data.start, data.start + 1), None)
    path = origin.path.removesuffix(" (deleted)") if origin else name
    code = [m for m in here if m.executable]
    found = Object(
        name=name,
        path=path,
        base=base,
        headers=headers,
        segments=segments,
        main=main,
        interpreter=any(s.start <= inside < s.end for s in segments if s.code),
        bti=bool(code) and all("bt" in m.flags for m in code),
        resident_code=sum(m.count("Rss") for m in code),
        resident=sum(m.count("Rss") for m in here),
    )
    # What follows opens files; objects without room for a huge page are never moved.
    if not pmd or all(span[-1].end - span[0].start < pmd for span in found.spans()):
        return found
    source, problem = _inspect(found, origin, here)
    touched = None if problem or found.interpreter else tuple(_touched(found, here, pmd))
    by_chance = problem is None and _is_by_chance(found, pmd)
    return replace(found, source=source, problem=problem, touched=touched, by_chance=by_chance)


def _is_by_chance(found: Object, pmd: int) -> bool:
    """Whether it begins at a multiple of a huge page where nothing sees to that: neither its own
    program headers, nor its file system."""
    if not pmd or found.fixed or found.start % pmd:
        return False
    loads = (h for h in ProgramHeader.parse_table(found.headers) if h.p_type == elf.PT_LOAD)
    if any(load.p_align >= pmd for load in loads):
        return False
    # The kernel chooses a program's address at random, whatever the file system.
    return found.main or not places_on(pmd, found.path, found.end - found.start)


def _touched(found: Object, here: Sequence[Mapping], pmd: int) -> Iterator[tuple[int, int]]:
    """Of each chunk its start, and bytes that are in this process's page tables; where these are
    closed to us, as much as its mappings have on an average."""
    with Pagemap() as pages:
        for span in found.spans():
            low, high = Range(span[0].start, span[-1].end).huge(pmd)
            if not any(segment.code for segment in span) or low == high:
                continue
            if not pages.closed:
                for chunk in pages.chunks(low, high, pmd):
                    yield chunk.start, chunk.present * page_size()
                continue
            for start in range(low, high, pmd):
                whole = Range(start, start + pmd)
                yield (
                    start,
                    sum(
                        whole.clip(Range(m.start, m.end)).length * m.count("Rss") // m.size
                        for m in overlapping(here, start, start + pmd)
                    ),
                )


def _inspect(
    found: Object, origin: Mapping | None, here: Sequence[Mapping]
) -> tuple[Source | None, Reason | None]:
    """The file of an object, and why it cannot be moved if it cannot."""
    if origin is None or not origin.inode:
        return None, reasons.MAPPED_OTHERWISE
    try:
        source = Source.of(found.path, os.stat(found.path))
    except ours(FileNotFoundError):
        return None, reasons.FILE_GONE
    except ours(OSError):
        return None, reasons.FILE_UNREADABLE
    if not _is_mapped_at(source, origin):
        return None, reasons.FILE_GONE
    if is_out_of_proportion(found.span_bytes, source.size):  # before anything asks of each chunk
        return source, reasons.OUT_OF_PROPORTION
    return source, _why_fixed(found, origin, here)


def _why_fixed(found: Object, origin: Mapping, here: Sequence[Mapping]) -> Reason | None:
    """Why an object's mappings must stay as they are, if they must."""
    for segment in found.segments:
        if segment.writable or segment.file_end == segment.start:
            continue
        if segment.code and not segment.flags & PF_R:
            return reasons.EXECUTE_ONLY
        for mapping in overlapping(here, segment.start, segment.file_end):
            if (mapping.device, mapping.inode) != (origin.device, origin.inode):
                return reasons.REMAPPED
            if mapping.offset - mapping.start != segment.offset - segment.start:
                return reasons.MAPPED_OTHERWISE
            if "sl" in mapping.flags:
                return reasons.SEALED
            if not is_protected_as_declared(segment, mapping):
                return reasons.MAPPED_OTHERWISE
    return reasons.TEXT_RELOCATIONS if _has_text_relocations(found) else None


def is_protected_as_declared(segment: Segment, mapping: Mapping) -> bool:
    """Whether a mapping of a read-only segment has the protection that it would be given again.
    Whoever made it writable writes to it, and whoever closed it does not want it read. What more is
    executable is so by personality(2) (READ_IMPLIES_EXEC), or since it was merged with code."""
    if not segment.accessible:
        return True  # no part of a span
    readable = mapping.permissions[0] == "r"
    return readable and not mapping.writable and (mapping.executable or not segment.code)


def _is_mapped_at(source: Source, mapping: Mapping) -> bool:
    """Whether a mapping is of the file that is now at its path."""
    device = f"{os.major(source.device):02x}:{os.minor(source.device):02x}"
    if (mapping.device, mapping.inode) == (device, source.inode):
        return True
    # btrfs and overlayfs show other numbers in maps than in stat(2): compare like with like, by
    # mapping the file once more.
    page = page_size()
    try:
        with _core.opened(os.open, source.path, os.O_RDONLY | os.O_CLOEXEC) as fd:
            area = map_new(page, page, 0, _core.PROT_READ, _core.MAP_PRIVATE, fd, 0)
        again = next(overlapping(read_maps(), area.address, area.address + page), None)
        return again is not None and (again.device, again.inode) == (mapping.device, mapping.inode)
    except ours(OSError):
        return False


def _has_text_relocations(found: Object) -> bool:
    headers = ProgramHeader.parse_table(found.headers)
    dynamic = next((header for header in headers if header.p_type == elf.PT_DYNAMIC), None)
    if dynamic is None:
        return False
    try:
        with _core.opened(os.open, found.path, os.O_RDONLY | os.O_CLOEXEC) as fd:
            return elf.has_text_relocations(elf.File(fd).dynamic(dynamic))
    except ours(OSError, elf.Malformed):
        return False
