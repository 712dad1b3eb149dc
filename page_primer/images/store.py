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
from _operator import index
from _weakref import ref  # weakref takes a millisecond to import
from itertools import count

from page_primer import _core
from page_primer._lean import Record, ours, suppress
from page_primer.images import directory, inventory, locks, names, quota, trust
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
    """An image in use. `lock` keeps it from being pruned (None: locks are unavailable)."""

    path: str
    fd: _core.Descriptor
    lock: _core.Descriptor | None
    written: int  # bytes; 0 when the image was there already

    def close(self) -> None:
        """Give the image up."""
        self.close_file()
        _kept.pop(self.path, None)
        if self.lock is not None:
            with suppress(OSError):
                self.lock.close()
            store, name, _ = self.path.rsplit("/", 2)
            if names.is_transient(name):
                with suppress(OSError, Unusable), Store(store, make=False) as opened:
                    opened.remove(name)

    def close_file(self) -> None:
        """The file need not stay open once it is mapped."""
        with suppress(OSError):
            self.fd.close()

    def keep(self) -> None:
        """It is in use for as long as this process is, if it is not closed: also when this
        interpreter ends before. One of a random load phase goes with its last user."""
        if self.lock is None:
            return
        self.lock.keep()
        if names.is_transient(self.path.rsplit("/", 2)[1]):
            if not _kept:
                atexit.unregister(_close_all)
                atexit.register(_close_all)
            _kept[self.path] = ref(self)


_kept: dict[str, ref[Image]] = {}  # those that go with us, by path


def _close_all() -> None:
    for image in [found() for found in _kept.values()]:
        if image is not None:
            image.close()


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
        trust.check_directory(self.fd, who)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.fd.close()

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

    def hold(self, image: Image) -> _core.Descriptor | None:
        """Keep an image from being removed until release()."""
        return None if image.lock is None else _core.opened(os.dup, image.lock)

    def release(self, hold: _core.Descriptor | None, name: str) -> None:
        """Give up a hold; an image of a random load phase goes if it was the last."""
        if hold is not None:
            hold.close()
            if names.is_transient(name):
                self.remove(name)

    def _get(self, wanted: Layout, fresh: bool) -> Image:
        made = self._make_folder(wanted.name)
        found = None
        try:
            with _core.opened(os.open, wanted.name, DIRECTORY, dir_fd=self.fd) as folder:
                if made:
                    os.fchmod(folder, 0o755)
                    _name_origin(folder, wanted.object.path)
                elif not trust.is_trusted(os.fstat(folder), self._owners):
                    raise Unusable(f"not ours alone: {self.path}/{wanted.name}")
                found = self._find_or_write(folder, wanted, fresh)
            return found
        finally:
            if made and found is None:
                self.remove(wanted.name)

    def _find_or_write(self, folder: int, wanted: Layout, fresh: bool) -> Image:
        lock = locks.share(folder) if self.writable else None
        try:
            found = None if fresh else self._open(folder, wanted, lock)
            if found is not None:
                return found
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
                return found or self._write(folder, wanted, lock)
            finally:
                if writer is not None:
                    writer.close()
        except BaseException:
            if lock is not None:  # for who removes what was begun
                lock.close()
            raise

    def _get_built(self, wanted: Layout) -> Image | None:
        """An image that build() has written, if there is none of the very name."""
        with suppress(FileNotFoundError):
            os.stat(wanted.name, dir_fd=self.fd, follow_symlinks=False)
            return None
        built = wanted.as_built()
        if built.name == wanted.name:
            return None
        with suppress(FileNotFoundError):
            folder = _core.opened(os.open, built.name, DIRECTORY, dir_fd=self.fd)
            if trust.is_trusted(os.fstat(folder), self._owners):
                lock = locks.share(folder) if self.writable else None
                return self._open(folder, built, lock)
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

    def _open(
        self, folder: int, wanted: Layout, lock: _core.Descriptor | None, written: int = 0
    ) -> Image | None:
        name = os.path.basename(wanted.object.path)
        with suppress(OSError):
            fd = _core.opened(os.open, name, FILE, dir_fd=folder)
            status = os.fstat(fd)
            whole = stat.S_ISREG(status.st_mode) and status.st_size >= wanted.content_end
            if trust.is_trusted(status, self._owners) and whole:
                with suppress(OSError):
                    os.utime(fd.fileno())  # the time of last use, for pruning
                return Image(f"{self.path}/{wanted.name}/{name}", fd, lock, written)
        return None

    def _write(self, folder: int, wanted: Layout, lock: _core.Descriptor | None) -> Image:
        source = wanted.object.source
        assert source is not None
        name = os.path.basename(wanted.object.path)
        # Another container may have a process of the same number.
        draft = f"{DRAFT}{os.getpid()}-{time.time_ns():x}-{next(_counter)}"
        with _core.opened(os.open, source.path, os.O_RDONLY | os.O_CLOEXEC) as original:
            room = quota.make_room(self.fd, wanted, original, limit=self._limit, spare=self._spare)
            # Closed before it is mapped: what is open for writing cannot be made huge with
            # CONFIG_READ_ONLY_THP_FOR_FS.
            with _core.opened(os.open, draft, _NEW, 0o600, dir_fd=folder) as target:
                try:
                    written = wanted.write(original, target, room)
                    if type(source).of(source.path, os.fstat(original)) != source:
                        raise OSError(errno.ESTALE, "the file changed while it was read")
                    os.fchmod(target, trust.mode_for(original, target))
                    # Before anybody executes it: pages whose write-back fails later (a thin volume
                    # that is full) could be dropped, and would be gone.
                    os.fdatasync(target)
                    os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(draft, dir_fd=folder)
                    raise
        found = self._open(folder, wanted, lock, written)
        if found is None:
            raise OSError(errno.ESTALE, "somebody changed the image as soon as it was written")
        return found


def _name_origin(folder: int, path: str) -> None:
    """First of all: by it what a killed writer leaves behind is found. One that was killed just
    before has made no more than the folder."""
    with suppress(FileExistsError):
        os.symlink(path, ORIGIN, dir_fd=folder)


def _remove_drafts(folder: int) -> None:
    """What writers left that were killed. One that wrote to it a minute ago may yet be there."""
    for name in os.listdir(index(folder)):
        if name.startswith(DRAFT):
            with suppress(OSError):
                if os.stat(name, dir_fd=folder).st_mtime < time.time() - _DEAD:
                    os.unlink(name, dir_fd=folder)
