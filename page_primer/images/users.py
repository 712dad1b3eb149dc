"""Which processes have an image mapped, as far as this one may look."""

from __future__ import annotations

import os

from page_primer._lean import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def find(paths: Iterable[str]) -> dict[str, list[int]]:
    """The processes that have images mapped, by the images' paths. Where the store is mounted at
    another place, as in another container, an image is known by its folder's name and its inode
    (which is not the same in /proc/PID/maps on every file system)."""
    found: dict[str, list[int]] = {path: [] for path in paths}
    signs = {path: _signs(path) for path in found}
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        with suppress(OSError), open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
            text = file.readall()
            for path, (whole, folder, inode) in signs.items():
                if whole in text or (
                    folder in text
                    and any(
                        folder in line and line.split(None, 5)[4] == inode
                        for line in text.splitlines()
                    )
                ):
                    found[path].append(pid)
    return found


def _signs(path: str) -> tuple[bytes, bytes, bytes]:
    """What a line of maps has: the path, or the end of it, and the inode."""
    inode = b""
    with suppress(OSError):
        inode = b"%d" % os.stat(path).st_ino
    store = os.path.dirname(os.path.dirname(path))
    whole = os.fsencode(f" {os.path.realpath(store)}{path.removeprefix(store)}\n")
    return whole, os.fsencode(path.removeprefix(store)), inode
