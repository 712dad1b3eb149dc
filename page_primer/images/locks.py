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

from page_primer._lean import ours, suppress

USERS, WRITER = ".users", ".writer"
_NEW = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_WAIT_FOR_WRITER = 3.0  # seconds; on a busy disk a first image takes that long


def share(folder: int) -> int:
    """Lock the users' file for a user; returns its descriptor, negative where that cannot be done.

    Raises:
        FileNotFoundError: the folder was removed, or is about to be.
    """
    try:
        fd = os.open(USERS, _NEW, 0o600, dir_fd=folder)
    except FileNotFoundError:
        raise
    except ours(OSError):
        return -1
    if fd <= 2:  # a standard stream was closed, and it is held for long: not in that one's place
        low, fd = fd, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
    kept = False  # a signal handler may raise: it would be locked for ever
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        kept = os.fstat(fd).st_nlink > 0
    except ours(BlockingIOError) as error:
        raise FileNotFoundError(errno.ENOENT, "being pruned") from error
    except ours(OSError):
        return -1
    finally:
        if not kept:
            os.close(fd)
    if not kept:
        raise FileNotFoundError(errno.ENOENT, "pruned")
    return fd


def for_writing(folder: int) -> tuple[int, bool]:
    """Take the writer's lock, which is held while the descriptor is open, or go on without it after
    a while.

    Returns:
        The descriptor, negative where locks are unavailable, and whether it holds the lock.
    """
    end = time.monotonic() + _WAIT_FOR_WRITER
    try:
        fd = os.open(WRITER, _NEW, 0o600, dir_fd=folder)
    except ours(OSError):
        return -1, False
    try:
        while time.monotonic() < end:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd, True
            except ours(BlockingIOError):
                time.sleep(0.002)
            except ours(OSError):
                break
        return fd, False
    except BaseException:
        os.close(fd)
        raise


def exclude(folder: int, held: list[int]) -> None:
    """Lock both files against users and writers, who must not be there; the descriptors are added
    to `held`. Raises OSError."""
    for name in (WRITER, USERS):
        held.append(os.open(name, _NEW, 0o600, dir_fd=folder))
        fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_used(folder: int) -> bool:
    """Whether somebody holds the users' lock; False where that cannot be found out."""
    with suppress(OSError):
        fd = os.open(USERS, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ours(BlockingIOError):
            return True
        finally:
            os.close(fd)
    return False
