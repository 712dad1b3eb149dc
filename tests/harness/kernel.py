"""What this kernel can do."""

import os
import subprocess

import pytest

__all__ = ["filesystem", "release", "require_huge_files"]


def release():
    return tuple(int(part) for part in os.uname().release.split(".")[:2])


def filesystem(path):
    done = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True)
    return done.stdout.strip()


def require_huge_files(path):
    """Skip where the kernel gives no huge pages to files there; see docs/how-it-works.md."""
    kind = filesystem(path)
    since = {"ext2/ext3": (6, 16), "xfs": (6, 12), "tmpfs": (6, 1)}.get(kind)
    if since is None or release() < since:
        pytest.skip(f"no huge pages for files on {kind} with Linux {os.uname().release}")
