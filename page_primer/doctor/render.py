"""Checks and layout as plain data and as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from page_primer.doctor.findings import OK, PROBLEM, WARNING, Check
from page_primer.words import counted, mib, percent

if TYPE_CHECKING:
    from page_primer.doctor.coverage import Interpreter

LayOut = Callable[
    [tuple[str, ...], tuple[tuple[str, ...], ...], tuple["str | None", ...]],
    str,
]
_COUNTED = (OK, WARNING, PROBLEM)


def as_dict(checks: Iterable[Check], layout: Interpreter | None = None) -> dict[str, Any]:
    """Checks and layout as plain data, ready for json.dumps(); sizes are in bytes."""
    return {
        "checks": [asdict(check) for check in checks],
        "interpreter": layout.as_dict() if layout else None,
    }


def render(checks: Sequence[Check], layout: Interpreter | None, lay_out: LayOut) -> str:
    """Checks and layout as text.

    Args:
        checks: what examine() found.
        layout: what interpreter() found.
        lay_out: what makes a table of titles and rows, with a note beneath a row that has one.
    """
    table = lay_out(
        ("", "check", "found"),
        tuple((check.status, check.name, check.found) for check in checks),
        tuple(f"fix: {check.fix}" if check.fix else None for check in checks),
    )
    counts = {status: sum(check.status == status for check in checks) for status in _COUNTED}
    words = (
        f"{counts[OK]} ok",
        counted(counts[WARNING], WARNING),
        counted(counts[PROBLEM], PROBLEM),
    )
    return "\n".join([table, *(["", *_draw(layout)] if layout else []), "", ", ".join(words)])


def _draw(layout: Interpreter) -> Iterator[str]:
    yield f"{layout.path} ({layout.kind}, on {layout.filesystem or 'an unknown file system'})"
    start, end = layout.span
    for segment in layout.segments:
        stop = segment.address + segment.size
        inside = "  span" if start <= segment.address < end else ""
        yield f"  {segment.address:#x}-{stop:#x}  {mib(segment.size):>9}  {segment.kind:<6}{inside}"
    if not layout.pmd_size:
        return
    yield (
        f"  span {mib(end - start)} with {layout.huge_pages} whole huge pages of "
        f"{mib(layout.pmd_size)}; load address is {layout.phase:#x} modulo that"
    )
    for name, coverage in (("image", layout.image), ("memfd, anonymous", layout.memory)):
        left = "".join(f"; {size} bytes: {why}" for why, size in coverage.left.items())
        yield (
            f"  {name}: {coverage.huge_bytes} of {layout.code_bytes} bytes of code "
            f"({percent(coverage.huge_bytes, layout.code_bytes)}) on huge pages{left}"
        )
