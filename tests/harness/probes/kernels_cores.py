"""Core files by the kernel, in debuggers and elfutils. A worker ends by them: these are last."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from elftools.elf.elffile import ELFFile

from harness import outside
from harness.probes import pystack
from harness.probes.commands import gdb, last_line, run, tool
from harness.probes.frames import NATIVE, Frame, base
from harness.probes.gdb import frames_of
from harness.probes.registry import probe
from harness.probes.target import Failed, NotHere, Target
from harness.probes.verdicts import same_frames
from harness.servers import wait_for


def kernels_core_of(target: Target) -> tuple[str, str]:
    """The program, and a core file by the kernel of a held worker; made once."""
    kept = target.directory / "kernels.core"
    exe = target.directory / "kernels.exe"
    if not kept.exists():
        if Path("/proc/sys/kernel/core_pattern").read_text().strip() != "core":
            raise NotHere("core files go elsewhere")
        exe.write_text(os.readlink(f"/proc/{target.pid}/exe"))
        paths = {vma.path for vma in outside.smaps(target.pid) if "w" in vma.perms}
        names = {exe.read_text(), target.interpreter, *(p for p in paths if "/libc." in p)}
        (target.directory / "kernels.json").write_text(json.dumps(sorted(names)))
        run("prlimit", "--pid", str(target.pid), "--core=unlimited")
        with target.held():
            os.kill(target.pid, signal.SIGSYS)  # gunicorn has handlers for the usual ones
            wait_for(lambda: not os.path.exists(f"/proc/{target.pid}"), "the core file")
        found = list(target.directory.glob("core*"))
        if not found:
            raise Failed("the kernel wrote no core file")
        found[0].rename(kept)
    return exe.read_text(), str(kept)


@probe("a core file of the kernel's, gdb bt and pystack core", same_frames, last=True)
def kernels_core(target: Target) -> list[Frame]:
    exe, core = kernels_core_of(target)
    frames = frames_of(gdb("bt", target=[exe, core]))
    return frames + pystack.frames_of(
        run(tool("pystack"), "core", "--native", "--no-color", core, exe)
    )


@probe("a core file, eu-unstrip: build-ids", last=True)
def build_ids(target: Target) -> dict[str, bool]:
    """Whether elfutils finds the build-ids of program, libpython and C library."""
    _, core = kernels_core_of(target)
    said = run(tool("eu-unstrip"), "-n", f"--core={core}")
    found = set(re.findall(r"^0x[0-9a-f]+\+0x[0-9a-f]+ ([0-9a-f]+)@", said, re.MULTILINE))
    paths = json.loads((target.directory / "kernels.json").read_text())
    known = {base(path): identity for path in paths if (identity := build_id_of(path))}
    return {name: identity in found for name, identity in known.items()}


def build_id_of(path: str) -> str:
    with open(path, "rb") as file:
        section = ELFFile(file).get_section_by_name(".note.gnu.build-id")
        return next(note["n_desc"] for note in section.iter_notes()) if section else ""


def elfutils_frames(text: str) -> list[Frame]:
    found = re.findall(r"^#\d+ +0x[0-9a-f]+ *(?:- \d+ +)?(.*)$", text, re.MULTILINE)
    if not found:
        raise Failed(last_line(text))
    return [Frame(NATIVE, name or "?", "") for name in found]


@probe("a core file, eu-stack", same_frames, last=True)
def stack(target: Target) -> list[Frame]:
    _, core = kernels_core_of(target)
    return elfutils_frames(run(tool("eu-stack"), f"--core={core}"))


@probe("a core file, eu-stack -e PROGRAM", same_frames, last=True)
def stack_of_program(target: Target) -> list[Frame]:
    exe, core = kernels_core_of(target)
    return elfutils_frames(run(tool("eu-stack"), "-e", exe, f"--core={core}"))
