"""How the interpreter is laid out, how much of its code each backing can put on huge pages, and
which backing prime() would take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from page_primer import plan, reasons
from page_primer.backing import image as image_backing
from page_primer.doctor.alignment import IN_PLACE_EVERYWHERE
from page_primer.doctor.directories import image_fix
from page_primer.doctor.findings import INFO, OK, PROBLEM, WARNING, Check
from page_primer.doctor.probes import Trial
from page_primer.doctor.remedies import REMEDIES, REMEDY_LINES
from page_primer.elf.file import PF_R
from page_primer.elf.objects import Object, Region
from page_primer.images import inventory, trust
from page_primer.images.trust import Unusable
from page_primer.kernel import credentials, mounts
from page_primer.kernel.mounts import mount_of
from page_primer.options import IN_PLACE, Options
from page_primer.plan import Move, Plan
from page_primer.reasons import Reason
from page_primer.survey import Survey
from page_primer.words import mib, percent

_PLENTY = 0.9  # share of the interpreter's code that is worth no remark


@dataclass(frozen=True)
class SegmentLayout:
    """A PT_LOAD in memory, in whole pages."""

    address: int
    size: int  # bytes
    kind: str  # "code", "rodata" or "data"


@dataclass(frozen=True)
class Coverage:
    """How much of the interpreter's code a backing can put on huge pages."""

    huge_bytes: int
    share: float
    left: dict[Reason, int]  # bytes of code left on small pages


@dataclass(frozen=True)
class Interpreter:
    """How the object that holds the interpreter is laid out, and what can be made of that."""

    path: str
    kind: str
    filesystem: str
    segments: tuple[SegmentLayout, ...]
    span: tuple[int, int]  # addresses: the read-only PT_LOADs around the code
    pmd_size: int  # bytes
    phase: int  # load address modulo pmd_size
    huge_pages: int  # whole ones inside the span
    code_bytes: int
    copied_bytes: int  # what its image takes
    image: Coverage
    memory: Coverage  # with memfd, anonymous memory and hugetlb
    in_place: Coverage  # by the file's own pages, where the loader mapped them
    aligned: bool  # in place as much as with a copy
    already: bool  # and these pages are huge now
    problem: Reason | None  # why it cannot be moved at all

    def as_dict(self) -> dict[str, Any]:
        """The layout as plain data, ready for json.dumps()."""
        return asdict(self)


def has_directory(options: Options) -> bool:
    """Whether files can be written for anchors, as far as permissions tell."""
    who = credentials.read()
    if who.user not in who.trusted:
        return False
    for place in image_backing.directories(options):
        there = place.path
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        with contextlib.suppress(OSError, Unusable):  # a symbolic link to nothing
            fd = os.open(there, inventory.DIRECTORY)
            try:
                trust.check_directory(fd, who, above=there != place.path)
                if os.access(there, os.W_OK):
                    return True
            finally:
                os.close(fd)
    return False


def in_memory(move: Move, anchors: bool) -> Sequence[Region]:
    return (move.signed if anchors else ()) or move.memory


def describe(found: Survey, planned: Plan, anchors: bool = False) -> Interpreter:
    obj = next(obj for obj in found.objects if obj.interpreter)
    already = any(move.object is obj for move in planned.already)
    move = next((move for move in (*planned.already, *planned.moves) if move.object is obj), None)
    left = {
        part.reason: 0 for part in planned.remainders if part.object is obj and part.kind == "code"
    }
    nothing = Coverage(0, 0.0, dict.fromkeys(left, obj.code_bytes))
    if move:
        nothing = Coverage(0, 0.0, {obj.problem or reasons.NOT_CONGRUENT: obj.code_bytes})
    replaceable = move is not None and bool(move.image)
    code = next(segment for segment in obj.segments if segment.code)
    span = next((span for span in obj.spans() if code in span), (code,))
    start, end = span[0].start, span[-1].end
    pmd = found.pmd_size
    low, high = Region(start, end, PF_R).huge(pmd) if pmd else (0, 0)
    return Interpreter(
        path=obj.path,
        kind=_kind(obj),
        filesystem=mount_of(os.path.realpath(obj.path), mounts.read()).filesystem,
        segments=tuple(SegmentLayout(s.start, s.end - s.start, s.kind) for s in obj.segments),
        span=(start, end),
        pmd_size=pmd,
        phase=obj.start % pmd if pmd else 0,
        huge_pages=(high - low) // pmd if pmd else 0,
        code_bytes=obj.code_bytes,
        copied_bytes=move.bytes if move and replaceable else 0,
        image=coverage(obj, move.image, pmd) if move and replaceable else nothing,
        memory=coverage(obj, in_memory(move, anchors), pmd) if move and replaceable else nothing,
        in_place=coverage(obj, move.in_place, pmd) if move and move.in_place else nothing,
        aligned=move is not None and move.aligned,
        already=already,
        problem=obj.problem,
    )


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _kind(obj: Object) -> str:
    if not obj.main:
        return "shared libpython" if _name(obj.path).startswith("libpython") else "shared library"
    return "static, ET_EXEC" if obj.fixed else "static, PIE"


def coverage(obj: Object, regions: Sequence[Region], pmd: int) -> Coverage:
    """How much of an object's code is on huge pages once `regions` have moved, and what keeps the
    rest; the two add up to its code."""
    left: dict[Reason, int] = {}
    if not regions:
        left = {reasons.PROFILERS_HEAD: obj.code_bytes}  # a move has no memory only for that reason
    else:
        code = [part for s in obj.segments if s.code for part in s.measured]
        for part in plan.explain(obj, regions, pmd):
            for low, high in code if part.kind == "code" else ():
                size = min(part.end, high) - max(part.start, low)
                if size > 0:
                    left[part.reason] = left.get(part.reason, 0) + size
    huge = obj.code_bytes - sum(left.values())
    return Coverage(huge, huge / obj.code_bytes if obj.code_bytes else 0.0, left)


def judge_interpreter(found: Interpreter, options: Options) -> Check:
    """What share of the interpreter's code can be on huge pages, and what keeps the rest."""
    text = (
        f"{_name(found.path)}: {found.kind} on {found.filesystem or 'an unknown file system'}, "
        f"{mib(found.code_bytes)} of code"
    )
    in_memory = options.backing in ("memfd", "anonymous", "hugetlb")
    best = found.memory if in_memory else found.image
    if found.already:
        share = percent(found.in_place.huge_bytes, found.code_bytes)
        text += f"; {share} of it is on huge pages of its own file already"
        return Check("interpreter", OK, text)
    if found.problem == reasons.REMAPPED:
        return Check("interpreter", INFO, f"{text}, which has been moved already",
                     code="already-moved")  # fmt: skip
    if found.problem:
        text += f", which cannot be moved: {found.problem}"
        return Check("interpreter", PROBLEM, text, REMEDIES.get(found.problem), "cannot-be-moved",
                     REMEDY_LINES.get(found.problem, ()))  # fmt: skip
    if not options.remap or set(best.left) == {reasons.EXCLUDED}:
        text += f", left alone: {', '.join(best.left)}"
        return Check("interpreter", INFO, text, code="left-alone")
    if found.aligned:
        text += "; its own pages can be huge, without a copy"
    if options.backing == IN_PLACE:
        return _judge_in_place(text, found)
    if not in_memory:
        text += (
            f"; an image can put {percent(best.huge_bytes, found.code_bytes)} of it on huge pages"
        )
    if in_memory or found.memory != found.image:
        share = percent(found.memory.huge_bytes, found.code_bytes)
        text += f"; memory without a file's name {share}"
    left = [f"{mib(size)}: {why}" for why, size in best.left.items()]
    if left:
        text += f" ({', '.join(left)})"
    if best.share >= _PLENTY:
        return Check("interpreter", OK, text)
    if found.phase and reasons.NO_CHUNK in best.left:
        text += f"; its load address is not {mib(found.pmd_size)} aligned, which costs coverage"
    fix = _coverage_fix(found, best, options)
    # Short of full is the nature of a small interpreter, unless something can be done about it.
    status = PROBLEM if not best.huge_bytes else WARNING if fix or found.phase else INFO
    return Check("interpreter", status, text, fix, "low-coverage")


def _judge_in_place(text: str, found: Interpreter) -> Check:
    """Of the backing in_place alone."""
    huge = found.in_place.huge_bytes
    text += f"; in place {percent(huge, found.code_bytes)} of it can be on huge pages"
    if huge:
        return Check("interpreter", OK, text)
    why = reasons.NOT_CONGRUENT
    return Check("interpreter", PROBLEM, f"{text}: {why}", REMEDIES[why], "not-congruent")


def _coverage_fix(found: Interpreter, best: Coverage, options: Options) -> str | None:
    if reasons.NO_CHUNK in best.left and not options.merge:
        return "PAGE_PRIMER_MERGE=1"
    return REMEDIES[reasons.PROFILERS_HEAD] if reasons.PROFILERS_HEAD in best.left else None


def judge_backing(
    trials: Sequence[Trial], found: Interpreter, options: Options, kernel: tuple[int, int]
) -> Check:
    """What prime() would take of what was tried."""
    if not options.remap:
        return Check("backing", INFO, "none: remap is off", code="remap-off")
    if found.already:
        share = percent(found.in_place.huge_bytes, found.code_bytes)
        text = f"already: {share} of the interpreter's code is on huge pages, nothing is copied"
        return Check("backing", OK, text)
    if found.problem or set(found.image.left) == {reasons.EXCLUDED}:
        return Check("backing", INFO, "none: the interpreter is left alone", code="left-alone")
    if options.backing == IN_PLACE:
        return _judge_backing_in_place(found, kernel)
    first = "in place first, where the kernel can; then " if found.aligned else ""
    works = [trial for trial in trials if trial.works]
    if not works:
        return Check("backing", PROBLEM, "none works here: code stays where it is",
                     code="no-backing")  # fmt: skip
    for trial in works:
        expected = found.image if trial.backing == "image" else found.memory
        if not expected.huge_bytes:
            continue
        share = percent(expected.huge_bytes, found.code_bytes)
        where = f" in {trial.where}" if trial.backing == "image" else ""
        text = (
            f"{first}{trial.backing}{where}, with {share} of the interpreter's code on huge pages"
        )
        if options.backing != "auto" or trial.backing == "image":
            return Check("backing", OK, text)
        text += "; profilers lose the symbols of what is moved, which an image keeps"
        return Check("backing", WARNING, text, image_fix(kernel), "memory-only")
    fix = next((REMEDIES[why] for why in found.memory.left if why in REMEDIES), None)
    names = ", ".join(trial.backing for trial in works)
    why = ", ".join(found.memory.left)
    text = f"{names} works, but there is nothing to move: {why}"
    return Check("backing", PROBLEM, text, fix, "nothing-to-move")


def _judge_backing_in_place(found: Interpreter, kernel: tuple[int, int]) -> Check:
    """Not tried: that would change the pages of this process's own code."""
    if not found.in_place.huge_bytes:
        why = reasons.NOT_CONGRUENT
        text = f"in_place works for no code of the interpreter: {why}"
        return Check("backing", PROBLEM, text, REMEDIES[why], "not-congruent")
    share = percent(found.in_place.huge_bytes, found.code_bytes)
    text = f"in_place, with up to {share} of the interpreter's code on huge pages"
    if kernel >= IN_PLACE_EVERYWHERE or (found.filesystem == "tmpfs" and kernel >= (6, 1)):
        return Check("backing", OK, text)
    where = found.filesystem or "this file system"
    text += (
        ", if the page cache has huge pages of it: Linux {}.{} makes none of small ones on {}, "
        "unless built with CONFIG_READ_ONLY_THP_FOR_FS".format(*kernel, where)
    )
    return Check("backing", WARNING, text, "page-primer warm", "page-cache-decides")
