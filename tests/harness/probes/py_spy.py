"""py-spy: stacks, and profiles of a working worker."""

from __future__ import annotations

import re
from collections import Counter

from harness.probes.commands import last_line, run, tool
from harness.probes.frames import NATIVE, PYTHON, Frame, base
from harness.probes.registry import probe
from harness.probes.target import Failed, Target
from harness.probes.verdicts import same_frames, same_shares


def frames_of(text: str) -> list[Frame]:
    frames = []
    for name, where in re.findall(r"^    (\S.*?) \(([^()]*)\)$", text, re.MULTILINE):
        kind = PYTHON if re.search(r"\.py:\d+$|^<frozen", where) else NATIVE
        frames.append(Frame(kind, "?" if name.startswith("0x") else name, base(where)))
    if not frames:
        raise Failed(last_line(text))
    return frames


@probe("py-spy dump", same_frames)
def dump(target: Target) -> list[Frame]:
    with target.held():
        return frames_of(run(tool("py-spy"), "dump", "--pid", str(target.pid)))


@probe("py-spy dump --native", same_frames)
def dump_native(target: Target) -> list[Frame]:
    with target.held():
        return frames_of(run(tool("py-spy"), "dump", "--native", "--pid", str(target.pid)))


def recorded(target: Target, *options: str) -> Counter[str]:
    output = target.directory / "recorded"
    with target.spinning():
        said = run(tool("py-spy"), "record", *options, "--pid", str(target.pid), "--rate", "200",
                   "--duration", "1", "--format", "raw", "--output", str(output))  # fmt: skip
    if not output.exists():
        raise Failed(last_line(said))
    names: Counter[str] = Counter()
    for line in output.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        for name in {frame.partition(" (")[0] for frame in stack.split(";")}:
            names[name] += int(count)
    output.unlink()
    return names


@probe("py-spy record", same_shares)
def record(target: Target) -> Counter[str]:
    return recorded(target)


@probe("py-spy record --native", same_shares)
def record_native(target: Target) -> Counter[str]:
    return recorded(target, "--native")
