"""Where images live: directories, sharing between processes, pruning.

A store is a directory with a folder for each image:

    <store>/<layout name>/<the object's own file name>     the image, mode 0555
    <store>/<layout name>/origin      symbolic link to the object's file
    <store>/<layout name>/.users      every user holds a shared flock(2) on it for its life
    <store>/<layout name>/.writer     locked by the process that writes the image

A forked child inherits its parent's lock, and pruning removes only what it can lock exclusively.
The lock files are ours alone (mode 0600), since whoever can open a file can lock it. Where locks
cannot be had (no flock on that file system, a store mounted read-only) images are used without.
Trust does not rest on any of this: an image is compared with live memory, byte for byte, before it
is mapped over code, and an anchor with what it should be.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from itertools import count

from page_primer._lean import Record, suppress
from page_primer.images import names
from page_primer.images.layout import Layout

# Unused images of one file that stay, and as many anchors to it: an address space laid out at
# random asks for another load phase each time.
_SPARE_IMAGES = 4
_WAIT_FOR_WRITER = 1.0  # seconds
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NEW = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_ORIGIN, _USERS, _WRITER, _DRAFT = "origin", ".users", ".writer", ".new-"

_counter = count()


class Unusable(Exception):
    """A directory that images cannot live in; the message says why."""


class Image(Record):
    """An image in use. `fd` is the file, to map it from; `lock` keeps it from being pruned, and is
    negative where locks are not to be had."""

    path: str
    fd: int
    lock: int
    written: int  # bytes; 0 when the image was there already
    identities: tuple[tuple[int, int], ...]  # device and inode of both

    def close(self) -> None:
        """Give the image up. A server that daemonizes may have closed our descriptors and opened
        something else under their numbers: then there is nothing of ours to close."""
        self.close_file()
        _close(self.lock, self.identities)

    def close_file(self) -> None:
        """The file need not stay open once it is mapped."""
        _close(self.fd, self.identities)


def _close(fd: int, identities: tuple[tuple[int, int], ...]) -> None:
    with suppress(OSError):
        if fd >= 0 and _identity(os.fstat(fd)) in identities:
            os.close(fd)


class Store:
    """An open directory of images."""

    def __init__(self, path: str) -> None:
        """Open the directory, creating it where it is missing.

        Raises:
            Unusable: not creatable, not ours alone, or not a directory.
        """
        self.path = path
        try:
            made = _make(path)
            self._fd = os.open(path, _DIRECTORY)
        except OSError as error:
            raise Unusable(error.strerror or str(error)) from error
        if made:
            os.fchmod(self._fd, 0o755)  # whatever the umask: other users' profilers read images
        status = os.fstat(self._fd)
        if not is_trusted(status):
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
            layout.CannotLayOut: the object's file has a form that no image can be written of.
            OSError: reading the object's file or writing the image failed.
        """
        try:
            found = self._get(layout, fresh)
        except FileNotFoundError:  # pruned between being found and being locked
            found = self._get(layout, fresh)
        if found.written:
            self.prune()
        return found

    def prune(self) -> None:
        """Remove images that nobody uses: of files that changed, and all but a few of each file.
        Nothing is touched that is not an image of ours by its name."""
        spare: dict[tuple[str, bool], list[tuple[float, str]]] = {}
        with suppress(OSError):
            for name in filter(names.is_name, os.listdir(self._fd)):
                with suppress(OSError):
                    origin = os.readlink(f"{name}/{_ORIGIN}", dir_fd=self._fd)
                    current = names.belongs_to(name, origin)
                    used = self._last_use(name, os.path.basename(origin))
                    group = origin, name.endswith(names.ANCHOR)
                    spare.setdefault(group, []).append((used if current else 0.0, name))
            for images in spare.values():
                images.sort(reverse=True)
                for index, (used, name) in enumerate(images):
                    if index >= _SPARE_IMAGES or not used:
                        self._remove(name)

    def _last_use(self, folder: str, name: str) -> float:
        times = []
        for entry in (name, "."):
            with suppress(OSError):
                path = f"{folder}/{entry}"
                times.append(os.stat(path, dir_fd=self._fd, follow_symlinks=False).st_mtime)
        return max(times, default=0.0)

    def _get(self, layout: Layout, fresh: bool) -> Image:
        made = False
        with suppress(FileExistsError, PermissionError):
            os.mkdir(layout.name, 0o755, dir_fd=self._fd)
            made = True
        folder = os.open(layout.name, _DIRECTORY, dir_fd=self._fd)
        lock = -1
        try:
            if made:
                os.fchmod(folder, 0o755)
            lock = _lock_shared(folder)
            found = None if fresh else self._open(folder, layout, lock)
            if found is None:
                # One process writes; the others wait for it and use what it wrote. If it takes too
                # long they write one each: only memory is lost by that.
                writer = _lock_for_writing(folder)
                try:
                    found = None if fresh else self._open(folder, layout, lock)
                    found = found or self._write(folder, layout, lock)
                finally:
                    if writer >= 0:
                        os.close(writer)
            lock = -1
            return found
        finally:
            os.close(folder)
            if lock >= 0:
                os.close(lock)

    def _open(self, folder: int, layout: Layout, lock: int, written: int = 0) -> Image | None:
        name = os.path.basename(layout.object.path)
        try:
            fd = os.open(name, FILE, dir_fd=folder)
        except OSError:
            return None
        status = os.fstat(fd)
        whole = stat.S_ISREG(status.st_mode) and status.st_size >= layout.content_end
        if not is_trusted(status) or not whole:
            os.close(fd)
            return None
        with suppress(OSError):
            os.utime(fd)  # the time of last use, for pruning
        identities = tuple(_identity(os.fstat(one)) for one in (fd, lock) if one >= 0)
        return Image(f"{self.path}/{layout.name}/{name}", fd, lock, written, identities)

    def _write(self, folder: int, layout: Layout, lock: int) -> Image:
        source = layout.object.source
        assert source is not None
        name = os.path.basename(layout.object.path)
        # Another container may have a process of the same number.
        draft = f"{_DRAFT}{os.getpid()}-{time.time_ns():x}-{next(_counter)}"
        original = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        target = -1
        try:
            # First of all: what a killed writer leaves behind is found by it.
            with suppress(FileExistsError):
                os.symlink(source.path, _ORIGIN, dir_fd=folder)
            target = os.open(draft, os.O_RDWR | os.O_EXCL | _NEW, 0o600, dir_fd=folder)
            written = layout.write(original, target)
            if type(source).of(source.path, os.fstat(original)) != source:
                raise OSError(errno.ESTALE, "the file changed while it was read")
            os.fchmod(target, 0o555)
            # No fsync: a file that a crash leaves half-written fails the comparison with memory
            # and is written again.
            os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            if target >= 0:
                with suppress(OSError):
                    os.unlink(draft, dir_fd=folder)
            raise
        finally:
            os.close(original)
            if target >= 0:
                os.close(target)
        found = self._open(folder, layout, lock, written)
        if found is None:
            raise OSError(errno.ESTALE, "somebody changed the image as soon as it was written")
        return found

    def _remove(self, name: str) -> None:
        """Remove an image's folder, unless somebody uses or is writing the image."""
        locks = []
        with suppress(OSError):
            folder = os.open(name, _DIRECTORY, dir_fd=self._fd)
            locks.append(folder)
            for entry in (_WRITER, _USERS):
                locks.append(os.open(entry, os.O_RDWR | _NEW, 0o600, dir_fd=folder))
                fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            image_name = os.path.basename(os.readlink(_ORIGIN, dir_fd=folder))
            for entry in os.listdir(folder):
                if entry in (image_name, _WRITER, _USERS) or entry.startswith(_DRAFT):
                    os.unlink(entry, dir_fd=folder)
            # Last: a folder without it would never be looked at again.
            os.unlink(_ORIGIN, dir_fd=folder)
            os.rmdir(name, dir_fd=self._fd)
        for fd in locks:
            os.close(fd)


def is_trusted(status: os.stat_result) -> bool:
    """Whether nobody else could have put something in, or can. What is root's can be trusted as the
    interpreter can."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _make(path: str) -> bool:
    """Create a directory, and its parent where that would be ours: never a part of the system, nor
    of somebody else's home. Returns whether it was missing."""
    parent = os.path.dirname(path)
    try:
        os.lstat(parent)  # what cannot be looked at is there, perhaps: lexists() would say no
    except FileNotFoundError:
        above = os.path.dirname(parent)
        if above in ("/", "/var", "/dev") or os.stat(above).st_uid != os.geteuid():
            raise FileNotFoundError(errno.ENOENT, "its parent does not exist") from None
        os.mkdir(parent, 0o700)
    if not os.path.isdir(parent):
        raise NotADirectoryError(errno.ENOTDIR, "its parent is not a directory")
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return False
    except OSError:
        if os.path.isdir(path):  # a read-only file system says so before it looks
            return False
        raise
    return True


def _lock_shared(folder: int) -> int:
    """Open and lock the users' file; negative where that cannot be done, which a store on a file
    system without locks, or a read-only one, is no worse for."""
    try:
        fd = os.open(_USERS, os.O_RDWR | _NEW, 0o600, dir_fd=folder)
    except FileNotFoundError:
        raise  # the folder was pruned
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "being pruned") from error
    except OSError:
        os.close(fd)
        return -1
    if not os.fstat(fd).st_nlink:
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "pruned")
    return fd


def _lock_for_writing(folder: int) -> int:
    """Take the writer's lock, which is held while the descriptor is open, or go on without it after
    a while; negative where locks are not to be had."""
    end = time.monotonic() + _WAIT_FOR_WRITER
    try:
        fd = os.open(_WRITER, os.O_RDWR | _NEW, 0o600, dir_fd=folder)
    except OSError:
        return -1
    while time.monotonic() < end:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.002)
        except OSError:
            break
    return fd


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
    return [path for path in found if os.path.isabs(path) and _trusted(path)]


def _trusted(path: str) -> bool:
    """Whether what there is of a path belongs to us or to root: under sudo, HOME may be somebody
    else's, where root should leave nothing."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    try:
        return os.stat(path).st_uid in (0, os.geteuid())
    except OSError:
        return False
