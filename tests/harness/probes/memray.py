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
        stack = record.stack_trace()
        names.update(frame[0] for frame in stack)
print(" ".join(sorted(names)))
"""


@probe("memray attach", last=True)
def attach(target: Target) -> set[str]:
    """By the debugger that memray takes, or else by LLDB: on some processors gdb 13 calls no
    functions, which memray must."""
    output = target.directory / "memray"
    command = [tool("memray"), "attach", "--duration", "1", "-o", str(output)]
    with target.spinning():
        said = run(*command, str(target.pid))
        if not output.exists():
            run(*command, "--method", "lldb", str(target.pid))
        time.sleep(1.5)
    if not output.exists():
        raise Failed(last_line(said))
    python = str(Path(tool("memray")).with_name("python"))
    names = set(run(python, "-c", MEMRAY_SEEN, str(output)).split())
    output.unlink()
    return names & {"app", "spin", "count_words", "dumps", "loads", "sub"}
