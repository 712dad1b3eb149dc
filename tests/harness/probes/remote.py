"""CPython's own way into another process, from 3.14 on."""

from __future__ import annotations

import re

from harness.probes.commands import inside, last_line
from harness.probes.registry import probe
from harness.probes.target import Failed, NotHere, Target
from harness.servers import wait_for

EXECUTED = """
import sys, traceback
names = [frame.name for frame in traceback.extract_stack()]
with open(%r, "w") as file:
    print(*names[: names.index("app") + 2], file=file)
"""


@probe("sys.remote_exec")
def remote_exec(target: Target) -> list[str]:
    """A script run in the worker by another interpreter: the stack that it finds itself on."""
    here = target.directory
    there = str(here).removeprefix(target.shape.chroot)
    (here / "script.py").write_text(EXECUTED % f"{there}/executed")
    execute = f"import sys; sys.remote_exec({target.pid}, '{there}/script.py')"
    with target.spinning():
        said = inside(target, target.shape.python, "-c", execute)
        if "has no attribute 'remote_exec'" in said:
            raise NotHere("Python before 3.14")
        if said:
            raise Failed(last_line(said))
        wait_for(lambda: (here / "executed").read_text().endswith("\n"), "the script")
    (here / "executed").rename(here / "executed before")
    return (here / "executed before").read_text().split()


@probe("pdb -p")
def pdb(target: Target) -> set[str]:
    with target.spinning():
        said = inside(target, target.shape.python, "-m", "pdb", "-p", str(target.pid),
                      stdin="where\nquit\n")  # fmt: skip
    if "option -p not recognized" in said:
        raise NotHere("Python before 3.14")
    found = set(re.findall(r"\.py\(\d+\)(\w+)\(\)", said))
    if "app" not in found:
        raise Failed(last_line(said))
    return found & {"handle_request", "app", "spin", "run_for_one"}
