"""Limits of this process, asked for before they are met."""

from __future__ import annotations

import errno
import os

from page_primer import _core


def check_file_size(size: int) -> None:
    """RLIMIT_FSIZE is enforced by a signal, which a host that embeds Python may not ignore: so ask.

    Raises:
        OSError: EFBIG, as write(2) would say where SIGXFSZ is ignored.
    """
    limit = _core.limit(_core.RLIMIT_FSIZE)
    if limit is not None and size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
