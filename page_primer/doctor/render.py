"""Checks and layout as plain data and as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from page_primer.doctor.findings import (
    INFO,
    OK,
    PROBLEM,
    STATUSES,
    WARNING,
    Check,
    exit_status,
)
from page_primer.words import counted, mib, percent

if TYPE_CHECKING:
    from page_primer.doctor.coverage import Interpreter

IMAGES = "image directory "  # how names of checks begin

# What a section's checks are called; the last has what is in no other.
SECTIONS = (
    ("This machine", ("platform", "kernel", "transparent huge pages", "shmem huge pages",
                      "memfd_noexec", "hugetlb pool", "container")),
    ("This process", ("switch", "THP of this process", "write-execute")),
    ("The interpreter's code", ("interpreter", "alignment", "backing")),
    ("Where copies can be", (IMAGES, "image directories", "memfd", "anonymous", "hugetlb")),
    ("Memory", ("locking", "available memory", "heap", "preloading")),
    ("Other", ("",)),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One check, as it is shown."""

    section: str | None  # of the first row of one
    status: str
    name: str
    found: str
    note: str | None


LayOut = Callable[[Sequence[Row]], str]


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
        lay_out: what makes a table of rows.
    """
    counts = {status: sum(check.status == status for check in checks) for status in STATUSES}
    words = (
        f"{counts[OK] + counts[INFO]} ok",
        counted(counts[WARNING], WARNING),
        counted(counts[PROBLEM], PROBLEM),
    )
    verdict = _VERDICTS[exit_status(checks)]
    codes = dict.fromkeys(check.code for check in checks if check.is_shortfall and check.code)
    about = [f"docs/doctor.md is about {', '.join(codes)}"] if codes else []
    parts = [lay_out(list(_rows(checks))), *(["", *_draw(layout)] if layout else [])]
    return "\n".join([*parts, "", *about, f"{verdict}: {', '.join(words)}"])


_VERDICTS = ("Fine", "Falls short", "Cannot do all that is asked of it")


def _rows(checks: Sequence[Check]) -> Iterator[Row]:
    """The checks section by section, in the order of a diagnosis within each."""
    left = list(checks)
    for title, names in SECTIONS:
        here = [check for check in left if check.name.startswith(names)]
        left = [check for check in left if check not in here]
        for number, check in enumerate(here):
            label = "fix" if check.is_shortfall else "try"
            note = f"{label}: {check.fix}" if check.fix else None
            name = check.name.removeprefix(IMAGES)
            yield Row(None if number else title, check.status, name, check.found, note)


def _draw(layout: Interpreter) -> Iterator[str]:
    yield layout.path
    yield f"  {layout.kind}, on {layout.filesystem or 'an unknown file system'}"
    start, end = layout.span
    for segment in layout.segments:
        stop = segment.address + segment.size
        inside = "  span" if start <= segment.address < end else ""
        line = (
            f"  {segment.address:#x}-{stop:#x}  {mib(segment.size):>9}  {segment.kind:<6}{inside}"
        )
        yield line.rstrip()
    if not layout.pmd_size:
        return
    pages = counted(layout.huge_pages, "whole huge page")
    yield f"  span {mib(end - start)} with {pages} of {mib(layout.pmd_size)}"
    yield f"  load address is {layout.phase:#x} modulo that"
    for name, coverage in (("image", layout.image), ("memfd, anonymous", layout.memory)):
        share = percent(coverage.huge_bytes, layout.code_bytes)
        yield f"  {name}: {share} of the code on huge pages"
        for why, size in coverage.left.items():
            yield f"    {mib(size)} left: {why}"
