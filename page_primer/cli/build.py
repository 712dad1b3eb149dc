"""`page-primer build`: what it is given, and what it says."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from page_primer import build
from page_primer._lean import asdict
from page_primer.build import Built
from page_primer.cli.tables import say
from page_primer.images.places import SYSTEM
from page_primer.images.store import Store
from page_primer.images.trust import Unusable
from page_primer.kernel import credentials
from page_primer.options import Options
from page_primer.words import counted, mib

if TYPE_CHECKING:
    from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    made = argparse.ArgumentParser(
        prog="page-primer build",
        description="Fill a store with the images of this interpreter and of what a server loads, "
        "for users who cannot write one, or a root file system that nobody can write to.",
    )
    made.add_argument(
        "--import", metavar="MODULE", nargs="+", action="extend", default=[], dest="modules",
        help="modules whose libraries are to be in it",
    )  # fmt: skip
    made.add_argument("--app", metavar="MODULE:APP", help="an application, as servers load it")
    made.add_argument("--dir", metavar="DIRECTORY", help=f"the store (default: {SYSTEM}, as root)")
    made.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    return made


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    given = parser().parse_args(words)
    status = run(given.modules, given.app, given.dir, as_json=given.json)
    sys.stdout.flush()
    return status


def run(modules: Sequence[str], app: str | None, directory: str | None, *, as_json: bool) -> int:
    """Run the command.

    Args:
        modules: those to import.
        app: the application to load, MODULE:ATTRIBUTE.
        directory: the store; None for the one that every user looks into.
        as_json: print JSON.

    Returns:
        The exit status.
    """
    options = Options.load({"image_dir": directory} if directory else {})
    path = options.image_dir or SYSTEM
    if path == SYSTEM and credentials.read().user != credentials.ROOT:
        return _fail(f"{SYSTEM} is filled by root: run this as root, or name a --dir")
    build.load(modules, app)
    try:
        with Store(path, limit=options.store_limit) as store:
            found = list(build.fill(store, options))
    except (Unusable, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return _fail(f"{path}: {why}")
    built = [one for one in found if isinstance(one, Built)]
    left = [one for one in found if not isinstance(one, Built)]
    if as_json:
        print(json.dumps({"path": path, "built": asdict(tuple(built)), "left": asdict(tuple(left))},
                         indent=2))  # fmt: skip
    else:
        for one in built:
            if one.huge:
                what = f"{mib(one.size)} written" if one.size else "is there"
                say(f"{one.object}: {what}, {mib(one.huge)} for huge pages")
        for other in left:
            say(f"{other.object}: left alone, {other.reason}")
        images = sum(bool(one.huge) for one in built)
        say(f"{path}: {counted(images, 'image')}; {_readers(built)}")
    return 0 if built else _fail("no object here has room for a huge page")


def _readers(built: Sequence[Built]) -> str:
    private = sorted({one.object for one in built if not os.stat(one.path).st_mode & 0o004})
    if not private:
        return "every user can read them"
    return f"readable as the originals are, so not for every user: {', '.join(private)}"


def _fail(why: str) -> int:
    print(f"page-primer: build: {why}", file=sys.stderr)
    return 1
