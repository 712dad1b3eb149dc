"""A command as in a container with Docker's defaults: overlay file systems, so that load addresses
are random modulo a huge page, a /dev/shm of 64 MiB from which nothing can be executed, and a user
without privileges. Nothing of the machine is changed; what is written is gone with `directory`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

__all__ = ["OVERLAID", "container"]

OVERLAID = ("usr", "opt", "root", "home", "var")

_SCRIPT = """
set -e
upper=$1 user=$2 ro=$3; shift 3
mount --make-rprivate /
for d in DIRECTORIES; do
    [ -d "/$d" ] || continue
    mkdir -p "$upper/$d/u" "$upper/$d/w"
    chmod --reference="/$d" "$upper/$d/u"
    mount -t overlay overlay -o "lowerdir=/$d,upperdir=$upper/$d/u,workdir=$upper/$d/w" "/$d"
done
chmod 755 /root
[ -z "$ro" ] || for d in DIRECTORIES; do mount -o remount,bind,ro "/$d"; done
mount -t tmpfs -o size=64m,mode=1777,nosuid,nodev,noexec shm /dev/shm
exec setpriv --reuid "$user" --regid "$user" --clear-groups "$@"
""".replace("DIRECTORIES", " ".join(OVERLAID))


def container(directory: Path, user: int = 1000, *, read_only: bool = False) -> list[str]:
    """A command prefix.

    Args:
        directory: an empty one, on a disk.
        user: who runs the command.
        read_only: the file systems cannot be written to.
    """
    arguments = [str(directory), str(user), "ro" if read_only else ""]
    prefix = ["unshare", "--mount", "sh", "-c", _SCRIPT, "sh", *arguments]
    done = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no overlay file systems can be mounted here: {done.stderr.strip()}")
    return prefix
