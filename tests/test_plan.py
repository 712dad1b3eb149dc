"""The plan is a pure function: made-up layouts, and properties that hold for every layout."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from page_primer import budget, hot, mlock_plan, plan, reasons
from page_primer._lean import replace
from page_primer.elf import file as elf
from page_primer.elf.file import PF_R, PF_W, PF_X
from page_primer.elf.objects import Object, Range, Segment, Source, segments_of
from page_primer.kernel.memory import WORKING, Memory
from page_primer.kernel.smaps import Mapping
from page_primer.options import Options
from page_primer.survey import Survey
from page_primer.verify import measure

MIB = 1 << 20
PMD = 2 * MIB
PAGE = 4096
SOURCE = Source("/lib/x.so", 1, 2, 3, 4, 5)


def segment(start, size, flags, offset=None):
    low, high = start & -PAGE, (start + size + PAGE - 1) & -PAGE
    at = low if offset is None else offset
    return Segment(low, high, high, at, flags, start, size)


def obj(*segments, path="/lib/x.so", **more):
    more.setdefault("base", segments[0].start)
    more.setdefault("source", SOURCE)
    return Object(name=path, path=path, headers=b"", segments=segments, **more)


def make(
    *objects, used=0, held=(), available=None, pmd=PMD, thp_disabled=False, mappings=(), **options
):
    memory = None if available is None else Memory(available, 1 << 40, "/proc/meminfo")
    survey = Survey(objects, pmd, thp_disabled, 1, (1, 0), memory, mappings)
    return plan.make(survey, Options(**options), used, held)


def ranges(regions):
    return [(r.start, r.end, "x" if r.flags & PF_X else "r") for r in regions]


def debian_python(**more):
    """/usr/bin/python3.11 of Debian 12, static and non-PIE."""
    return obj(
        segment(0x400000, 0x1E3E8, PF_R),
        segment(0x41F000, 0x2B2289, PF_R | PF_X),
        segment(0x6D2000, 0x272968, PF_R),
        segment(0x945DC8, 0x1832F0, PF_R | PF_W),
        path="/usr/bin/python3.11", base=0, main=True, interpreter=True, **more,
    )  # fmt: skip


def libpython(base, **more):
    """libpython3.12 as --enable-shared builds it."""
    more = {"interpreter": True, "path": "/opt/lib/libpython3.12.so.1.0", **more}
    return obj(
        segment(base, 0x105130, PF_R),
        segment(base + 0x106000, 0x272EC9, PF_R | PF_X),
        segment(base + 0x379000, 0x1530C8, PF_R),
        segment(base + 0x4CD6D0, 0x1E7598, PF_R | PF_W),
        **more,
    )


def test_fixed_main_program_is_covered_whole():
    (move,) = make(debian_python()).moves
    assert ranges(move.image) == [(0x400000, 0x800000, "x"), (0x800000, 0x945000, "r")]
    # Memory without a name leaves the chunk of the ELF header and the first code to profilers, or
    # there are anchors.
    assert ranges(move.memory) == [(0x600000, 0x800000, "x")]
    assert ranges(move.signed) == [(0x400000, 0x800000, "x")]
    assert (move.near, move.far) == (0x3FF000, plan.FAR)


def test_without_profilers_memory_takes_every_chunk():
    (move,) = make(debian_python(), keep_profilers=False).moves
    assert ranges(move.memory) == [(0x400000, 0x800000, "x")]
    assert not move.signed and not move.near and not move.far


@pytest.mark.parametrize("start", [0x3F0000, plan.FAR])
def test_there_is_no_room_for_a_anchor(start):
    taken = Mapping(start, start + 0x10000, "r--p", 0, "00:00", 0, "")
    (move,) = make(debian_python(), mappings=[taken]).moves
    assert ranges(move.memory) == [(0x600000, 0x800000, "x")]
    assert not move.signed
    # An image needs but the far one.
    assert (move.near, move.far) == ((0, plan.FAR) if start == 0x3F0000 else (0x3FF000, 0))


def test_what_has_a_random_address_has_no_anchors():
    for made in (libpython(0x7F0000000000), libpython(0x555555400000, main=True)):
        (move,) = make(made).moves
        assert not move.signed and not move.near and not move.far


def test_shared_interpreter_at_an_aligned_address():
    base = 0x7F0000000000
    (move,) = make(libpython(base)).moves
    assert ranges(move.image) == [
        (base, base + 0x400000, "x"),
        (base + 0x400000, base + 0x4CD000, "r"),
    ]


def test_shared_interpreter_at_a_random_address_keeps_its_edges_on_small_pages():
    base = 0x7F0000123000
    planned = make(libpython(base))
    (move,) = planned.moves
    first = 0x7F0000200000
    assert ranges(move.image) == [
        (base, first, "r"),
        (first, base + 0x379000, "x"),
        (base + 0x379000, base + 0x4CD000, "r"),
    ]
    left = {(part.kind, part.reason) for part in planned.remainders}
    assert ("code", reasons.NO_CHUNK) in left


def test_pie_main_program_keeps_the_huge_page_of_its_first_code():
    base = 0x555555400000
    pie = libpython(base, main=True, path="/opt/python3.12")
    (move,) = make(pie).moves
    assert move.image[0].start == base + PMD
    kept = [part for part in make(pie).remainders if part.reason == reasons.PROFILERS_HEAD]
    assert sum(part.end - part.start for part in kept) == PMD
    (move,) = make(pie, keep_profilers=False).moves
    assert move.image[0].start == base


def aligned_python(base=0x7F0000000000, huge=0, **more):
    """libpython3.12 after alignment, and its mappings in smaps."""
    aligned = obj(
        segment(base, 0x4CC0C8, PF_R | PF_X, offset=0),
        segment(base + 0x4CD6D0, 0x1E7598, PF_R | PF_W, offset=0x4CD000),
        path="/opt/lib/libpython3.12.so.1.0", interpreter=True, **more,
    )  # fmt: skip
    text, data = aligned.segments
    counters = f"\nFilePmdMapped: {huge >> 10} kB\n"
    return aligned, [
        Mapping(text.start, text.end, "r-xp", 0, "08:01", 7, aligned.path, counters),
        Mapping(data.start, data.end, "rw-p", 0x4CD000, "08:01", 7, aligned.path),
    ]


def test_what_is_huge_already_is_not_moved():
    aligned, mappings = aligned_python(huge=2 * PMD)
    planned = make(aligned, mappings=mappings, limit=0)
    assert planned.moves == ()
    (move,) = planned.already
    assert ranges(move.in_place) == [(aligned.start, aligned.start + 0x4CD000, "x")]
    # What a huge page cannot cover is told all the same.
    left = {(part.kind, part.reason) for part in planned.remainders}
    assert left == {("code", reasons.NO_CHUNK), ("data", reasons.WRITABLE)}


def test_an_aligned_file_on_small_pages_is_tried_in_place_first():
    aligned, mappings = aligned_python(huge=PMD)
    planned = make(aligned, mappings=mappings)
    (move,) = planned.moves
    assert planned.already == ()
    assert move.aligned
    assert move.image


@pytest.mark.parametrize(
    "problem",
    [
        "sealed",
        "file deleted or replaced on disk",
        "not mapped as its program headers say",  # but for those that can be
    ],
)
def test_what_cannot_be_replaced_can_be_huge_in_place(problem):
    aligned, mappings = aligned_python(problem=problem)
    (move,) = make(aligned, mappings=mappings).moves
    assert move.aligned
    assert move.image == move.memory == ()
    # What was moved is not the object's own file any longer.
    aligned, mappings = aligned_python(problem="already remapped")
    assert make(aligned, mappings=mappings).moves == ()


def test_around_code_that_was_made_writable_huge_pages_stay():
    reason = "not mapped as its program headers say"
    aligned, (text, data) = aligned_python(huge=PMD, problem=reason)
    start, second = text.start, text.start + PMD
    file = "08:01", 7, aligned.path
    low = Mapping(start, second - PAGE, "r-xp", 0, *file)
    patched = Mapping(second - PAGE, second, "rwxp", PMD - PAGE, *file)
    high = Mapping(second, text.end, "r-xp", PMD, *file, details=text.details)
    planned = make(aligned, mappings=[low, patched, high, data])
    (move,) = planned.already
    assert ranges(move.in_place) == [(second, text.end, "x")]
    left = {(part.start, part.end, part.reason) for part in planned.remainders}
    assert (start, second, reason) in left


def test_a_load_address_that_is_not_congruent_has_nothing_in_place():
    aligned, mappings = aligned_python(base=0x7F0000123000)
    (move,) = make(aligned, mappings=mappings).moves
    assert not move.in_place
    assert not move.aligned
    planned = make(aligned, mappings=mappings, backing="in_place")
    assert planned.moves == ()
    assert {p.reason for p in planned.remainders if p.kind == "code"} == {reasons.NOT_CONGRUENT}


def test_separate_segments_are_congruent_in_part():
    """As linkers lay out stock Pythons: chunks of code alone can be huge in place."""
    base = 0x7F0000000000
    library = libpython(base)
    mappings = [
        Mapping(s.start, s.end, "r-xp" if s.code else "r--p", s.start - base, "08:01", 7, "/l")
        for s in library.segments[:3]
    ]
    (move,) = make(library, mappings=mappings).moves
    assert not move.in_place  # 0x106000 to 0x379000 has no whole huge page
    wide = obj(
        segment(base, MIB, PF_R, offset=0),
        segment(base + MIB, 6 * MIB, PF_R | PF_X, offset=MIB),
        segment(base + 8 * MIB, MIB, PF_R | PF_W),
    )
    mapping = Mapping(base + MIB, base + 7 * MIB, "r-xp", MIB, "08:01", 7, "/lib/x.so")
    (move,) = make(wide, mappings=[mapping]).moves
    assert move.in_place
    assert not move.aligned  # its first chunk holds code too


def test_strict_protections_move_only_what_one_segment_covers():
    big = obj(
        segment(0x10000000, 0x1000, PF_R),
        segment(0x10001000, 9 * MIB, PF_R | PF_X),
        segment(0x10001000 + 9 * MIB, 3 * MIB, PF_R),
        segment(0x10001000 + 13 * MIB, MIB, PF_R | PF_W),
    )
    (move,) = make(big, merge=False).moves
    assert ranges(move.image) == [
        (0x10000000, 0x10001000, "r"),
        (0x10001000, 0x10001000 + 9 * MIB, "x"),
        (0x10001000 + 9 * MIB, 0x10001000 + 12 * MIB, "r"),
    ]
    assert not make(debian_python(), merge=False).moves[1:]
    assert make(libpython(0x7F0000123000), merge=False).moves == ()


def test_several_executable_segments():
    """lld with a section of its own for hot code: R X R X, then data."""
    base = 0x7F0000000000
    two = obj(
        segment(base, MIB, PF_R),
        segment(base + MIB, 3 * MIB, PF_R | PF_X, offset=0x1000),
        segment(base + 4 * MIB, 4 * MIB, PF_R),
        segment(base + 8 * MIB, 3 * MIB, PF_R | PF_X),
        segment(base + 12 * MIB, MIB, PF_R | PF_W),
    )
    (move,) = make(two).moves
    assert ranges(move.image) == [
        (base, base + 4 * MIB, "x"),
        (base + 4 * MIB, base + 8 * MIB, "r"),
        (base + 8 * MIB, base + 11 * MIB, "x"),
    ]


def test_a_gap_in_memory_ends_the_span():
    base = 0x7F0000000000
    gap = obj(
        segment(base, MIB, PF_R),
        segment(base + 2 * MIB, 3 * MIB, PF_R | PF_X),
        segment(base + 8 * MIB, 4 * MIB, PF_R),
        segment(base + 13 * MIB, MIB, PF_R | PF_W),
    )
    (move,) = make(gap).moves
    assert ranges(move.image) == [(base + 2 * MIB, base + 5 * MIB, "x")]
    left = {(part.start, part.reason) for part in make(gap).remainders}
    assert (base + 8 * MIB, reasons.NO_CODE) in left
    assert (base, reasons.NO_CODE) in left


def test_patched_elf_with_leading_and_trailing_segments():
    """patchelf puts a writable segment before everything, or one after it."""
    base = 0x7F0000000000
    patched = obj(
        segment(base, 0x2000, PF_R | PF_W),
        segment(base + PMD, MIB, PF_R),
        segment(base + PMD + MIB, 4 * MIB, PF_R | PF_X),
        segment(base + PMD + 6 * MIB, MIB, PF_R | PF_W),
        segment(base + PMD + 8 * MIB, 0x1000, PF_R),
    )
    (move,) = make(patched).moves
    assert ranges(move.image) == [
        (base + PMD, base + PMD + 5 * MIB, "x"),
    ]


def test_writable_code_is_never_moved():
    assert make(obj(segment(PMD, 8 * MIB, PF_R | PF_W | PF_X))).moves == ()


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: make(debian_python(), remap=False), reasons.REMAP_OFF),
        (lambda: make(debian_python(), exclude=("python3*",)), reasons.EXCLUDED),
        (lambda: make(debian_python(), exclude=("/usr/bin/*",)), reasons.EXCLUDED),
        (lambda: make(debian_python(), include=("lib*",)), reasons.EXCLUDED),
        (lambda: make(debian_python(), pmd=0), reasons.NO_HUGE_PAGES),
        (lambda: make(debian_python(), thp_disabled=True), reasons.THP_DISABLED),
        (lambda: make(debian_python(problem="sealed")), "sealed"),
        (lambda: make(obj(segment(PMD, 9 * MIB, PF_R))), reasons.NO_CODE),
        (lambda: make(obj(segment(PMD, MIB, PF_R | PF_X))), reasons.NO_CHUNK),
        (lambda: make(libpython(PMD, interpreter=False), limit=MIB), reasons.OVER_LIMIT),
        (lambda: make(libpython(PMD), pmd=512 * MIB), reasons.NO_CHUNK),
    ],
)
def test_reasons(made, reason):
    planned = made()
    assert planned.moves == ()
    assert {part.reason for part in planned.remainders if part.kind != "data"} == {reason}
    assert {part.reason for part in planned.remainders if part.kind == "data"} <= {reasons.WRITABLE}


def test_disabled_thp_does_not_concern_hugetlb():
    assert make(debian_python(), thp_disabled=True, backing="hugetlb").moves


def library(n, resident):
    start = (n + 1) << 30
    return obj(
        segment(start, 8 * MIB, PF_R | PF_X), segment(start + 8 * MIB, MIB, PF_R | PF_W),
        path=f"/lib/{n}.so", resident_code=resident,
    )  # fmt: skip


def test_the_limit_is_spent_on_the_hottest_and_the_interpreter_always_fits():
    libraries = [library(n, n * MIB) for n in range(1, 5)]
    planned = make(*libraries, debian_python(), limit=15 * MIB)  # 8 MiB each
    paths = [move.object.path for move in planned.moves]
    assert paths == ["/usr/bin/python3.11", "/lib/4.so"]
    assert [move.object.path for move in make(debian_python(), limit=0).moves] == paths[:1]
    assert make(libraries[0], limit=9 * MIB, used=2 * MIB).moves == ()


def test_locks_are_ordered_by_worth():
    python, library = debian_python(), libpython(PMD << 10, interpreter=False, path="/lib/y.so")
    mappings = [
        Mapping(s.start, s.end, perms, 0, "0:0", 1, o.path)
        for o in (library, python)
        for s, perms in zip(o.segments, ("r--p", "r-xp", "r--p", "rw-p"), strict=True)
    ] + [Mapping(0x1000, 0x2000, "r-xp", 0, "0:0", 0, "[vdso]")]
    mappings.sort(key=lambda mapping: mapping.start)
    locks = mlock_plan.locks([library, python], mappings, Options(), PMD)
    assert [(lock.object.path, lock.kind) for lock in locks] == [
        ("/usr/bin/python3.11", "code"), ("/lib/y.so", "code"),
        ("/usr/bin/python3.11", "rodata"), ("/usr/bin/python3.11", "rodata"),
        ("/lib/y.so", "rodata"), ("/lib/y.so", "rodata"),
        ("/usr/bin/python3.11", "data"), ("/lib/y.so", "data"),
    ]  # fmt: skip
    assert [lock.on_fault for lock in locks] == [
        lock.object is not python or lock.kind == "data" for lock in locks
    ]
    code = mlock_plan.locks([library, python], mappings, Options(mlock="code"), PMD)
    assert code == locks[:2]
    assert mlock_plan.locks([python], mappings, Options(mlock=False), PMD) == ()
    assert mlock_plan.locks([python], mappings, Options(exclude=("python*",)), PMD) == ()
    # Segments are 64 KiB apart on arm64: what lies between them is not the object's.
    first, *between, last = library.segments
    apart = Object(library.name, library.path, library.base, b"", (first, last))
    others = [Mapping(s.start, s.end, "rw-p", 0, "0:0", 0, "") for s in between]
    assert len(mlock_plan.locks([library], others, Options(), PMD)) == len(others) > 0
    assert mlock_plan.locks([apart], others, Options(), PMD) == ()


def test_of_an_aligned_interpreter_the_code_is_locked_first():
    """Its read-only data is in the same mapping, and a limit may be too small for both."""
    start = 2 * PMD
    inner = (Range(start + 0x22000, start + 2 * PMD + 0x3000),)
    whole = segment(start, 3 * PMD + 0x10000, PF_R | PF_X)
    python = obj(replace(whole, inner_code=inner), interpreter=True)
    file = [Mapping(python.start, python.end, "r-xp", 0, "0:0", 1, python.path)]
    parts = [
        (start, start + 3 * PMD, "code"), (start + 3 * PMD, python.end, "rodata"),
    ]  # fmt: skip

    def found(mappings, **options):
        locks = mlock_plan.locks([python], mappings, Options(**options), PMD)
        assert not any(lock.on_fault for lock in locks)
        return [(lock.start, lock.end, lock.kind) for lock in locks]

    assert found(file) == parts
    assert found(file, mlock="code") == parts[:1]
    # As the mappings are once the code alone is locked.
    split = [Mapping(low, high, "r-xp", 0, "0:0", 1, python.path) for low, high, _ in parts]
    assert found(split) == parts
    assert mlock_plan.locks([python], file, Options(), 0)[0].range == Range(
        python.start, python.end
    )


def test_memory_goes_to_the_hottest_first():
    """Each library here takes 9 MiB, the interpreter 6.8."""
    objects = [*(library(n, n * MIB) for n in range(1, 5)), debian_python()]
    paths = [move.object.path for move in make(*objects).moves]
    assert paths[:2] == ["/usr/bin/python3.11", "/lib/4.so"]
    python = budget.size_of(debian_python())

    def moved(available, **more):
        return [m.object.path for m in make(*objects, available=available, **more).moves]

    assert moved(1 << 30) == paths
    # A quarter of what is available, not even for the interpreter more.
    assert moved(4 * (python + 9 * MIB)) == paths[:2]
    assert moved(4 * (python + 9 * MIB) - 4) == paths[:1]
    assert moved(4 * python - 4) == []
    assert moved(4 * python) == paths[:1]
    left = make(*objects, available=4 * python).remainders
    assert {(p.kind, p.reason) for p in left if p.object.path == "/lib/4.so"} == {
        ("code", reasons.OVER_MEMORY), ("data", reasons.WRITABLE),
    }  # fmt: skip
    # What is held is available no longer, and counts: nothing is added by asking again.
    objects[-1] = debian_python(problem="already remapped")
    taken = [(s.start, s.end) for s in objects[-1].segments]
    assert moved(4 * (python + 9 * MIB) - python, held=taken) == paths[1:2]
    assert moved(4 * (python + 9 * MIB) - python - 4, held=taken) == []
    objects[-1] = debian_python()
    # With room for everything there is still a second copy to be kept in mind, and ourselves.
    assert moved(2 * python + WORKING, memory_share=1) == paths[:1]
    assert moved(2 * python + WORKING - 1, memory_share=1) == []


def test_what_is_not_moved_keeps_its_share_of_memory_for_the_lock():
    """The hotter object has no whole huge page, but is to be locked."""
    small = obj(segment(0x1000, MIB, PF_R | PF_X), path="/lib/small.so", resident_code=9 * MIB)
    big = library(1, MIB)
    room = budget.size_of(small) + budget.size_of(big)
    assert make(small, big, available=4 * room).moves != ()
    assert make(small, big, available=4 * room - 4).moves == ()
    assert make(small, big, available=4 * room - 4, mlock=False).moves != ()
    assert make(small, big, available=4 * room - 4, exclude=("small.so",)).moves != ()
    locked = [(0x1000, 0x1000 + MIB)]
    assert make(small, big, available=4 * room - MIB, held=locked).moves != ()


def test_locks_are_divided_by_worth_and_what_is_held_is_free():
    locks = [
        mlock_plan.Lock(debian_python(), start, end, "code", False)
        for start, end in ((0, 4 * PAGE), (4 * PAGE, 6 * PAGE), (6 * PAGE, 7 * PAGE))
    ]
    assert mlock_plan.affordable(locks, 7 * PAGE, ()) == (locks, [])
    assert mlock_plan.affordable(locks, 6 * PAGE, ()) == (locks[:2], locks[2:])
    # A smaller one takes what a larger one could not.
    assert mlock_plan.affordable(locks, 3 * PAGE, ()) == (locks[1:], locks[:1])
    assert mlock_plan.affordable(locks, 0, [Range(0, 4 * PAGE), Range(5 * PAGE, 7 * PAGE)]) == (
        [locks[0], locks[2]], [locks[1]],
    )  # fmt: skip
    held = [Range(PAGE, 6 * PAGE), Range(0, 2 * PAGE)]
    assert mlock_plan.affordable(locks, -1, held) == (locks[:2], locks[2:])


def test_without_knowledge_of_memory_nothing_is_withheld():
    assert budget.memory_room(None, Options(), ()) > 1 << 60
    some = Memory(10 * MIB, 20 * MIB, "/proc/meminfo")
    assert budget.memory_room(some, Options(memory_share=0.5), ()) == 5 * MIB
    held = [Range(0, MIB), Range(0, 2 * MIB)]
    assert budget.memory_room(some, Options(memory_share=0.5), held) == 4 * MIB


@st.composite
def layouts(draw):
    """An object of up to seven segments with gaps, of any protection, at any load address."""
    at = draw(st.integers(0, 1024)) * PAGE + (1 << 40)
    segments = []
    for _ in range(draw(st.integers(1, 7))):
        at += draw(st.sampled_from([0, 0, 0, PAGE, 3 * PAGE, PMD])) if segments else 0
        pages = draw(st.integers(1, 2048))
        flags = PF_R | draw(st.sampled_from([0, PF_X, PF_X, PF_W]))
        segments.append(segment(at, pages * PAGE - draw(st.integers(0, PAGE - 1)), flags))
        at = segments[-1].end
    return obj(*segments, main=draw(st.booleans()), interpreter=draw(st.booleans()))


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(layouts(), st.booleans(), st.booleans())
def test_every_byte_is_moved_or_explained(made, merge, keep):
    planned = make(made, merge=merge, keep_profilers=keep)
    for regions in [(m.image, m.memory, m.signed) for m in planned.moves]:
        for kind in regions:
            check_regions(made, kind, merge)
    if planned.moves:
        (move,) = planned.moves
        assert all(r.start % PMD == 0 and r.end % PMD == 0 for r in move.memory)
        assert any(r.flags & PF_X and r.huge(PMD).length for r in move.image)
        if keep and (made.main or made.interpreter):
            code = next(s for s in made.segments if s.code)
            for page in (made.start, code.start):
                assert not any(r.start <= page < r.end for r in move.memory)
                if made.main:
                    assert not any(r.start <= page < r.end for r in move.image)
        for kind in (move.image, move.memory, move.signed):
            if kind:
                check_partition(made, kind, plan.explain(made, kind, PMD))
        check_partition(made, move.image, planned.remainders)
    else:
        check_partition(made, (), planned.remainders)


def check_regions(made, regions, merge):
    for low, high in itertools.pairwise(regions):
        assert low.end <= high.start
    for region in regions:
        inside = [s for s in made.segments if s.start < region.end and region.start < s.end]
        assert not any(s.writable for s in inside)
        assert sum(min(s.end, region.end) - max(s.start, region.start) for s in inside) == (
            region.end - region.start
        ), "a region covers nothing but segments"
        if any(s.code for s in inside):
            assert region.flags & PF_X, "code stays executable"
        if not merge:
            assert len({s.code for s in inside}) == 1
        if region.flags & PF_X:
            # Nothing becomes executable that does not share a chunk with code.
            for s in inside:
                if not s.code:
                    low, high = max(s.start, region.start), min(s.end, region.end)
                    for chunk in range(low // PMD * PMD, high, PMD):
                        assert any(
                            c.start < chunk + PMD and chunk < c.end for c in inside if c.code
                        )


def check_partition(made, regions, left):
    for part in left:  # or the report gives none of them the reason
        assert any(s.start <= part.start and part.end <= s.end for s in made.segments)
    pieces = [tuple(r.huge(PMD)) for r in regions] + [(part.start, part.end) for part in left]
    pieces = sorted(piece for piece in pieces if piece[0] < piece[1])
    merged = []
    for low, high in pieces:
        assert not merged or merged[-1][1] <= low, "no byte is told of twice"
        if merged and merged[-1][1] == low:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    whole = []
    for s in made.segments:
        if whole and whole[-1][1] == s.start:
            whole[-1] = (whole[-1][0], s.end)
        else:
            whole.append((s.start, s.end))
    assert merged == whole


def test_of_an_aligned_file_only_machine_code_is_counted_as_code():
    """Its one executable PT_LOAD stands for three; the entries that it replaces are kept."""
    rows = [
        (elf.PT_LOAD, PF_R | PF_X, 0, 0x400000, 0, 0x544968, 0x544968, PMD),
        (elf.PT_NULL, PF_R | PF_X, 0x1F000, 0x41F000, 0, 0x2B2289, 0x2B2289, PAGE),
        (elf.PT_NULL, PF_R, 0x2D2000, 0x6D2000, 0, 0x272968, 0x272968, PAGE),
        (elf.PT_LOAD, PF_R | PF_W, 0x545DC8, 0x945DC8, 0, 0x13E4B0, 0x1832F0, PAGE),
    ]
    headers = b"".join(elf.PROGRAM_HEADER.pack(*row) for row in rows)
    text, data = segments_of(headers, 0, PAGE)
    assert text.measured == (Range(0x41F000, 0x41F000 + 0x2B2289),)
    assert data.measured == (Range(0x945DC8, 0x945DC8 + 0x1832F0),)
    made = obj(text, data, base=0)
    assert made.code_bytes == 0x2B2289
    mapping = Mapping(
        text.start, text.end, "r-xp", 0, "08:01", 7, "/x", f"\nFilePmdMapped: {2 * PMD >> 10} kB\n"
    )
    code, _ = measure(made.segments, [mapping], PMD)
    assert (code.bytes, code.huge_bytes) == (0x2B2289, 0x2B2289)
    # As the linker made it, without such entries, all of it is code.
    (text, _) = segments_of(headers[:56] + headers[3 * 56 :], 0, PAGE)
    assert text.measured == (Range(0x400000, 0x400000 + 0x544968),)


# ------------------------------------------------------------------------- hot chunks, limits ---


def touched_library(start, *touched, path="/lib/t.so", **more):
    """Eight MiB of code, bytes touched of each huge page, and data."""
    chunks = range(-(-start // PMD) * PMD, start + 8 * MIB - PMD + 1, PMD)
    return obj(
        segment(start, 8 * MIB, PF_R | PF_X), segment(start + 8 * MIB, MIB, PF_R | PF_W),
        path=path, touched=tuple(zip(chunks, touched, strict=True)),
        resident=sum(touched), **more,
    )  # fmt: skip


def test_only_hot_chunks_move():
    start = 1 << 30
    one = touched_library(start, PMD // 8, PMD // 8 - 1, PMD, PMD)
    planned = make(one)
    (move,) = planned.moves
    assert ranges(move.image) == [
        (start, start + PMD, "x"), (start + 2 * PMD, start + 4 * PMD, "x"),
    ]  # fmt: skip
    assert move.memory == move.image
    assert [(p.start, p.end, p.reason) for p in planned.remainders if p.kind == "code"] == [
        (start + PMD, start + 2 * PMD, reasons.COLD)
    ]
    # Nothing of it is hot.
    planned = make(touched_library(start, 0, PAGE, 0, PAGE))
    assert planned.moves == ()
    assert {p.reason for p in planned.remainders if p.kind == "code"} == {reasons.COLD}
    # The interpreter moves whole, whatever was touched.
    whole = touched_library(start, 0, 0, 0, 0, interpreter=True)
    assert make(whole).moves[0].bytes == 8 * MIB
    # Strict protections: a chunk must be of code alone.
    split = obj(
        segment(start, PMD + MIB, PF_R), segment(start + PMD + MIB, 5 * MIB, PF_R | PF_X),
        touched=((start, PMD), (start + PMD, PMD), (start + 2 * PMD, PMD)), resident=0,
    )  # fmt: skip
    assert ranges(make(split).moves[0].image) == [(start + PMD, start + 3 * PMD, "x")]
    assert ranges(make(split, merge=False).moves[0].image) == [
        (start + 2 * PMD, start + 3 * PMD, "x")
    ]


def test_a_limit_leaves_the_head_of_a_program_on_its_file():
    # A server that embeds Python: the program is not the interpreter, and linked for one address.
    start = 1 << 30
    program = touched_library(start, PMD, PMD // 2, PMD // 4, PMD, main=True, base=0)
    for limit in (8 * MIB, 4 * MIB):
        (move,) = make(program, limit=limit).moves
        assert ranges(move.image)[0][0] == start
        assert all(region.start >= start + PMD for region in move.memory), limit
    assert ranges(move.memory) == [(start + 3 * PMD, start + 4 * PMD, "x")]


def test_a_private_copy_has_a_limit_of_its_own_and_keeps_the_hottest():
    start = (1 << 30) + 5 * PAGE
    private = touched_library(start, PMD // 2, PMD // 4, PMD)
    (move,) = make(private).moves
    assert move.bytes == 3 * PMD
    first = (1 << 30) + PMD
    (move,) = make(private, private_limit=2 * PMD, limit=0).moves
    assert ranges(move.image) == [
        (first, first + PMD, "x"),
        (first + 2 * PMD, first + 3 * PMD, "x"),
    ]
    (move,) = make(private, private_limit=2 * PMD - 1).moves
    assert ranges(move.image) == [(first + 2 * PMD, first + 3 * PMD, "x")]
    planned = make(private, private_limit=PMD - 1)
    assert planned.moves == ()
    assert reasons.OVER_PRIVATE_LIMIT in {p.reason for p in planned.remainders}
    # At an address that recurs a copy is others', too.
    shared = touched_library(1 << 31, PMD, PMD, PMD, PMD, path="/lib/s.so")
    moves = make(private, shared, private_limit=PMD).moves
    assert {m.object.path: m.bytes for m in moves} == {"/lib/t.so": PMD, "/lib/s.so": 4 * PMD}
    assert make(shared, limit=PMD - 1).moves == ()
    # What was copied before counts.
    found = Survey((private,), PMD, False, 1, (1, 0), None, ())
    options = Options(private_limit=3 * PMD)
    assert plan.make(found, options, used=1 << 40, used_private=PMD).moves[0].bytes == 2 * PMD
    assert hot.is_shared(shared, PMD)
    assert not hot.is_shared(private, PMD)


def test_what_each_worker_would_copy_for_itself_counts_for_all_of_them():
    private = touched_library((1 << 30) + 0x5000, PMD, PMD, PMD, path="/lib/t.so")
    shared = touched_library(1 << 31, PMD, PMD, PMD, PMD, path="/lib/s.so")
    room = Memory(160 * PMD, 1 << 30, "/proc/meminfo")

    def moved(siblings, **options):
        found = Survey((private, shared), PMD, False, 1, (1, 0), room, (), False, siblings)
        return {m.object.path for m in plan.make(found, Options(**options)).moves}

    assert moved(1) == moved(1, backing="memfd") == {"/lib/t.so", "/lib/s.so"}
    assert moved(16) == {"/lib/s.so"}
    assert moved(16, backing="memfd") == set()


def test_what_siblings_copy_is_taken_off_and_what_they_share_counts_once():
    start = [(n << 30) + 0x5000 for n in range(1, 8)]
    private = [touched_library(at, PMD, 0, 0, path=f"/lib/{n}.so") for n, at in enumerate(start)]

    def copied(objects, available, siblings):
        room = Memory(available, 1 << 40, "/proc/meminfo")
        found = Survey(tuple(objects), PMD, False, 1, (1, 0), room, (), False, siblings)
        options = Options(memory_share=0.5, private_limit=1 << 30)
        return sum(m.bytes for m in plan.make(found, options).moves)

    # Each of seven passes alone, but there is room for five: 17 copies, and the file's own chunk.
    assert copied(private[:1], 400 * MIB, 17) == PMD
    assert copied(private, 400 * MIB, 17) == 5 * PMD
    assert copied(private, 36 * PMD * 7, 17) == 7 * PMD
    assert copied(private, 400 * MIB, 1) == 7 * PMD
    # One hot chunk, and much that is in the page cache for all of them.
    cold = PMD // 9
    one = replace(touched_library(start[0], PMD, cold, cold), resident=9 * MIB)
    need = 17 * PMD + one.resident
    assert copied([one], 2 * need + 2 * WORKING, 17) == PMD
    assert copied([one], 2 * need - 4, 17) == 0


def test_what_a_library_takes_of_memory_is_what_it_has_touched_and_what_is_copied():
    one = touched_library(1 << 30, PMD, 0, 0, 0)
    assert budget.size_of(one, make(one).moves[0].image) == 2 * PMD
    room = 4 * 2 * PMD
    assert make(one, available=room).moves != ()
    assert make(one, available=room - 4).moves == ()
    # A lock on fault takes no more than is there.
    lock = mlock_plan.Lock(one, one.start, one.start + 8 * MIB, "code", True)
    share = PMD / (9 * MIB)
    assert mlock_plan.affordable([lock], int(share * 8 * MIB), ()) == ([lock], [])
    assert mlock_plan.affordable([lock], int(share * 8 * MIB) - 1, ()) == ([], [lock])


@settings(deadline=None)
@given(
    start=st.integers(0, 1023),
    touched=st.lists(st.integers(0, PMD), min_size=1, max_size=12),
    limit=st.integers(0, 12 * PMD),
)
def test_chunks_stay_within_limits_and_leave_nothing_unexplained(start, touched, limit):
    low = (1 << 30) + start * PAGE
    first = -(-low // PMD) * PMD
    end = first + len(touched) * PMD + 3 * PAGE
    one = obj(
        segment(low, end - low, PF_R | PF_X), segment(end, PAGE, PF_R | PF_W), resident=0,
        touched=tuple((first + n * PMD, size) for n, size in enumerate(touched)),
    )  # fmt: skip
    planned = make(one, limit=limit, private_limit=limit)
    moved = [region for move in planned.moves for region in move.image]
    assert sum(region.length for region in moved) <= limit
    chosen = {at for region in moved for at in range(region.start, region.end, PMD)}
    sizes = dict(one.touched)
    assert all(8 * sizes[at] >= PMD for at in chosen)
    spared = [size for at, size in one.touched if at not in chosen and 8 * size >= PMD]
    assert not spared or len(chosen) == limit // PMD
    assert all(size <= min(sizes[at] for at in chosen) for size in spared if chosen)
    left = sum(p.end - p.start for p in planned.remainders if p.kind == "code")
    assert left + sum(region.length for region in moved) == end - low
