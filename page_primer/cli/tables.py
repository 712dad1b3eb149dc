"""One renderer of tables: by rich where the terminal and the extra `cli` allow it, plain otherwise.

A cell of the column that `wraps` is folded to the width; a note, printed beneath its row, never is,
so that it can be copied.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap

from page_primer._lean import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

_GAP = "  "
_NARROWEST = 30  # columns that a cell is folded to at least


class Table(Record):
    """What is to be shown. Numbers stand to the right, except in the columns named `left`."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = (0, -1)  # columns
    wraps: bool = False  # the last column
    notes: tuple[str | None, ...] = ()  # of each row

    def is_left(self, column: int) -> bool:
        return column in self.left or column - len(self.titles) in self.left

    def widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.titles, *self.rows, strict=True)]

    def note(self, row: int) -> str | None:
        return self.notes[row] if self.notes else None


def show_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns: the first and the last aligned to the left, numbers to the right."""
    print(render(Table(tuple(titles), tuple(map(tuple, rows)))))


def render(table: Table) -> str:
    """A table for stdout, whatever that is."""
    if sys.stdout is not None and sys.stdout.isatty():  # None: closed
        try:
            from rich.console import Console  # the extra, and 100 ms
        except ImportError:
            pass
        else:
            return _by_rich(table, Console(highlight=False))
    return plain(table, shutil.get_terminal_size((100, 24)).columns)


def plain(table: Table, width: int) -> str:
    """A table as text; `width` is what a column that wraps is folded to."""
    widths = table.widths()
    start = len(_GAP) * len(widths) + sum(widths[:-1])  # of the last column
    lines = []
    for number, cells in enumerate((table.titles, *table.rows), -1):
        folded = _fold(cells[-1], max(width - start, _NARROWEST)) if table.wraps else [cells[-1]]
        padded = [
            cell.ljust(size) if table.is_left(column) else cell.rjust(size)
            for column, (cell, size) in enumerate(
                zip((*cells[:-1], folded[0]), widths, strict=True)
            )
        ]
        lines.append((_GAP + _GAP.join(padded)).rstrip())
        lines += [" " * start + line for line in folded[1:]]
        if number >= 0 and (note := table.note(number)):
            lines.append(" " * start + note)
    return "\n".join(lines)


def _fold(text: str, width: int) -> list[str]:
    # No line ends between a number and its unit.
    text = re.sub(r"(\d) (%|MiB)", "\\1\0\\2", text)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines] or [""]


def _by_rich(table: Table, console: Console) -> str:
    """Long cells fold to the width of the terminal."""
    # An extra: whoever calls this has it.
    from rich.markup import escape
    from rich.table import Table as Grid

    widths = table.widths()
    start = len(_GAP) * len(widths) + sum(widths[:-1])
    fixed = widths[:-1] if table.notes else []  # where a note ends a grid, the next must match it

    def grid(header: bool) -> Grid:
        new = Grid(box=None, pad_edge=False, padding=(0, 1, 0, 1), header_style="bold",
                   show_header=header)  # fmt: skip
        for column, title in enumerate(table.titles):
            new.add_column(
                title, justify="left" if table.is_left(column) else "right", overflow="fold",
                width=fixed[column] if column < len(fixed) else None,
            )  # fmt: skip
        return new

    with console.capture() as captured:
        part = grid(header=True)
        for number, row in enumerate(table.rows):
            part.add_row(*map(escape, row))
            if note := table.note(number):
                console.print(part)
                console.print(" " * start + escape(note), soft_wrap=True)
                part = grid(header=False)
        if part.row_count:
            console.print(part)
    return captured.get().rstrip("\n")
