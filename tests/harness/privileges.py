"""What only root can do, and processes with less privilege than ours."""

import os

import pytest

__all__ = ["IS_ROOT", "drop_memlock", "needs_root"]

IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.root("drop capabilities or change ids")


def drop_memlock(limit):
    """A command prefix: no CAP_IPC_LOCK, and this RLIMIT_MEMLOCK in bytes."""
    prefix = ["prlimit", f"--memlock={limit}:{limit}"]
    if IS_ROOT:
        prefix += ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    return prefix
