"""Which file system a path is on."""

from __future__ import annotations

import os

from page_primer._lean import Record, ours
from page_primer._loading import Loading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Mount(Record):
    """A mounted file system."""

    point: str
    filesystem: str
    options: frozenset[str] = frozenset()
    root: str = "/"  # the directory of the file system that is mounted there


def parse(mountinfo: str, filesystem: str | None = None) -> Iterator[Mount]:
    """The mounts in the text of /proc/self/mountinfo: all, or those of one kind.

    From proc(5): the root is the fourth field, the mount point the fifth, the mount's options are
    the sixth; type, source and the file system's options follow a lone hyphen.
    """
    for line in mountinfo.split("\n"):  # names may hold what else splitlines() takes for an end
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) >= 6 and len(rest) >= 3 and filesystem in (None, rest[0]):
            options = {*fields[5].split(","), *rest[2].split(",")}
            yield Mount(_plain(fields[4]), rest[0], frozenset(options), _plain(fields[3]))


def _plain(field: str) -> str:
    if "\\" in field:
        with Loading():  # too slow an import for what is so rare
            import re

        field = re.sub(r"\\([0-3][0-7]{2})", lambda code: chr(int(code[1], 8)), field)
    return field


def mount_of(path: str, mounts: Iterable[Mount]) -> Mount:
    """The mount that an absolute path without symbolic links belongs to."""
    best = Mount("", "")
    for mount in mounts:
        inside = path == mount.point or path.startswith(mount.point.rstrip("/") + "/")
        if inside and len(mount.point) >= len(best.point):
            best = mount
    return best


def read() -> list[Mount]:
    """The mounts as this process sees them now; none where /proc is not to be had."""
    return list(parse(_text("/proc/self/mountinfo")))


def of(fd: int) -> Mount | None:
    """The mount of an open file; None where the kernel does not tell, as of one that was detached,
    belongs to another mount namespace, or is above this process's root.

    From proc(5): the third field of mountinfo is the st_dev of the mount's files. (But for
    subvolumes of btrfs and some overlays, whose files have numbers of their own: None.)
    """
    device = os.fstat(fd).st_dev
    device_name = f"{os.major(device)}:{os.minor(device)}"
    for line in _text("/proc/self/mountinfo").split("\n"):
        if line.split(" ", 3)[2:3] == [device_name]:
            return next(parse(line), None)
    return None


def _text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except ours(OSError):
        return ""
