"""Core files of gcore(1) in debuggers."""

from __future__ import annotations

import os
from pathlib import Path

from harness.probes import pystack
from harness.probes.commands import gdb, last_line, run, tool
from harness.probes.frames import Frame
from harness.probes.gdb import frames_of
from harness.probes.registry import probe
from harness.probes.target import Failed, Target
from harness.probes.verdicts import same_frames


def core_of(target: Target) -> Path:
    """A core file by gcore(1), of a held worker; made once."""
    path = target.directory / f"gcore.{target.pid}"
    if not path.exists():
        with target.held():
            said = run(tool("gcore"), "-o", str(target.directory / "gcore"), str(target.pid))
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
