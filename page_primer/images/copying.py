"""Write parts of one file to another."""

from __future__ import annotations

import os

from page_primer.kernel.address_space import Window
from page_primer.kernel.thp import page_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Part = tuple[int | None, int]  # an offset in the original, or None for zeroes, and a size


def copy(original: int, parts: Sequence[Part], target: int, offset: int) -> int:
    """Copy parts of one file to one place in another, in one call: a file system that has large
    folios makes one of each aligned block that is written whole (ext4 since Linux 6.16, xfs)."""
    windows: list[Window] = []
    buffers: list[bytes | memoryview] = []
    try:
        for source, size in parts:
            if source is None:
                buffers.append(bytes(size))
            else:
                windows.append(Window(original, source, size, page_size()))
                buffers.append(windows[-1].view)
        size = sum(map(len, buffers))
        if os.pwritev(target, buffers, offset) < size:  # a signal, or little room: one by one
            at = offset
            for buffer in buffers:
                at += write_all(target, buffer, at)
        return size
    finally:
        for window in windows:
            window.close()


def write_all(fd: int, data: bytes | memoryview, offset: int) -> int:
    """Write all of `data`; returns its size."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return done
