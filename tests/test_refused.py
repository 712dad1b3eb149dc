"""A seccomp filter that refuses each system call that prime() and restore() make, one at a time."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.refused import CANNOT_GIVE_BACK

TESTS = Path(__file__).parent
# Begins and ends recording, for syscalls.c.
RECORD = """
import ctypes, json, sys, page_primer
import json, re, decimal, gc
prctl = ctypes.CDLL(None).prctl
prctl(0x70700001, 0, 0, 0, 0)
for options in json.loads(sys.argv[1]):
    page_primer.prime(**options)
    page_primer.restore()
prctl(0x70700002, 0, 0, 0, 0)
"""


def variants(folder):
    """Options by backing."""
    options = {"image_dir": f"{folder}/images", "keep_profilers": False}
    return {
        "auto": options,
        **{name: {**options, "backing": name} for name in ("image", "memfd", "anonymous")},
    }


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The system calls in use, by name."""
    folder = tmp_path_factory.mktemp("calls")
    return calls_in_use(folder, sys.executable)


def calls_in_use(folder, python):
    tracer = folder / "syscalls"
    done = subprocess.run(
        ["gcc", "-O1", "-Wall", "-o", str(tracer), str(TESTS / "harness/syscalls.c")],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"syscalls.c does not compile here: {done.stderr}")
    out, given = folder / "numbers", json.dumps(list(variants(folder).values()))
    command = [str(tracer), str(out), python, "-c", RECORD, given]
    if subprocess.run(command, timeout=120).returncode:
        pytest.skip("processes may not be traced here")
    source = "#include <sys/syscall.h>"
    macros = subprocess.run(
        ["gcc", "-E", "-dM", "-"], input=source, capture_output=True, text=True, check=True
    ).stdout
    names = {
        int(number): name for name, number in re.findall(r"#define __NR_(\w+) (\d+)\n", macros)
    }
    found = {names[int(number)]: int(number) for number in out.read_text().split()}
    # The C library takes the error for a new end of the heap, and a process dies without us.
    found.pop("brk", None)
    return found


def refuse(python, calls, options, *, errors, late):
    given = {"calls": calls, "errors": errors, "late": late, "options": options}
    done = subprocess.run(
        [python, "-m", "harness.refused"], input=json.dumps(given), capture_output=True,
        text=True, timeout=600, check=False, cwd=TESTS,
    )  # fmt: skip
    if "no seccomp filter can be put up" in done.stderr + done.stdout:
        pytest.skip("no seccomp filter can be put up here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(outcomes):
    """Nobody died, hung or raised; what was not obtained has a reason; nothing stays."""
    for one in outcomes:
        name = one["name"]
        assert one["problem"] is None, one
        assert one["reason"] or one["huge"] or one["notes"], one
        if name not in CANNOT_GIVE_BACK:
            assert one["left"] == [], one


def test_the_calls_in_use_are_known(calls):
    assert {"mmap", "madvise", "munmap", "openat", "mlock", "prctl"} <= set(calls)


@pytest.mark.parametrize("late", [False, True], ids=["before", "while primed"])
def test_each_call_refused(calls, python, tmp_path, late):
    """In a sandbox from the start, or one that a primed process enters."""
    options = variants(tmp_path)["auto"]
    outcomes = refuse(python, calls, options, errors=[errno.EPERM], late=late)
    check(outcomes)
    by_name = {one["name"]: one for one in outcomes}
    # What can be done without, is; what cannot, has a reason that names it.
    for name in ("geteuid", "prctl", "uname", "rt_sigprocmask", "mlock", "prlimit64", "flock"):
        assert by_name[name]["huge"], by_name[name]
    assert "mlock" not in by_name or "not permitted" in by_name["mlock"]["lock_refusal"]
    assert "/proc/self/" in by_name["openat"]["reason"] or "page_primer" in str(by_name["openat"])
    if late:
        assert "not put back: reserve: Operation not permitted" in by_name["mmap"]["notes"]
        assert "/proc/self/" in by_name["read"]["reason"]
    else:
        assert "failed to map segment" in by_name["mmap"]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "while primed"])
@pytest.mark.parametrize("backing", ["auto", "image", "memfd", "anonymous"])
def test_each_call_refused_to_each_backing(calls, python, tmp_path, backing, late):
    """With EPERM, as filters answer, and ENOSYS, as older kernels and sandboxes do."""
    options = variants(tmp_path)[backing]
    check(refuse(python, calls, options, errors=[errno.EPERM, errno.ENOSYS], late=late))
