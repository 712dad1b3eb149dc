"""Checks and layout as plain data and as text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from page_primer.doctor.findings import OK, PROBLEM, WARNING, Check
from page_primer.report import mib, percent

if TYPE_CHECKING:
    from page_primer.doctor.coverage import Interpreter


def as_dict(checks: Iterable[Check], layout: Interpreter | None = None) -> dict[str, Any]:
    """Checks and layout as plain data, ready for json.dumps(); sizes are in bytes."""
    return {
        "checks": [asdict(check) for check in checks],
        "interpreter": layout.as_dict() if layout else None,
    }


def render(checks: Sequence[Check], layout: Interpreter | None = None, width: int = 100) -> str:
    """Checks and layout as text for a terminal of `width` columns. Fixes are never wrapped, so that
    they can be copied."""
    lines = []
    indent = " " * 9
    for check in checks:
        # No line ends between a number and its unit.
        text = re.sub(r"(\d) (%|MiB)", "\\1\0\\2", f"{check.name}: {check.found}")
        wrapped = textwrap.wrap(
            text, max(width - 9, 30), break_long_words=False, break_on_hyphens=False
        )
        wrapped = [line.replace("\0", " ") for line in wrapped]
        lines += [f"{check.status:<9}{wrapped[0]}", *(indent + line for line in wrapped[1:])]
        if check.fix:
            lines.append(f"{indent}fix: {check.fix}")
    if layout:
        lines += ["", *_draw(layout)]
    counts = [
        f"{sum(check.status == status for check in checks)} {word}"
        for status, word in ((OK, "ok"), (WARNING, "warnings"), (PROBLEM, "problems"))
    ]
    return "\n".join([*lines, "", ", ".join(counts)])


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
