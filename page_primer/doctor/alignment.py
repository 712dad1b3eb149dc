"""The check of the interpreter's file: whether the loader itself places its code so that it can be
on huge pages, in every process and without a copy."""

from __future__ import annotations

import os
from dataclasses import dataclass

from page_primer.align import files, owners
from page_primer.align.aligned import listed
from page_primer.doctor.findings import INFO, OK, WARNING, Check
from page_primer.words import counted, mib

_ALIGNED = (files.ALIGNED, files.SHIPPED)
GLIBC_ALIGNS = (2, 35)  # libraries; before, p_align beyond a page was ignored
GLIBC_TUNABLE = (2, 44)
_MUCH = 0.1  # of the code: what more on huge pages than by a copy is a shortfall
IN_PLACE_EVERYWHERE = (7, 2)  # MADV_COLLAPSE of file mappings, with large folios


@dataclass(frozen=True)
class Alignment:
    """What is known of the interpreter's file, and of what loads it."""

    path: str
    state: str  # as align.files.look() has it
    reason: str = ""
    chunks: int = 0  # whole huge pages that its span has, or would have
    share: float = 0.0  # of its code, what that puts on huge pages
    listed: bool = False  # recorded as aligned
    huge: bool = False  # its own pages are huge now, in this process
    program: bool = False  # mapped by the kernel rather than by the loader
    libc: str = ""  # "glibc", "musl"
    version: tuple[int, int] = (0, 0)  # of glibc
    by: str = ""  # who may replace it, if that is not who asks: "root", "its owner"
    first: str = ""  # what to do before root does it, who refuses to as it is


def read(path: str, loaded: list[str], *, huge: bool, program: bool, merge: bool) -> Alignment:
    """Look at the interpreter's file.

    Args:
        path: of the object that holds the interpreter.
        loaded: the paths of all objects of the process.
        huge: whether its own pages are huge now.
        program: whether it is the main program.
        merge: whether read-only data may share a huge page with code.
    """
    path = os.path.realpath(path)
    state = files.look(path, merge=merge)
    libc, version = _libc(loaded)
    share = state.after / state.code if state.code else 0.0
    by = _by(path)
    first = owners.before_root(path) if by == "root" or (not by and os.geteuid() == 0) else ""
    return Alignment(
        path, state.state, state.reason, state.chunks, share, listed(path), huge, program,
        libc, version, by, first,
    )  # fmt: skip


def _by(path: str) -> str:
    try:
        owner = os.stat(path).st_uid
    except OSError:
        return ""
    if owner not in (0, os.geteuid()):
        return "its owner"  # root executes nobody else's code, and so does not align it
    writable = os.geteuid() == 0 or os.access(os.path.dirname(path), os.W_OK)
    return "" if writable else "root"


def _libc(loaded: list[str]) -> tuple[str, tuple[int, int]]:
    if any(os.path.basename(path).startswith(("ld-musl", "libc.musl")) for path in loaded):
        return "musl", (0, 0)
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        major, minor, *_ = *version.split("."), 0, 0
        return name, (int(major), int(minor))
    except (OSError, ValueError):
        return "", (0, 0)


def judge_alignment(found: Alignment, kernel: tuple[int, int], pmd: int, share: float) -> Check:
    """Whether the interpreter's file is aligned, and what to do if it is not.

    Args:
        found: what read() says.
        kernel: its version.
        pmd: the size of a huge page, bytes; 0 without.
        share: of the code, what a copy can put on huge pages.
    """
    name = os.path.basename(found.path)
    if found.huge:
        return _check(OK, f"{name} is {_how(found)}, and its pages are huge now")
    if not pmd:
        return _check(INFO, f"{name}: there are no huge pages to align it for", code="no-thp")
    if found.state in _ALIGNED:
        text = f"{name} is {_how(found)}, but in memory on small pages"
        return _check(OK, text + _hints(found, kernel), "page-primer warm", code="small-pages")
    if found.listed:
        why = f" ({found.reason})" if found.reason else ""
        text = f"{name} is no longer aligned: an upgrade has replaced it{why}"
        text, fix = _mended(found, text, "page-primer align --again")
        return _check(WARNING, text, fix, code="no-longer-aligned")
    if found.state != files.CAN_BE:
        text = f"{name} cannot be aligned: {found.reason or found.state}"
        return _check(INFO, text, code="cannot-be-aligned")
    pages = f"{counted(found.chunks, 'huge page')} of {mib(pmd)}"
    text = f"{name} is not aligned; aligned, it has {pages} with code"
    if not found.program and found.libc == "musl":
        text += ", but musl's loader does not align libraries"
        return _check(INFO, text, code="musl")
    text += ", in every process and without a copy"
    status = INFO if found.share - share < _MUCH else WARNING
    text, fix = _mended(found, text + _hints(found, kernel), _align(found.path))
    return _check(status, text, fix, code="not-aligned")


def _check(status: str, text: str, fix: str | None = None, code: str | None = None) -> Check:
    return Check("alignment", status, text, fix, code)


def _how(found: Alignment) -> str:
    return found.state if found.state in _ALIGNED else "placed on a huge page boundary"


def _hints(found: Alignment, kernel: tuple[int, int]) -> str:
    """What this kernel and this C library add to it."""
    hints = []
    if kernel >= IN_PLACE_EVERYWHERE:
        hints.append(
            "Linux {}.{} makes small pages of aligned files huge in place, on every file system "
            "with large folios".format(*kernel)
        )
    glibc = "glibc {}.{}".format(*found.version)
    if found.libc == "musl" and not found.program:
        hints.append("musl's loader does not align libraries: their addresses are random")
    elif found.libc == "glibc" and found.version < GLIBC_ALIGNS and not found.program:
        hints.append(f"{glibc} does not align libraries, 2.35 and newer do")
    elif found.libc == "glibc" and found.version >= GLIBC_TUNABLE:
        hints.append(
            f"{glibc} advises huge pages for aligned files with GLIBC_TUNABLES=glibc.elf.thp=1"
        )
    return "".join(f"; {hint}" for hint in hints)


def _mended(found: Alignment, text: str, command: str) -> tuple[str, str | None]:
    """What to say, and the command, with who runs it: none where that would be refused."""
    if found.first:
        return f"{text}; to align it: {found.first}", None
    return text, f"{command}  # as {found.by}" if found.by else command


def _align(path: str) -> str:
    name = os.path.basename(path)
    ours = name.startswith(("python", "libpython"))
    return "page-primer align" if ours else f"page-primer align {path}"
