"""One renderer of tables, for a terminal of any width and for a pipe.

Where a table is too wide, first the column that wraps is folded, between words; then paths lose
folders; then columns that may go are left out; then names are cut, with a sign that they were, and
where that leaves too little of them, more columns go. A note, printed beneath its row, never is cut
or folded, so that it can be copied.
"""

from __future__ import annotations

import re
import sys
import textwrap

from page_primer._lean import Record
from page_primer.cli import terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_GAP = "  "
_NARROWEST = 30  # columns that a cell is folded to at least
_SHORTEST = 12  # columns that a name is cut to at least
_READABLE = 32  # a path, before columns are left out: what the names of most libraries take


class Column(Record):
    """How a column is shown."""

    title: str
    left: bool = False  # names stand to the left, numbers to the right
    wraps: bool = False
    cuts: str = ""  # where it may be cut: "end", "start", or "path" for what is a path
    # It may be left out, the highest number first: above 0 before names are cut, below 0 where they
    # would become shorter than can be read. 0: never.
    goes: int = 0


class Table(Record):
    """What is to be shown."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str | None, ...] = ()  # of each row
    headings: tuple[str | None, ...] = ()  # above each row

    def sizes(self) -> list[int]:
        titles = tuple(column.title for column in self.columns)
        cells = zip(titles, *self.rows, strict=True)
        return [max(map(terminal.length, column)) for column in cells]

    def without(self, number: int) -> Table:
        def less(cells: tuple[str, ...]) -> tuple[str, ...]:
            return cells[:number] + cells[number + 1 :]

        columns = self.columns[:number] + self.columns[number + 1 :]
        return Table(columns, tuple(map(less, self.rows)), self.notes, self.headings)


def show_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], goes: Sequence[str] = ()
) -> None:
    """Print columns: the first, whose paths may be cut, and the last, which may be folded, to the
    left; numbers between them to the right.

    Args:
        titles: of the columns.
        rows: their cells.
        goes: titles of columns that may be left out, the first one first.
    """
    last = len(titles) - 1
    ranks = {title: len(goes) - number for number, title in enumerate(goes)}
    columns = tuple(
        Column(title, left=number in (0, last), cuts="" if number else "path",
               wraps=number == last and terminal.is_terminal(), goes=ranks.get(title, 0))
        for number, title in enumerate(titles)
    )  # fmt: skip
    print(render(Table(columns, tuple(map(tuple, rows)))))


def say(line: str) -> None:
    """Print a sentence, on a terminal in as many lines as that wants."""
    print("\n".join(folded(line)))


def folded(line: str, indent: str = "") -> list[str]:
    """A sentence as lines that fit the terminal; paths stay whole, and in a pipe all of it."""
    columns = terminal.width()
    if columns is None:
        return [f"{indent}{line}"]
    return textwrap.wrap(
        line, max(columns - 1, 40), initial_indent=indent, subsequent_indent=f"{indent}  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def render(table: Table) -> str:
    """A table for stdout, whatever that is."""
    wide = terminal.width()
    if wide is None and any(column.wraps for column in table.columns):
        return fit(table, terminal.width_of_sentences(), cut=False)
    return fit(table, wide)


def fit(table: Table, width: int | None, *, cut: bool = True) -> str:
    """A table as text.

    Args:
        table: what it is.
        width: columns that it may take; None: any number.
        cut: whether names may be cut and columns left out.
    """
    sizes = table.sizes()
    while width is not None:
        excess = sum(sizes) + len(_GAP) * len(sizes) - width
        if excess <= 0:
            break
        folded = _shrink(table, sizes, excess, _NARROWEST, lambda column: column.wraps)
        if folded or not cut:
            if not folded:
                break
            continue
        if _shrink(table, sizes, excess, _READABLE, lambda column: column.cuts == "path"):
            continue
        least = max(range(len(sizes)), key=lambda n: table.columns[n].goes or -sys.maxsize)
        goes = table.columns[least].goes
        if goes <= 0 and _shrink(table, sizes, excess, _SHORTEST, lambda column: bool(column.cuts)):
            continue
        if not goes:
            break
        table = table.without(least)
        sizes = table.sizes()
    return "\n".join(_lines(table, sizes))


def _shrink(
    table: Table, sizes: list[int], excess: int, least: int, may: Callable[[Column], bool]
) -> bool:
    """Make the longest of the columns that may be shorter so; whether one was."""
    found = [
        number
        for number, column in enumerate(table.columns)
        if may(column) and sizes[number] > least
    ]
    if not found:
        return False
    longest = max(found, key=lambda number: sizes[number])
    sizes[longest] = max(least, sizes[longest] - excess)
    return True


def _lines(table: Table, sizes: Sequence[int]) -> list[str]:
    start = len(_GAP) * len(sizes) + sum(sizes[:-1])  # of the last column
    titles = [terminal.styled(column.title, terminal.BOLD) for column in table.columns]
    lines = [_line(table.columns, titles, sizes)] if any(titles) else []
    for number, cells in enumerate(table.rows):
        if table.headings and (heading := table.headings[number]):
            lines += [*([""] if lines else []), terminal.styled(heading, terminal.BOLD)]
        folded = _fold(cells[-1], sizes[-1]) if table.columns[-1].wraps else [cells[-1]]
        lines.append(_line(table.columns, (*cells[:-1], folded[0]), sizes))
        lines += [" " * start + line for line in folded[1:]]
        if table.notes and (note := table.notes[number]):
            lines.append(" " * start + note)
    return lines


def _line(columns: Sequence[Column], cells: Sequence[str], sizes: Sequence[int]) -> str:
    padded = []
    for column, cell, size in zip(columns, cells, sizes, strict=True):
        text = _cut(cell, size, column.cuts) if column.cuts else cell
        padding = " " * (size - terminal.length(text))
        padded.append(text + padding if column.left else padding + text)
    return (_GAP + _GAP.join(padded)).rstrip()


def _cut(cell: str, size: int, where: str) -> str:
    if where == "path":
        return terminal.cut_path(cell, size)
    return terminal.cut(cell, size, start=where == "start")


def _fold(text: str, width: int) -> list[str]:
    # No line ends between a number and its unit.
    text = re.sub(r"(\d) (%|MiB)", "\\1\0\\2", text)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines] or [""]
