"""What a process holds, seen from outside, and whether it is as before.

harness.refused forks a thousand children that prime themselves, each with what is imported here: so
this imports little, and nothing that brings shared libraries.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

# What a program does that would notice code gone wrong.
EXERCISE = (
    "import json, re, decimal, gc; gc.collect()\n"
    "assert json.loads(json.dumps({'a': [1.5, None]})) == {'a': [1.5, None]}\n"
    "assert re.sub('(a+)', r'<\\1>', 'xaay') == 'x<aa>y'\n"
    "result = str(decimal.Decimal(2).sqrt())[:10]"
)


def file_mappings(pid: int) -> list[tuple[int, int, str, int, str]]:
    """What /proc/PID/maps says of the mappings of ELF files: range, protection, offset, path."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        rows = [line.split(maxsplit=5) for line in file]
    return [
        (int(start, 16), int(end, 16), row[1], int(row[2], 16), row[5].strip())
        for row in rows
        if len(row) > 5 and row[5].startswith("/")
        for start, _, end in [row[0].partition("-")]
    ]


# How often what is tried is repeated between two looks at a process: a mapping, descriptor or lock
# that stays after each call is then more than what assert_nothing_left() lets an interpreter have.
CYCLES = 4


class State(NamedTuple):
    """What a process holds, seen from outside."""

    files: list[tuple[int, int, str, int, str]]
    mappings: int
    size: int
    locked: int
    descriptors: list[str]


def state(pid: int) -> State:
    with open(f"/proc/{pid}/maps") as file:
        spans = [line.split()[0].split("-") for line in file]
    with open(f"/proc/{pid}/status") as file:
        locked = next((int(line.split()[1]) for line in file if line.startswith("VmLck")), 0)
    names = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    size = sum(int(high, 16) - int(low, 16) for low, high in spans)
    return State(file_mappings(pid), len(spans), size, locked, sorted(names))


def left(before: State, after: State, slack: int = 3) -> dict[str, str]:
    """What a process has kept, by kind. Descriptors, locks and file mappings should be the same; a
    few mappings may be the interpreter's own memory. To be of use against what stays after each
    call, there are CYCLES of them between the two."""
    found = {}
    if after.descriptors != before.descriptors:
        found["descriptors"] = f"{before.descriptors}, then {after.descriptors}"
    if after.locked != before.locked:
        found["locks"] = f"{before.locked} KiB, then {after.locked}"
    more = [m for m in after.files if m not in before.files]
    gone = [m for m in before.files if m not in after.files]
    if gone or any("page-primer" in m[4] or "/images/" in m[4] for m in more):
        found["mappings"] = f"not put back: {gone}; left mapped: {more}"
    elif after.mappings > before.mappings + slack:
        found["mappings"] = f"{before.mappings}, then {after.mappings}"
    elif after.size > before.size + (8 << 20):
        found["mappings"] = f"{before.size} bytes, then {after.size}"
    return found


def assert_nothing_left(before: State, after: State, slack: int = 3) -> None:
    found = left(before, after, slack)
    assert not found, found
