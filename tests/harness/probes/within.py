"""What the process itself does: dump its stack, throw through moved frames, walk them."""

from __future__ import annotations

import os
import re
import signal

from harness.probes.registry import probe
from harness.probes.target import Target
from harness.servers import wait_for


@probe("faulthandler")
def stack_by_signal(target: Target) -> list[str]:
    traceback = target.directory / "traceback"
    with target.held():
        os.kill(target.pid, signal.SIGUSR2)
        wait_for(lambda: "_run_module_as_main" in traceback.read_text(), "the traceback")
    return re.findall(r'File ".*?([^/]*)", line (\d+) in (\S+)', traceback.read_text())


@probe("a C++ exception through moved frames")
def exception(target: Target) -> str:
    return target.get("throw")


@probe("backtrace(3)")
def backtrace(target: Target) -> list[str]:
    return [line.partition(" [")[0] for line in target.get("backtrace").splitlines()]
