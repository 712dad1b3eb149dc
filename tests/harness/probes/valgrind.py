"""A program that primes itself under memcheck."""

from __future__ import annotations

import re
from typing import Any

from harness.probes.commands import last_line, run, tool
from harness.probes.registry import probe
from harness.probes.target import UNPRIMED, Failed, NotHere, Target
from harness.probes.verdicts import Verdict, same

VALGRINDED = """
import json, re, sys, page_primer
core = page_primer.prime().interpreter
why = sorted({reason for segment in core.segments for reason in segment.left}) if core else ()
text = json.dumps(sorted(range(1000), key=lambda number: number * 7919 % 1009))
print(len(re.sub(r"\\d+", "", text)), core and core.backing, *why)
"""


def same_checks(expected: dict[str, Any], seen: dict[str, Any]) -> Verdict:
    return same({**expected, "backing": ""}, {**seen, "backing": ""})


@probe("valgrind", same_checks)
def memcheck(target: Target) -> dict[str, Any]:
    """A program that primes itself under memcheck. What is told of uninitialised values is
    CPython's own, and prime() runs more of it; accesses to wrong addresses are not."""
    env = {**target.shape.env, **target.way.env, "PYTHONMALLOC": "malloc", "PAGE_PRIMER_MLOCK": "0",
           "PAGE_PRIMER_PERF_MAP": "0"}  # fmt: skip
    command = [tool("valgrind"), target.shape.python, "-c", VALGRINDED]
    said = run(*command, env=env)
    result = re.search(r"^(\d+) (\w+)(.*)$", said, re.MULTILINE)
    if not result or "ERROR SUMMARY" not in said:
        raise Failed(last_line(said))
    if result[2] == "None" and "no whole huge page" in result[3]:
        raise NotHere("nothing to move: no whole huge page where valgrind loads it")
    if not target.way.aligned and (result[2] == "None") != (target.way == UNPRIMED):
        raise Failed("not primed under valgrind")
    return {
        "result": int(result[1]),
        "wrong addresses": len(re.findall("Invalid (?:read|write)|Jump to the invalid", said)),
        # The innermost alone: where nothing is moved, too, valgrind takes a word of the heap for a
        # caller's address now and then.
        "frames without a name": len(re.findall(r"at 0x[0-9A-F]+: \?\?\?", said)),
        "backing": result[2],
    }
