"""A bar of an object's memory: which part of it is on huge pages, private, locked."""

from __future__ import annotations

from page_primer.cli import terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Sign, sign in ASCII, colour; and what it is. Each byte is of one kind: the first that it is of.
KINDS = (
    ("huge", "█", "#", terminal.GREEN, "huge"),
    ("private", "▓", "%", terminal.YELLOW, "huge, private"),
    ("locked", "▒", "=", terminal.CYAN, "small, locked"),
    ("small", "░", ".", terminal.DIM, "small"),
)
NAMES = tuple(kind[0] for kind in KINDS)


def bar(sizes: Mapping[str, int], width: int) -> str:
    """A bar of so many characters.

    Args:
        sizes: bytes of each kind.
        width: characters.
    """
    cells = _share_out([sizes[name] for name in NAMES], width)
    parts = zip(KINDS, cells, strict=True)
    return "".join(terminal.styled(_sign(kind) * count, kind[3]) for kind, count in parts)


def legend(columns: int | None) -> list[str]:
    """What the signs mean, in lines of so many columns; None: in one."""
    lines = [""]
    for kind in KINDS:
        meaning = f"  {terminal.styled(_sign(kind), kind[3])} {kind[4]}"
        if lines[-1] and columns and terminal.length(lines[-1] + meaning) > columns:
            lines.append("")
        lines[-1] += meaning
    return lines


def _sign(kind: Sequence[str]) -> str:
    return kind[1] if terminal.can_write(kind[1]) else kind[2]


def _share_out(sizes: Sequence[int], width: int) -> list[int]:
    """Whole numbers in proportion, with the sum `width`; what is there at all is seen."""
    whole = sum(sizes)
    if not whole:
        return [0] * (len(sizes) - 1) + [width]
    cells = [max(1, size * width // whole) if size else 0 for size in sizes]
    # What is missing, or too much by the ones that are seen all the same, is the largest's.
    cells[sizes.index(max(sizes))] += width - sum(cells)
    return cells
