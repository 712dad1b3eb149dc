"""Which processes have an image mapped, as far as this one may look."""

from __future__ import annotations

import os

from page_primer._lean import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def find(names: Iterable[str]) -> dict[str, list[int]]:
    """The processes that have something of an image's folder mapped, by the folder's name: in
    another container the path before it may be another."""
    parts = {name: os.fsencode(f"/{name}/") for name in names}
    found: dict[str, list[int]] = {name: [] for name in parts}
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        with suppress(OSError), open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
            text = file.readall()
            for name, part in parts.items():
                if part in text:
                    found[name].append(pid)
    return found
