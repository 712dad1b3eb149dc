"""Refuse one system call after the other to prime() and restore(), each in a child of its own.

    python -m harness.refused < JSON    {"calls": {NAME: NUMBER}, "errors": [ERRNO], "late": BOOL,
                                 "options": {}}

The child's seccomp filter answers a call with an error; with `late` it is put up once the process
is primed. Each child writes images of its own, into a directory below the options' image_dir: one
that is there already would be mapped, and the calls that write it never be refused. The child tells
what came of it through shared memory, since any call may be the refused one, and waits in a loop
while it is looked at from outside. JSON comes out: a list of outcomes.
"""

import ctypes
import gc
import importlib
import json
import mmap
import os
import struct
import sys
import time
import traceback
from contextlib import suppress

import page_primer
from harness.state import CYCLES, EXERCISE, left, state

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]
LD_ABS, JEQ, RET = 0x20, 0x15, 0x06  # linux/bpf_common.h
SECONDS = 30.0

# What nobody can give back where the call for it is refused.
CANNOT_GIVE_BACK = {"munmap": "mappings", "munlock": "locks", "close": "descriptors"}
# Why parts of an interpreter stay where they are, whatever is refused.
LEFT_ANYWAY = {"writable", "no whole huge page"}
# What an import calls: refused to a process that has yet to import most of the package.
IMPORTS_CALL = {"access", "brk", "close", "faccessat", "fstat", "futex", "getcwd", "getdents64",
                "ioctl", "lseek", "mmap", "mprotect", "mremap", "munmap", "newfstatat", "openat",
                "pread64", "read", "readlink", "readlinkat", "stat", "statx"}  # fmt: skip


def refuse(number, error):
    """From now on this process gets an error for a system call."""
    rows = [
        (LD_ABS, 0, 0, 4),  # seccomp_data.arch
        (JEQ, 0, 3, AUDIT_ARCH),
        (LD_ABS, 0, 0, 0),  # seccomp_data.nr
        (JEQ, 0, 1, number),
        (RET, 0, 0, RET_ERRNO | error),
        (RET, 0, 0, RET_ALLOW),
    ]
    program = b"".join(struct.pack("=HBBI", *row) for row in rows)
    code = ctypes.create_string_buffer(program)
    header = struct.pack("@HP", len(rows), ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    filter_ = ctypes.create_string_buffer(header)
    assert prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    if prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(filter_), 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be put up here")


class Channel:
    """Shared memory: a step that one side has reached and the other has seen, and a text."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 4 << 20)

    def reach(self, step, text=""):
        data = text.encode()
        self._memory[8 : 8 + len(data)] = data
        self._memory[4:8] = struct.pack("=I", len(data))
        self._memory[0] = step
        while self._memory[1] != step:
            # No call that prime() makes, so never the refused one: the other side has work to do.
            time.sleep(0.0005)

    def wait(self, step, child):
        end = time.monotonic() + SECONDS
        while self._memory[0] != step:
            if time.monotonic() > end:
                raise TimeoutError(f"step {step} is never reached")
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise ChildProcessError(f"it ended before step {step}")
            time.sleep(0.0005)
        (size,) = struct.unpack("=I", self._memory[4:8])
        return self._memory[8 : 8 + size].decode()

    def go_on(self, step):
        self._memory[1] = step


def subject(channel, number, error, options, late):
    """In the child. Late, it has a store of its own for what comes after the filter."""
    names = {}
    if late:
        page_primer.prime(**{**options, "image_dir": f"{options['image_dir']}-before"})
    refuse(number, error)
    if not late:
        page_primer.prime(**options)
    page_primer.restore()
    channel.reach(1)
    for _ in range(CYCLES - 1):
        page_primer.prime(**options)
        page_primer.restore()
    report = page_primer.prime(**options)
    exec(EXERCISE, names)
    said = page_primer.status(), page_primer.status(measure=True)
    page_primer.restore()
    exec(EXERCISE, names)
    said += page_primer.status(), page_primer.status(measure=True)
    found = {"report": report.as_dict(), "status": said, "result": names["result"]}
    channel.reach(2, json.dumps(found))


def look(channel, child, name):
    """What one child did, in a dictionary."""
    channel.wait(1, child)
    before = state(child)
    channel.go_on(1)
    found = json.loads(channel.wait(2, child))
    assert found["result"] == "1.41421356"
    after = state(child)
    channel.go_on(2)
    report = found["report"]
    reason = ": ".join(filter(None, (report["reason"], report["detail"]))) or None
    core = next((obj for obj in report["objects"] if obj["interpreter"]), None)
    why = {name for part in core["segments"] for name in part["left"]} if core else set()
    return {
        "reason": reason, "backing": core and core["backing"],
        "huge": core["code_huge_bytes"] if core else 0, "notes": core["notes"] if core else [],
        "why": sorted(why - LEFT_ANYWAY),
        "locked": report["locked_bytes"], "left": left(before, after),
        "lock_refusal": report["lock_refusal"],
    }  # fmt: skip


def remove(folder, *pids):
    """What a child has written; without shutil, which brings shared libraries."""
    for pid in pids:
        with suppress(FileNotFoundError):
            os.unlink(f"/tmp/perf-{pid}.map")
    for path, folders, files in os.walk(folder, topdown=False):
        links = [one for one in folders if os.path.islink(f"{path}/{one}")]
        for one in files + links:
            os.unlink(f"{path}/{one}")
        os.rmdir(path)


def attempt(name, number, error, options, late):
    channel = Channel()
    folder = f"{options['image_dir']}/{name}-{error}"
    os.makedirs(folder)
    options = {**options, "image_dir": f"{folder}/images"}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            subject(channel, number, error, options, late)
            status = 0
        except BaseException:
            channel._memory[0] = 9
            text = traceback.format_exc().encode()
            channel._memory[8 : 8 + len(text)] = text
        finally:
            os._exit(status)
    outcome = {"name": name, "errno": error, "problem": None}
    try:
        outcome |= look(channel, child, name)
    except (AssertionError, OSError, ValueError) as problem:
        said = channel._memory[8:].split(b"\0")[0].decode(errors="replace")
        outcome["problem"] = f"{problem!r}: {said}"
        os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    if status and not outcome["problem"]:
        outcome["problem"] = f"it ended with status {status:#x}"
    remove(folder, child, -error)  # which is its number where getpid is refused
    return outcome


def import_all(options):
    """Import what a child imports in one of these: of what each child does it is half."""
    names, there = os.pipe()
    store = f"{options['image_dir']}/imports"
    os.makedirs(os.path.dirname(store), exist_ok=True)
    if os.fork() == 0:
        try:
            page_primer.prime(**{**options, "image_dir": store})
            page_primer.status(measure=True)
            page_primer.restore()
            os.write(there, " ".join(sys.modules).encode())
        finally:
            os._exit(0)
    os.close(there)
    with open(names) as file:
        found = file.read().split()
    remove(store, os.wait()[0])
    assert "page_primer.apply.process" in found, found
    for name in found:
        importlib.import_module(name)


def attempts(given, calls):
    gc.freeze()  # a child's collections need not look at, and so copy, what is ours
    return [
        attempt(name, number, error, given["options"], given["late"])
        for name, number in calls.items()
        for error in given["errors"]
    ]


def main():
    given = json.load(sys.stdin)
    exec(EXERCISE, {})
    os.umask(0o022)  # a store below what others can write to is not trusted
    calls = given["calls"]
    order = list(calls)
    imports = [] if given["late"] else [name for name in calls if name in IMPORTS_CALL]
    outcomes = attempts(given, {name: calls.pop(name) for name in imports})
    import_all(given["options"])
    outcomes += attempts(given, calls)
    json.dump(sorted(outcomes, key=lambda one: order.index(one["name"])), sys.stdout)


if __name__ == "__main__":
    main()
