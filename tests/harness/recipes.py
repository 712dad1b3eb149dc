"""What docs/deploy/ has in its code blocks, so that tests run what is written there."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["block"]

_PAGES = Path(__file__).parents[2] / "docs" / "deploy"


def block(page: str, start: str, number: int = 0) -> str:
    """An indented code block of a page.

    Args:
        page: its file name.
        start: how the block begins.
        number: which of several.
    """
    text = (_PAGES / page).read_text()
    blocks = re.findall(r"(?:^    .*\n(?:^\n(?=    ))?)+", text, re.MULTILINE)
    bare = ["\n".join(line[4:] for line in one.splitlines()) + "\n" for one in blocks]
    return [one for one in bare if one.startswith(start)][number]
