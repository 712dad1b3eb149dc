"""What a directory's file system does with code: where the loader puts it, and whether it may be
executed at all. In most containers load addresses are random, and /dev/shm is noexec."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import subprocess
import tempfile

import pytest

from harness.outside import PMD
from harness.privileges import has_images

__all__ = [
    "has_one_address",
    "has_random_addresses",
    "require_executable",
    "require_images",
    "require_one_address",
]

_RANDOM = "load addresses are random on this file system"

_WHERE = r"""
import re
maps = open("/proc/self/maps").read()
found = re.search(r"^([0-9a-f]+)-.* /\S*/libpython3\.\d+\S*\.so", maps, re.MULTILINE)
print(found[1] if found else maps.partition("-")[0])
"""


def has_one_address(python: str) -> bool:
    """Whether an interpreter's code is at the same address modulo a huge page in every process."""
    return _has_one_address(os.path.realpath(python))


@functools.cache
def _has_one_address(program: str) -> bool:
    command = [program, "-I", "-S", "-c", _WHERE]
    starts = [subprocess.check_output(command, text=True) for _ in range(4)]
    return len({int(start, 16) % PMD for start in starts}) == 1


def has_random_addresses(library: str) -> bool:
    """Whether a library, of a huge page at least, is at random addresses modulo a huge page."""
    with open(library, "rb") as file:
        copies = [mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) for _ in range(4)]
    starts = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in copies]
    return any(start % PMD for start in starts)


def require_one_address(python: str) -> None:
    """Skip what needs a start to find what another one left: images of random addresses go with
    their last process."""
    if not has_one_address(python):
        pytest.skip(f"{_RANDOM}: no start maps what another one wrote")


def require_images() -> None:
    """Skip what needs a directory of our own for images, or for anchors."""
    if not has_images():
        pytest.skip(f"files of user {os.geteuid()} may be anybody's: no image of ours is mapped")


def require_executable(directory: str) -> None:
    """Skip where nothing in a directory may be executed or mapped executable."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(mmap.PAGESIZE)
        try:
            mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC).close()
        except PermissionError:
            pytest.skip(f"{directory} is mounted noexec")
