"""What looks after services: start-stop-daemon, pidof, needrestart."""

from __future__ import annotations

import os
import re
import subprocess

from harness.probes.commands import last_line, run, tool
from harness.probes.registry import probe
from harness.probes.target import Failed, NotHere, Target


@probe("start-stop-daemon and pidof")
def find(target: Target) -> tuple[bool, bool]:
    """Whether they find the process by its program's path."""
    program = os.readlink(f"/proc/{target.pid}/exe")
    pid = str(target.pid)
    command = [tool("start-stop-daemon"), "--status", "--pid", pid, "--exec", program]
    found = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return found.returncode == 0, pid in run(tool("pidof"), program).split()


@probe("needrestart")
def needrestart(target: Target) -> list[str]:
    """What it says of the process: nothing that it maps is to be mistaken for replaced."""
    if os.geteuid() != 0:
        raise NotHere("needs root")
    command = [tool("needrestart"), "-v", "-l", "-b", "-n", "-r", "l"]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=300, check=False,
        stdin=subprocess.DEVNULL, env={**os.environ, "HOME": "/root"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    if "NEEDRESTART-VER" not in said:
        raise Failed(last_line(said))
    # What else it says of a process depends on where its program lies, and on who started it.
    return re.findall(rf"#{target.pid} (uses (?:obsolete|deleted|non-existing) .*)", said)
