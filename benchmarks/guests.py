"""A benchmark under another kernel: in a guest, booted in qemu, for what needs no clock to tell.

Where qemu has to emulate, the guest is some ten times slower, and each thing by another factor;
what the kernel decides, such as which pages it drops, is the kernel's own all the same.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from kept import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from harness.guest import APPEND, RUNNER, file_system, lacking

__all__ = ["SCRATCH", "Failed", "run"]

SCRATCH = "/scratch"  # in the guest, a disk
TIMEOUT = 4 * 3600  # seconds
CGROUPS = (
    "mount -t cgroup2 cgroup2 /sys/fs/cgroup && echo +memory >/sys/fs/cgroup/cgroup.subtree_control"
)
KEPT = "/run/page-primer.json"


class Failed(Exception):
    """No guest can be booted here, or it had no result."""


def run(kernel: str, script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run benchmarks/SCRIPT with these arguments and --json, print what it prints, and return what
    it keeps. It is root there, has memory cgroups, and SCRATCH is empty.

    Raises:
        Failed: what failed in the guest is on stderr.
    """
    if (why := lacking()) is not None:
        raise Failed(why)
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--json", KEPT]
    both = f"{CGROUPS} && {shlex.join(command)} && echo && cat {KEPT}"
    options = ["--fs", file_system(kernel), *APPEND, "--timeout", str(TIMEOUT)]
    found = ""
    with subprocess.Popen(
        [RUNNER, *options, kernel, "--", "/bin/sh", "-c", both], stdout=subprocess.PIPE, text=True
    ) as guest:
        for line in guest.stdout:
            if found or line == "{\n":
                found += line
            else:
                print(line, end="", flush=True)
    if guest.returncode or not found:
        raise Failed(f"no result from a guest with Linux {kernel}: status {guest.returncode}")
    return dict(json.loads(found))
