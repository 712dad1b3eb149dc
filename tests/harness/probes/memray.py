"""memray attach, which puts breakpoints into the interpreter's code."""

from __future__ import annotations

import time
from pathlib import Path

from harness.probes.commands import last_line, run, tool
from harness.probes.registry import probe
from harness.probes.target import Failed, Target

MEMRAY_SEEN = """
import sys, memray
names = set()
for record in memray.FileReader(sys.argv[1]).get_allocation_records():
    if record.allocator not in (memray.AllocatorType.FREE, memray.AllocatorType.MUNMAP):
        stack = record.%s_stack_trace()
        names.update(frame[0] for frame in stack)
print(" ".join(sorted(names)))
"""


def names_of(target: Target, *options: str, stack: str = "") -> set[str]:
    output = target.directory / "memray"
    with target.spinning():
        said = run(
            tool("memray"),
            "attach",
            *options,
            "--duration",
            "1",
            "-o",
            str(output),
            str(target.pid),
        )
        time.sleep(1.5)
    if not output.exists():
        raise Failed(last_line(said))
    seen = run(
        str(Path(tool("memray")).with_name("python")), "-c", MEMRAY_SEEN % stack, str(output)
    )
    output.unlink()
    return set(seen.split())


@probe("memray attach", last=True)
def attach(target: Target) -> set[str]:
    return names_of(target) & {"app", "spin", "count_words", "dumps", "loads", "sub"}
