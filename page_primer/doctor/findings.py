"""The outcome of one examination, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

STATUSES = OK, INFO, WARNING, PROBLEM = "ok", "info", "warning", "problem"

# Whatever is not merely fine has one of these, and docs/doctor.md a section on it.
CODES = (
    "platform", "not-examined", "switched-off", "remap-off",
    "old-kernel", "no-thp", "huge-pages-too-large", "thp-never", "shmem-forbidden", "container",
    "thp-disabled", "anonymous-denied",
    "already-moved", "cannot-be-moved", "left-alone", "low-coverage", "not-congruent",
    "small-pages", "no-longer-aligned", "cannot-be-aligned", "musl", "not-aligned",
    "no-backing", "memory-only", "nothing-to-move", "page-cache-decides",
    "directory-unusable", "directory-not-huge", "directory-full", "directory-passed-over",
    "no-image-in-roots-store", "memory-unusable", "memory-not-huge",
    "pool-unused", "pool-too-small",
    "locks-off", "locks-refused", "locks-exceed-limit", "code-exceeds-limit",
    "memory-unknown", "short-of-memory", "heap-off", "heap-left-alone", "not-frozen",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing examined."""

    name: str
    status: str  # "ok", "info", "warning" or "problem"
    found: str
    fix: str | None = None  # what mends it, in one line: a command, a flag, a unit's setting
    code: str | None = None  # one of CODES; None where all is well
    lines: tuple[str, ...] = ()  # the fix as it is to be written, where that is not `fix` itself

    @property
    def is_shortfall(self) -> bool:
        return self.status in (WARNING, PROBLEM)


def exit_status(checks: Iterable[Check]) -> int:
    """0: all is fine; 1: something falls short; 2: something that is needed, or was asked for,
    cannot be had."""
    found = {check.status for check in checks}
    return 2 if PROBLEM in found else 1 if WARNING in found else 0


def fix_lines(checks: Iterable[Check]) -> tuple[str, ...]:
    """What mends the shortfalls, line by line, each once; a line that nothing can read is a
    comment. Of several numbers for one sysctl the largest does for all."""
    lines = [
        line
        for check in checks
        if check.is_shortfall
        for line in (check.lines or ((check.fix,) if check.fix else ()))
    ]
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition("=")
        if not line.startswith("sysctl "):
            found[line] = line
        elif int(value) > int(found.get(key, "=0").partition("=")[2]):
            found[key] = line
    return tuple(found.values())
