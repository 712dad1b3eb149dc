"""The locks of an image's folder: who uses the image, and who is writing it.

Every user holds a shared flock(2) on `.users` for its life, which a forked child inherits; whoever
removes the image must have it exclusively. The files are ours alone (mode 0600), since whoever can
open a file can lock it. Where locks are unavailable (no flock on that file system, a store that
cannot be written to) images are used without.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from page_primer import _core
from page_primer._lean import ours, suppress

USERS, WRITER = ".users", ".writer"
_NEW = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_WAIT_FOR_WRITER = 3.0  # seconds; on a busy disk a first image takes that long
_WAIT_FOR_ASKER = 0.05  # seconds: who asks whether the image is used has the lock for microseconds


def share(folder: int) -> _core.Descriptor | None:
    """Lock the users' file for a user; returns it open, None where that cannot be done.

    Raises:
        FileNotFoundError: the folder was removed, or is about to be.
    """
    try:
        fd = _core.opened(os.open, USERS, _NEW, 0o600, dir_fd=folder)
    except FileNotFoundError:
        raise
    except ours(OSError):
        return None
    if fd.fileno() <= 2:  # a standard stream was closed: not in that one's place, for so long
        fd = _core.opened(fcntl.fcntl, fd, fcntl.F_DUPFD_CLOEXEC, 3)
    try:
        locked = _lock(fd, fcntl.LOCK_SH, _WAIT_FOR_ASKER)
        there = os.fstat(fd).st_nlink > 0
    except ours(OSError):
        return None
    if not locked:
        raise FileNotFoundError(errno.ENOENT, "being pruned")
    if not there:
        raise FileNotFoundError(errno.ENOENT, "pruned")
    return fd


def for_writing(folder: int) -> tuple[_core.Descriptor | None, bool]:
    """Take the writer's lock, which is held while the descriptor is open, or go on without it after
    a while.

    Returns:
        The descriptor, None where locks are unavailable, and whether it holds the lock.
    """
    try:
        fd = _core.opened(os.open, WRITER, _NEW, 0o600, dir_fd=folder)
    except ours(OSError):
        return None, False
    with suppress(OSError):
        return fd, _lock(fd, fcntl.LOCK_EX, _WAIT_FOR_WRITER)
    return fd, False


def _lock(fd: int, kind: int, seconds: float) -> bool:
    """Take a lock as soon as others let it be taken; returns False after that many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        except ours(BlockingIOError):
            if time.monotonic() >= end:
                return False
        time.sleep(0.002)


def exclude(folder: int) -> list[_core.Descriptor]:
    """Lock both files against users and writers, who must not be there, for as long as they are
    open. Raises OSError."""
    held = []
    for name in (WRITER, USERS):
        held.append(_core.opened(os.open, name, _NEW, 0o600, dir_fd=folder))
        fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def is_used(folder: int) -> bool:
    """Whether somebody holds the users' lock, be it to ask the same; False where that cannot be
    found out, as in a store that cannot be written to: on NFS an exclusive lock needs a file that
    is open for writing."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(OSError), _core.opened(os.open, USERS, flags, dir_fd=folder) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ours(BlockingIOError):
            return True
    return False
