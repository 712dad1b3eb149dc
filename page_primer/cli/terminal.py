"""What the output is: how wide, with colours or without, and which signs it has."""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

BOLD, DIM = "1", "2"
RED, GREEN, YELLOW, CYAN = "31", "32", "33", "36"

_SEQUENCE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
ELLIPSIS = "…"
CLEAR = "\x1b[2J"
# At the beginning of a line of its own, with lines that wrap.
LEAVE = "\x1b[?7h\n"
_PATHS = ("/", "./", "../")  # how they begin
_ROOM = 8  # columns of a path behind words, at least
_IN_A_PIPE = 100  # columns, unless COLUMNS says something else


def is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()  # None: closed


def has_colours() -> bool:
    """A terminal that knows them, unless NO_COLOR is set (https://no-color.org)."""
    return can_draw() and not os.environ.get("NO_COLOR")


def can_draw() -> bool:
    """A terminal that can move its cursor."""
    return is_terminal() and os.environ.get("TERM", "dumb") != "dumb"


def screen(lines: Sequence[str]) -> str:
    """What writes these lines over the ones that are there, for a screen that is cleared first
    flickers. No line wraps, or the next would be where no line of this is."""
    rows = shutil.get_terminal_size((80, 24)).lines - 1  # the last one is the cursor's
    if len(lines) > rows > 1:
        shown = rows - 1
        lines = [*lines[:shown], f"  and {len(lines) - shown} more lines"]
    lines = lines[: max(rows, 1)]
    # A line is cleared before: after one that fills it, its last character would go (xterm).
    written = "".join(f"\x1b[K{line}\n" for line in lines)
    return f"\x1b[?7l\x1b[H{written}\x1b[J\x1b[?7h"


def width() -> int | None:
    """Columns to fit into; None where there is no such limit, as in a pipe."""
    return shutil.get_terminal_size((80, 24)).columns if is_terminal() else None


def width_of_sentences() -> int:
    """Columns to fold sentences to, in a pipe too."""
    return shutil.get_terminal_size((_IN_A_PIPE, 24)).columns


def can_write(text: str) -> bool:
    """Whether the output's encoding has these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def styled(text: str, *codes: str) -> str:
    """The text in colours, where there are any."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes and text and has_colours() else text


def one_line(text: str) -> str:
    """Text of others (a command line) without what would move the cursor."""
    return _CONTROL.sub(" ", text)


def length(text: str) -> int:
    """Columns that a text takes, colours aside."""
    plain = _SEQUENCE.sub("", text)
    if plain.isascii():
        return len(plain)
    return sum(_columns(character) for character in plain)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, columns: int | None, *, start: bool = False) -> str:
    """Text without colours, cut to so many columns at its end, or at its start (paths, whose end
    tells more)."""
    if columns is None or length(text) <= columns:
        return text
    sign = ELLIPSIS if can_write(ELLIPSIS) else "~"
    kept: list[str] = []
    room = columns - 1
    for character in reversed(text) if start else text:
        room -= _columns(character)
        if room < 0:
            break
        kept.append(character)
    return sign + "".join(reversed(kept)) if start else "".join(kept) + sign


def cut_path(text: str, columns: int | None) -> str:
    """A path cut to so many columns: folders go first, from its start, then the end of its name,
    which for libraries is the interpreter's and the platform's. Words before it stay, where there
    is room for both."""
    if columns is None or length(text) <= columns:
        return text
    words, space, path = text.rpartition(" /") if not text.startswith(_PATHS) else ("", "", text)
    if space:
        room = columns - length(words) - 1
        if room < _ROOM:
            return cut(text, columns, start=True)
        return f"{words} {cut_path('/' + path, room)}"
    if not text.startswith(_PATHS):
        return cut(text, columns)
    *folders, kept = text.split("/")
    if length(kept) + 1 > columns:
        return cut(kept, columns)
    while folders and length(f"{folders[-1]}/{kept}") + 2 <= columns:
        kept = f"{folders.pop()}/{kept}"
    return cut(f"{'/' * columns}{kept}", min(columns, length(kept) + 2), start=True)
