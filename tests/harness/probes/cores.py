"""Core files, gdb's and the kernel's, in debuggers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from harness.probes import pystack
from harness.probes.commands import gdb, last_line, run, tool
from harness.probes.frames import Frame
from harness.probes.gdb import frames_of
from harness.probes.registry import probe
from harness.probes.target import Failed, NotHere, Target
from harness.probes.verdicts import same_frames
from harness.servers import wait_for


def core_of(target: Target) -> Path:
    """A core file by gcore(1), of a held worker; made once."""
    path = target.directory / f"core.{target.pid}"
    if not path.exists():
        with target.held():
            said = run(tool("gcore"), "-o", str(target.directory / "core"), str(target.pid))
        if not path.exists():
            raise Failed(last_line(said))
    return path


@probe("gcore, then gdb bt", same_frames)
def gcore_gdb(target: Target) -> list[Frame]:
    core = str(core_of(target))
    return frames_of(gdb("bt", target=[f"/proc/{target.pid}/exe", core]))


@probe("gcore, then pystack core --native", same_frames)
def gcore_pystack(target: Target) -> list[Frame]:
    core = str(core_of(target))
    exe = os.readlink(f"/proc/{target.pid}/exe")
    return pystack.frames_of(run(tool("pystack"), "core", "--native", "--no-color", core, exe))


@probe("a core file of the kernel's, gdb bt and pystack core", same_frames, last=True)
def kernels_core(target: Target) -> list[Frame]:
    if Path("/proc/sys/kernel/core_pattern").read_text().strip() != "core":
        raise NotHere("core files go elsewhere")
    exe = os.readlink(f"/proc/{target.pid}/exe")
    run("prlimit", "--pid", str(target.pid), "--core=unlimited")
    with target.held():
        os.kill(target.pid, signal.SIGABRT)
        wait_for(lambda: not os.path.exists(f"/proc/{target.pid}"), "the core file")
    core = str(max(target.directory.glob("core*"), key=os.path.getmtime))
    frames = frames_of(gdb("bt", target=[exe, core]))
    return frames + pystack.frames_of(
        run(tool("pystack"), "core", "--native", "--no-color", core, exe)
    )
