"""How much memory is to be had: what the machine and the memory cgroups of this process have left.

What is locked, and what is copied to memory, cannot be reclaimed. Where too little is left the
kernel kills a process of the cgroup, or stalls it (memory.high), so the plan has to know.
"""

from __future__ import annotations

import os
import sys

from page_primer import reasons
from page_primer._lean import Record, suppress
from page_primer.kernel import mounts
from page_primer.reasons import Declined, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# What priming takes beside copies and locks, bytes: our own modules in a process that is not primed
# yet, a block of one huge page, the survey. Generous: measured were 7 MiB, when more was imported.
WORKING = 8 << 20

# (limit, bytes in use, their part in the page cache that can be reclaimed: keys of memory.stat),
# from Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. Memory of tmpfs and
# what is locked is on other lists (inactive_anon, unevictable). `total_` counts descendants, which
# version 2 always does.
_FILES = {
    "cgroup2": (
        ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"),
    ),
    "cgroup": (
        ("memory.limit_in_bytes",), "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}  # fmt: skip


class Memory(Record):
    """The tightest bound on what this process may take."""

    available: int  # bytes: the limit, less what is in use and cannot be reclaimed
    limit: int  # bytes
    where: str  # the file of the limit


def read(root: str = "") -> Memory | None:
    """The bound that leaves least, or None where nothing is known.

    Args:
        root: where /proc and /sys are to be found.
    """
    return min(bounds(root), key=lambda bound: bound.available, default=None)


def resident() -> int:
    """What this process has in memory, bytes; 0 where /proc does not say (proc(5), statm)."""
    fields = _text("/proc/self/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGESIZE") if len(fields) > 1 else 0


def require_mappings(root: str = "") -> None:
    """Moving and locking takes some hundreds of mappings in a large program. Each arena of malloc's
    or pymalloc's may be one more: where none is left, it is the host that has no memory.

    Raises:
        Declined: a 32nd or less is left of those that the kernel allows a process.
    """
    with suppress(ValueError, OSError):
        limit = int(_text(f"{root}/proc/sys/vm/max_map_count"))
        with open(f"{root}/proc/self/maps", "rb", buffering=0) as file:
            count = sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 16), b""))
        if count >= limit - limit // 32:
            many = f"{count} of {limit} (vm.max_map_count)"
            raise Declined(Refusal(reasons.TOO_MANY_MAPPINGS, many))


def bounds(root: str = "") -> Iterator[Memory]:
    """Every bound: the machine's, and one for each limit of a cgroup up the hierarchy, as far as it
    can be seen from here and is below the machine's memory."""
    machine = _numbers(f"{root}/proc/meminfo")
    total = machine.get("MemTotal:", sys.maxsize >> 10) << 10
    if "MemAvailable:" in machine:
        yield Memory(machine["MemAvailable:"] << 10, total, "/proc/meminfo")
    table = _text(f"{root}/proc/self/mountinfo")
    for line in _text(f"{root}/proc/self/cgroup").split("\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or "memory" in controllers.split(","):
            kind = "cgroup2" if number == "0" else "cgroup"
            for directory in _directories(path, kind, table):
                yield from _limits(root, directory, kind, total)


def _directories(path: str, kind: str, mountinfo: str) -> Iterator[str]:
    """The directories of a cgroup and of its ancestors, as far as they are mounted."""
    best: mounts.Mount | None = None
    for mount in mounts.parse(mountinfo, kind):
        if kind == "cgroup" and "memory" not in mount.options:
            continue
        # A container may see its own cgroup alone, mounted as the root of the hierarchy.
        if best is None or (_inside(path, mount.root), -len(mount.root)) > (
            _inside(path, best.root), -len(best.root),
        ):  # fmt: skip
            best = mount
    if best is None:
        return
    below = path[len(best.root.rstrip("/")) :] if _inside(path, best.root) else ""
    while below.rstrip("/"):
        yield best.point + below
        below = below.rpartition("/")[0]
    yield best.point


def _inside(path: str, root: str) -> bool:
    # "/../x" is a cgroup outside the namespace, of which nothing is mounted.
    return f"{path}/".startswith(f"{root.rstrip('/')}/") and ".." not in path.split("/")


def _limits(root: str, directory: str, kind: str, total: int) -> Iterator[Memory]:
    limits, usage, reclaimable = _FILES[kind]
    for name in limits:
        with suppress(ValueError):  # "max", or a file that is not there
            limit = int(_text(f"{root}{directory}/{name}"))
            if limit >= total:  # version 1 says so where there is no limit
                continue
            used = int(_text(f"{root}{directory}/{usage}"))
            counters = _numbers(f"{root}{directory}/memory.stat")
            used -= sum(counters.get(key, 0) for key in reclaimable)
            yield Memory(max(0, limit - max(0, used)), limit, f"{directory}/{name}")


def _numbers(path: str) -> dict[str, int]:
    """Lines such as "inactive_file 4096" or "MemTotal:  4 kB"."""
    rows = (line.split() for line in _text(path).split("\n"))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _text(path: str) -> str:
    """A file's content; empty where there is none to be had."""
    # As paths are decoded: a cgroup's name is part of one, and may be no UTF-8.
    with suppress(OSError), open(path, "rb") as file:
        return os.fsdecode(file.read())
    return ""
