"""austin, which reads a worker's memory from outside."""

from __future__ import annotations

import re
from collections import Counter

from harness.probes.commands import last_line, run, tool
from harness.probes.registry import probe
from harness.probes.target import Failed, Target


def frequent_stack(target: Target) -> list[str]:
    """The most frequent stack, outermost first."""
    output = target.directory / "austin"
    with target.held():
        said = run(
            tool("austin"), "-p", str(target.pid), "-x", "1", "-i", "20ms", "-o", str(output)
        )
    stacks: Counter[str] = Counter()
    for line in output.read_text().splitlines() if output.exists() else ():
        if line.startswith("P"):
            stack, _, _ = line.rpartition(" ")
            stacks[stack] += 1
    if not stacks:
        words = " ".join(re.sub(r"\x1b\[[\d;]*m", "", said).split())
        what = re.search(r"[A-Z][\w' ]{20,}\.", words)
        raise Failed(what[0] if what else last_line(said))
    return [":".join(part.split(":")[-2:]) for part in stacks.most_common(1)[0][0].split(";")[2:]]


@probe("austin")
def austin(target: Target) -> list[str]:
    return frequent_stack(target)
