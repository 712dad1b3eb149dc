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
from page_primer.images import store
from page_primer.images.anchors import Anchors
from page_primer.options import Options
from page_primer.plan import Move

_trials = itertools.count()


class Trial(Record):
    """The result of trying a backing with two huge pages at a scratch address."""

    backing: str
    where: str
    wanted: int = 0  # bytes
    huge: int = 0  # bytes that smaps showed on huge pages
    refused: str | None = None  # why smaps could not be asked
    number: int | None = None  # errno of that, if known

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


def try_directory(path: str, pmd: int) -> Trial:
    """Write a file of two huge pages into an image directory, map it as an image would be, and see
    what came of it; file and directories that were made for it are removed."""
    missing = []
    parent = path
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    move = _trial_move(pmd)
    layout = image.Layout(move.object, move.image, pmd, "trial")
    try:
        with _TrialStore(path) as directory:
            return _best("image", path, image_backing.from_store(directory, layout))
    except store.Unusable as error:
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        return Trial("image", path, refused=str(error), number=number)
    except OSError as error:
        return Trial("image", path, refused=reason_of(error), number=error.errno)
    finally:
        for created in missing:
            with contextlib.suppress(OSError):
                os.rmdir(created)


class _TrialStore(store.Store):
    """A store whose only image is a file without a name, so that nothing can be left behind."""

    _kept: int | None = None

    def __exit__(self, *exception: object) -> None:
        self._forget()
        super().__exit__(*exception)

    def get(self, layout: image.Layout, *, fresh: bool = False) -> store.Image:
        written = 0
        if fresh:
            self._forget()
        if self._kept is None:
            self._kept = self._create()
            written = self._fill(self._kept, layout)
        status = os.fstat(self._kept)
        # The caller gives its descriptor up before it asks for the file once more.
        fd = os.dup(self._kept)
        identities = ((status.st_dev, status.st_ino),)
        return store.Image(f"/proc/self/fd/{self._kept}", fd, -1, written, identities)

    def _create(self) -> int:
        name = f".doctor-{os.getpid()}-{next(_trials)}"
        flags = os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        os.unlink(name, dir_fd=self._fd)
        return fd

    @staticmethod
    def _fill(kept: int, layout: image.Layout) -> int:
        # By another descriptor, closed before the file is mapped: what is open for writing cannot
        # be made huge with CONFIG_READ_ONLY_THP_FOR_FS.
        target = os.open(f"/proc/self/fd/{kept}", os.O_WRONLY | os.O_CLOEXEC)
        block = memoryview(b"page-primer trial".ljust(64) * (layout.pmd // 64))
        written = 0
        try:
            while written < 2 * layout.pmd:
                rest = block[written % layout.pmd :]
                written += os.pwrite(target, rest, layout.pad + written)
        finally:
            os.close(target)
        return written

    def _forget(self) -> None:
        if self._kept is not None:
            os.close(self._kept)
        self._kept = None
