"""Hostile kernels: guests that are set to give no huge pages, or none to some memory.

test_hostile_guests.py boots each, and so does tools/environments --guest, for its document.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from harness.environments import NOT, OTHERWISE, PRIMED, Unavailable
from harness.guest import APPEND, RUNNER, lacking

__all__ = ["GUESTS", "Guest", "rows_in"]

TOOL = Path(__file__).parents[2] / "tools/environments"


@dataclass(frozen=True)
class Guest:
    """`options` are the runner's, `kernel` the kernel's; in it an environment of hostile_places.py
    is tried."""

    name: str
    options: tuple[str, ...]
    outcome: str  # since Linux 6.1, which has MADV_COLLAPSE
    kernel: str = ""
    environment: str = "in a guest"


GUESTS = (
    # MADV_COLLAPSE asks neither; but "deny" is for memory files and tmpfs, whoever asks.
    Guest("THP enabled=never", ("--thp", "never"), PRIMED),
    Guest("shmem_enabled=deny", ("--shmem", "deny"), OTHERWISE),
    Guest(
        "THP enabled=never, shmem_enabled=deny", ("--thp", "never", "--shmem", "deny"), OTHERWISE
    ),
    # For Linux the processor is then one without such pages (PSE), and all that is of them is gone.
    Guest(
        "a kernel without transparent huge pages", (), NOT, "clearcpuid=3",
        "in a guest without huge pages",
    ),
)  # fmt: skip


def rows_in(version: str, guest: Guest | None, *environments: str) -> list[list[str]]:
    """What tools/environments observes in a guest: name, how, outcome, reason of each environment.

    Raises:
        Unavailable: no such guest can be booted here.
    """
    if (why := lacking()) is not None:
        raise Unavailable(why)
    append, arguments = APPEND
    command = [RUNNER, append, arguments, "--timeout", "900"]
    if guest is not None:
        command[2] += f" {guest.kernel}"
        command += guest.options
        environments = (guest.environment,)
    command += [version, "--", sys.executable, str(TOOL), "--json", *environments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    if done.returncode == 125 and "boot: the guest failed" not in done.stderr:
        raise Unavailable((done.stderr.strip().splitlines() or ["no such kernel"])[-1])
    try:  # also where a row is a fault, with which it ends with 1
        found: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise AssertionError(f"ended with {done.returncode}: {done.stderr}") from None
    return found
