"""The C core's arguments: what is not an address, a length or a power of two is refused before any
system call sees it."""

import ctypes
import mmap
import os

import pytest

from page_primer import _core

TOP = (1 << 64) - 1
PAGE = mmap.PAGESIZE

RANGES = {
    "unmap": lambda start, size: _core.unmap(start, size),
    "protect": lambda start, size: _core.protect(start, size, _core.PROT_READ),
    "advise": lambda start, size: _core.advise(start, size, _core.MADV_POPULATE_READ),
    "populate": lambda start, size: _core.populate(start, size),
    "lock": lambda start, size: _core.lock(start, size),
    "unlock": lambda start, size: _core.unlock(start, size),
    "view": lambda start, size: _core.view(start, size),
    "map": lambda start, size: _core.map(start, size, 0, _core.MAP_ANONYMOUS, -1, 0),
    "fill": lambda start, size: _core.fill(start, size, 0, 0),
    "swap": lambda start, size: _core.swap(0, b"", [(start, size, 0, 0, -1, 0)], []),
    "undo": lambda start, size: _core.swap(0, b"", [], [(start, size, 0, 0, -1, 0)]),
}


@pytest.mark.parametrize("call", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize(
    ("start", "size"),
    [(1 << 70, PAGE), (-PAGE, PAGE), (0, 1 << 64), (0, -1), (TOP, PAGE), (PAGE, TOP)],
)
def test_what_no_address_space_has_is_an_overflow(call, start, size):
    with pytest.raises(OverflowError):
        call(start, size)


@pytest.mark.parametrize("call", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("wrong", [1.5, "4096", None])
def test_an_address_is_an_integer(call, wrong):
    with pytest.raises(TypeError):
        call(wrong, PAGE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _core.protect(0, PAGE),  # type: ignore[call-arg]
        lambda: _core.advise(0, PAGE),  # type: ignore[call-arg]
        lambda: _core.lock(0),  # type: ignore[call-arg]
        lambda: _core.unlock(0, PAGE, 0),  # type: ignore[call-arg]
        lambda: _core.unmap(0, PAGE, 0),  # type: ignore[call-arg]
        lambda: _core.reserve(PAGE, PAGE),  # type: ignore[call-arg]
        lambda: _core.swap(0, b"", [(0, PAGE, 0)], []),  # type: ignore[list-item]
        lambda: _core.swap(0, "", [], []),  # type: ignore[arg-type]
        lambda: _core.swap(0, b"", 0, []),  # type: ignore[arg-type]
        lambda: _core.limit(),  # type: ignore[call-arg]
        lambda: _core.placed(),  # type: ignore[call-arg]
        lambda: _core.dump_before(0),  # type: ignore[call-arg]
        lambda: _core.arenas_install(),  # type: ignore[call-arg]
        lambda: _core.heap_align(),  # type: ignore[call-arg]
    ],
)
def test_arguments_are_neither_forgotten_nor_too_many(call):
    with pytest.raises(TypeError):
        call()


def test_a_page_for_core_files_is_one_that_can_be():
    for address in (-PAGE, 1 << 64, TOP):
        with pytest.raises(OverflowError):
            _core.dump_page(address)
    for address in (-PAGE, 1 << 64):
        with pytest.raises(OverflowError):
            _core.dump_before(address, _core.PROT_READ, -1, PAGE)
    for address, offset in ((0, PAGE), (PAGE, 0)):
        with pytest.raises(ValueError, match="before the first page"):
            _core.dump_before(address, _core.PROT_READ, -1, offset)
    with mmap.mmap(-1, PAGE) as memory, open("/proc/self/exe", "rb") as file:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with pytest.raises(_core.Error, match="exists"):
            _core.dump_before(address + PAGE, _core.PROT_READ, file.fileno(), PAGE)
        with pytest.raises(_core.Error):
            _core.dump_page(PAGE)  # nothing is mapped there


def test_a_view_is_no_longer_than_a_buffer_can_be():
    with pytest.raises(OverflowError, match="too long for a buffer"):
        _core.view(0, 1 << 63)


@pytest.mark.parametrize("alignment", [0, 1, PAGE // 2, 3 * PAGE, PAGE + 1])
def test_an_alignment_is_a_power_of_two_and_a_page_at_least(alignment):
    with pytest.raises(ValueError, match="power of two"):
        _core.reserve(PAGE, alignment, 0)


def test_a_reservation_that_wraps_around_is_an_overflow():
    with pytest.raises(OverflowError):
        _core.reserve(TOP - PAGE, 1 << 21, 0)


@pytest.mark.parametrize("like", [0, 0x123000, 0x7FFF_FFFF_F000])
def test_a_reservation_is_congruent(like):
    alignment = 1 << 21
    area = _core.reserve(PAGE - 1, alignment, like)
    address = area.address
    assert address % alignment == like % alignment
    line = f"{address:x}-{address + PAGE:x} ---p"
    with open("/proc/self/maps") as maps:
        assert line in maps.read()
    area = None
    with open("/proc/self/maps") as maps:
        assert line not in maps.read()


def test_an_area_owns_what_it_has_mapped(tmp_path):
    """And not what may be somebody else's: what it has unmapped, or lost in a refused mapping."""
    area = _core.reserve(2 * PAGE, PAGE, 0)
    area.map(PAGE, _core.PROT_READ, _core.MAP_PRIVATE | _core.MAP_ANONYMOUS, -1, 0)
    for wrong in (3 * PAGE, TOP):
        with pytest.raises(ValueError, match="not within"):
            area.map(wrong, _core.PROT_READ, _core.MAP_PRIVATE | _core.MAP_ANONYMOUS, -1, 0)
    with pytest.raises(_core.Error, match="map"):  # before anything is touched
        area.map(PAGE, _core.PROT_READ, _core.MAP_PRIVATE, -1, 0)
    assert readable(area.address)
    folder = _core.opened(os.open, tmp_path, os.O_RDONLY)
    with pytest.raises(_core.Error, match="map"):  # the kernel may have unmapped it
        area.map(PAGE, _core.PROT_READ, _core.MAP_PRIVATE, folder, 0)
    first = area.address
    area.unmap()
    anonymous = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
    if readable(first):  # here it has not: what was there is nobody's now
        _core.unmap(first, PAGE)
    _core.map(first, 2 * PAGE, _core.PROT_READ, anonymous, -1, 0)
    area.unmap()
    area = None
    assert readable(first) and readable(first + PAGE)
    _core.unmap(first, 2 * PAGE)


def readable(address):
    with open("/proc/self/maps") as maps:
        spans = [[*line.split()[0].split("-"), line.split()[1]] for line in maps]
    return any(int(low, 16) <= address < int(high, 16) and kind[0] == "r"
               for low, high, kind in spans)  # fmt: skip


def test_a_descriptor_goes_with_its_object(tmp_path):
    path = tmp_path / "file"
    path.write_text("text")
    file = _core.opened(os.open, path, os.O_RDONLY)
    number = file.fileno()
    assert os.fstat(number).st_size == os.fstat(file).st_size == 4
    file = None
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


def test_a_descriptor_that_became_somebody_elses_stays_open(tmp_path):
    """A server that daemonizes closes all there are, and opens its own under the same numbers."""
    for name in ("ours", "theirs"):
        (tmp_path / name).write_text(name)
    file = _core.opened(os.open, tmp_path / "ours", os.O_RDONLY)
    number = file.fileno()
    os.close(number)
    theirs = os.open(tmp_path / "theirs", os.O_RDONLY)
    os.dup2(theirs, number)
    file.close()
    file.close()
    assert os.pread(number, 6, 0) == b"theirs"
    assert file.fileno() == -1
    for one in {theirs, number}:
        os.close(one)


def test_a_descriptor_that_is_kept_outlives_its_object(tmp_path):
    file = _core.opened(os.open, tmp_path, os.O_RDONLY)
    number = file.fileno()
    file.keep()
    file = None
    os.close(number)
    file = _core.opened(os.open, tmp_path, os.O_RDONLY)
    file.keep()
    file.close()
    assert file.fileno() == -1


def test_what_is_opened_is_a_descriptor():
    with pytest.raises(TypeError, match="takes a function"):
        _core.opened()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        _core.opened(str)  # type: ignore[arg-type]
    for wrong in (-1, 1 << 32, 1 << 40):  # the low 32 bits of these are standard input's number
        with pytest.raises(ValueError, match="not a descriptor"):
            _core.opened(int, wrong)
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        _core.opened(os.open, "/nowhere", os.O_RDONLY)


def test_an_error_tells_step_range_and_number():
    area = _core.reserve(PAGE, PAGE, 0)
    address = area.address
    area.unmap()
    with pytest.raises(_core.Error) as caught:
        _core.lock(address, PAGE)
    error = caught.value
    assert (error.errno, error.step, error.start, error.end) == (
        12,
        "lock",
        address,
        address + PAGE,
    )


def test_objects_are_those_of_the_process():
    """Checked against the mappings, which the kernel tells."""
    adds, subs, found = _core.objects()
    assert (adds, subs) == _core.loads()
    with open("/proc/self/maps") as maps:
        mapped = {line.split()[5] for line in maps if len(line.split()) > 5}
    names = [name.decode() for name, _, _ in found]
    assert names[0] == ""
    assert {os.path.realpath(name) for name in names[1:] if name.startswith("/")} <= mapped
    assert any("libc.so" in name for name in names)
    assert all(headers and len(headers) % 56 == 0 for _, _, headers in found)
