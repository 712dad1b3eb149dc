"""Which file system a path is on."""

from __future__ import annotations

from page_primer.record import Record


class Mount(Record):
    """The file system that a path is, or would be, on."""

    point: str
    filesystem: str
    options: frozenset[str] = frozenset()


def mount_of(path: str, mountinfo: str) -> Mount:
    """The mount that an absolute path without symbolic links belongs to.

    From /proc/self/mountinfo (proc(5)): the mount point is the fifth field, the mount's options are
    the sixth; type, source and the file system's options follow a lone hyphen.
    """
    best = Mount("", "")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(rest) < 3:
            continue
        point = fields[4]
        if "\\" in point:
            import re  # too slow an import for what is so rare

            point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point)
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best.point):
            options = {*fields[5].split(","), *rest[2].split(",")}
            best = Mount(point, rest[0], frozenset(options))
    return best


def read() -> str:
    """The mounts as this process sees them now; empty where /proc is not to be had."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""
