"""What only root can do, and processes with less privilege than ours."""

import functools
import os
import resource
from pathlib import Path

__all__ = ["BACKING", "IS_ROOT", "drop_memlock", "has_images", "locks_fit"]

_IPC_LOCK = 1 << 14  # capabilities(7)

IS_ROOT = os.geteuid() == 0


@functools.cache
def has_images() -> bool:
    """Whether images of our own are mapped by our processes: not where we run as the overflow uid
    (Debian's nobody, the user of many containers) or as one that has no name in our namespace,
    whose files could be anybody's (docs/security.md). Code is in memory files then, but for what
    profilers need on the interpreter's own file."""
    if os.geteuid() == int(Path("/proc/sys/kernel/overflowuid").read_text()):
        return False
    rows = [map(int, row.split()) for row in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= os.geteuid() < first + count for first, _, count in rows)


# Where code goes that may be anywhere.
BACKING = "image" if has_images() else "memfd"


def locks_fit() -> bool:
    """Whether a child of ours may lock the libraries of a large program as well."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or limit >= 256 << 20:
        return True
    rows = Path("/proc/self/status").read_text().splitlines()
    effective = next(int(row.split()[1], 16) for row in rows if row.startswith("CapEff"))
    return bool(effective & _IPC_LOCK)


def drop_memlock(limit):
    """A command prefix: no CAP_IPC_LOCK, and this RLIMIT_MEMLOCK in bytes."""
    prefix = ["prlimit", f"--memlock={limit}:{limit}"]
    if IS_ROOT:
        prefix += ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    return prefix
