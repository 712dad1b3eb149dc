"""Whom an image may come from: it is code, so from nobody but root and this process's own user.

A store counts if it and every directory above it can be written by nobody else, as with sshd's
StrictModes. The directories are looked at from below, each through the descriptor of the one that
it holds (`..`), so no name can lead elsewhere between a check and what follows it.

From the root of a mounted file system that leads past the directory it is mounted on, and with FUSE
any user may mount one on a directory of theirs: owners and modes, and what is read, are then that
user's word. So such a one must be mounted by root or this process's own user, too.
"""

from __future__ import annotations

import errno
import os
import stat

from page_primer import _core
from page_primer._lean import ours, suppress
from page_primer.kernel import credentials, mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

_ABOVE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DEEPEST = 200  # directories above a store
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NO_LIST = errno.ENODATA, errno.EOPNOTSUPP
_ACCESS_LIST = "system.posix_acl_access"
_FUSE = 0x65735546  # FUSE_SUPER_MAGIC (linux/magic.h)
UNTRUSTED = "its own user is not to be trusted"
BUILD = "page-primer build"  # as root: it fills a store that everybody can trust
_ELSEWHERE = "PAGE_PRIMER_IMAGE_DIR=/a/directory/on/another/file/system"


class Unusable(Exception):
    """A directory that images cannot live in; the message says why, `remedy` is a command."""

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.remedy = remedy


def is_trusted(status: os.stat_result, owners: Collection[int]) -> bool:
    """Whether nobody but `owners` could have put something in, or can."""
    return status.st_uid in owners and not status.st_mode & _OTHERS_WRITE


def check_directory(fd: int, who: credentials.Credentials, *, above: bool = False) -> None:
    """Check a directory, and all above it.

    Args:
        fd: the open directory.
        who: the credentials of this process.
        above: it is not the store, but above one.

    Raises:
        Unusable: others can write to it or exchange it, or say what is in it.
        OSError: it cannot be examined.
    """
    # Who mounted the root file system has all files of the program.
    devices = {os.stat("/").st_dev}
    at = _core.opened(os.dup, fd)
    try:
        for _ in range(_DEEPEST):
            status = os.fstat(at)
            if status.st_dev not in devices:
                _check_mount(at, who, above)
                devices.add(status.st_dev)
            # In a sticky one nobody can rename what belongs to others: /tmp, /var/tmp, /dev/shm.
            sticky = above and status.st_mode & stat.S_ISVTX and status.st_uid in who.trusted
            if not sticky and not is_trusted(status, who.trusted):
                raise _refusal(at, status, who, above)
            at = _go_up(at)
            if _identity(os.fstat(at)) == _identity(status):
                return
            above = True
        raise Unusable("too many directories above it")
    finally:
        at.close()


def _go_up(fd: _core.Descriptor) -> _core.Descriptor:
    """The directory above an open one, which is closed."""
    above = _core.opened(os.open, "..", _ABOVE, dir_fd=fd)
    fd.close()
    return above


def _check_mount(fd: int, who: credentials.Credentials, above: bool) -> None:
    """Refuse a file system of FUSE that a user mounted whom this process does not trust."""
    if not _is_fuse(fd):
        return
    mount = mounts.of(fd)
    it = f"{_path(fd)} above it" if above else "it"
    if mount is None:
        why = f"perhaps not ours alone: who mounted {it} cannot be found out"
        raise Unusable(why, _ELSEWHERE)
    # Whose number it is, this namespace's or one's above it, is not told: as root each may do with
    # this process what it likes.
    known = credentials.has_all_ids()
    for user in _mounted_by(mount):
        if user not in who.trusted or not (known or user == credentials.ROOT):
            where = "" if known else " of this user namespace or one above it"
            why = f"not ours alone: user {user}{where} mounted {it} ({mount.filesystem})"
            raise Unusable(why, _ELSEWHERE)


def _is_fuse(fd: int) -> bool:
    """Whether an open file is on a file system of FUSE: to mount another takes root, or what root
    lets users mount (docs/security.md). Where its server or a sandbox refuses to say it may be."""
    with suppress(OSError):
        return _core.filesystem(fd) == _FUSE
    return True


def _mounted_by(mount: mounts.Mount) -> list[int]:
    """Whose word is what is in a file system: of FUSE's mounts every one says so (mount.fuse3(8)),
    but for virtiofs, which the host provides."""
    options = [option.partition("=") for option in mount.options]
    return [int(value) for name, _, value in options if name == "user_id" and value.isdecimal()]


def _path(fd: int) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}")
    return ""


def _quoted(path: str) -> str:
    """A path in a command for a shell: its names may be somebody else's choice. As shlex.quote()
    has it, which takes milliseconds to import."""
    if path and all(letter.isalnum() or letter in "/._-+,:@%=" for letter in path):
        return path
    return "'" + path.replace("'", "'\"'\"'") + "'"


def _refusal(
    fd: int, status: os.stat_result, who: credentials.Credentials, above: bool
) -> Unusable:
    path = _path(fd)
    it = f"{path} above it" if above else "it"
    if status.st_uid in who.trusted:
        mode = f"mode {stat.S_IMODE(status.st_mode):04o}"
        return Unusable(
            f"not ours alone: others can write to {it} ({mode})", f"chmod go-w {_quoted(path)}"
        )
    owner = f"{it} belongs to user {status.st_uid}"
    if status.st_uid != who.user:
        mine = f", this process runs as {who.user}" if who.user >= 0 else ""
        return Unusable(
            f"not ours alone: {owner}{mine}", f"chown {max(who.user, 0)} {_quoted(path)}"
        )
    why = who.privilege or "that may be anybody's name (user_namespaces(7))"
    return Unusable(f"not root's alone: {owner}, and of this process {why}", BUILD)


def mode_for(original: int, image: int) -> int:
    """The mode of an image, so that nobody can read what they cannot read of the original.

    Args:
        original: the open file that it is made of.
        image: the open image, whose group becomes the original's where that is allowed.
    """
    status = os.fstat(original)
    group, other = status.st_mode >> 3 & 5, status.st_mode & 5
    if not _is_reached_by_others(original):
        group = other = 0
    if os.fstat(image).st_gid != status.st_gid:
        try:
            os.fchown(image, -1, status.st_gid)
        except ours(OSError):  # its members are others then, and others its members
            group = other = group & other
    return 0o500 | group << 3 | other


def _is_reached_by_others(fd: int) -> bool:
    """Whether the mode is all that keeps other users from a file: no list says more (acl(5)), and
    none of the directories above it does, nor a file system that is its user's alone. What cannot
    be looked at may."""
    try:
        os.getxattr(fd, _ACCESS_LIST)
        return False
    except ours(OSError) as error:
        if error.errno not in _NO_LIST:
            return False
    try:
        where = os.path.dirname(os.readlink(f"/proc/self/fd/{fd}"))
        at = _core.opened(os.open, where, _ABOVE)
        devices = {os.stat("/").st_dev}
    except ours(OSError):
        return False
    try:
        for _ in range(_DEEPEST):
            status = os.fstat(at)
            if not status.st_mode & stat.S_IXOTH:
                return False
            if status.st_dev not in devices:
                if _is_fuse(at) and not _lets_others_in(at):
                    return False
                devices.add(status.st_dev)
            at = _go_up(at)
            if _identity(os.fstat(at)) == _identity(status):
                return True
        return False
    except ours(OSError):
        return False
    finally:
        at.close()


def _lets_others_in(fd: int) -> bool:
    mount = mounts.of(fd)
    return mount is not None and (not _mounted_by(mount) or "allow_other" in mount.options)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
