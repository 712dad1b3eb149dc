"""Align one file, look at one, undo one."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

from page_primer.align import memory, owners, replace, rewrite, trial, verify
from page_primer.align.aligned import aligned_span
from page_primer.align.layout import Layout, Span, best_span, covered, lay_out
from page_primer.align.original import Original, Refused, read
from page_primer.elf import file as elf
from page_primer.elf.file import ProgramHeader

# What a file is, in the table's words.
ALIGNED = "aligned"  # by us
SHIPPED = "aligned as shipped"
CAN_BE = "can be aligned"
TOO_SMALL = "no whole huge page of code"
REFUSED = "refused"

_MUSL = "musl's loader does not align libraries"
_ANOTHER_SIZE = "aligned for huge pages of another size: undo that first"


@dataclass(frozen=True)
class State:
    """What is known of one file. Sizes in bytes: `before` and `after` are code on whole huge pages,
    as it was shipped (at the best load address) and aligned."""

    path: str
    state: str
    reason: str = ""
    span: int = 0
    chunks: int = 0
    code: int = 0
    before: int = 0
    after: int = 0

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def pmd_size() -> int:
    """The size of a huge page, 2 MiB where the kernel does not say."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 2 << 20


def look(path: str, *, merge: bool = True) -> State:
    """What a file is, and what aligning it would give. Never raises for what the file is.

    Args:
        path: of the file itself, no link.
        merge: whether read-only data may be joined to code.
    """
    try:
        with replace.opened(path) as fd:
            original = read(fd)
            state = _state(path, fd, original)
            if state.state == CAN_BE:
                replace.check_replaceable(fd)
                _plan(path, original, merge)
            return state
    except Refused as why:
        return State(path, REFUSED, str(why))
    except OSError as error:
        return State(path, REFUSED, error.strerror or str(error))


def _state(path: str, fd: int, original: Original) -> State:
    pmd, code = pmd_size(), original.code_ranges()
    size = sum(end - start for start, end in code)
    before = _strictly_covered(original.loads, code, pmd)
    span = _aligned_as_is(original, pmd)
    if span is not None:
        chunks = range(-(-span[0] // pmd) * pmd, span[1] // pmd * pmd, pmd)
        after = covered(code, chunks)
        ours = rewrite.read_record(fd)
        if ours is not None:
            programs = rewrite.original_programs(fd, ours)
            loads = [program for program in programs if program.p_type == elf.PT_LOAD]
            before = _strictly_covered(loads, code, pmd)
        state = ALIGNED if ours else SHIPPED
        return State(path, state, "", span[1] - span[0], len(chunks), size, before, after)
    best = best_span(original, pmd)
    if best is None:
        return State(path, TOO_SMALL, "", 0, 0, size, before, before)
    chunks = best.chunks(pmd)
    after = max(before, covered(code, chunks))
    return State(path, CAN_BE, "", best.end - best.start, len(chunks), size, before, after)


def _aligned_as_is(original: Original, pmd: int) -> tuple[int, int] | None:
    table = b"".join(program.pack() for program in original.programs)
    span = aligned_span(table, pmd, fixed=original.header.e_type == elf.ET_EXEC)
    best = best_span(original, pmd)
    if span is None or best is None:
        return None
    # All that could be had, or there is something left to do.
    code = original.code_ranges()
    chunks = range(-(-span[0] // pmd) * pmd, span[1] // pmd * pmd, pmd)
    return span if covered(code, chunks) >= covered(code, best.chunks(pmd)) else None


def _strictly_covered(loads: list[ProgramHeader], code: list[tuple[int, int]], pmd: int) -> int:
    """Bytes of code that have whole huge pages as segments are: mapping by mapping, where address
    and offset agree."""
    total = 0
    for load in loads:
        if load.executable and not load.writable and not (load.p_vaddr - load.p_offset) % pmd:
            chunks = range(-(-load.p_vaddr // pmd) * pmd, load.file_end // pmd * pmd, pmd)
            total += covered(code, chunks)
    return total


def _plan(path: str, original: Original, merge: bool) -> tuple[Span, Layout]:
    """Decide, or raise Refused."""
    if any(name.startswith("libc.musl") for name in original.needed) and not original.interpreter:
        raise Refused(_MUSL)
    trial.check(original, path)
    if rewrite.read_record(original.fd) is not None:
        raise Refused(_ANOTHER_SIZE)
    pmd = pmd_size()
    span = best_span(original, pmd)
    if span is None:
        raise Refused(TOO_SMALL)
    return span, lay_out(original, span, pmd, merge=merge)


def align(path: str, *, python: str | None, merge: bool = True) -> str | None:
    """Align a file that look() says can be.

    Args:
        path: of the file itself, no link.
        python: the interpreter to try a library with.
        merge: whether read-only data may be joined to code.

    Returns:
        What there is to be said of it, if anything.

    Raises:
        Refused: it was left as it is.
        OSError: it was left as it is.
    """
    notes = []
    with replace.to_replace(path) as old:
        owners.check_code(old.fd)
        original = read(old.fd)
        _, layout = _plan(old.path, original, merge)
        status = os.fstat(old.fd)
        if status.st_nlink > 1:
            notes.append(f"its {status.st_nlink - 1} other hard links keep the old file")
        with replace.beside(old.path) as new:
            with new.writable() as target:  # until then it cannot be executed
                rewrite.write(original, layout, target, pmd_size())
                _check(old.fd, target)
                replace.copy_attributes(old.fd, target)
                os.fsync(target)
            if (untried := trial.run(original, old.path, new.path, python)) is not None:
                notes.append(untried)
            if (small := memory.missing(new.path)) is not None:
                notes.append(small)
            finish(new, old, status)
    return "; ".join(notes) or None


def _check(old: int, new: int) -> None:
    with (
        open(old, "rb", buffering=0, closefd=False) as before,
        open(new, "rb", buffering=0, closefd=False) as after,
    ):
        verify.check(io.BufferedReader(before), io.BufferedReader(after), pmd_size())
    record = rewrite.read_record(new)
    if record is None:
        raise Refused("the new file failed its check (record)")
    rewrite.restore(new, record)


def finish(new: replace.New, old: replace.Old, status: os.stat_result) -> None:
    """Put the new file in the place of the old one, if that is as it was.

    Raises:
        Refused, OSError: it was left as it is.
    """
    now = os.fstat(old.fd)
    if (now.st_size, now.st_mtime_ns, now.st_ctime_ns) != (
        status.st_size, status.st_mtime_ns, status.st_ctime_ns,
    ):  # fmt: skip
        raise Refused("was changed while it was being rewritten")
    os.utime(new.fd, ns=(status.st_atime_ns, status.st_mtime_ns))
    replace.put_in_place(new, old)


def check_place(path: str, *, executed: bool = False) -> None:
    """Raise what undo(), or align(), of which the trial executes the file, would say of where it
    lies and of whose it is."""
    with replace.to_replace(path) as old:
        if executed:
            owners.check_code(old.fd)


def can_be_undone(path: str) -> bool:
    """Whether a file has the record of its original, whatever else it is on this machine: it may
    have been aligned for huge pages of another size."""
    try:
        with replace.opened(path) as fd:
            return rewrite.read_record(fd) is not None
    except (Refused, OSError):
        return False


def has_no_record(path: str) -> bool:
    """Whether a file was looked at, or is gone, and there is no record of an original."""
    try:
        with replace.opened(path) as fd:
            return rewrite.read_record(fd) is None
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (Refused, OSError):
        return False


def undo(path: str) -> None:
    """Put the original back.

    Raises:
        Refused: the file is not one that align() has written, or was changed since.
        OSError: it was left as it is.
    """
    with replace.to_replace(path) as old:
        record = rewrite.read_record(old.fd)
        if record is None:
            raise Refused("was not aligned by page-primer")
        status = os.fstat(old.fd)
        with replace.beside(old.path) as new:
            with new.writable() as target:
                rewrite.restore(old.fd, record, target)
                os.ftruncate(target, record.size)
                replace.copy_attributes(old.fd, target)
                os.fsync(target)
            finish(new, old, status)
