"""What a store holds, and what of it is removed: by whom it is not used any more, or for room.

Nothing is touched that is not an image of ours by its name, nor what somebody uses or writes.
"""

from __future__ import annotations

import os
from _operator import index  # operator takes a millisecond to import

from page_primer import _core
from page_primer._lean import Record, ours, suppress
from page_primer.images import locks, names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
ORIGIN, DRAFT = "origin", ".new-"
# Unused images of one file that stay, and as many anchors to it: other layouts are asked for by
# other options.
_SPARE_IMAGES = 4
_BLOCK = 512  # bytes, of st_blocks


class Entry(Record):
    """A folder of a store."""

    name: str
    origin: str  # the object's path
    size: int  # bytes that it takes of the file system
    used: float  # when it was last taken into use, as time.time() has it
    current: bool  # the object's file is still the one that it was made of

    @property
    def image(self) -> str:
        """The image's path in the store."""
        return f"{self.name}/{os.path.basename(self.origin)}"


def read(store: int) -> list[Entry]:
    """The images and anchors in an open store."""
    found = []
    with suppress(OSError):
        for name in filter(names.is_name, os.listdir(index(store))):
            with suppress(OSError):
                found.append(_entry(store, name))
    return found


def _entry(store: int, name: str) -> Entry:
    with _core.opened(os.open, name, DIRECTORY, dir_fd=store) as folder:
        origin = os.readlink(ORIGIN, dir_fd=folder)
        size, used = 0, os.fstat(folder).st_mtime
        for entry in os.listdir(index(folder)):
            with suppress(OSError):
                status = os.stat(entry, dir_fd=folder, follow_symlinks=False)
                size += status.st_blocks * _BLOCK
                if entry == os.path.basename(origin):
                    used = max(used, status.st_mtime)
    return Entry(name, origin, size, used, names.belongs_to(name, origin))


def prune(store: int, *, room: int = 0, limit: int | None = None) -> int:
    """Remove what nobody uses: images of files that changed and of random load phases, all but a
    few of each file, and, the longest unused first, what exceeds a limit. What was built stays as
    long as its file is what it was.

    Args:
        store: the open directory.
        room: bytes that are to be added within the limit. Where that cannot be done by removing
            what nobody uses, nothing is removed for it.
        limit: bytes that the store may take; None for no limit.

    Returns:
        The bytes that the store takes then.
    """
    _remove_unnamed(store)
    spare: dict[tuple[str, bool], int] = {}
    kept: list[Entry] = []
    for entry in sorted(read(store), key=lambda entry: -entry.used):
        group = entry.origin, entry.name.endswith(names.ANCHOR)
        needless = not entry.current or names.is_transient(entry.name)
        if not needless and not names.is_built(entry.name):
            spare[group] = spare.get(group, 0) + 1
            needless = spare[group] > _SPARE_IMAGES
        if not needless or not remove(store, entry.name):
            kept.append(entry)
    return _make_room(store, kept, room, limit)


def _remove_unnamed(store: int) -> None:
    """What is left of a writer that ended before it had named the origin: nothing else finds it.
    One that lives, and whose folder it is, makes it again."""
    with suppress(OSError):
        for name in filter(names.is_name, os.listdir(index(store))):
            with suppress(OSError):
                os.rmdir(name, dir_fd=store)
            try:
                os.readlink(f"{name}/{ORIGIN}", dir_fd=store)
            except ours(FileNotFoundError):
                remove(store, name)
            except ours(OSError):
                pass


def _make_room(store: int, kept: Sequence[Entry], room: int, limit: int | None) -> int:
    total = sum(entry.size for entry in kept)
    if limit is None or total + room <= limit:
        return total
    unused = [
        entry
        for entry in reversed(kept)
        if not names.is_built(entry.name) and not is_used(store, entry.name)
    ]
    # Nothing goes for what would find no room, either, if all of them went.
    if room and total - sum(entry.size for entry in unused) + room > limit:
        return total
    for entry in unused:
        if total + room <= limit:
            break
        if remove(store, entry.name):
            total -= entry.size
    return total


def clear(store: int) -> int:
    """Remove every image that nobody uses; returns how many were removed."""
    _remove_unnamed(store)
    return sum(remove(store, entry.name) for entry in read(store))


def is_used(store: int, name: str) -> bool:
    """Whether somebody holds an image's lock, as far as can be seen from here."""
    with suppress(OSError), _core.opened(os.open, name, DIRECTORY, dir_fd=store) as folder:
        return locks.is_used(folder)
    return False


def remove(store: int, name: str) -> bool:
    """Remove an image's folder, unless somebody uses or is writing the image. Returns whether it
    was removed."""
    with suppress(OSError), _core.opened(os.open, name, DIRECTORY, dir_fd=store) as folder:
        held = locks.exclude(folder)
        image_name = ""
        with suppress(FileNotFoundError):  # nobody could name it: the disk was full
            image_name = os.path.basename(os.readlink(ORIGIN, dir_fd=folder))
        for entry in os.listdir(index(folder)):
            if entry in (image_name, locks.WRITER, locks.USERS) or entry.startswith(DRAFT):
                os.unlink(entry, dir_fd=folder)
        # Last: without it the folder is taken for one that has no image.
        if image_name:
            os.unlink(ORIGIN, dir_fd=folder)
        os.rmdir(name, dir_fd=store)
        del held
        return True
    return False
