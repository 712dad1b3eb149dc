"""Put a new file in an old one's place, with everything that is said of the old one beside its
content: mode, owner, times, extended attributes (POSIX ACLs are among them)."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from page_primer.align import owners
from page_primer.align.original import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

# Ends the name of a file that is being written. It is the same for everybody, so that one who comes
# later finds what one who was killed has left, and two do not work on the same file.
SUFFIX = ".page-primer-new"
BUSY = "is being rewritten by another process"
_LONGEST_NAME = 255  # bytes, NAME_MAX
_TRIES = 3  # to create it, where others remove what they take for stale

# What a file may carry that rests on its content, and what is said of it then.
_SIGNED = {
    "security.capability": "has file capabilities",
    "security.ima": "has an IMA signature",
    "security.evm": "has an EVM signature",
}
# Linux, include/uapi/linux/fs.h: FS_IOC_GETFLAGS is _IOR('f', 1, long), FS_VERITY_FL.
_FS_IOC_GETFLAGS, _FS_VERITY_FL = 0x80086601, 0x00100000
_FS_IMMUTABLE_FL, _FS_APPEND_FL = 0x10, 0x20


class Old(NamedTuple):
    """A file that is to be replaced: open, and its path, in which nothing is a link."""

    fd: int
    path: str


class New(NamedTuple):
    """The file that will replace it. The descriptor holds its lock, and is for reading, since a
    program that is open for writing cannot be tried."""

    fd: int
    path: str

    @contextlib.contextmanager
    def writable(self) -> Iterator[int]:
        """A descriptor of this very file for reading and writing: its name might be another's by
        now (proc(5), /proc/self/fd)."""
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


@contextlib.contextmanager
def opened(path: str, directory: int | None = None) -> Iterator[int]:
    """A descriptor of a regular file, for reading.

    Args:
        path: of the file itself, no link.
        directory: an open one that the path is relative to.

    Raises:
        Refused: it is something else.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused("a symbolic link by now") from error
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Refused("not a regular file")
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def to_replace(path: str) -> Iterator[Old]:
    """A file that may be replaced where it lies.

    Args:
        path: of the file itself, no link.

    Raises:
        Refused: it must not be.
        OSError: it cannot be opened.
    """
    above, name = os.path.split(path)
    directory = os.open(above or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with opened(name, directory) as fd:
            owners.check_place(fd, directory)
            check_replaceable(fd)
            # Of the directory that was checked, wherever a link in the given path leads by now.
            yield Old(fd, os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name))
    finally:
        os.close(directory)


def check_replaceable(fd: int) -> None:
    """Raise Refused where the file's meaning rests on more than its content."""
    mode = os.fstat(fd).st_mode
    if mode & (stat.S_ISUID | stat.S_ISGID):
        raise Refused("setuid or setgid")
    names = set(_attributes(fd))
    for name, text in _SIGNED.items():
        if name in names:
            raise Refused(text)
    flags = array.array("l", [0])
    with contextlib.suppress(OSError):  # a file system without flags
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags, True)
    if flags[0] & _FS_VERITY_FL:
        raise Refused("protected by fs-verity")
    if flags[0] & (_FS_IMMUTABLE_FL | _FS_APPEND_FL):
        raise Refused("marked immutable or append-only (chattr)")


@contextlib.contextmanager
def beside(path: str) -> Iterator[New]:
    """A new, empty file in another's directory, which is gone afterwards unless it was renamed.

    Raises:
        Refused: somebody else is at work on the same file.
        OSError: the directory cannot be written.
    """
    directory, name = os.path.split(path)
    head = os.fsencode(f".{name}")[: _LONGEST_NAME - len(SUFFIX)]
    new = os.path.join(directory, os.fsdecode(head) + SUFFIX)
    fd = _create(new)
    try:
        yield New(fd, new)
    finally:
        with contextlib.suppress(OSError):
            if _is_at(fd, new):
                os.unlink(new)
        os.close(fd)


def _create(new: str) -> int:
    """Create the file, and lock it."""
    flags = os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(_TRIES):
        try:
            fd = os.open(new, flags, 0o600)
        except FileExistsError:
            _remove_stale(new)
            continue
        try:
            _lock(fd)
        except Refused as why:
            if str(why) != BUSY and _is_at(fd, new):  # else whoever took it for stale removes it
                os.unlink(new)
            os.close(fd)
            raise
        if _is_at(fd, new):
            return fd
        os.close(fd)  # somebody took it for stale, and removed it, before it had its lock
    raise Refused(BUSY)


def _lock(fd: int) -> None:
    """Lock a file, or raise Refused: another has; or there is no such lock, as NFS has none for a
    file that is open for reading (flock(2)), and one that is open for writing cannot be tried."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Refused(BUSY) from error
    except OSError as error:
        raise Refused(f"a new file cannot be locked here ({error.strerror})") from error


def _remove_stale(new: str) -> None:
    """Remove what a killed process has left; a live one holds its lock."""
    try:
        fd = os.open(new, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused(f"{new} is in the way") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Refused(f"{new} is in the way")
        _lock(fd)
        # Since it was opened another may have removed it, or renamed it into place, and one more be
        # at work on a file of its own.
        if _is_at(fd, new):
            os.unlink(new)
    finally:
        os.close(fd)


def copy_attributes(old: int, new: int) -> None:
    """Give an open file the owner, mode, extended attributes and times of another.

    Raises:
        Refused: one of them cannot be kept.
    """
    status = os.fstat(old)
    here = os.fstat(new)
    try:
        if (here.st_uid, here.st_gid) != (status.st_uid, status.st_gid):
            os.fchown(new, status.st_uid, status.st_gid)
        os.fchmod(new, stat.S_IMODE(status.st_mode))
    except PermissionError as error:
        if here.st_uid == status.st_uid:
            text = f"its group {status.st_gid} cannot be kept: run this as a member of it"
        else:
            text = (
                f"its owner cannot be kept; {owners.instead(os.readlink(f'/proc/self/fd/{old}'))}"
            )
        raise Refused(text) from error
    for name in _attributes(old):
        value = os.getxattr(old, name)
        try:
            if name in _attributes(new) and os.getxattr(new, name) == value:
                continue
            os.setxattr(new, name, value)
        except OSError as error:
            raise Refused(f"its attribute {name} cannot be kept ({error.strerror})") from error
    for name in set(_attributes(new)) - set(_attributes(old)):
        with contextlib.suppress(OSError):  # a directory's default ACL, a default label
            os.removexattr(new, name)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))


def put_in_place(new: New, old: Old) -> None:
    """Rename the new file over the original, unless one of the names is another file's by now; both
    are on disk then, where the directory can be asked for it.

    Raises:
        Refused: the original was replaced or changed in the meantime, or the new file was.
        OSError: renaming failed.
    """
    if not _is_at(old.fd, old.path):
        raise Refused("was replaced while it was being rewritten")
    if not _is_at(new.fd, new.path):
        raise Refused(f"{new.path} was replaced by another file")
    os.replace(new.path, old.path)
    # It is done, whatever follows: a directory that may not be read, no descriptor left, or a file
    # system without fsync of directories.
    with contextlib.suppress(OSError):
        directory = os.open(os.path.dirname(old.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _is_at(fd: int, path: str) -> bool:
    """Whether a path is still an open file's."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _attributes(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError:  # a file system without
        return []
