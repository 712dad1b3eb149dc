"""A guest with another kernel: commands of this machine's own files, run in qemu."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["APPEND", "RUNNER", "file_system", "lacking"]

# `boot [options] KERNEL -- COMMAND ...`; KERNEL_BOOT names another.
RUNNER = os.environ.get("KERNEL_BOOT") or str(
    Path(__file__).resolve().parents[2] / "../shared/kernels/boot"
)

# On a busy machine an emulated timer may be too late for the kernel's check that it works.
APPEND = ("--append", "no_timer_check")


def lacking() -> str | None:
    """What is missing for a guest to be booted, if anything is."""
    if not os.access(RUNNER, os.X_OK):
        return f"no runner at {RUNNER}: KERNEL_BOOT may name another"
    if not shutil.which("qemu-system-x86_64"):
        return "qemu-system-x86_64 is not installed (apt-get install qemu-system-x86)"
    return None


def file_system(kernel: str) -> str:
    """The file system, of those the runner can make, that this kernel gives large folios on."""
    version = tuple(int(part) for part in kernel.split(".")[:2])
    return "ext4" if version >= (6, 16) else "xfs"
