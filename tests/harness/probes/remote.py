"""CPython's own way into another process, from 3.14 on."""

from __future__ import annotations

import re

from harness.probes.commands import last_line, run
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
    (here / "script.py").write_text(EXECUTED % f"{here}/executed")
    execute = f"import sys; sys.remote_exec({target.pid}, '{here}/script.py')"
    with target.spinning():
        said = run(target.shape.python, "-c", execute)
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
        said = run(target.shape.python, "-m", "pdb", "-p", str(target.pid), stdin="where\nquit\n")
    if "option -p not recognized" in said or "unrecognized arguments: -p" in said:
        raise NotHere("Python before 3.14")
    found = set(re.findall(r"\.py\(\d+\)(\w+)\(\)", said))
    if "app" not in found:
        raise Failed(last_line(said))
    return found & {"handle_request", "app", "spin", "run_for_one"}
