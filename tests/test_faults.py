"""Every system call of the swap is made to fail in its turn: the process runs on, the report says
at which step, and all mappings are whole."""

import json
import os
import subprocess
from errno import EACCES, EAGAIN, EINTR, EINVAL, EIO, ENOMEM, EPERM

import pytest
from harness import outside
from harness.faults import build_fault
from harness.interpreters import KINDS, python_of
from harness.kernel import release
from harness.placement import require_images
from harness.privileges import has_images
from harness.process import Process, interpreter
from harness.system_calls import TESTS

# What a program does that would notice code gone wrong.
EXERCISE = (
    "import json, re, decimal, gc; gc.collect()\n"
    "assert json.loads(json.dumps({'a': [1.5, None]})) == {'a': [1.5, None]}\n"
    "assert re.sub('(a+)', r'<\\1>', 'xaay') == 'x<aa>y'\n"
    "result = str(decimal.Decimal(2).sqrt())"
)


@pytest.fixture(scope="module")
def preload(tmp_path_factory):
    return build_fault(tmp_path_factory.mktemp("fault"))


def backing_options(backing, images):
    return {"backing": backing, "image_dir": str(images), "keep_profilers": False}


def whole(process, before):
    """Every mapping of a file that was there is there again, or covered by a replacement."""
    vmas = sorted((v.start, v.end, v.perms) for v in outside.smaps(process.pid))
    for start, end, perms, _, path in before:
        at = start
        for low, high, now in vmas:
            if low <= at < high and at < end:
                assert now[0] == "r" or perms[0] != "r", (path, perms, now)
                assert now[2] == "x" or perms[2] != "x", (path, perms, now)
                at = high
        assert at >= end, f"hole in {path} at {at:#x}"


@pytest.mark.parametrize(
    ("backing", "function", "number"),
    [
        ("image", "mmap", ENOMEM),
        pytest.param("image", "mmap", EACCES, marks=pytest.mark.slow),
        pytest.param("image", "mmap with a hole", ENOMEM, marks=pytest.mark.slow),
        ("image", "madvise", EINVAL),
        pytest.param("image", "madvise", ENOMEM, marks=pytest.mark.slow),
        pytest.param("image", "madvise", EIO, marks=pytest.mark.slow),
        pytest.param("image", "munmap", ENOMEM, marks=pytest.mark.slow),
        ("image", "mlock", ENOMEM),
        pytest.param("image", "mlock", EAGAIN, marks=pytest.mark.slow),
        ("memfd", "mmap", ENOMEM),
        ("memfd", "mmap with a hole", ENOMEM),
        ("memfd", "madvise", ENOMEM),
        ("memfd", "pread", EIO),
        ("anonymous", "mmap", ENOMEM),
        ("anonymous", "mremap", ENOMEM),
        ("anonymous", "mremap with a hole", ENOMEM),
        ("anonymous", "mprotect", EACCES),
        ("anonymous", "madvise", EINVAL),
        ("anonymous", "pread", EIO),
        ("anonymous", "munmap", EPERM),
    ],
)
def test_every_call_may_fail(python, images, preload, backing, function, number):
    if backing == "image":
        require_images()
    options = backing_options(backing, images)
    outcomes = []
    with Process(python, env={"LD_PRELOAD": preload}) as process:
        # What prime() imports is imported, so that mappings only change by what it does.
        process.prime(**options)
        process.restore()
        process.run("import ctypes, json, re, decimal; fault = ctypes.CDLL(None)")
        process.run(EXERCISE)
        before = outside.file_mappings(process.pid)
        # There is a call of mlock for each mapping, all alike: some of them will do.
        for nth in range(1, 400, 11 if function == "mlock" else 1):
            process.run(f"name = {function.encode()!r}; fault.fault_arm(name, {nth}, {number})")
            report = process.prime(**options)
            if not process.run("result = fault.fault_fired()"):
                break
            whole(process, before)
            assert process.run(EXERCISE).startswith("1.41421356")
            core = interpreter(report)
            text = outside.text_of(process.pid, core["path"])
            outcomes.append(text.huge)
            if not text.huge:
                said = str(core["notes"]) + str([s["left"] for s in core["segments"]])
                step = {
                    "mmap": ("reserve", "map", "replace"),
                    "mmap with a hole": ("map", "replace"),
                    "mremap": ("replace",),
                    "mremap with a hole": ("replace",),
                    "mprotect": ("protect",),
                    "pread": ("fill",),
                    "madvise": ("populate", "huge"),
                    "munmap": ("unmap",),
                }[function]
                assert any(f"{name}" in said for name in step), said
            process.restore()
            missing = [m for m in before if m not in outside.file_mappings(process.pid)]
            assert missing == [], f"after failure {nth} of {function}"
        else:
            raise AssertionError("the fault never stopped firing")
        assert outcomes, f"{function} is never called"
        # And it works when nothing fails.
        assert outside.text_of(process.pid, interpreter(report)["path"]).huge


@pytest.mark.slow
@pytest.mark.parametrize("backing", ["image", "memfd", "anonymous"])
@pytest.mark.images
def test_a_anchor_may_fail(images, tmp_path, preload, backing):
    """Then a program's head stays on its file in memory without a name."""
    if "static" not in KINDS:
        pytest.skip("no static interpreter here")
    options = {"backing": backing, "image_dir": str(images), "mlock": False}
    with Process(python_of(tmp_path, KINDS["static"]), env={"LD_PRELOAD": preload}) as process:
        process.prime(**options)
        process.restore()
        process.run("import ctypes, json, re, decimal; fault = ctypes.CDLL(None)")
        process.run(EXERCISE)
        before = outside.file_mappings(process.pid)
        seen = set()
        for nth in range(1, 100):
            process.run(f"name = b'mmap'; fault.fault_arm(name, {nth}, {ENOMEM})")
            core = interpreter(process.prime(**options))
            if not process.run("result = fault.fault_fired()"):
                break
            whole(process, before)
            text = outside.text_of(process.pid, core["path"])
            posts = sum("-anchor/" in m[4] for m in outside.file_mappings(process.pid))
            seen.add((posts, text.huge == text.attainable, text.huge > 0))
            process.restore()
            assert not any(str(images) in m[4] for m in outside.file_mappings(process.pid))
            assert [m for m in before if m not in outside.file_mappings(process.pid)] == []
        else:
            raise AssertionError("the fault never stopped firing")
    nothing, whole_anyway = (0, False, False), (1 if backing == "image" else 2, True, True)
    without = (0, backing == "image", True)
    assert {without, nothing} <= seen <= {without, nothing, whole_anyway}


@pytest.mark.slow
@pytest.mark.parametrize("function", ["mmap", "mmap with a hole", "madvise", "munmap"])
def test_restore_may_fail(python, images, preload, function):
    """What cannot be put back stays on the copy, says so, and can be put back later."""
    options = backing_options("image" if has_images() else "memfd", images)
    with Process(python, env={"LD_PRELOAD": preload}) as process:
        process.run("import ctypes, json, re, decimal; fault = ctypes.CDLL(None)")
        process.prime(**options)
        process.restore()
        process.run(EXERCISE)
        before = outside.file_mappings(process.pid)
        for nth in range(1, 200):
            process.prime(**options)
            process.run(f"name = {function.encode()!r}; fault.fault_arm(name, {nth}, {ENOMEM})")
            process.restore()
            if not process.run("result = fault.fault_fired()"):
                break
            whole(process, before)
            assert process.run(EXERCISE).startswith("1.41421356")
            process.restore()
            assert [m for m in before if m not in outside.file_mappings(process.pid)] == []
        else:
            raise AssertionError("the fault never stopped firing")
        assert nth > 1


@pytest.mark.parametrize(
    ("question", "function", "step"),
    [
        ("thp_disabled", "prctl", "PR_GET_THP_DISABLE"),
        ("mdwe", "prctl", "PR_GET_MDWE"),
        ("credentials", "getresuid", "getresuid"),
        ("credentials", "getresgid", "getresgid"),
        ("credentials", "capget", "capget"),
        ("credentials", "prctl", "PR_GET_DUMPABLE"),
    ],
)
def test_a_question_that_is_refused(python, preload, question, function, step):
    code = (
        "import ctypes; from page_primer import _core\n"
        f"name = {function.encode()!r}; ctypes.CDLL(None).fault_arm(name, 1, {EPERM})\n"
        f"try: result = _core.{question}()\n"
        "except _core.Error as error: result = [error.errno, error.step]\n"
        f"result = result, ctypes.CDLL(None).fault_fired(), bool(_core.{question}() is not None)"
    )
    with Process(python, env={"LD_PRELOAD": preload}) as process:
        if question == "mdwe" and release() < (6, 3):
            pytest.skip("PR_GET_MDWE is there from Linux 6.3 on")
        assert process.run(code) == [[EPERM, step], 1, True]


FILL = (
    "import ctypes; fault = ctypes.CDLL(None); head = bytes(range(200))\n"
    "fill = lambda mib: [head + b'%08d' % i for i in range(mib * 4096)]\n"
)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("function", ["mmap", "munmap"])
def test_memory_of_arenas_may_be_refused(python, preload, function, nth):
    """Then it is the turn of the interpreter's own allocator, or of a later attempt."""
    with Process(python, env={"LD_PRELOAD": preload}) as process:
        options = {"heap": "arenas", "remap": False, "mlock": False, "include": ["nothing"]}
        refused = process.prime(**options)["heap"]["reason"]
        if refused:
            pytest.skip(f"no arenas here: {refused}")
        process.run(FILL + "from page_primer import _core; fill(4)")
        before = process.run("result = len(_core.arenas_regions())")
        arm = f"name = {function.encode()!r}; fault.fault_arm(name, {nth}, {ENOMEM})\n"
        kept = process.run(arm + "kept = fill(30)\nresult = len(kept), kept[7][-8:].decode()")
        assert kept == [30 * 4096, "00000007"]
        assert process.run("del kept\nresult = fault.fault_fired()") == 1
        process.run("kept = fill(30)\ndel kept\nkept = fill(30)\ndel kept")
        assert process.run("result = len(_core.arenas_regions())") <= before + 4


def test_reading_that_is_interrupted_goes_on(python, preload):
    code = (
        "import ctypes, sys; from page_primer import _core\n"
        "flags = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS\n"
        "area = _core.reserve(4096, 4096, 0); at = area.address\n"
        "area.map(4096, _core.PROT_READ | _core.PROT_WRITE, flags, -1, 0)\n"
        f"name = b'pread'; ctypes.CDLL(None).fault_arm(name, 1, {EINTR})\n"
        "with open(sys.executable, 'rb') as file:\n"
        "    _core.fill(at, 4096, file.fileno(), 0)\n"
        "    same = _core.view(at, 4096) == file.read(4096)\n"
        "result = same, ctypes.CDLL(None).fault_fired()"
    )
    with Process(python, env={"LD_PRELOAD": preload}) as process:
        assert process.run(code) == [True, 1]


def test_every_allocation_may_fail(python, preload):
    """Of the interpreter's and of the core's own: a MemoryError, and nothing is left behind."""
    env = {**os.environ, "LD_PRELOAD": preload, "PYTHONHASHSEED": "0"}
    env.pop("COVERAGE_PROCESS_START", None)  # it is not made for this
    done = subprocess.run(
        [python, "-m", "harness.scarce"], cwd=TESTS, env=env, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    found = json.loads(done.stdout)
    # What the interpreter keeps of a module that was not loaded is its own matter.
    assert found.pop("load_core")["memory"] > 20
    assert {name: one for name, one in found.items() if one["blocks"] > 0} == {}
    assert found["objects"]["malloc"] == 1 and found["objects"]["calloc"] == 2
    assert found["arenas_regions"]["malloc"] == 1 and found["swap"]["calloc"] > 0
    assert all(found[name]["memory"] > 5 for name in ("map", "lock", "swap", "dump_before"))
