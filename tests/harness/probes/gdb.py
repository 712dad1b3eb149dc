"""gdb on a live worker."""

from __future__ import annotations

import json
import os
import re

from harness.probes.commands import gdb, last_line
from harness.probes.frames import NATIVE, Frame, base
from harness.probes.registry import probe
from harness.probes.target import Failed, NotHere, Target
from harness.probes.verdicts import same_frames


def frames_of(text: str) -> list[Frame]:
    found = re.findall(r"^#\d+\s+(?:0x[0-9a-f]+ in )?(\S+) \((.*)$", text, re.MULTILINE)
    if not found:
        raise Failed(last_line(text))
    frames = []
    for name, rest in found:
        where = re.search(r"\) (?:at|from) (\S+)$", rest)
        frames.append(Frame(NATIVE, "?" if name == "??" else name, base(where[1]) if where else ""))
    return frames


@probe("gdb bt", same_frames)
def bt(target: Target) -> list[Frame]:
    with target.held():
        return frames_of(gdb("bt", target=["-p", str(target.pid)]))


@probe("gdb symbols")
def symbols(target: Target) -> dict[str, list[str]]:
    """Symbols by address and by name, code disassembled, a variable read and a function called."""
    questions = {}
    for name, address in json.loads(target.get("addresses")).items():
        questions[f"symbol at {name}"] = f"info symbol {address}"
        questions[f"code of {name}"] = f"x/3i {address}"
    questions["address of PyEval_EvalCode"] = "info symbol PyEval_EvalCode"
    questions["a variable"] = "x/s &_PyRuntime"
    questions["a call"] = "print ((const char *(*)(void))Py_GetVersion)()"
    commands = []
    for name, question in questions.items():
        commands += [f"echo \\n@{name}\\n", question]
    with target.held():
        said = gdb(*commands, target=["-p", str(target.pid)])
    if said.count("\n@") != len(questions):
        raise Failed(last_line(said))
    answers = {}
    for part in said.split("\n@")[1:]:
        name, _, answer = part.partition("\n")
        answers[name] = re.sub(r"0x[0-9a-f]+|\[Inferior .*| of /.*", "", answer).split("\n")
    return answers


@probe("gdb breakpoint")
def breakpoint_in_moved_code(target: Target) -> tuple[list[str], bool]:
    """A breakpoint in moved code is hit, and the worker works on after it."""
    with target.spinning():
        said = gdb("break PySequence_Tuple", "continue", "bt 1", "delete", "detach",
                   target=["-p", str(target.pid)])  # fmt: skip
    return [frame.name for frame in frames_of(said)], target.alive


@probe("gdb py-bt")
def py_bt(target: Target) -> list[str]:
    """Python's own extension of gdb, which needs debug information of the interpreter."""
    version = json.loads(target.get("version"))
    places = [
        f"{version['base']}/bin/python{version['number']}-gdb.py",
        f"/usr/share/gdb/auto-load{version['base']}/bin/python{version['number']}-gdb.py",
    ]
    script = next((place for place in places if os.path.exists(place)), None)
    if script is None:
        raise NotHere(f"no python{version['number']}-gdb.py here")
    with target.held():
        said = gdb(f"source {script}", "py-bt", target=["-p", str(target.pid)])
    found = re.findall(r'^  File ".*?([^/"]*)", line (\d+), in (\S+)', said, re.MULTILINE)
    if not found:
        raise Failed(last_line(said))
    return [" ".join(frame) for frame in found]
