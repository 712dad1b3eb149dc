"""The image: a file laid out by address, where a directory's file system gives huge pages."""

from __future__ import annotations

import os

from page_primer import _core
from page_primer._lean import ours, replace, suppress
from page_primer.backing.pieces import (
    Attempt,
    Piece,
    Prepared,
    Refused,
    place,
    reason_of,
)
from page_primer.elf.objects import Region
from page_primer.images import layout as image
from page_primer.images import store, trial
from page_primer.images.places import Place, candidates
from page_primer.images.trust import Unusable
from page_primer.kernel.release import release
from page_primer.kernel.thp import bring_in
from page_primer.options import Options
from page_primer.plan import Move

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_FILES_SINCE = (6, 1)  # MADV_COLLAPSE; before it, only xfs has huge folios, and only when read


def directories(options: Options) -> list[Place]:
    """The image directories to try, in order, each with the reason to pass it over, if any."""
    if options.image_dir is not None:
        return [Place(options.image_dir, limit=options.store_limit, named=True)]
    found = candidates(options.store_limit)
    if options.backing == "auto" and release() < _FILES_SINCE:
        reason = "files are on huge pages from Linux 6.1 on"
        found = [replace(place, reason=reason) for place in found]
    return found


def attempts(move: Move, pmd: int, places: Sequence[Place], fresh: bool) -> Iterator[Attempt]:
    layout = image.lay_out(move.object, move.image, pmd)
    for where in places:
        if where.reason:
            yield Refused(where.path, where.reason)
            continue
        try:
            with where.open() as directory:
                if where.named or where.system or trial.gives_huge_pages(directory.fd, pmd):
                    yield from from_store(directory, layout, fresh)
                else:
                    yield Refused(where.path, "files there are not on huge pages")
        except store.Missing as error:
            if not where.system:
                yield Refused(where.path, str(error))
        except (Unusable, image.CannotLayOut) as error:
            yield Refused(where.path, str(error))
        except ours(OSError) as error:
            yield Refused(where.path, reason_of(error))


def from_store(
    directory: store.Store, layout: image.Layout, fresh: bool = False
) -> Iterator[Attempt]:
    """Attempts with an image in one directory: the one that is there (unless a fresh one is asked
    for), the same read again, since the pages of a file that somebody else read or copied first are
    in memory as small ones, and where that is no help, since somebody maps them, a new one."""
    found = directory.get(layout, fresh=fresh)
    hold = directory.hold(found)  # between two attempts nobody uses it
    try:
        try:
            yield _map_image(found, layout)
        except ours(OSError) as error:
            if found.written:
                raise
            yield Refused(found.path, reason_of(error))
        if not found.written:
            yield _map_again(directory, layout)
            found = directory.get(layout, fresh=True)
            yield _map_image(found, layout)
        # Not huge as written: on some kernels (xfs before 6.12) only what is read back can be.
        yield _map_again(directory, layout, found.written)
    finally:
        directory.release(hold, layout.name)


def _map_again(directory: store.Store, layout: image.Layout, written: int = 0) -> Attempt:
    again = directory.get(layout)
    with suppress(OSError):
        os.fsync(again.fd)
        os.posix_fadvise(again.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return _map_image(replace(again, written=written), layout)
    except ours(OSError) as error:
        return Refused(again.path, reason_of(error))


def _map_image(found: store.Image, layout: image.Layout) -> Prepared:
    def place_region(region: Region) -> Piece:
        offset = layout.offset(region.start)
        return place(region, layout.object, layout.pmd, found.fd, offset, _core.MAP_PRIVATE)

    try:
        pieces = tuple(map(place_region, layout.regions))
        for piece in pieces:
            bring_in(piece.source, piece.size, layout.pmd)
    except BaseException:
        found.close()
        raise
    return Prepared("image", found.path, pieces, layout.pmd, found, found.written)
