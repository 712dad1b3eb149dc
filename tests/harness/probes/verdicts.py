"""What a tool saw of a primed worker, held against what it saw of an unprimed one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from harness.probes.frames import NATIVE, PYTHON, Frame

__all__ = [
    "ABSENT",
    "CANNOT",
    "NOTE",
    "WORKS",
    "Verdict",
    "hottest",
    "same",
    "same_frames",
    "same_shares",
]


@dataclass(frozen=True)
class Verdict:
    """What became of a tool: it works, works with a note, or cannot do its work."""

    mark: str
    note: str = ""


WORKS, NOTE, CANNOT, ABSENT = "works", "note", "cannot", "not here"


def same_frames(expected: list[Frame], seen: list[Frame]) -> Verdict:
    if seen == expected:
        return Verdict(WORKS)
    python = [[frame for frame in frames if frame.kind == PYTHON] for frames in (expected, seen)]
    if python[0] != python[1]:
        return Verdict(CANNOT, f"{len(python[1])} of {len(python[0])} Python frames")
    names = [Counter(f.name for f in frames if f.kind == NATIVE) for frames in (expected, seen)]
    missing = names[0] - names[1]
    total = names[0].total()
    if missing:
        mark = NOTE if python[0] else CANNOT
        return Verdict(mark, f"{total - missing.total()} of {total} native frames are named")
    more = names[1] - names[0]
    return Verdict(NOTE, f"{more.total()} frames more" if more else "other source lines")


def same(expected: Any, seen: Any) -> Verdict:
    if seen == expected:
        return Verdict(WORKS)
    return Verdict(CANNOT, f"{difference(expected, seen)}")


def difference(expected: Any, seen: Any) -> str:
    if isinstance(expected, dict) and isinstance(seen, dict):
        keys = [key for key in expected if seen.get(key) != expected[key]]
        return (
            f"{len(keys)} of {len(expected)} differ: {keys[0]} {seen.get(keys[0])!r}"
            if keys
            else ""
        )
    return (seen if isinstance(seen, str) else f"{seen!r}")[:160]


def hottest(names: Counter[str], total: int) -> set[str]:
    """What no run of the same work misses by chance: 5 % of the samples, and 20 of them."""
    return {name for name, count in names.items() if count >= max(20, 0.05 * total)}


def same_shares(expected: Counter[str], seen: Counter[str]) -> Verdict:
    """Names that have a share worth mentioning when unprimed are seen when primed."""
    hot = hottest(expected, expected.total())
    missing = hot - set(seen)
    if missing:
        return Verdict(
            CANNOT, f"{len(hot) - len(missing)} of {len(hot)} functions; not {min(missing)}"
        )
    return Verdict(WORKS)
