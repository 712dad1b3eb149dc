"""What only root can do, and processes with less privilege than ours."""

import os
import resource
from pathlib import Path

__all__ = ["IS_ROOT", "drop_memlock", "locks_fit"]

_IPC_LOCK = 1 << 14  # capabilities(7)

IS_ROOT = os.geteuid() == 0


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
