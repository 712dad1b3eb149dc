"""What the checks are about: the kernel's settings, this process, its container, directories.

Read from /proc and /sys; what cannot be read is left at its default.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from page_primer import _core
from page_primer.kernel import mounts
from page_primer.kernel.mounts import Mount, mount_of
from page_primer.kernel.release import release
from page_primer.kernel.thp import chosen
from page_primer.processes import CAP_IPC_LOCK

_HUGETLB = "/sys/kernel/mm/hugepages"


@dataclass(frozen=True)
class Settings:
    """The kernel's version and settings; an empty string or None where there is no such setting."""

    kernel: tuple[int, int]
    pmd: int  # bytes; 0 without THP
    thp: str = ""
    thp_of_size: str = ""  # hugepages-*/enabled
    shmem: str = ""
    shmem_of_size: str = ""
    memfd_noexec: int | None = None
    pool: int | None = None  # hugetlb pages
    pool_free: int = 0


@dataclass(frozen=True)
class Process:
    """What this process has been forbidden, and what it may lock."""

    thp_disabled: bool
    mdwe: int
    soft: int | None  # RLIMIT_MEMLOCK, bytes; None: unlimited
    hard: int | None
    capable: bool  # CAP_IPC_LOCK in the effective set
    locked: int  # bytes, VmLck


@dataclass(frozen=True)
class Directory:
    """A candidate for images, as found before the trial."""

    path: str
    mount: Mount
    user: int  # our effective uid
    free: int | None = None  # bytes
    owner: int | None = None  # None where it does not exist
    mode: int = 0


def read_settings(pmd: int) -> Settings:
    """Read what the kernel says of itself."""
    of_size = f"hugepages-{pmd >> 10}kB"
    pool = f"{_HUGETLB}/hugepages-{pmd >> 10}kB"
    pages = _number(f"{pool}/nr_hugepages")
    free = (_number(f"{pool}/free_hugepages") or 0) - (_number(f"{pool}/resv_hugepages") or 0)
    return Settings(
        kernel=release(),
        pmd=pmd,
        thp=chosen("enabled"),
        thp_of_size=chosen(f"{of_size}/enabled"),
        shmem=chosen("shmem_enabled"),
        shmem_of_size=chosen(f"{of_size}/shmem_enabled"),
        memfd_noexec=_number("/proc/sys/vm/memfd_noexec"),
        pool=pages,
        pool_free=max(free, 0),
    )


def read_process() -> Process:
    """Read what this process may do."""
    import resource  # Linux alone: the doctor is imported everywhere, and says so

    def limit(value: int) -> int | None:
        return None if value == resource.RLIM_INFINITY else value

    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    status = dict(re.findall(r"^(\w+):\s+(\w+)", read("/proc/self/status"), re.MULTILINE))
    disabled, mdwe = False, 0
    # Older kernels say EINVAL to the question: then the answer is no.
    with contextlib.suppress(OSError):
        disabled = _core.thp_disabled()
    with contextlib.suppress(OSError):
        mdwe = _core.mdwe()
    return Process(
        thp_disabled=disabled,
        mdwe=mdwe,
        soft=limit(soft),
        hard=limit(hard),
        capable=bool(int(status.get("CapEff", "0"), 16) >> CAP_IPC_LOCK & 1),
        locked=int(status.get("VmLck", "0")) << 10,
    )


def read_container() -> tuple[str | None, str]:
    """The sign of a container, if there is one, and the root file system's type."""
    root = mount_of("/", mounts.read()).filesystem
    sign = container_sign(
        [path for path in ("/.dockerenv", "/run/.containerenv") if os.path.exists(path)],
        read("/proc/1/environ"),
        read("/proc/self/cgroup"),
    )
    return sign, root


def container_sign(files: Sequence[str], environment: str, cgroup: str) -> str | None:
    """What shows that this is a container.

    Args:
        files: the marker files that exist.
        environment: of process 1, separated by null bytes; empty when it is not readable.
        cgroup: the content of /proc/self/cgroup.
    """
    if files:
        return files[0]
    for variable in environment.split("\0"):
        name, _, value = variable.partition("=")
        if name == "container" and value:
            return f"container={value}"
    found = re.search(r"docker|kubepods|containerd|libpod|lxc|crio", cgroup)
    return f"cgroup of {found[0]}" if found else None


def read_directory(path: str) -> Directory:
    """Look at a candidate for images without touching it."""
    real = os.path.realpath(path)
    owner, mode = None, 0
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        owner, mode = status.st_uid, status.st_mode & 0o7777
    there = real
    while not os.path.isdir(there) and there != "/":
        there = os.path.dirname(there)
    free = None
    with contextlib.suppress(OSError):
        room = os.statvfs(there)
        if room.f_blocks:
            free = (room.f_bavail if os.geteuid() else room.f_bfree) * room.f_frsize
    mount = mount_of(there, mounts.read())
    return Directory(path, mount, os.geteuid(), free, owner, mode)


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = read(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None
