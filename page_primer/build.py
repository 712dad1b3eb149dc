"""`page-primer build`: fill a store with the images that servers will use, before they start.

What a server has loaded is loaded here, as far as it is named, surveyed, and planned as prime()
would, with every library at the load address (modulo a huge page) that the loader gives it where it
can. Whoever may read the store then maps the images and writes nothing: a service's user, a
container with a read-only root.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from page_primer import plan, survey
from page_primer._lean import Record, replace, suppress
from page_primer.elf.objects import segments_of
from page_primer.images import anchors
from page_primer.images import layout as image
from page_primer.kernel.thp import page_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from page_primer.elf.objects import Object
    from page_primer.images.layout import Layout
    from page_primer.images.store import Store
    from page_primer.options import Options
    from page_primer.plan import Move

# What the servers that have an integration load beside the application, where they are installed.
_SERVERS = (
    "gunicorn.app.wsgiapp", "gunicorn.arbiter", "gunicorn.workers.sync", "gunicorn.workers.gthread",
    "uvicorn.main", "uvicorn.loops.auto", "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto", "celery.apps.worker",
)  # fmt: skip


class Built(Record):
    """An image in the store."""

    object: str  # its path
    path: str  # the image's
    size: int  # bytes that were written; 0 where it was there
    huge: int  # bytes that can be on huge pages


class Left(Record):
    """An object without an image, and why."""

    object: str
    reason: str


def load(modules: Iterable[str], app: str | None) -> None:
    """Load what a server will have loaded.

    Args:
        modules: names of modules.
        app: MODULE:ATTRIBUTE, with `()` behind it for a factory, as gunicorn has it; or MODULE.

    Raises:
        ValueError: one cannot be loaded; the message says which, and why.
    """
    sys.path.insert(0, os.getcwd())  # as servers do
    if app is not None:
        for name in _SERVERS:
            with suppress(ImportError):
                importlib.import_module(name)
    for name in modules:
        _import(name)
    if app is not None:
        _load_app(app)


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def _load_app(app: str) -> None:
    module, _, attribute = app.partition(":")
    found = _import(module)
    factory = attribute.endswith("()")
    try:
        for name in filter(None, attribute.removesuffix("()").split(".")):
            found = getattr(found, name)
        if factory:
            found()  # type: ignore[operator]  # as its user says
    except Exception as error:
        raise ValueError(f"cannot load {app}: {type(error).__name__}: {error}") from error


def fill(store: Store, options: Options) -> Iterator[Built | Left]:
    """Write the images of what is loaded in this process.

    Args:
        store: where to.
        options: what servers will have: their limits are kept, and images are for their `merge` and
            `keep_profilers`.
    """
    found = survey.take()
    pmd = found.pmd_size
    objects = tuple(_where_loaded(obj, pmd) for obj in found.objects) if pmd else found.objects
    # Memory is not what is asked of a store; what is mapped here is not mapped there.
    planned = plan.make(replace(found, objects=objects, memory=None, mappings=()), options)
    for move in planned.moves:
        path = move.object.path
        try:
            yield from _build(store, move, pmd)
        except (image.CannotLayOut, OSError) as error:
            yield Left(path, getattr(error, "strerror", None) or str(error))
    moved = {move.object.path for move in planned.moves}
    for part in planned.remainders:
        if part.kind == "code" and part.object.source and part.object.path not in moved:
            moved.add(part.object.path)
            yield Left(part.object.path, part.reason)


def _where_loaded(obj: Object, pmd: int) -> Object:
    """The object at the address that the loader gives it on a disk, modulo a huge page: a program
    that is linked for one address has that, all else is aligned. Whole, since what of it is hot
    shows only when a server works."""
    obj = replace(obj, touched=None, by_chance=False)
    if obj.fixed:
        return obj
    base = obj.base - obj.start % pmd
    return replace(obj, base=base, segments=segments_of(obj.headers, base, page_size()))


def _build(store: Store, move: Move, pmd: int) -> Iterator[Built]:
    wanted: list[Layout] = [image.lay_out(move.object, move.image, pmd)]
    for which, address in ((anchors.NEAR, move.near), (anchors.FAR, move.far)):
        if address:
            wanted.append(anchors.lay_out(move.object, which, address))
    for layout in wanted:
        found = store.build(layout)
        found.close()
        huge = sum(region.huge(pmd).length for region in layout.regions)
        yield Built(move.object.path, found.path, found.written, huge)
