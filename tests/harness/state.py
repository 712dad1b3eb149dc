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


def assert_nothing_left(before: State, after: State, slack: int = 3) -> None:
    """Descriptors, locks and file mappings are the same; a few mappings may be the interpreter's
    own memory."""
    assert after.descriptors == before.descriptors
    assert after.locked == before.locked, "locks"
    assert [m for m in before.files if m not in after.files] == [], "not put back"
    more = [m for m in after.files if m not in before.files]
    assert [m for m in more if "page-primer" in m[4] or "/images/" in m[4]] == [], "left mapped"
    assert after.mappings <= before.mappings + slack
    assert after.size <= before.size + (8 << 20)
