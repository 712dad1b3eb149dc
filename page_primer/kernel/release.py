"""The running kernel's version."""

from __future__ import annotations

import os
import sys

from page_primer._lean import ours


def release() -> tuple[int, int]:
    """The running kernel's version, as in (6, 1). Where a sandbox keeps us from asking it is taken
    for the newest: what it gives is seen in smaps anyway."""
    try:
        name = os.uname().release
    except ours(OSError):
        return sys.maxsize, 0
    numbers = "".join(c if c.isdecimal() else " " for c in name)
    major, minor, *_ = *numbers.split(), 0, 0
    return int(major), int(minor)
