"""Hostile kernels: guests that are set to give no huge pages, or none to some memory.

test_hostile_guests.py tries each, and so does tools/environments --guest, for its document.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.environments import NOT, OTHERWISE, PRIMED, Unavailable
from harness.guest import APPEND, RUNNER, lacking

__all__ = ["GUESTS", "Guest", "rows_in", "rows_of"]

TOOL = Path(__file__).parents[2] / "tools/environments"


@dataclass(frozen=True)
class Guest:
    """What /sys has of THP and of shared memory, if not the kernel's own settings; and the kernel's
    options. An environment of hostile_places.py is tried in it."""

    name: str
    outcome: str  # since Linux 6.1, which has MADV_COLLAPSE
    enabled: str = "$enabled"
    shmem: str = "$shmem"
    kernel: str = ""
    environment: str = "in a guest"


GUESTS = (
    # MADV_COLLAPSE asks neither; but "deny" is for memory files and tmpfs, whoever asks.
    Guest("THP enabled=never", PRIMED, enabled="never"),
    Guest("shmem_enabled=deny", OTHERWISE, shmem="deny"),
    Guest(
        "THP enabled=never, shmem_enabled=deny", OTHERWISE, enabled="never", shmem="deny"
    ),
    # For Linux the processor is then one without such pages (PSE), and all that is of them is gone.
    Guest(
        "a kernel without transparent huge pages", NOT, kernel="clearcpuid=3",
        environment="in a guest without huge pages",
    ),
)  # fmt: skip

_SETTINGS = """
cd /sys/kernel/mm/transparent_hugepage 2>/dev/null && {
    enabled=$(sed 's/.*\\[\\(.*\\)\\].*/\\1/' enabled)
    shmem=$(sed 's/.*\\[\\(.*\\)\\].*/\\1/' shmem_enabled)
}
"""
_SET = "[ ! -e enabled ] || { echo %s >enabled && echo %s >shmem_enabled; } || exit 99\n"


def rows_of(version: str, guests: Sequence[Guest]) -> list[list[str]]:
    """Of each guest what tools/environments observes in it: name, how, outcome and reason. Those
    with the same kernel options are one guest, set once and once more.

    Raises:
        Unavailable: no such guest can be booted here.
    """
    found = []
    for kernel in dict.fromkeys(guest.kernel for guest in guests):
        script = _SETTINGS
        for guest in guests:
            if guest.kernel == kernel:
                script += _SET % (guest.enabled, guest.shmem) + _command(guest.environment) + "\n"
        for line in _output(version, kernel, script):
            (row,) = json.loads(line)
            found.append(row)
    return found


def rows_in(version: str, *environments: str) -> list[list[str]]:
    """The same of several environments in one guest, as its kernel is."""
    (line,) = _output(version, "", _command(*environments))
    rows: list[list[str]] = json.loads(line)
    return rows


def _command(*environments: str) -> str:
    return shlex.join([sys.executable, str(TOOL), "--json", *environments])


def _output(version: str, kernel: str, script: str) -> list[str]:
    """What a script prints as JSON in a guest, line by line; also where a row is a fault."""
    append, arguments = APPEND
    command = [RUNNER, append, f"{arguments} {kernel}", "--timeout", "900"]
    command += [version, "--", "sh", "-c", script]
    if (why := lacking()) is not None:
        raise Unavailable(why)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    if done.returncode == 125 and "boot: the guest failed" not in done.stderr:
        raise Unavailable((done.stderr.strip().splitlines() or ["no such kernel"])[-1])
    lines = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    assert lines, f"ended with {done.returncode}: {done.stderr}"
    return lines
