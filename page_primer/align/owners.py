"""Refuse a file that other users could exchange while it is rewritten, or whose code they write.

Whoever can write to the directory of a file, or to one above it, can put another file or a link in
its place, and in the place of the new one, at any moment: root would read, write and execute what
they choose. As with images, that is seen from below (images/trust.py), and what is executed for a
trial has to be root's own, or the user's.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import stat
from typing import TYPE_CHECKING

from page_primer.align.original import Refused
from page_primer.images import trust
from page_primer.kernel import credentials

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOTS = "a file of root's belongs where root alone can write"
_PLACE = os.O_PATH | os.O_CLOEXEC
_MOST_LINKS = 40  # on one way, as in the kernel (path_resolution(7))


class Exposed(Refused):
    """Others could exchange the file, or write to it; `remedy` says what to do, and as whom."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.remedy = remedy


def check_place(file: int, directory: int, who: credentials.Credentials | None = None) -> None:
    """Raise Exposed where others could exchange a file. A user other than root may have their own
    file where they like: nobody there makes them do more than they can be made to do anyway.

    Args:
        file: open.
        directory: the one that it is in, open.
        who: is to rewrite it: by default this process.
    """
    who, status = who or credentials.read(), os.fstat(file)
    if _is_own(who, status):
        return
    # In a sticky one (/tmp) nobody can rename what belongs to root or to us.
    sticky = os.fstat(directory).st_mode & stat.S_ISVTX and status.st_uid in who.trusted
    try:
        trust.check_directory(directory, who, above=bool(sticky))
    except trust.Unusable as why:
        text = f"others could exchange it: its directory is {why}"
        raise Exposed(text, _remedy(who, status, why.remedy)) from why


def check_code(file: int, who: credentials.Credentials | None = None) -> None:
    """Raise Exposed where executing an open file would execute what others write.

    Args:
        file: open.
        who: is to execute it: by default this process.
    """
    who, status = who or credentials.read(), os.fstat(file)
    if _is_own(who, status) or trust.is_trusted(status, who.trusted):
        return
    others = "others" if status.st_uid in who.trusted else f"user {status.st_uid}"
    text = f"it would be executed, and {others} can write to it"
    raise Exposed(text, _remedy(who, status, f"chmod go-w {shlex.quote(_path(file))}"))


def before_root(path: str) -> str:
    """What is to be done before root aligns a file; nothing where root would, or where this user
    cannot see that."""
    root = credentials.Credentials(credentials.ROOT)
    above, name = os.path.split(os.path.realpath(path))
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        directory = os.open(above, os.O_DIRECTORY | _PLACE)
        opened.callback(os.close, directory)
        file = os.open(name, os.O_NOFOLLOW | _PLACE, dir_fd=directory)
        opened.callback(os.close, file)
        try:
            check_place(file, directory, root)
            check_code(file, root)
        except Exposed as why:
            return why.remedy
    return ""


def instead(path: str) -> str:
    """How a file can be replaced that this user, not root, cannot replace."""
    try:
        if os.stat(path).st_uid == os.geteuid():
            return "its directory must be its owner's, too, or the file root's"
    except OSError:
        pass
    return before_root(path) or "run this as root"


def check_program(path: str) -> None:
    """Raise Refused where root would execute a program that others write, or could exchange: it, or
    a directory or link on the way to it.

    Raises:
        OSError: it is not there.
    """
    if credentials.read().user != credentials.ROOT:
        return
    for file, directory, is_last in _way(path):
        try:
            check_place(file, directory)
        except Refused as why:
            if is_last:
                raise
            raise Refused(f"{_path(file)} leads there, and {why}") from why
        if is_last:
            check_code(file)


def _way(path: str) -> Iterator[tuple[int, int, bool]]:
    """What a path leads through, directories and links, and last what it names: each open, with the
    directory that it is in, and whether it is the last."""
    left, links = _names(path), 0
    directory = os.open("/" if path.startswith("/") else ".", os.O_DIRECTORY | _PLACE)
    try:
        while left:
            file = os.open(left.pop(), os.O_NOFOLLOW | _PLACE, dir_fd=directory)
            try:
                is_link = stat.S_ISLNK(os.fstat(file).st_mode)
                yield file, directory, not left and not is_link
                if not is_link:
                    os.dup2(file, directory, inheritable=False)
                    continue
                links += 1
                if links > _MOST_LINKS:
                    raise Refused("too many links lead there")
                target = os.readlink("", dir_fd=file)
            finally:
                os.close(file)
            left += _names(target)
            if target.startswith("/"):
                os.close(directory)
                directory = os.open("/", os.O_DIRECTORY | _PLACE)
    finally:
        os.close(directory)


def _names(path: str) -> list[str]:
    """The parts of a path, the first one last."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def _is_own(who: credentials.Credentials, status: os.stat_result) -> bool:
    return who.user not in (credentials.ROOT, -1) and status.st_uid == who.user


def _remedy(who: credentials.Credentials, status: os.stat_result, command: str | None) -> str:
    """What to do about a file.

    Args:
        who: is to rewrite it.
        status: the file's.
        command: `chmod go-w PATH` or `chown USER PATH`, of what is not as it should be.
    """
    if status.st_uid not in who.trusted:
        owner = status.st_uid
        if not _is_one_user(owner):
            return f"its owner has no name here ({owner} is anybody's): run this where it has one"
        return f"run this as its owner: {_as(owner)} (in a Dockerfile: USER {owner})"
    verb, *_, path = shlex.split(command or "") or ("", "")
    as_root = "then `page-primer ...` as root"
    if verb == "chmod":
        return f"`{command}`, {as_root}"
    if verb == "chown":
        with contextlib.suppress(OSError):
            place = os.stat(path)
            if not _is_one_user(place.st_uid):
                return _ROOTS
            # With its group, which that user could not keep otherwise.
            give = f"chown -R {place.st_uid}:{place.st_gid} {shlex.quote(path)}"
            return (
                f"`chown 0 {shlex.quote(path)}`, {as_root}; or `{give}`, then `{_as(place.st_uid)}`"
            )
    return _ROOTS


def _is_one_user(user: int) -> bool:
    """Whether an id is one user's here, who could do something (user_namespaces(7))."""
    return credentials.has_all_ids() or user in credentials.Credentials(user).trusted


def _as(owner: int) -> str:
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"#{owner}"
    return f"sudo -u {shlex.quote(name)} page-primer ..."
