"""The kernel's multi-generational LRU, which chooses what is reclaimed first, on and off."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["FILE", "MODES", "Unavailable", "switch"]

FILE = Path("/sys/kernel/mm/lru_gen/enabled")
MODES = {"on": ("on",), "off": ("off",), "both": ("on", "off"), None: ("",)}


class Unavailable(Exception):
    """This kernel has none (before 6.1, or without CONFIG_LRU_GEN), or it is not ours to switch."""


@contextlib.contextmanager
def switch(asked: str | None) -> Iterator[Callable[[str], None]]:
    """Give what sets one of the modes of MODES[asked], of which "" is what is set already. At the
    end, after SIGTERM and SIGHUP too, what was set before is set again.

    Raises:
        Unavailable: where not even what is set can be set.
    """
    if asked is None:
        yield lambda _: None
        return
    try:
        before = FILE.read_text().strip()
        FILE.write_text(before)
    except OSError as error:
        raise Unavailable(f"MGLRU cannot be switched here: {error}") from error

    def write(mode: str) -> None:
        # All of its components (Linux, Documentation/admin-guide/mm/multigen_lru.rst).
        FILE.write_text({"on": "y", "off": "n"}.get(mode, before))

    # As SIGINT does by itself: the setting is the whole machine's.
    handlers = {
        number: signal.signal(number, lambda number, _: sys.exit(128 + number))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield write
    finally:
        write("")
        for number, handler in handlers.items():
            signal.signal(number, handler)
