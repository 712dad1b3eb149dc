"""The running kernel's version."""

from __future__ import annotations

import os


def release() -> tuple[int, int]:
    """The running kernel's version, as in (6, 1)."""
    numbers = "".join(c if c.isdecimal() else " " for c in os.uname().release)
    major, minor, *_ = *numbers.split(), 0, 0
    return int(major), int(minor)
