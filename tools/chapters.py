"""Documents of which one part is made by a tool: chapters between two comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_MADE = re.compile(r"(<!-- made by [^\n]* -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
CHAPTER = "### "


def enter(document: Path, title: str, text: str, *, last: bool = False) -> None:
    """Write a chapter into the document, in the place of the one of that title, if there is one.

    Args:
        document: has a comment `made by ...`, and a comment `end` after it.
        title: one line.
        text: what stands below it.
        last: as the last chapter in any case.
    """
    whole = document.read_text()
    found = _MADE.search(whole)
    if found is None:
        raise ValueError(f"{document} has no part that is made by a tool")
    first, *parts = found[2].split(CHAPTER)
    chapters = dict(part.split("\n", 1) for part in parts)
    if last:
        chapters.pop(title, None)
    chapters[title] = f"\n{text}\n"
    body = "".join(f"{CHAPTER}{title}\n{text}" for title, text in chapters.items())
    document.write_text(f"{whole[: found.start(2)]}{first}{body}{whole[found.start(3) :]}")


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows as Markdown has them; the second is the line below the head."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
