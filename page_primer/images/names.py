"""The names of images and anchors in a store: what identifies content and layout, so that the same
name is the same bytes."""

from __future__ import annotations

import os
import sys

from page_primer.elf.objects import Source

# Part of an image's name in the store: raise it when what layout.py writes changes.
LAYOUT_VERSION = 4
ANCHOR = "anchor"  # ends the name of one (anchors.py)
_HEXADECIMAL = set("0123456789abcdef")


def of(source: Source, *layout: str) -> str:
    """The name of a file's image or anchor with a layout."""
    return "-".join([f"{LAYOUT_VERSION}", *identity(source), *layout])


def as_libpython(name: str) -> str:
    """A folder's name for a program's file that profilers shall take for its libpython: they know
    one by its path, some by any part of it."""
    return "libpython{}.{}.so-{}".format(*sys.version_info[:2], name)


def _plain(name: str) -> str:
    """What as_libpython() was given, if it was."""
    return name.partition(".so-")[2] if name.startswith("libpython") else name


def is_name(name: str) -> bool:
    """Whether a name is one that of() or as_libpython() gives, in any version."""
    version, *numbers = _plain(name).split("-")
    if not version.isascii() or not version.isdigit():
        return False
    if numbers[-1:] == [ANCHOR]:
        numbers[-1:] = "0", "r"
    return (
        len(numbers) == 8
        and all(numbers)
        and all(map(_HEXADECIMAL.issuperset, numbers[:-1]))
        and (_HEXADECIMAL | set("rxh.")).issuperset(numbers[-1])
    )


def belongs_to(name: str, path: str) -> bool:
    """Whether an image's name is of the file that is at `path` now."""
    try:
        source = Source.of(path, os.stat(path))
    except OSError:
        return False
    _, *numbers = _plain(name).split("-")
    return numbers[:5] == identity(source)


def identity(source: Source) -> list[str]:
    """What tells a file's content, as parts of a name."""
    numbers = (source.device, source.inode, source.size, source.mtime_ns, source.ctime_ns)
    return [f"{number:x}" for number in numbers]
