"""The directory of a store, opened or made."""

from __future__ import annotations

import errno
import os

from page_primer import _core
from page_primer._lean import ours, suppress
from page_primer.images import trust
from page_primer.images.inventory import DIRECTORY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from page_primer.kernel import credentials

_SYSTEM = "/", "/var", "/dev"  # where no directory is made


def open_or_make(path: str, who: credentials.Credentials, *, make: bool) -> _core.Descriptor:
    """Open a directory.

    Args:
        path: where it is.
        who: the credentials of this process.
        make: create it where it is missing, and its parent where that would be in our own: never a
            part of the system, nor of somebody else's home.

    Raises:
        OSError: it cannot be opened, or made.
        Unusable: others can write where it would be made, or this process must not trust what it
            would make.
    """
    parent, name = os.path.split(path)
    try:
        return _core.opened(os.open, path, DIRECTORY)
    except ours(FileNotFoundError):
        if not make:
            raise
        if who.user not in who.trusted:
            why = f"it is not there, and none can be made: {trust.UNTRUSTED}"
            raise trust.Unusable(why, trust.BUILD) from None
    except ours(NotADirectoryError):
        if os.path.isdir(parent):
            raise
        raise NotADirectoryError(errno.ENOTDIR, "its parent is not a directory") from None
    try:
        above = _core.opened(os.open, parent, DIRECTORY & ~os.O_NOFOLLOW)
    except ours(FileNotFoundError):
        above = _make_parent(parent, who)
    with above:
        # Whatever the umask: other users' profilers read images.
        return _make_in(above, name, 0o755, who, os.fchmod)


def _make_parent(path: str, who: credentials.Credentials) -> _core.Descriptor:
    grandparent, name = os.path.split(path)
    refusal = FileNotFoundError(errno.ENOENT, "its parent does not exist")
    if grandparent in _SYSTEM:
        raise refusal
    with _core.opened(os.open, grandparent, DIRECTORY & ~os.O_NOFOLLOW) as above:
        if os.fstat(above).st_uid != who.user:
            raise refusal
        return _make_in(above, name, 0o700, who)


def _make_in(
    above: int,
    name: str,
    mode: int,
    who: credentials.Credentials,
    finish: Callable[[int, int], None] | None = None,
) -> _core.Descriptor:
    """Make and open a directory in an open one that nobody else can write to."""
    trust.check_directory(above, who, above=True)
    made = False
    with suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=above)
        made = True
    fd = _core.opened(os.open, name, DIRECTORY, dir_fd=above)
    if made and finish is not None:
        finish(fd, mode)
    return fd
