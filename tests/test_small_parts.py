"""Small parts of the package by themselves: what a process that has everything never meets."""

import errno
import pickle
from typing import Any

import pytest

import page_primer
from page_primer import _lean, _loading, options, outcome, reasons, schema, survey, words
from page_primer.elf.file import PF_R, PF_X
from page_primer.elf.objects import Object, Segment
from page_primer.heap import arenas, chunks, refusal
from page_primer.kernel import credentials, limits, memlock, mounts, release, smaps, thp
from page_primer.kernel.memory import Memory
from page_primer.kernel.smaps import Mapping
from page_primer.options import Options

MIB = 1 << 20


def test_what_stands_in_the_way_of_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, 10))
    assert arenas.unavailable(2 * MIB) is None
    too_large = arenas.install(512 * MIB)
    assert too_large == "arenas: huge pages of 512 MiB are too large for them"
    monkeypatch.setattr("sys.version_info", (3, 15))
    assert arenas.install(2 * MIB) == "arenas: this CPython advises them by itself"
    monkeypatch.setattr("sys.getallocatedblocks", lambda: 0)  # PYTHONMALLOC=malloc
    assert "pymalloc is not in use" in str(arenas.install(2 * MIB))
    assert arenas.find([]) == []


def test_free_threaded_builds_have_no_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are those of mimalloc looked for."""
    assert arenas.find(smaps.read_maps())
    monkeypatch.setattr("sys.abiflags", "t")
    assert "pymalloc is not in use" in str(arenas.install(2 * MIB))
    assert arenas.find(smaps.read_maps()) == []


def test_a_heap_that_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given, huge = Options(heap="auto"), 2 * MIB
    plenty = Memory(1 << 40, 1 << 40, "/proc/meminfo")
    tiny = Memory(MIB, 1 << 40, "/proc/meminfo")
    monkeypatch.setattr(refusal, "enabled", lambda _: "madvise")
    assert refusal.refusal(given, huge, [plenty]) is None
    refused = refusal.refusal(given, huge, [plenty, tiny])
    assert refused is not None and refused.reason == reasons.TOO_LITTLE_MEMORY
    monkeypatch.setattr(refusal, "enabled", lambda _: "never")
    refused = refusal.refusal(given, huge, [plenty])
    assert refused is not None and refused.reason == reasons.THP_OFF


def test_a_child_of_a_fork_amid_an_import_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loading, "_cut_off", True)
    assert page_primer.__getattr__("__version__") == "unknown"
    assert options.nearest_variable("PAGE_PRIMER_LIMITS") is None
    assert page_primer.restore().reason == reasons.CUT_OFF


def test_an_option_that_is_nothing() -> None:
    given = Options.load({"include": None, "image_dir": None}, {})
    assert (given.include, given.image_dir) == ((), None)


def test_prime_takes_options_once() -> None:
    with pytest.raises(TypeError, match="either Options or keyword arguments"):
        page_primer.prime(Options(), limit=0)


def test_memory_that_ends_at_an_import_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted() -> None:
        raise MemoryError

    monkeypatch.setattr(page_primer, "_load", exhausted)
    report = page_primer.restore()
    assert (report.reason, report.detail) == (reasons.TOO_LITTLE_MEMORY, "MemoryError")


def test_segments_are_a_tuple() -> None:
    one = outcome.SegmentReport(0, MIB, "code", MIB, 0, 0, {reasons.NO_BACKING: MIB})
    two = outcome.SegmentReport(MIB, 2 * MIB, "data", MIB, 0, 0, {})
    packed: Any = outcome.Segments((one, two))
    assert packed == (one, two) and packed != (one,) and packed != [one, two]
    assert one in packed and 5 not in packed and packed[1] == two and len(packed) == 2
    assert repr(packed) == repr((one, two))
    assert pickle.loads(pickle.dumps(packed)) == packed


def test_a_heap_that_was_left_alone_says_why() -> None:
    report = outcome.HeapReport("auto", reasons.THP_OFF, "never")
    assert str(report).startswith("heap left alone: ") and "never" in str(report)


def test_a_pod_has_no_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert "add: [IPC_LOCK]" in words.memlock_remedy(MIB)
    first, *others = words.memlock_lines(MIB)
    assert "add: [IPC_LOCK]" in first and len(others) == 1 and "LimitMEMLOCK" in others[0]


def test_no_share_of_nothing() -> None:
    assert words.percent(0, 0) == "-"


def test_a_schema_of_what_has_none() -> None:
    with pytest.raises(TypeError, match="no schema for"):
        schema._of(complex)


def test_locking_on_trial() -> None:
    assert memlock.try_lock(0) is None
    assert memlock.try_lock(1 << 64) == memlock.OVER


def test_what_the_kernel_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc or /sys is hidden: no limit, no mounts, nothing locked, nobody's files."""
    real = open

    def hidden(path, *arguments, **options):
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return real(path, *arguments, **options)

    assert limits.soft_limit(9999) is None
    assert not thp.has_no_huge_pages()
    monkeypatch.setattr("builtins.open", hidden)
    assert not mounts.read() and not memlock._locked()
    assert mounts.of(1) is None
    assert not credentials._text("/proc/self/uid_map")
    assert thp.has_no_huge_pages()
    assert not credentials._is_one_user(-1)


def test_a_version_that_is_not_told_is_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.uname", refused)
    assert release.release() > (99, 0)
    assert page_primer._unsupported() is None


def test_reading_that_fails_says_of_which_file() -> None:
    with pytest.raises(OSError, match="/proc/self/mem"):  # nothing is at its beginning
        list(smaps._parts("/proc/self/mem", b"\n"))


def segment(flags: int, offset: int = 0) -> Segment:
    return Segment(MIB, 2 * MIB, 2 * MIB, offset, flags, MIB, MIB)


def loaded(path: str, flags: int = PF_R | PF_X) -> Object:
    return Object("libx.so", path, MIB, b"", (segment(flags),))


@pytest.mark.parametrize(
    ("path", "inode", "reason"),
    [
        ("/nowhere/libx.so", 0, reasons.MAPPED_OTHERWISE),
        ("/nowhere/libx.so", 5, reasons.FILE_GONE),
        (f"/{'x' * 300}", 5, reasons.FILE_UNREADABLE),
    ],
)
def test_an_object_without_its_file(path: str, inode: int, reason: reasons.Reason) -> None:
    origin = Mapping(MIB, 2 * MIB, "r-xp", 0, "08:01", inode, path)
    assert survey._inspect(loaded(path), origin, [origin]) == (None, reason)


def test_code_that_cannot_be_read_stays_where_it_is() -> None:
    origin = Mapping(MIB, 2 * MIB, "--xp", 0, "08:01", 5, "/lib/libx.so")
    found = loaded("/lib/libx.so", PF_X)
    assert survey._why_fixed(found, origin, [origin]) == reasons.EXECUTE_ONLY


def test_code_that_is_mapped_from_elsewhere_in_its_file_stays_where_it_is() -> None:
    origin = Mapping(MIB, 2 * MIB, "r-xp", 4096, "08:01", 5, "/lib/libx.so")
    assert survey._why_fixed(loaded("/lib/libx.so"), origin, [origin]) == reasons.MAPPED_OTHERWISE


@pytest.mark.parametrize(
    ("flags", "permissions", "reason"),
    [
        (PF_R | PF_X, "---p", reasons.MAPPED_OTHERWISE),
        (PF_R | PF_X, "r--p", reasons.MAPPED_OTHERWISE),
        (PF_R | PF_X, "rwxp", reasons.MAPPED_OTHERWISE),
        (PF_R, "---p", reasons.MAPPED_OTHERWISE),
        (PF_R, "rw-p", reasons.MAPPED_OTHERWISE),
        (PF_R, "r--p", None),
        (PF_R, "r-xp", None),  # READ_IMPLIES_EXEC
        (0, "---p", None),  # which does not move
    ],
)
def test_what_has_another_protection_stays_where_it_is(
    flags: int, permissions: str, reason: reasons.Reason | None
) -> None:
    origin = Mapping(MIB, 2 * MIB, permissions, 0, "08:01", 5, "/lib/libx.so")
    assert survey._why_fixed(loaded("/lib/libx.so", flags), origin, [origin]) == reason


def test_an_object_without_a_dynamic_section_has_no_text_relocations() -> None:
    origin = Mapping(MIB, 2 * MIB, "r-xp", 0, "08:01", 5, "/lib/libx.so")
    assert survey._why_fixed(loaded("/lib/libx.so"), origin, [origin]) is None


def test_a_records_fields_are_what_it_takes() -> None:
    class Point(_lean.Record):
        x: int
        y: int = 0

    assert repr(Point(1)).endswith("(x=1, y=0)")
    with pytest.raises(TypeError, match="takes x, y"):
        Point(1, 2, 3)  # type: ignore[call-arg]


def test_where_pagemap_is_closed_a_chunk_is_like_its_mapping() -> None:
    def chunks_of(resident: int, shared: int = 0, swapped: int = 0) -> list[chunks.Chunk]:
        details = f"\nRss: {resident >> 10} kB\nShared_Clean: {shared >> 10} kB\n"
        details += f"Shared_Dirty: 0 kB\nSwap: {swapped >> 10} kB\n"
        mapping = Mapping(0, 8 * MIB, "rw-p", 0, "00:00", 0, "[heap]", details)
        return list(chunks._alike(mapping, 2 * MIB, 6 * MIB, 2 * MIB))

    quarter_missing = [
        chunks.Chunk(start, missing=MIB // 2, shared=MIB) for start in (2 * MIB, 4 * MIB)
    ]
    assert chunks_of(6 * MIB, shared=4 * MIB) == quarter_missing
    assert chunks_of(4 * MIB) == []  # as much is missing as is there
    assert chunks_of(6 * MIB, swapped=4096) == []
