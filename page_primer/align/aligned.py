"""Whether a file is aligned, and which files were: what priming and the doctor ask, so without
imports that cost anything.

The paths of aligned files are kept in a list, one a line, so that it can be said when an upgrade
has replaced one.
"""

from __future__ import annotations

import os

from page_primer._lean import ours

VARIABLE = "PAGE_PRIMER_ALIGNED"
SYSTEM_LIST = "/var/lib/page-primer/aligned"
_PAGE = 4096  # the smallest; what ends in one can be followed by what begins in the next


def is_aligned(headers: bytes, pmd: int, *, fixed: bool = False) -> bool:
    """Whether the loader maps a span with whole huge pages of code so that they can be huge.

    Args:
        headers: the program header table.
        pmd: the huge page size.
        fixed: whether it is an ET_EXEC, of which the addresses are known without p_align.
    """
    return aligned_span(headers, pmd, fixed=fixed) is not None


def aligned_span(headers: bytes, pmd: int, *, fixed: bool = False) -> tuple[int, int] | None:
    """The addresses of the span that is_aligned() is about: the longest executable run of PT_LOADs
    that are adjacent in memory and in the file, at a multiple of the huge page size; None where
    there is none with a whole huge page."""
    # Not where a command is only started, and the list looked at.
    from page_primer.elf.file import PF_R, PF_W, PF_X, PROGRAM_HEADER, PT_LOAD, ProgramHeader

    best: tuple[int, int] | None = None
    start = end = delta = 0
    largest = 0
    whole = len(headers) // PROGRAM_HEADER.size * PROGRAM_HEADER.size
    for header in ProgramHeader.parse_table(headers[:whole]):
        if header.p_type != PT_LOAD:
            continue
        largest = max(largest, header.p_align)
        distance = header.p_vaddr - header.p_offset
        if header.p_flags & (PF_R | PF_W | PF_X) != PF_R | PF_X or distance % pmd:
            end = 0
            continue
        if not end or header.p_vaddr & -_PAGE > end or distance != delta:
            start, delta = header.p_vaddr & -_PAGE, distance
        end = -(-header.file_end // _PAGE) * _PAGE
        low, high = -(-start // pmd) * pmd, end // pmd * pmd
        if low < high and (best is None or end - start > best[1] - best[0]):
            best = start, end
        if header.p_memsz > header.p_filesz:
            end = 0
    return best if fixed or largest >= pmd else None


def list_file() -> str:
    """Where the list is kept."""
    if named := os.environ.get(VARIABLE):
        return named
    if os.geteuid() == 0:
        return SYSTEM_LIST
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "page-primer", "aligned")


def all_listed(name: str | None = None) -> list[str]:
    """The paths in the list; nothing where there is no list, or it cannot be read.

    Without a name the system's list and the user's are read as one.
    """
    names = [name] if name else list(dict.fromkeys([list_file(), SYSTEM_LIST]))
    if not name and os.environ.get(VARIABLE):
        names = [list_file()]
    found: list[str] = []
    for each in names:
        try:
            with open(each, encoding="utf-8", errors="surrogateescape") as file:
                found += [line.rstrip("\n") for line in file]
        except ours(OSError):
            continue
    return [path for path in dict.fromkeys(found) if path.startswith("/")]


def listed(path: str) -> bool:
    """Whether a file is one that was aligned: if it is no longer, something has replaced it."""
    return os.path.realpath(path) in all_listed()


def change_list(path: str, *, listed: bool) -> None:
    """Put a path into the list, or take it out, in one step for whoever reads it. A list that is
    no regular file (/dev/null) is none, and stays what it is.

    Raises:
        OSError: the list cannot be written.
    """
    import fcntl  # a library to load, which processes that are primed do without

    name = list_file()
    if os.path.exists(name) and not os.path.isfile(name):
        return
    directory = os.path.dirname(name) or "."
    os.makedirs(directory, mode=0o755, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        paths = all_listed(name)
        if (path in paths) == listed or "\n" in path:
            return
        paths = [*paths, path] if listed else [other for other in paths if other != path]
        new = f"{name}.new"
        with open(new, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write("".join(f"{each}\n" for each in paths))
        os.replace(new, name)
    finally:
        os.close(lock)
