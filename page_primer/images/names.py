"""The names of images and anchors in a store: what identifies content and layout, so that the same
name is the same bytes."""

from __future__ import annotations

import os
import sys

from page_primer._lean import ours
from page_primer.elf.objects import Object, Source

# Part of an image's name in the store: raise it when what layout.py writes changes.
LAYOUT_VERSION = 5
ANCHOR = "anchor"  # ends the name of one (anchors.py)
# In the names of what `page-primer build` writes: it is for files that have been copied since, by
# layers of a container, which change all but a file's content and the second of its change.
_BUILT = "built"
_WHOLE = "0x"
BUILD_ID_SIZE = 20  # bytes: that of SHA-1, which tools expect
# FNV-1a, 256 bits (RFC 9923): the first and the factor.
_FNV = 0xDD268DBCAAC550362D98C384C4E576CCC8B1536847B6BBB31023B4C8CAEE0535, (1 << 168) + 0x163
_PRIME = (1 << 89) - 1
_SECOND = 10**9  # nanoseconds
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


def as_built(name: str, source: Source, headers: bytes, *, whole: bool = False) -> str:
    """The name of the same image or anchor, as `page-primer build` gives it. It says less of the
    file, and what is found by it is compared with memory as any image is.

    Args:
        name: of() gave it.
        source: the object's file.
        headers: its program headers.
        whole: it has all of the file, for whatever regions are mapped from it. Not an
            interpreter's, from whose program headers profilers work out where that is.
    """
    plain = _plain(name)
    version, *numbers = plain.split("-")
    if numbers[5] == numbers[6]:  # 0 by chance: see placement()
        numbers[6] = "0"
    content = int.from_bytes(headers, "little") % _PRIME
    rest = [*numbers[5:-1], _WHOLE] if whole else numbers[5:]
    parts = (version, _BUILT, *_seconds(source), f"{content:x}", *rest)
    return name.removesuffix(plain) + "-".join(parts)


def _seconds(source: Source) -> tuple[str, str]:
    return f"{source.size:x}", f"{source.mtime_ns // _SECOND:x}"


def is_built(name: str) -> bool:
    """Whether an image's name is one that as_built() gives."""
    return _plain(name).split("-")[1:2] == [_BUILT]


def is_name(name: str) -> bool:
    """Whether a name is one that these functions give, in any version."""
    version, *numbers = _plain(name).split("-")
    if not version.isascii() or not version.isdigit():
        return False
    if numbers[-1:] == [ANCHOR]:
        numbers[-1:] = "0", "r"
    if built := numbers[:1] == [_BUILT]:
        del numbers[0]
    return (
        len(numbers) == (6 if built else 8)
        and all(numbers)
        and all(map(_HEXADECIMAL.issuperset, numbers[:-1]))
        and (_HEXADECIMAL | set("rxh.")).issuperset(numbers[-1])
    )


def belongs_to(name: str, path: str) -> bool:
    """Whether an image's name is of the file that is at `path` now, as far as we may see that."""
    try:
        source = Source.of(path, os.stat(path))
    except ours(OSError) as error:
        return isinstance(error, PermissionError)
    _, *numbers = _plain(name).split("-")
    if is_built(name):
        return tuple(numbers[1:3]) == _seconds(source)
    return numbers[:5] == identity(source)


def placement(obj: Object, pmd: int) -> tuple[str, str]:
    """The parts of a name that are for the huge page size and the load address modulo that. Where
    it is 0 by chance it is written as a whole huge page: the bytes are the same, their use is not.
    """
    return f"{pmd:x}", f"{pmd if obj.by_chance else obj.start % pmd:x}"


def is_transient(name: str) -> bool:
    """Whether an image's name is of a random load phase, which hardly comes again: the loader gives
    files on ext4, xfs and btrfs phase 0, and a program that is linked for one address has that."""
    _, *numbers = _plain(name).split("-")
    return len(numbers) == 8 and numbers[-1] != ANCHOR and numbers[6] != "0"


def identity(source: Source) -> list[str]:
    """What tells a file's content, as parts of a name."""
    numbers = (source.device, source.inode, source.size, source.mtime_ns, source.ctime_ns)
    return [f"{number:x}" for number in numbers]


def build_id(name: str) -> bytes:
    """The build-id of the image with a name: its alone, and the same whenever it is written."""
    # By hand: hashlib would load OpenSSL into the server for the sake of a name, and any module
    # that hashes costs a first prime a millisecond.
    digest, factor = _FNV
    for byte in name.encode(errors="surrogateescape"):
        digest = (digest ^ byte) * factor % (1 << 256)
    return digest.to_bytes(32, "big")[:BUILD_ID_SIZE]
