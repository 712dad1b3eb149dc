"""The core's functions, each with a system call or a C library's function that fails beneath it."""

import mmap
import os
from errno import EAGAIN, EEXIST, EFAULT, EINTR, EINVAL, EMFILE, ENOENT, ENOMEM, ETIMEDOUT

import pytest
from harness.faults import build_fault
from harness.outside import PMD
from harness.process import Process

PAGE = mmap.PAGESIZE
START = f"""
import ctypes, os, re, sys, threading, zlib
from page_primer import _core
fault, PAGE = ctypes.CDLL(None), {PAGE}
def arm(name, nth, number, times=1):
    global armed
    fault.fault_arm(armed := name, nth, number)
    fault.fault_times(times)
def error(function, *arguments):
    try:
        return function(*arguments)
    except _core.Error as raised:
        return [raised.errno, raised.step]
text = memoryview(bytearray(1 << 20))
def mappings():  # without memory of its own, which might be a mapping more
    size = 0
    with open("/proc/self/maps", "rb", buffering=0) as file:
        while got := file.readinto(text[size:]):
            size += got
    return zlib.crc32(text[:size])
ANONYMOUS = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
def memory(pages=1):
    area = _core.reserve(pages * PAGE, PAGE, 0)
    area.unmap()
    _core.map(area.address, pages * PAGE, _core.PROT_READ | _core.PROT_WRITE, ANONYMOUS, -1, 0)
    return area.address
for _ in range(3):  # what an error takes of memory is there from now on
    mappings(), error(_core.map, 1, PAGE, 1, ANONYMOUS, -1, 0)
"""


@pytest.fixture(scope="module")
def process(python, tmp_path_factory):
    preload = build_fault(tmp_path_factory.mktemp("fault"))
    with Process(python, env={"LD_PRELOAD": preload}) as process:
        process.run(START)
        yield process


@pytest.mark.parametrize(
    ("call", "step"),
    [
        ("_core.map, at, PAGE, 1, ANONYMOUS, -1, 0", "map"),
        ("_core.dump_before, at + PAGE, 1, file.fileno(), PAGE", "dump"),
    ],
)
def test_a_kernel_that_takes_an_address_for_a_hint(process, call, step):
    """Linux before 4.17 maps elsewhere what must not replace anything."""
    code = (
        "at = memory()\n"
        "with open(sys.executable, 'rb') as file:\n"
        "    before = mappings(); arm(b'mmap by a hint', 1, 0)\n"
        f"    got = error({call})\n"
        "result = got, fault.fault_fired(), mappings() == before; _core.unmap(at, PAGE)"
    )
    assert process.run(code) == [[EEXIST, step], 1, True]


@pytest.mark.parametrize("number", [EAGAIN, EINTR])
def test_populating_is_tried_again(process, number):
    code = (
        f"at = memory(); arm(b'madvise', 1, {number}, 7); got = error(_core.populate, at, PAGE)\n"
        "fired = fault.fault_fired()\n"
        f"arm(b'madvise', 1, {number}, 99); result = got, fired, error(_core.populate, at, PAGE)\n"
        "fault.fault_fired(); _core.unmap(at, PAGE)"
    )
    assert process.run(code) == [None, 7, [number, "populate"]]


@pytest.mark.parametrize("known", [True, False])
def test_a_page_that_cannot_be_read_is_an_error(process, known):
    """The kernel says EINVAL to it, as to advice that it does not know (before Linux 5.14)."""
    arm = "" if known else f"arm(b'madvise', 1, {EINVAL}, 99)\n"
    code = (
        f"at = memory(3)\n{arm}"
        "whole = error(_core.populate, at, 3 * PAGE)\n"
        f"with open('/proc/self/pagemap', 'rb') as file: file.seek(at // PAGE * 8); "
        "present = file.read(24)[7::8]\n"
        "_core.protect(at + PAGE, PAGE, _core.PROT_NONE)\n"
        "with open('/proc/self/status') as file: before = re.findall('Sig[BIC].*', file.read())\n"
        f"{arm}closed = error(_core.populate, at, 3 * PAGE); fault.fault_fired()\n"
        "with open('/proc/self/status') as file: after = re.findall('Sig[BIC].*', file.read())\n"
        "result = whole, [byte >> 7 for byte in present], closed, before == after\n"
        "_core.unmap(at, 3 * PAGE)"
    )
    assert process.run(code) == [None, [1, 1, 1], [EFAULT, "populate"], True]


@pytest.mark.parametrize(
    ("number", "tries", "text"),
    [
        (EAGAIN, 2, os.strerror(EAGAIN)),
        (EINVAL, 1, "this kernel does not (Linux 6.1), khugepaged may"),
        (ENOMEM, 1, "no huge page is free"),
    ],
)
def test_a_collapse_that_the_kernel_refuses(process, number, tries, text):
    """The first call only advises."""
    code = (
        "from page_primer.heap import chunks\n"
        f"area = _core.reserve({PMD}, {PMD}, 0); at = area.address\n"
        f"area.map({PMD}, _core.PROT_READ | _core.PROT_WRITE, ANONYMOUS, -1, 0)\n"
        f"arm(b'madvise', 2, {number}, 2)\n"
        f"got = chunks.collapse([chunks.Chunk(at, 0, 0)], {PMD}, 64 << 20, unshare=False)\n"
        "result = got.bytes, got.notes, fault.fault_fired(); area.unmap()"
    )
    assert process.run(code) == [0, [f"1 of 1 not collapsed: {text}"], tries]


def test_a_file_that_cannot_be_unmapped(process):
    code = (
        f"arm(b'munmap', 1, {ENOMEM})\n"
        "with open(sys.executable, 'rb') as file: got = error(_core.placed, PAGE, file.fileno())\n"
        "result = got, fault.fault_fired()"
    )
    assert process.run(code) == [[ENOMEM, "unmap"], 1]


def test_threads_that_cannot_be_counted(process):
    code = f"arm(b'stat', 1, {ENOENT}); result = error(_core.threads), fault.fault_fired()"
    assert process.run(code) == [[ENOENT, "threads"], 1]


def test_a_page_for_core_files_without_a_descriptor(process):
    code = (
        "import resource; before = resource.getrlimit(resource.RLIMIT_NOFILE); at = memory()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))\n"
        "result = error(_core.dump_page, at)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, before); _core.unmap(at, PAGE)"
    )
    assert process.run(code) == [EMFILE, "dump"]


@pytest.mark.parametrize(("times", "outcome"), [(3, [ENOMEM, "replace"]), (9999, [ENOMEM, "undo"])])
def test_putting_back_is_tried_for_long(process, times, outcome):
    """The memory that is replaced here is nobody's, so that it may stay a hole."""
    code = (
        "at, copy = memory(), memory()\n"
        "with open(sys.executable, 'rb') as file:\n"
        "    for area in (at, copy): _core.fill(area, PAGE, file.fileno(), 0)\n"
        "    _, base, headers = _core.objects()[2][0]\n"
        "    piece = (at, PAGE, 1, copy, file.fileno(), 0)\n"
        f"    arm(b'mmap with a hole', 1, {ENOMEM}, {times})\n"
        "    got = error(_core.swap, base, headers, [piece], [piece])\n"
        "fired = fault.fault_fired(); mappings()\n"
        "there = b'%x-%x r--p' % (at, at + PAGE) in bytes(text)\n"
        "result = got, fired, there; _core.unmap(at, PAGE); _core.unmap(copy, PAGE)"
    )
    got, fired, there = process.run(code)
    assert got == outcome
    # The replacement, and at most a thousand attempts to undo it.
    assert (fired, there) == ((3, True) if times == 3 else (1001, False))


def test_what_cannot_be_put_back_is_no_reason_to_leave_the_rest(process):
    """Of two pieces the second leaves a hole, and can never be mapped again; the first can."""
    code = (
        "at, copy = memory(2), memory(2)\n"
        "with open(sys.executable, 'rb') as file:\n"
        "    for area in (at, copy): _core.fill(area, 2 * PAGE, file.fileno(), 0)\n"
        "    _, base, headers = _core.objects()[2][0]\n"
        "    first, second = [\n"
        "        (at + n * PAGE, PAGE, _core.PROT_READ, copy + n * PAGE, file.fileno(), n * PAGE)\n"
        "        for n in (0, 1)]\n"
        "    executable = (at, PAGE, _core.PROT_READ | _core.PROT_EXEC, *first[3:])\n"
        f"    arm(b'mmap with a hole', 2, {ENOMEM}, 1001)\n"
        "    got = error(_core.swap, base, headers, [first, second], [second, executable])\n"
        "fired = fault.fault_fired(); mappings()\n"
        "there = b'%x-%x r-xp' % (at, at + PAGE) in bytes(text)\n"
        "result = got, fired, there; _core.unmap(at, 2 * PAGE); _core.unmap(copy, 2 * PAGE)"
    )
    # The replacement, and a thousand attempts at the second piece.
    assert process.run(code) == [[ENOMEM, "undo"], 1001, True]


def test_what_waits_in_vain_is_told_so(process):
    """A call, for another thread's; and a fork, after which calls go on."""
    process.run(
        "begun, over = threading.Event(), threading.Event()\n"
        "def busy(): begun.set(); over.wait()\n"
        "thread = threading.Thread(target=_core.alone, args=(busy, print)); thread.start()\n"
        "begun.wait()"
    )
    code = f"arm(b'pthread_cond_timedwait', 1, {ETIMEDOUT})\n"
    code += "result = _core.alone(lambda: 1, lambda mine: ['not called', mine])"
    assert process.run(code) == ["not called", False]
    code = f"arm(b'pthread_cond_timedwait', 1, {ETIMEDOUT}); _core.before_fork()\n"
    code += "result = fault.fault_fired(); _core.after_fork()"
    assert process.run(code) == 1
    assert process.run("over.set(); thread.join(); result = _core.alone(lambda: 1, print)") == 1


@pytest.mark.parametrize(("function", "outcome"), [("malloc", 0), ("sbrk", f"error {ENOMEM}")])
def test_the_heap_cannot_be_aligned(process, function, outcome):
    """Neither where malloc has no blocks below the next huge page, nor without address space."""
    code = (
        "brk = lambda: sbrk(0) or 0; sbrk = fault.sbrk; sbrk.restype = ctypes.c_void_p\n"
        # So that nearly a huge page's worth is missing: blocks are taken of malloc first.
        "fault.sbrk(ctypes.c_ssize_t(-brk() % (1 << 21) + PAGE))\n"
        f"arm({function.encode()!r}, 1, {ENOMEM}); before = brk()\n"
        "try: got = _core.heap_align(1 << 21)\n"
        "except OSError as raised: got = f'error {raised.errno}'\n"
        "result = got, fault.fault_fired(), brk() % (1 << 21) == 0"
    )
    assert process.run(code) == [outcome, 1, False]


# Arenas as pymalloc asks for them, but by hand, in regions that are as small as they may be and
# that the interpreter's own arenas do not fit in.
ARENAS = """
SIZE = 256 << 10
class Arenas(ctypes.Structure):
    _fields_ = [("ctx", ctypes.c_void_p),
                ("alloc", ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
                ("free", ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p,
                                           ctypes.c_size_t))]
installed = _core.arenas_install(SIZE)
now = Arenas()
ctypes.PyDLL(None).PyObject_GetArenaAllocator(ctypes.byref(now))
take = lambda: now.alloc(now.ctx, SIZE)
give = lambda address: now.free(now.ctx, address, SIZE)
counts = lambda: dict(zip("regions given spare made small unadvised slowest".split(),
                          _core.arenas_counts()))
"""


@pytest.fixture
def arenas(python, tmp_path_factory):
    """A process of its own, where every arena taken is given back at the end."""
    preload = build_fault(tmp_path_factory.mktemp("fault"))
    with Process(python, env={"LD_PRELOAD": preload}) as process:
        process.run(START + ARENAS)
        if process.run("result = installed") != "active":
            pytest.skip("this interpreter has no arenas")
        yield process
        process.run("for address in taken: give(address)")
        assert process.run("result = _core.arenas_retire(), counts()['regions']") == [True, 0]


def test_a_region_or_the_table_of_them_cannot_be_mapped(arenas):
    """The allocator before gives what ours cannot list."""
    code = "taken, seen = [], []\n"
    code += f"for nth in (1, 2, 3): arm(b'mmap', nth, {ENOMEM}); taken.append(take()); "
    code += "seen.append([fault.fault_fired(), counts()['regions']])\nresult = seen"
    # A region takes one mapping, or two where the first one is not aligned; then the table's.
    assert arenas.run(code) in ([[1, 0], [1, 0], [1, 0]], [[1, 0], [1, 0], [0, 1]])
    assert arenas.run("result = all(ctypes.memset(at, 1, SIZE) == at for at in taken)") is True


def test_the_table_of_regions_cannot_grow(arenas):
    code = f"taken = [take() for _ in range(128)]; arm(b'mremap', 1, {ENOMEM})\n"
    code += "taken.append(take()); result = fault.fault_fired(), counts()['regions']"
    assert arenas.run(code) == [1, 128]
    code = "taken += [take() for _ in range(9)]\nresult = counts()['regions'], len({*taken})"
    assert arenas.run(code) == [137, 138]
    assert arenas.run("result = all(ctypes.memset(at, 1, SIZE) == at for at in taken)") is True


def test_regions_go_without_advice_while_the_kernel_is_slow(arenas):
    code = (
        "arm(b'madvise that takes long', 1, 0); taken = [take()]; fired = fault.fault_fired()\n"
        "seen = [counts()['unadvised']]\n"
        "for _ in range(3): taken.append(take()); seen.append(counts()['unadvised'])\n"
        "result = fired, seen, counts()['slowest'] > 15_000_000"
    )
    fired, unadvised, slow = arenas.run(code)
    assert fired == 1 and slow
    # Two, of which the first one comes next, and then it is tried again.
    assert unadvised == [0, 1, 2, 2]


def test_an_allocator_that_is_put_back_over_ours(arenas):
    """The one that was there before ours: what ours gave is freed there, as mappings."""
    code = (
        "taken = []; python = ctypes.PyDLL(None)\n"
        "result = _core.arenas_retire()\n"
        "before = Arenas(); python.PyObject_GetArenaAllocator(ctypes.byref(before))\n"
        "_core.arenas_install(SIZE); address = take(); had = counts()['regions']\n"
        "python.PyObject_SetArenaAllocator(ctypes.byref(before))\n"
        "again = _core.arenas_install(SIZE)\n"
        "result = result, had, again, counts()['regions'], counts()['given']\n"
        "before.free(before.ctx, address, SIZE)"
    )
    assert arenas.run(code) == [True, 1, "active", 0, 0]


def test_forks_that_cannot_be_watched(python, tmp_path):
    with Process(python, env={"LD_PRELOAD": build_fault(tmp_path)}) as process:
        process.run(START)
        code = f"arm(b'pthread_atfork', 1, {ENOMEM}); result = _core.arenas_install(1 << 21)"
        if (got := process.run(code)) == "none":
            pytest.skip("this interpreter has no arenas")
        assert got == "fork"
        assert process.run("result = _core.arenas_install(1 << 21)") == "active"


def test_threads_that_watch_forks_at_once(python, tmp_path):
    """glibc 2.28 to 2.35 has them wait for a fork's handlers, which may wait for the GIL: another
    thread comes as far, meanwhile.  Forks count twice then, and are over all the same."""
    code = (
        "arm(b'pthread_atfork that waits for another', 1, 0, 2); got = []\n"
        "install = lambda: got.append(_core.arenas_install(SIZE))\n"
        "threads = [threading.Thread(target=install) for _ in range(2)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "result = got, fault.fault_fired()"
    )
    with Process(python, env={"LD_PRELOAD": build_fault(tmp_path)}) as process:
        install, rest = ARENAS.split("installed = _core.arenas_install(SIZE)\n")
        process.run(START + install)
        got, fired = process.run(code)
        if got == ["none"] * 2:
            pytest.skip("this interpreter has no arenas")
        assert (got, fired) == (["active"] * 2, 2)
        code = (
            "late = take(); regions = counts()['regions']\n"
            "child = os.fork()\n"
            "give(late)\n"  # at once where no fork is under way
            "taken = take(), counts()['regions'], counts()['given'] // SIZE\n"
            "if not child: os._exit(taken[1:] != (regions, 1))\n"
            "result = taken[1:], regions, os.waitpid(child, 0)[1]; give(taken[0])"
        )
        assert process.run(rest + code) == [[1, 1], 1, 0]


def test_arenas_are_not_begun_amid_a_fork(python):
    """By a handler of pthread_atfork(3) of another library's."""
    code = (
        "seen = []; handler = ctypes.CFUNCTYPE(None)(\n"
        "    lambda: seen.append(_core.arenas_install(1 << 21)))\n"
        "getattr(fault, '__register_atfork')(handler, None, None, None)\n"
        "result = _core.arenas_install(1 << 21)"
    )
    with Process(python) as process:
        process.run(START)
        if process.run(code) == "none":
            pytest.skip("this interpreter has no arenas")
        process.run("_core.arenas_retire()")
        process.run("child = os.fork()\nif not child: os._exit(0)\nos.waitpid(child, 0)")
        assert process.run("result = seen") == ["fork"]
        assert process.run("result = _core.arenas_install(1 << 21)") == "active"


def test_a_pointer_chase_without_memory(python):
    pytest.importorskip("page_primer.bench._probe", reason="built without it")
    code = (
        "import resource; from page_primer.bench import _probe\n"
        "def chase(more):\n"
        "    with open('/proc/self/statm') as file: size = int(file.read().split()[0]) * PAGE\n"
        "    before = resource.getrlimit(resource.RLIMIT_AS)\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))\n"
        "    try: return _probe.pointer_chase(1 << 18, False, 1)\n"
        "    except MemoryError: return 'no memory'\n"
        "    finally: resource.setrlimit(resource.RLIMIT_AS, before)\n"
        "try: _probe.pointer_chase(1, False, 1)\n"
        "except ValueError as error: refused = str(error)\n"
        # Not for the pages, of which there is a gigabyte; and not for the pointers to them.
        "result = refused, chase(0), chase((1 << 30) + (3 << 20))"
    )
    with Process(python) as process:
        process.run(START)
        refused, *got = process.run(code)
    assert refused and got == ["no memory", "no memory"]
