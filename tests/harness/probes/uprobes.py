"""Uprobes, which perf, bpftrace and SystemTap set on a file: by the path of the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading

from elftools.elf.elffile import ELFFile

from harness import outside
from harness.probes.commands import last_line, run, tool
from harness.probes.registry import probe
from harness.probes.target import UNPRIMED, Failed, NotHere, Target

FUNCTION = "PySequence_Tuple"  # a request to spin calls it

# A tracefs of our own, for the machine may have none mounted; the events are of all. What others
# have set stays: a line is appended, and the one event is taken away. perf counts the hits of the
# one process, and the kernel sets the breakpoint in no other.
SCRIPT = """
mount -t tracefs none "$1" || exit 77
trap 'echo "-:$2/call" >>"$1/uprobe_events"; umount "$1"' EXIT
echo "p:$2/call $3:$4" >>"$1/uprobe_events" || exit 1
"$6" stat -x, -e "$2:call" -p "$5" sleep 2
"""


def offset_of(path: str, name: str) -> int:
    """Where a function lies in a file."""
    with open(path, "rb") as file:
        elf = ELFFile(file)
        (symbol,) = elf.get_section_by_name(".dynsym").get_symbol_by_name(name)
        return next(iter(elf.address_offsets(symbol["st_value"], 1)))


def hit(target: Target, path: str) -> str:
    """Whether a uprobe on a file fires while the worker works, in words."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        raise NotHere("needs root and unshare")
    mount = target.directory / "tracing"
    mount.mkdir(exist_ok=True)
    group = f"page_primer_{target.pid}_{threading.get_ident():x}"
    with target.spinning():
        said = run("unshare", "--mount", "sh", "-c", SCRIPT, "sh", str(mount), group, path,
                   hex(offset_of(path, FUNCTION)), str(target.pid), tool("perf"))  # fmt: skip
    counted = re.search(rf"^(\d+),,{group}:call,", said, re.MULTILINE)
    if not counted:
        raise Failed(last_line(said))
    if counted[1] == "0" and target.way == UNPRIMED:
        raise Failed("it does not fire")
    return "it fires" if int(counted[1]) else "it does not fire"


@probe("uprobe on the interpreter's path")
def by_path(target: Target) -> str:
    return hit(target, target.interpreter)


@probe("uprobe on the path in /proc/PID/maps")
def by_mapping(target: Target) -> str:
    address = json.loads(target.get("addresses"))[FUNCTION]
    path = next(v.path for v in outside.smaps(target.pid) if v.start <= address < v.end)
    if not os.path.exists(path):
        raise Failed("there is no file with that path")
    return hit(target, path)
