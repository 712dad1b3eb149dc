"""A library to preload that lets system calls of the core fail: fault.c."""

import subprocess
from pathlib import Path

__all__ = ["build_fault"]


def build_fault(directory):
    """Build it; its path, for LD_PRELOAD."""
    path = directory / "fault.so"
    source = Path(__file__).with_name("fault.c")
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-Wl,-z,now", "-o", str(path), str(source)],
        check=True,
    )
    return str(path)
