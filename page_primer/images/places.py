"""The directories for images, better ones first: where the processes of one user agree, and a disk
before memory."""

from __future__ import annotations

import os

from page_primer._lean import Record, suppress
from page_primer.images import trust
from page_primer.images.room import NO_LIMIT
from page_primer.images.store import Store
from page_primer.kernel import credentials, mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Filled by `page-primer build` for every user; root writes there itself.
SYSTEM = "/var/cache/page-primer"
_IN_MEMORY = ("tmpfs", "ramfs")
# Of memory that has a file system, as /dev/shm, most is the application's.
_SHARE = 8


class Place(Record):
    """A directory to try."""

    path: str
    reason: str | None = None  # why it is passed over, if it is
    limit: int = NO_LIMIT  # bytes that the store may take
    named: bool = False  # somebody asked for it
    system: bool = False  # others' images are looked for there, and none is written
    in_memory: bool = False

    def open(self) -> Store:
        """Open it, creating it where that is for us to do.

        Raises:
            Unusable: as Store does.
        """
        spare = _SHARE if self.in_memory else 1
        return Store(self.path, limit=self.limit, spare=spare, make=not self.system)


def candidates(limit: int) -> list[Place]:
    """The places to consider when none was named.

    Args:
        limit: bytes that a store may take.
    """
    who = credentials.read()
    user = who.user
    if user not in who.trusted:
        why = who.privilege or f"user {user} may be anybody"
        missing = None if os.path.isdir(SYSTEM) else f"{why}: {trust.BUILD}, as root"
        return [Place(SYSTEM, missing, system=True)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    paths = [f"{cache}/page-primer", f"/var/tmp/page-primer-{user}"]
    # systemd's CacheDirectory=, the only place that a unit with ProtectSystem=strict may have.
    if given := os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]:
        paths.insert(0, f"{given}/page-primer")
    if user == credentials.ROOT:
        paths.insert(0, SYSTEM)  # every user's profiler can read it, which /root is not
    if runtime:
        paths.append(f"{runtime}/page-primer")
    paths.append(f"/dev/shm/page-primer-{user}")
    mounted = mounts.read()
    found = [_place(path, limit, mounted) for path in paths if os.path.isabs(path)]
    if user != credentials.ROOT and os.path.isdir(SYSTEM):
        found.insert(0, Place(SYSTEM, system=True))
    return sorted(found, key=lambda place: place.in_memory)


def _place(path: str, limit: int, mounted: Sequence[mounts.Mount]) -> Place:
    if mounts.mount_of(os.path.realpath(path), mounted).filesystem not in _IN_MEMORY:
        return Place(path, limit=limit)
    there = path
    while not os.path.isdir(there) and there != "/":
        there = os.path.dirname(there)
    size, reason = 0, None
    with suppress(OSError):
        status = os.statvfs(there)
        size = status.f_blocks * status.f_frsize
        if status.f_flag & os.ST_NOEXEC:  # then nothing is made there, either
            reason = "mounted noexec"
    return Place(path, reason, min(limit, size // _SHARE), in_memory=True)
