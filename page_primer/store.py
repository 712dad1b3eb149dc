"""Where images live: directories, sharing between processes, pruning.

A store is a directory with a folder for each image:

    <store>/<layout name>/<the object's own file name>     the image, mode 0555
    <store>/<layout name>/origin                            symbolic link to the object's file

Every user of an image holds a shared flock(2) on it for its life (a forked child inherits it), and
pruning removes only what it can lock exclusively. Trust does not rest on any of this: an image is
compared with live memory, byte for byte, before it is mapped over code.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from page_primer import image
from page_primer.image import Layout

# Unused images of one file that stay: an address space laid out at random asks for another load
# phase each time.
_SPARE_IMAGES = 4
_WAIT_FOR_WRITER = 1.0  # seconds
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

_counter = count()


class Unusable(Exception):
    """A directory that images cannot live in; the message says why."""


@dataclass(frozen=True)
class Image:
    """An image in use: the open file holds the lock that keeps it from being pruned."""

    path: str
    fd: int
    inode: tuple[int, int]
    written: int  # bytes; 0 when the image was there already

    def close(self) -> None:
        """Give the image up. A server that daemonizes may have closed our descriptor and opened
        something else under its number: then there is nothing of ours to close."""
        with contextlib.suppress(OSError):
            if _identity(os.fstat(self.fd)) == self.inode:
                os.close(self.fd)


class Store:
    """An open directory of images."""

    def __init__(self, path: str) -> None:
        """Open the directory, creating it where it is missing.

        Raises:
            Unusable: not creatable, not ours alone, or not a directory.
        """
        self.path = path
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o755)
            self._fd = os.open(path, _DIRECTORY)
        except FileExistsError as error:
            raise Unusable("its parent is not a directory") from error
        except OSError as error:
            raise Unusable(error.strerror or str(error)) from error
        status = os.fstat(self._fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            os.close(self._fd)
            raise Unusable("not ours alone: it belongs to another user or others can write to it")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def get(self, layout: Layout, *, fresh: bool = False) -> Image:
        """Return the image of a layout, writing it if it is missing.

        Args:
            layout: what the image holds.
            fresh: write a new file even where there is one (its pages are in memory as small ones,
                or its content is wrong).

        Raises:
            image.CannotLayOut: the object's file has a form that no image can be written of.
            OSError: reading the object's file or writing the image failed.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(layout.name, 0o755, dir_fd=self._fd)
        folder = os.open(layout.name, _DIRECTORY, dir_fd=self._fd)
        try:
            found = None if fresh else self._open(folder, layout)
            if found is not None:
                return found
            # One process writes; the others wait for it and use what it wrote. If it takes too
            # long they write one each: only memory is lost by that.
            with _locked(folder):
                found = None if fresh else self._open(folder, layout)
                found = found or self._write(folder, layout)
        finally:
            os.close(folder)
        self.prune()
        return found

    def prune(self) -> None:
        """Remove images that nobody uses: of files that changed, and all but a few of each file."""
        spare: dict[str, list[tuple[float, str]]] = {}
        with contextlib.suppress(OSError):
            for name in os.listdir(self._fd):
                with contextlib.suppress(OSError):
                    origin = os.readlink(f"{name}/origin", dir_fd=self._fd)
                    used = max(
                        os.stat(f"{name}/{entry}", dir_fd=self._fd, follow_symlinks=False).st_mtime
                        for entry in (os.path.basename(origin), ".")
                    )
                    current = image.belongs_to(name, origin)
                    spare.setdefault(origin, []).append((used if current else 0.0, name))
            for images in spare.values():
                images.sort(reverse=True)
                for index, (used, name) in enumerate(images):
                    if index >= _SPARE_IMAGES or not used:
                        self._remove(name)

    def _open(self, folder: int, layout: Layout) -> Image | None:
        name = os.path.basename(layout.object.path)
        try:
            fd = os.open(name, _FILE, dir_fd=folder)
        except OSError:
            return None
        found = None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            status = os.fstat(fd)
            ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
            whole = status.st_size >= layout.content_end
            # Without links it was pruned between opening and locking.
            if stat.S_ISREG(status.st_mode) and ours and whole and status.st_nlink:
                os.utime(fd)  # the time of last use, for pruning
                found = Image(f"{self.path}/{layout.name}/{name}", fd, _identity(status), 0)
        except OSError:
            pass
        finally:
            if found is None:
                os.close(fd)
        return found

    def _write(self, folder: int, layout: Layout) -> Image:
        source = layout.object.source
        assert source is not None
        name = os.path.basename(layout.object.path)
        draft = f".new-{os.getpid()}-{next(_counter)}"
        original = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        target = -1
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            target = os.open(draft, flags, 0o600, dir_fd=folder)
            fcntl.flock(target, fcntl.LOCK_EX)
            written = image.write(layout, original, target)
            if type(source).of(source.path, os.fstat(original)) != source:
                raise OSError(errno.ESTALE, "the file changed while it was read")
            os.fchmod(target, 0o555)
            with contextlib.suppress(FileExistsError):
                os.symlink(source.path, "origin", dir_fd=folder)
            # No fsync: a file that a crash leaves half-written fails the comparison with memory
            # and is written again.
            os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
            fd = os.open(name, _FILE, dir_fd=folder)
            fcntl.flock(target, fcntl.LOCK_UN)
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            path = f"{self.path}/{layout.name}/{name}"
            return Image(path, fd, _identity(os.fstat(fd)), written)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft, dir_fd=folder)
            raise
        finally:
            os.close(original)
            if target >= 0:
                os.close(target)

    def _remove(self, name: str) -> None:
        """Remove an image's folder, unless somebody uses or is writing the image."""
        with contextlib.suppress(OSError):
            folder = os.open(name, _DIRECTORY, dir_fd=self._fd)
            try:
                entries = os.listdir(folder)
                held = [
                    entry
                    for entry in entries
                    if entry != "origin" and not _unlink_unused(entry, folder)
                ]
                if not held:
                    os.unlink("origin", dir_fd=folder)
                    os.rmdir(name, dir_fd=self._fd)
            finally:
                os.close(folder)


def _unlink_unused(name: str, folder: int) -> bool:
    fd = os.open(name, _FILE, dir_fd=folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=folder)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@contextlib.contextmanager
def _locked(folder: int) -> Iterator[None]:
    """Hold the folder's lock, or go on without it after a while."""
    end = time.monotonic() + _WAIT_FOR_WRITER
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        time.sleep(0.002)
    yield  # closing the folder unlocks it


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def candidates() -> list[str]:
    """The directories to consider when none was named, better ones first: where the processes of
    one user agree, on disk before memory."""
    user = os.geteuid()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    found = [f"{cache}/page-primer", f"/var/tmp/page-primer-{user}", f"/dev/shm/page-primer-{user}"]
    if user == 0:
        # Where every user's profiler can read it, which /root is not.
        found.insert(0, "/var/cache/page-primer")
    if runtime:
        found.append(f"{runtime}/page-primer")
    return [path for path in found if os.path.isabs(path)]
