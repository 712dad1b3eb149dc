"""`page-primer images`: what the stores hold, and what of it is to go."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, TypedDict

from page_primer.backing import image as image_backing
from page_primer.cli.tables import Column, Table, render
from page_primer.images import inventory, names, users
from page_primer.images.room import NO_LIMIT
from page_primer.images.trust import Unusable
from page_primer.options import Options
from page_primer.words import counted, mib

if TYPE_CHECKING:
    from page_primer.images.places import Place


class Image(TypedDict):
    """One file of a store; sizes in bytes."""

    path: str
    object: str  # what it is an image of
    anchor: bool
    size: int
    users: list[int]  # processes that map it
    locked: bool  # somebody has it, perhaps in another container
    last_use: float  # seconds since 1970
    current: bool  # the object is what it was


class Listing(TypedDict):
    """One store, as --json has it."""

    path: str
    size: int
    limit: int | None
    removed: list[str]
    images: list[Image]


_COLUMNS = (
    Column("object", left=True, cuts="path"), Column("size"), Column("users"),
    Column("last use", goes=1), Column("path", left=True, goes=2),
)  # fmt: skip


def run(action: str, directory: str | None, *, as_json: bool) -> int:
    """Run the command.

    Args:
        action: "list", "prune" or "clear".
        directory: a store; None for all that this user has.
        as_json: print JSON.

    Returns:
        The exit status.
    """
    options = Options.load({"image_dir": directory} if directory else {})
    status = 0
    found: list[Listing] = []
    for place in image_backing.directories(options):
        if not os.path.lexists(place.path):
            if place.named:
                print(f"page-primer: no directory {place.path}", file=sys.stderr)
                status = 1
            continue
        try:
            found.append(_act(place, action))
        except (Unusable, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            print(f"page-primer: {place.path}: {why}", file=sys.stderr)
            status = 1
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    return status


def _act(place: Place, action: str) -> Listing:
    """Do it in one store, and say what it holds then."""
    with place.open() as store:
        before = {entry.name for entry in inventory.read(store.fd)}
        if action == "prune":
            inventory.prune(store.fd, limit=place.limit)
        elif action == "clear":
            inventory.clear(store.fd)
        entries = inventory.read(store.fd)
        mapped = users.find(f"{place.path}/{entry.image}" for entry in entries)
        return {
            "path": place.path,
            "size": sum(entry.size for entry in entries),
            "limit": place.limit if place.limit < NO_LIMIT else None,
            "removed": sorted(before - {entry.name for entry in entries}),
            "images": [
                {
                    "path": f"{place.path}/{entry.image}",
                    "object": entry.origin,
                    "anchor": entry.name.endswith(names.ANCHOR),
                    "size": entry.size,
                    "users": mapped[f"{place.path}/{entry.image}"],
                    "locked": inventory.is_used(store.fd, entry.name),
                    "last_use": entry.used,
                    "current": entry.current,
                }
                for entry in sorted(entries, key=lambda entry: (entry.origin, entry.name))
            ],
        }


def _show(found: list[Listing]) -> None:
    for store in found:
        removed = counted(len(store["removed"]), "image") + " removed, " if store["removed"] else ""
        number = counted(len(store["images"]), "image")
        limit = f" of {mib(store['limit'])}" if store["limit"] else ""
        print(f"{store['path']}: {removed}{number}, {mib(store['size'])}{limit}")
        if store["images"]:
            rows = tuple(tuple(_row(image)) for image in store["images"])
            print(render(Table(_COLUMNS, rows)))
    if not found:
        print("no images")


def _row(image: Image) -> list[str]:
    name = image["object"]
    if image["anchor"]:
        name += " (anchor)"
    elif not image["current"]:
        name += " (changed since)"
    number = str(len(image["users"]))
    if image["locked"] and not image["users"]:
        number = "elsewhere"  # in another container, or another user's
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(image["last_use"]))
    return [name, mib(image["size"]), number, used, image["path"]]
