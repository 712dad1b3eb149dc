"""Where huge memory comes from. Each backing *prepares* a replacement at an address of its own,
faults it in, and lets the caller see in smaps what came of it; nothing live is touched here.

Which source works on which kernel is a matter of versions, settings and luck, so every attempt is
believed only when smaps shows the pages huge.
"""

from __future__ import annotations

from page_primer._lean import ours, replace
from page_primer._loading import Loading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from page_primer.backing.pieces import Attempt
    from page_primer.images.anchors import Anchors
    from page_primer.images.places import Place
    from page_primer.options import Options
    from page_primer.plan import Move


def directories(options: Options) -> list[Place]:
    """The image directories to try, in order; none where this package has gone since it was loaded
    (an upgrade under a running server), which the attempts will say."""
    try:
        with Loading():  # with what it needs a quarter of our modules
            from page_primer.backing import image
    except ours(ImportError):
        return []
    return image.directories(options)


def attempts(
    move: Move,
    pmd: int,
    options: Options,
    places: Sequence[Place],
    held: Anchors,
    fresh: bool = False,
) -> Iterator[Attempt]:
    """Try the backings that the options allow, in order. The caller takes the first that is good
    enough and discards the others; nothing is prepared before it is asked for.

    Args:
        move: the object and its regions.
        pmd: the size of a huge page, bytes.
        options: what the caller wants.
        places: what directories() says.
        held: the object's anchors, mapped as far as what is prepared needs them.
        fresh: the image that is there has wrong content: write a new one.
    """
    with Loading():  # not where nothing is copied
        from page_primer.backing import image, memory
        from page_primer.backing.pieces import Prepared
        from page_primer.images import anchors

    wanted = ("image", "memfd", "anonymous") if options.backing == "auto" else (options.backing,)
    for name in wanted:
        if name == "image":
            needed: tuple[str, ...] = (anchors.FAR,) if move.far else ()
            found = image.attempts(move, pmd, places, fresh)
        else:
            needed = (anchors.NEAR, anchors.FAR) if move.signed else ()
            if needed and not held.map(needed):
                needed = ()  # then the head stays
            found = memory.BACKINGS[name](
                replace(move, memory=move.signed) if needed else move, pmd
            )
        for attempt in found:
            yield replace(attempt, anchors=needed) if isinstance(attempt, Prepared) else attempt
