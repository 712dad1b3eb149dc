"""The image: a file laid out by address, where a directory's file system gives huge pages."""

from __future__ import annotations

import os

from page_primer import _core
from page_primer._lean import replace, suppress
from page_primer.backing.pieces import (
    Attempt,
    Piece,
    Place,
    Prepared,
    Refused,
    place,
    place_all,
    reason_of,
)
from page_primer.elf.objects import Region
from page_primer.images import layout as image
from page_primer.images import store
from page_primer.kernel import mounts
from page_primer.kernel.release import release
from page_primer.kernel.thp import bring_in
from page_primer.options import Options
from page_primer.plan import Move

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# From which kernel on a file system's files can be on huge pages without further settings. Others
# are tried after these: a kernel with CONFIG_READ_ONLY_THP_FOR_FS can collapse any file.
GOOD_SINCE = {"ext4": (6, 16), "xfs": (6, 1), "tmpfs": (6, 1)}
_FILES_SINCE = (6, 1)  # MADV_COLLAPSE; before it, only xfs has huge folios, and only when read


def directories(options: Options) -> list[Place]:
    """The image directories to try, in order, each with the reason to pass it over, if any."""
    if options.image_dir is not None:
        return [(options.image_dir, None)]
    good: list[str] = []
    other: list[str] = []
    table = mounts.read()
    for path in store.candidates():
        since = GOOD_SINCE.get(mounts.mount_of(os.path.realpath(path), table).filesystem)
        (good if since and release() >= since else other).append(path)
    reason = None
    if options.backing == "auto" and release() < _FILES_SINCE:
        reason = "files are on huge pages from Linux 6.1 on"
    return [(path, reason) for path in good + other]


def attempts(move: Move, pmd: int, places: Sequence[Place], fresh: bool) -> Iterator[Attempt]:
    layout = image.lay_out(move.object, move.image, pmd)
    for path, reason in places:
        if reason:
            yield Refused(path, reason)
            continue
        try:
            with store.Store(path) as directory:
                yield from from_store(directory, layout, fresh)
        except (store.Unusable, image.CannotLayOut) as error:
            yield Refused(path, str(error))
        except OSError as error:
            yield Refused(path, reason_of(error))


def from_store(
    directory: store.Store, layout: image.Layout, fresh: bool = False
) -> Iterator[Attempt]:
    """Attempts with an image in one directory: the one that is there (unless a fresh one is asked
    for), the same read again, since the pages of a file that somebody else read or copied first are
    in memory as small ones, and where that is no help, since somebody maps them, a new one."""
    found = directory.get(layout, fresh=fresh)
    try:
        yield _map_image(found, layout)
    except OSError as error:
        if found.written:
            raise
        yield Refused(found.path, reason_of(error))
    if not found.written:
        yield _map_again(directory, layout)
        found = directory.get(layout, fresh=True)
        yield _map_image(found, layout)
    # Not huge as written: on some kernels (xfs before 6.12) only what is read back can be.
    yield _map_again(directory, layout, found.written)


def _map_again(directory: store.Store, layout: image.Layout, written: int = 0) -> Attempt:
    again = directory.get(layout)
    with suppress(OSError):
        os.fsync(again.fd)
        os.posix_fadvise(again.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return _map_image(replace(again, written=written), layout)
    except OSError as error:
        return Refused(again.path, reason_of(error))


def _map_image(found: store.Image, layout: image.Layout) -> Prepared:
    def place_region(region: Region) -> Piece:
        offset = layout.offset(region.start)
        return place(region, layout.object, layout.pmd, found.fd, offset, _core.MAP_PRIVATE)

    try:
        pieces = place_all(layout.regions, place_region)
    except BaseException:
        found.close()
        raise
    prepared = Prepared("image", found.path, pieces, layout.pmd, found, found.written)
    try:
        for piece in pieces:
            bring_in(piece.source, piece.size, layout.pmd)
    except BaseException:
        prepared.discard()
        raise
    return prepared
