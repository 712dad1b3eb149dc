"""Try what a backing or a lock would give here, at scratch addresses, leaving nothing behind: the
doctor's evidence."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable

from page_primer import backing
from page_primer._lean import Record, replace
from page_primer.backing import image as image_backing
from page_primer.backing.pieces import Attempt, Refused, reason_of
from page_primer.elf.file import PF_R, PF_X
from page_primer.elf.objects import Object, Region, Segment
from page_primer.images import layout as image
from page_primer.images import trial
from page_primer.images.anchors import Anchors
from page_primer.images.places import Place
from page_primer.images.trust import Unusable
from page_primer.options import Options
from page_primer.plan import Move


class Trial(Record):
    """The result of trying a backing with two huge pages at a scratch address."""

    backing: str
    where: str
    wanted: int = 0  # bytes
    huge: int = 0  # bytes that smaps showed on huge pages
    refused: str | None = None  # why smaps could not be asked
    number: int | None = None  # errno of that, if known
    remedy: str | None = None  # a command
    there: bool = False  # it was an image's, not a file's that was written for it

    @property
    def works(self) -> bool:
        return 0 < self.wanted == self.huge


def _trial_move(pmd: int) -> Move:
    """The move of an object that does not exist: two huge pages of code, all of them zeroes."""
    segment = Segment(
        start=pmd, end=3 * pmd, file_end=3 * pmd, offset=0, flags=PF_R | PF_X,
        address=pmd, size=2 * pmd,
    )  # fmt: skip
    regions = (Region(pmd, 3 * pmd, PF_R | PF_X),)
    return Move(Object("", "/dev/zero", 0, b"", (segment,)), regions, regions)


def _best(name: str, where: str, attempts: Iterable[Attempt]) -> Trial:
    """Go through the attempts as swap.py does, keeping nothing."""
    best = Trial(name, where, refused="not tried")
    for attempt in attempts:
        if isinstance(attempt, Refused):
            best = replace(best, refused=attempt.reason) if best.refused else best
            continue
        try:
            if best.refused or attempt.huge > best.huge:
                best = Trial(name, where, attempt.wanted, attempt.huge)
        finally:
            attempt.discard()
        if best.works:
            break
    return best


def try_memory(name: str, pmd: int) -> Trial:
    """Try "memfd", "anonymous" or "hugetlb" at a scratch address."""
    options = Options(backing=name)
    move = _trial_move(pmd)
    return _best(
        name, name, backing.attempts(move, pmd, options, (), Anchors(move.object, 0, 0, ()))
    )


def try_image(place: Place, move: Move, pmd: int) -> Trial | None:
    """Map the image of an object, if there is one in a directory that this process need not be able
    to write to. Returns None where there is none."""
    layout = image.lay_out(move.object, move.image, pmd)
    try:
        with place.open() as directory:
            if not directory.has(layout):
                return None
            attempts = image_backing.from_store(directory, layout)
            best = _best("image", place.path, itertools.islice(attempts, 1))
            return replace(best, there=True) if best.works else None
    except (Unusable, image.CannotLayOut, OSError):
        return None  # try_directory() says why


def try_directory(place: Place, pmd: int) -> Trial:
    """Write a file of two huge pages into an image directory, map it as an image would be, and see
    what came of it; file and directories that were made for it are removed."""
    path = place.path
    missing = []
    parent = path
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    try:
        with place.open() as directory:
            return Trial("image", path, trial.SIZE * pmd, trial.measure(directory.fd, pmd))
    except Unusable as error:
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        return Trial("image", path, refused=str(error), number=number, remedy=error.remedy)
    except OSError as error:
        return Trial("image", path, refused=reason_of(error), number=error.errno)
    finally:
        for created in missing:
            with contextlib.suppress(OSError):
                os.rmdir(created)
