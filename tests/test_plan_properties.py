"""What holds of every plan, for any table of program headers that a loader would accept: nothing
outside the read-only spans, nothing of RELRO, no overlap, no protection gained but execution within
a chunk that has code, chunks aligned, and images congruent."""

import itertools
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from page_primer import plan
from page_primer.elf.file import PF_R, PF_W, PF_X, PT_LOAD
from page_primer.elf.objects import Object, Source, segments_of
from page_primer.images import layout
from page_primer.kernel.smaps import Mapping
from page_primer.options import Options
from page_primer.survey import Survey

PAGE = 4096
PT_GNU_RELRO = 0x6474E552
HEADER = struct.Struct("=IIQQQQQQ")
READ_ONLY = [PF_R, PF_R | PF_X, PF_R | PF_X, PF_R, 0]
WRITABLE = [PF_R | PF_W, PF_R | PF_W | PF_X]


@st.composite
def tables(draw):
    """A program header table as linkers, patchelf and strip leave them, and the address it is
    loaded at. Segments may share a page of the file, not of memory."""
    page = draw(st.sampled_from([PAGE, PAGE, 1 << 16, 1 << 21]))  # -z max-page-size
    rows, vaddr, offset = [], draw(st.sampled_from([0, 0, 0x400000])), 0
    for index in range(draw(st.integers(1, 8))):
        flags = draw(st.sampled_from(READ_ONLY + WRITABLE if index else READ_ONLY[:4]))
        size = draw(st.integers(1, 5 << 20))
        bss = draw(st.integers(0, 1 << 20)) if flags & PF_W else 0
        rows.append((PT_LOAD, flags, offset, vaddr, 0, size, size + bss, page))
        if flags & PF_W and draw(st.booleans()):
            relro = min(size, draw(st.integers(1, 1 << 18)))
            rows.append((PT_GNU_RELRO, PF_R, offset, vaddr, 0, relro, relro, 1))
        offset += size + draw(st.sampled_from([0, 0, 100, page]))
        end = vaddr + size + bss
        vaddr = -(-end // PAGE) * PAGE + draw(st.sampled_from([0, 0, 0, page, 1 << 21]))
        vaddr += (offset - vaddr) % page  # p_vaddr and p_offset agree modulo p_align
    base = draw(st.integers(0, 1023)) * PAGE + (1 << 40)
    return b"".join(HEADER.pack(*row) for row in rows), base


def loaded(table, base, segments):
    """The mappings that a loader makes of it."""
    for segment in segments:
        kind = "".join(
            letter if segment.flags & bit else "-"
            for letter, bit in (("r", PF_R), ("w", PF_W), ("x", PF_X))
        )
        if segment.start < segment.file_end:
            yield Mapping(segment.start, segment.file_end, f"{kind}p", segment.offset, "fe:00", 7,
                          "/lib/x.so")  # fmt: skip


def relro(table, base):
    for kind, _, _, vaddr, _, _, size, _ in HEADER.iter_unpack(table):
        if kind == PT_GNU_RELRO:
            yield base + vaddr, base + vaddr + size


@settings(max_examples=150, deadline=None)
@given(tables(), st.sampled_from([1 << 21, 1 << 16]), st.booleans(), st.booleans(), st.booleans())
def test_of_every_plan(made, pmd, merge, keep, main):
    table, base = made
    segments = segments_of(table, base, PAGE)
    for low, high in itertools.pairwise(segments):
        assert low.end <= high.start
    source = Source("/lib/x.so", 1, 2, 3, 4, 5)
    obj = Object("x", "/lib/x.so", base, table, segments, main=main, interpreter=True,
                 source=source)  # fmt: skip
    found = Survey((obj,), pmd, False, 1, (1, 0), None, tuple(loaded(table, base, segments)))
    for move in plan.make(found, Options(merge=merge, keep_profilers=keep)).moves:
        for regions in (move.image, move.memory, move.signed, move.in_place):
            check(obj, regions, pmd, merge, in_place=regions is move.in_place)
            for low, high in relro(table, base):
                assert not any(r.start < high and low < r.end for r in regions), "RELRO"
        for region in move.memory:
            assert region.start % pmd == region.end % pmd == 0
        if move.image:
            laid_out = layout.lay_out(obj, move.image, pmd)
            for region in move.image:
                assert (laid_out.offset(region.start) - region.start) % pmd == 0
        for region in move.in_place:
            mapping = next(m for m in found.mappings if m.start == region.start)
            assert (mapping.offset - mapping.start) % pmd == 0


def check(obj, regions, pmd, merge, in_place):
    for low, high in itertools.pairwise(regions):
        assert low.end <= high.start, "overlap"
    for region in regions:
        assert region.start % PAGE == region.end % PAGE == 0
        assert region.flags in (PF_R, PF_R | PF_X), "nothing becomes writable"
        inside = [s for s in obj.segments if s.start < region.end and region.start < s.end]
        assert all(s.flags & (PF_R | PF_W | PF_X) in (PF_R, PF_R | PF_X) for s in inside)
        assert obj.start <= region.start < region.end <= obj.end
        covered = sum(min(s.end, region.end) - max(s.start, region.start) for s in inside)
        assert covered == region.end - region.start, "only what the loader has mapped"
        code = [s for s in inside if s.code]
        assert bool(code) <= bool(region.flags & PF_X), "code stays executable"
        if not region.flags & PF_X:
            continue
        assert code, "nothing becomes executable far from code"
        for other in inside:
            if other.code or in_place:
                continue
            assert merge
            low, high = max(other.start, region.start), min(other.end, region.end)
            for chunk in range(low // pmd * pmd, high, pmd):
                assert any(c.start < chunk + pmd and chunk < c.end for c in code)
