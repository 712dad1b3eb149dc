"""Limits of this process, asked for before they are met."""

from __future__ import annotations

import errno
import os

from page_primer import _core
from page_primer._lean import ours


def soft_limit(resource: int) -> int | None:
    """The soft limit in force; None where there is none, or a sandbox keeps us from asking."""
    try:
        return _core.limit(resource)
    except ours(OSError):
        return None


def check_file_size(size: int) -> None:
    """RLIMIT_FSIZE is enforced by a signal, which a host that embeds Python may not ignore: so ask.

    Raises:
        OSError: EFBIG, as write(2) would say where SIGXFSZ is ignored.
    """
    limit = soft_limit(_core.RLIMIT_FSIZE)
    if limit is not None and size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
