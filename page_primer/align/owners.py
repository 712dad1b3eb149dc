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


def check_place(file: int, directory: int) -> None:
    """Raise Refused where others could exchange a file. A user other than root may have their own
    file where they like: nobody there makes them do more than they can be made to do anyway.

    Args:
        file: open.
        directory: the one that it is in, open.
    """
    who, status = credentials.read(), os.fstat(file)
    if _is_own(who, status):
        return
    # In a sticky one (/tmp) nobody can rename what belongs to root or to us.
    sticky = os.fstat(directory).st_mode & stat.S_ISVTX and status.st_uid in who.trusted
    try:
        trust.check_directory(directory, who, above=bool(sticky))
    except trust.Unusable as why:
        text = f"others could exchange it: its directory is {why}; {_remedy(who, status)}"
        raise Refused(text) from why


def check_code(file: int) -> None:
    """Raise Refused where executing an open file would execute what others write."""
    who, status = credentials.read(), os.fstat(file)
    if _is_own(who, status) or trust.is_trusted(status, who.trusted):
        return
    others = "others" if status.st_uid in who.trusted else f"user {status.st_uid}"
    text = f"it would be executed, and {others} can write to it"
    raise Refused(f"{text}; {_remedy(who, status)}")


def check_program(path: str) -> None:
    """Raise Refused where root would execute a program that others write, or could exchange; or a
    link that names it.

    Raises:
        OSError: it is not there.
    """
    if credentials.read().user != credentials.ROOT:
        return
    link, target = os.path.abspath(path), os.path.realpath(path)
    for name in dict.fromkeys((link, target)):
        with _opened(name, os.O_NOFOLLOW) as file:
            with _opened(os.path.dirname(name), os.O_DIRECTORY) as directory:
                check_place(file, directory)
            if name == target:
                check_code(file)


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_PATH | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_own(who: credentials.Credentials, status: os.stat_result) -> bool:
    return who.user not in (credentials.ROOT, -1) and status.st_uid == who.user


def _remedy(who: credentials.Credentials, status: os.stat_result) -> str:
    owner = status.st_uid
    if owner in who.trusted:
        return "a file of root's belongs where root alone can write"
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"#{owner}"
    return f"run this as its owner: sudo -u {shlex.quote(name)} page-primer ..."
