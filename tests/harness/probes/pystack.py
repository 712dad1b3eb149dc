"""pystack on a live worker, and the frames that it prints."""

from __future__ import annotations

import re

from harness.probes.commands import last_line, run, tool
from harness.probes.frames import NATIVE, PYTHON, Frame, base
from harness.probes.registry import probe
from harness.probes.target import Failed, Target
from harness.probes.verdicts import same_frames


def frames_of(text: str) -> list[Frame]:
    pattern = r'^    \((C|Python)\) File "(.*?)", line (\d+), in (\S+)(.*)$'
    found = re.findall(pattern, text, re.MULTILINE)
    if not found:
        raise Failed(last_line(text))
    frames = []
    for kind, file, line, name, rest in found:
        where = f"{base(file)}:{line}"
        if file == "???":
            where = base(rest.rpartition("(")[2].rstrip(")"))
        inlined = " (inlined)" if "(inlined)" in rest else ""
        frames.append(Frame(PYTHON if kind == "Python" else NATIVE, name + inlined, where))
    return frames


@probe("pystack remote", same_frames)
def remote(target: Target) -> list[Frame]:
    with target.held():
        said = run(tool("pystack"), "remote", "--no-color", str(target.pid))
    found = re.findall(r'^    File "(.*)", line (\d+), in (\S+)', "\n" + said, re.MULTILINE)
    found = found or re.findall(r'\(Python\) File "(.*)", line (\d+), in (\S+)', said)
    if not found:
        raise Failed(last_line(said))
    return [Frame(PYTHON, name, f"{base(file)}:{line}") for file, line, name in found]


@probe("pystack remote --native", same_frames)
def remote_native(target: Target) -> list[Frame]:
    with target.held():
        return frames_of(run(tool("pystack"), "remote", "--native", "--no-color", str(target.pid)))
