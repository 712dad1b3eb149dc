"""The system calls that prime(), status() and restore() make, and what becomes of each one's
refusal."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from harness.interpreters import MEASURED
from harness.refused import CANNOT_GIVE_BACK

__all__ = ["VARIANTS", "calls_in_use", "check", "refuse", "variants"]

TESTS = Path(__file__).parents[1]
# Begins and ends recording, for syscalls.c.
RECORD = """
import ctypes, json, sys, page_primer
import json, re, decimal, gc
prctl = ctypes.CDLL(None).prctl
prctl(0x70700001, 0, 0, 0, 0)
for options in json.loads(sys.argv[1]):
    page_primer.prime(**options)
    page_primer.status(measure=True)
    page_primer.restore()
prctl(0x70700002, 0, 0, 0, 0)
import os
if os.path.exists(f"/tmp/perf-{os.getpid()}.map"):
    os.unlink(f"/tmp/perf-{os.getpid()}.map")
"""
_ALL_ELSE = {"keep_profilers": True, "heap": "all", "freeze": True, "perf_map": True}
_VARIANTS: dict[str, dict[str, object]] = {
    "auto": {},
    **{name: {"backing": name} for name in ("image", "memfd", "anonymous", "hugetlb")},
    # Anchors are of images and of memory, a perf map is of memory.
    "auto, all else": _ALL_ELSE,
    "anonymous, all else": {"backing": "anonymous", **_ALL_ELSE},
}
VARIANTS = tuple(_VARIANTS)


def variants(folder):
    """Options by name: each backing, and what has calls of its own with it."""
    options = {"image_dir": f"{folder}/images", "keep_profilers": False}
    return {name: {**options, **more} for name, more in _VARIANTS.items()}


def calls_in_use(folder, python):
    tracer = folder / "syscalls"
    done = subprocess.run(
        ["gcc", "-O1", "-Wall", "-o", str(tracer), str(TESTS / "harness/syscalls.c")],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"syscalls.c does not compile here: {done.stderr}")
    out, given = folder / "numbers", json.dumps(list(variants(folder).values()))
    # -B: what is compiled here for the first time is not what prime() writes.
    command = [str(tracer), str(out), python, "-B", "-c", RECORD, given]
    # Nor what a measurement of coverage does.
    variables = {name: value for name, value in os.environ.items() if name not in MEASURED}
    if subprocess.run(command, timeout=120, env=variables).returncode:
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
    outcomes = json.loads(done.stdout)
    assert [one["name"] for one in outcomes] == [name for name in calls for _ in errors]
    return outcomes


def check(outcomes):
    """Nobody died, hung or raised; what was not obtained has a reason; nothing stays but what the
    refused call gives back."""
    for one in outcomes:
        name = one["name"]
        assert one["problem"] is None, one
        assert one["reason"] or one["huge"] or one["notes"] or one["why"], one
        assert set(one["left"]) <= {CANNOT_GIVE_BACK.get(name)}, one
