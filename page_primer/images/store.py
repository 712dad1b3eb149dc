"""Where images live: a directory with a folder for each image, shared between processes.

    <store>/<layout name>/<the object's own file name>     the image, readable as the original is
    <store>/<layout name>/origin      symbolic link to the object's file
    <store>/<layout name>/.users      who uses the image (locks.py)
    <store>/<layout name>/.writer     who is writing it
    <store>/.trial                    whether files here are on huge pages (trial.py)

Who can put something in is checked when the store is opened (trust.py), and everything after that
goes by descriptor. Images are compared with live memory, byte for byte, before they are mapped over
code, and anchors with what they should be.
"""

from __future__ import annotations

import atexit
import errno
import os
import stat
import time
from itertools import count

from page_primer._lean import Record, ours, suppress
from page_primer.images import directory, inventory, locks, names, trust
from page_primer.images.inventory import DIRECTORY, DRAFT, ORIGIN
from page_primer.images.layout import Layout
from page_primer.images.room import NO_LIMIT
from page_primer.images.trust import Unusable
from page_primer.kernel import credentials

FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DEAD = 60  # seconds
_NOT_OURS = errno.EACCES, errno.EPERM, errno.EROFS  # root's store, or a read-only one

_counter = count()


class Missing(Unusable):
    """The image is not there, and cannot be written."""


class Image(Record):
    """An image in use. `lock` keeps it from being pruned (negative: locks are unavailable)."""

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
        store, name, _ = self.path.rsplit("/", 2)
        if self.lock >= 0 and names.is_transient(name):
            _transient.pop(self.lock, None)
            with suppress(OSError, Unusable), Store(store, make=False) as opened:
                opened.remove(name)

    def close_file(self) -> None:
        """The file need not stay open once it is mapped."""
        _close(self.fd, self.identities)


def _close(fd: int, identities: tuple[tuple[int, int], ...]) -> None:
    with suppress(OSError):
        if fd >= 0 and _identity(os.fstat(fd)) in identities:
            os.close(fd)


class Store:
    """An open directory of images."""

    def __init__(
        self, path: str, *, limit: int = NO_LIMIT, spare: int = 1, make: bool = True
    ) -> None:
        """Open the directory.

        Args:
            path: where it is.
            limit: bytes that it may take.
            spare: how many times the room that an image needs must be free.
            make: create it where it is missing.

        Raises:
            Unusable: not creatable, not ours alone, or not a directory.
        """
        self.path, self._limit, self._spare = path, limit, spare
        who = credentials.read()
        # What this process may not trust it need not write.
        self.writable = who.user in who.trusted
        try:
            self.fd = directory.open_or_make(path, who, make=make)
        except ours(OSError) as error:
            raise Unusable(error.strerror or str(error)) from error
        self._owners = who.trusted
        try:
            trust.check_directory(self.fd, who)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def get(self, wanted: Layout, *, fresh: bool = False) -> Image:
        """Return the image of a layout, writing it if it is missing.

        Args:
            wanted: what the image holds.
            fresh: write a new file even where one is (its pages are small, or its content wrong).

        Raises:
            Missing: it is not there, and this store cannot be written to.
            Unusable: there is no room for it within the limit.
            layout.CannotLayOut: the object's file has a form that no image can be written of.
            OSError: reading the object's file or writing the image failed.
        """
        found = None if fresh else self._get_built(wanted)
        try:
            found = found or self._get(wanted, fresh)
        except ours(FileNotFoundError):  # pruned between being found and being locked
            found = self._get(wanted, fresh)
        if found.lock >= 0 and names.is_transient(wanted.name):
            _remember(found)
        return found

    def has(self, wanted: Layout) -> bool:
        """Whether the image of a layout is there, written or built."""
        for name in (wanted.name, wanted.as_built().name):
            with suppress(OSError):
                path = f"{name}/{os.path.basename(wanted.object.path)}"
                os.stat(path, dir_fd=self.fd, follow_symlinks=False)
                return True
        return False

    def build(self, wanted: Layout) -> Image:
        """Write an image for whoever cannot write one, unless it is there; raises what get() does.
        It is found by less than others (names.py), and stays."""
        return self.get(wanted.as_built())

    def prune(self) -> None:
        """Remove what nobody uses, as far as is due."""
        inventory.prune(self.fd, limit=self._limit)

    def remove(self, name: str) -> bool:
        """Remove an image that nobody uses; returns whether it was removed."""
        return inventory.remove(self.fd, name)

    def hold(self, image: Image) -> int:
        """Keep an image from being removed until release(); returns a descriptor for that."""
        return os.dup(image.lock) if image.lock >= 0 else -1

    def release(self, hold: int, name: str) -> None:
        """Give up a hold; an image of a random load phase goes if it was the last."""
        if hold >= 0:
            os.close(hold)
            if names.is_transient(name):
                self.remove(name)

    def _get(self, wanted: Layout, fresh: bool) -> Image:
        made = self._make_folder(wanted.name)
        folder = os.open(wanted.name, DIRECTORY, dir_fd=self.fd)
        lock, found = -1, None
        try:
            if made:
                os.fchmod(folder, 0o755)
                _name_origin(folder, wanted.object.path)
            elif not trust.is_trusted(os.fstat(folder), self._owners):
                raise Unusable(f"not ours alone: {self.path}/{wanted.name}")
            lock = locks.share(folder) if self.writable else -1
            found = None if fresh else self._open(folder, wanted, lock)
            if found is None:
                # One process writes; the others wait for it and use what it wrote. If it takes too
                # long they write one each: only memory is lost by that.
                if not self.writable:
                    raise Missing("no image of it there, nor is one written")
                writer, alone = locks.for_writing(folder)
                try:
                    if alone:
                        _remove_drafts(folder)
                    _name_origin(folder, wanted.object.path)
                    found = None if fresh else self._open(folder, wanted, lock)
                    found = found or self._write(folder, wanted, lock)
                finally:
                    if writer >= 0:
                        os.close(writer)
            lock = -1
            return found
        finally:
            os.close(folder)
            if lock >= 0:
                os.close(lock)
            if made and found is None:
                self.remove(wanted.name)

    def _get_built(self, wanted: Layout) -> Image | None:
        """An image that build() has written, if there is none of the very name."""
        with suppress(FileNotFoundError):
            os.stat(wanted.name, dir_fd=self.fd, follow_symlinks=False)
            return None
        built = wanted.as_built()
        if built.name == wanted.name:
            return None
        with suppress(FileNotFoundError):
            folder, lock, found = os.open(built.name, DIRECTORY, dir_fd=self.fd), -1, None
            try:
                if trust.is_trusted(os.fstat(folder), self._owners):
                    lock = locks.share(folder) if self.writable else -1
                    found = self._open(folder, built, lock)
                return found
            finally:
                os.close(folder)
                if found is None and lock >= 0:
                    os.close(lock)
        return None

    def _make_folder(self, name: str) -> bool:
        """Make an image's folder where it is missing; returns whether it was."""
        why = trust.UNTRUSTED
        if self.writable:
            try:
                os.mkdir(name, 0o755, dir_fd=self.fd)
                return True
            except ours(FileExistsError):
                return False
            except ours(OSError) as error:
                if error.errno not in _NOT_OURS:
                    raise
                why = error.strerror or str(error)
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except ours(FileNotFoundError):
            raise Missing(f"no image of it there, and none can be written: {why}") from None
        return False

    def _open(self, folder: int, wanted: Layout, lock: int, written: int = 0) -> Image | None:
        name = os.path.basename(wanted.object.path)
        fd, found = -1, None
        try:
            fd = os.open(name, FILE, dir_fd=folder)
            status = os.fstat(fd)
            whole = stat.S_ISREG(status.st_mode) and status.st_size >= wanted.content_end
            if trust.is_trusted(status, self._owners) and whole:
                with suppress(OSError):
                    os.utime(fd)  # the time of last use, for pruning
                identities = tuple(_identity(os.fstat(one)) for one in (fd, lock) if one >= 0)
                found = Image(f"{self.path}/{wanted.name}/{name}", fd, lock, written, identities)
            return found
        except ours(OSError):
            return None
        finally:
            if found is None and fd >= 0:
                os.close(fd)

    def _write(self, folder: int, wanted: Layout, lock: int) -> Image:
        source = wanted.object.source
        assert source is not None
        room = self._make_room(wanted)
        name = os.path.basename(wanted.object.path)
        # Another container may have a process of the same number.
        draft = f"{DRAFT}{os.getpid()}-{time.time_ns():x}-{next(_counter)}"
        original = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        target = -1
        try:
            target = os.open(draft, _NEW, 0o600, dir_fd=folder)
            written = wanted.write(original, target, room)
            if type(source).of(source.path, os.fstat(original)) != source:
                raise OSError(errno.ESTALE, "the file changed while it was read")
            os.fchmod(target, trust.mode_for(original, target))
            # Before anybody executes it: pages whose write-back fails later (a thin volume that is
            # full) could be dropped, and would be gone.
            os.fdatasync(target)
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
        found = self._open(folder, wanted, lock, written)
        if found is None:
            raise OSError(errno.ESTALE, "somebody changed the image as soon as it was written")
        return found

    def _make_room(self, wanted: Layout) -> int:
        """Make room for an image within the limit; returns the bytes that are left for it."""
        status = os.fstatvfs(self.fd)
        if wanted.regions and status.f_flag & os.ST_NOEXEC:
            raise OSError(errno.EACCES, "mounted noexec")
        needed = wanted.content_end
        free = status.f_bavail * status.f_frsize
        if free < self._spare * needed and self._spare > 1:
            raise Unusable(f"left to the application: {free >> 20} MiB are free")
        taken = inventory.prune(self.fd, room=needed, limit=self._limit)
        if taken + needed > self._limit:
            raise Unusable(
                f"{taken >> 20} MiB are in use there: with this image it would be more than "
                f"{self._limit >> 20} MiB",
                f"PAGE_PRIMER_STORE_LIMIT={(taken + needed >> 20) + 1}M",
            )
        # Of what is written at each start, and gone after it, the debug information is not worth
        # the time and the page cache.
        return needed if names.is_transient(wanted.name) else self._limit - taken


def _name_origin(folder: int, path: str) -> None:
    """First of all: by it what a killed writer leaves behind is found. One that was killed just
    before has made no more than the folder."""
    with suppress(FileExistsError):
        os.symlink(path, ORIGIN, dir_fd=folder)


def _remove_drafts(folder: int) -> None:
    """What writers left that were killed. One that wrote to it a minute ago may yet be there."""
    for name in os.listdir(folder):
        if name.startswith(DRAFT):
            with suppress(OSError):
                if os.stat(name, dir_fd=folder).st_mtime < time.time() - _DEAD:
                    os.unlink(name, dir_fd=folder)


_transient: dict[int, Image] = {}  # by the descriptor of their locks


def _remember(image: Image) -> None:
    """An image of a random load phase goes with its last user: at the latest when that ends."""
    if not _transient:
        atexit.unregister(_close_all)
        atexit.register(_close_all)
    _transient[image.lock] = image


def _close_all() -> None:
    for image in [*_transient.values()]:
        image.close()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
