"""Hostile environments: how each is made, and what prime() may do in it.

In every one the host lives, answers, ends normally, and the report names the reason; restore()
leaves no descriptor, mapping or lock. test_environments.py tries each, and tools/environments
writes docs/environments.md from what it observes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import outside
from harness.privileges import has_images
from harness.process import Failed, Process, interpreter
from harness.refused import LEFT_ANYWAY
from harness.state import CYCLES, EXERCISE, assert_nothing_left, state
from page_primer import reasons

MIB = 1 << 20
PRIMED, OTHERWISE, NOT = "on huge pages", "on huge pages, otherwise", "left alone"

NOT_TRUSTED = "its own user is not to be trusted|that may be anybody's name"

PRIME = "import page_primer; report = page_primer.prime(**options)"


class Unavailable(Exception):
    """This machine cannot make the environment; the message says why."""


@dataclass(frozen=True)
class Made:
    """A process's surroundings: the interpreter, what is put before it, variables, options."""

    python: str
    folder: Path  # empty, on disk, and gone afterwards
    options: dict[str, Any] = field(default_factory=dict)
    wrapper: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """`make` puts it up around a process; `before` is executed there first, `during` in prime()'s
    place, which it is part of. `says` is what the report must have; without it any reason will do,
    and none where all that can be is on huge pages. `outcome` is what may come of it: one of the
    three words above, or several.

    What `before` leaves in `unavailable` is why the environment cannot be made."""

    name: str
    how: str
    outcome: tuple[str, ...] = (PRIMED,)
    says: str = ""
    make: Callable[[Made, ExitStack], Made] = lambda made, _: made
    before: str = ""
    during: str = PRIME
    # restore() may do its part where prime() cannot: it needs less, and memory was freed.
    undoes: bool = False
    cycles: int = CYCLES  # of `during` and restore(): fewer where `during` has many itself
    slow: bool = False
    hours: bool = False  # for tools/environments alone, by name


@dataclass(frozen=True)
class Row:
    """What was observed."""

    outcome: str
    reason: str  # in the report's words


def observe(environment: Environment, python: str, folder: Path) -> Row:
    """Try an environment: everything that must hold in each is asserted.

    Raises:
        Unavailable: it cannot be made here.
        AssertionError, Failed: something did not hold.
    """
    with ExitStack() as stack:
        options = {"image_dir": str(folder / "store" / "images")}
        (folder / "store").mkdir(mode=0o755)
        made = environment.make(Made(python, folder, options), stack)
        try:
            process = stack.enter_context(
                Process(made.python, env=made.variables, wrapper=made.wrapper, options=made.flags)
            )
        except Failed as error:
            raise Unavailable(f"no such process can be started: {error}") from error
        return _observe(environment, made, process)


def _observe(environment: Environment, made: Made, process: Process) -> Row:
    pid = leaf(process._process.pid)
    process.run(EXERCISE)
    process.run("import ctypes, os, page_primer")
    options = f"options, unavailable = {made.options!r}, None"
    unavailable = process.run(f"{options}\n{environment.before}\nresult = unavailable")
    if unavailable:
        raise Unavailable(unavailable)
    report, text = process.run(
        f"{environment.during}\nresult = report.as_dict(), str(report) + repr(report.as_dict())"
    )
    assert process.run(EXERCISE) == "1.41421356", "it answers"
    outcome, reason = _outcome(environment, made, pid, report, text)
    put_back = process.run("result = page_primer.restore().reason")
    if environment.undoes:
        assert report["reason"] or put_back in (None, str(reasons.TOO_LITTLE_MEMORY)), put_back
    else:
        assert bool(put_back) == bool(report["reason"]), (report, put_back)
    assert process.run(EXERCISE) == "1.41421356", "it answers when put back"
    # What a first call imports and allocates stays: what is compared are others.
    before = state(pid)
    for _ in range(environment.cycles):
        process.run(f"{environment.during}\npage_primer.restore()\nresult = None")
    assert process.run(EXERCISE) == "1.41421356"
    assert_nothing_left(before, state(pid))
    return Row(outcome, reason)


def _outcome(
    environment: Environment, made: Made, pid: int, report: dict[str, Any], text: str
) -> tuple[str, str]:
    core = interpreter(report) if report["objects"] else None
    huge, whole = 0, False
    if core is not None:
        with suppress(OSError, StopIteration):  # it was upgraded, and is not at its path
            text_section = outside.text_of(pid, core["path"])
            if not text_section.attainable:  # the loader has put it where no huge page fits
                assert not core["code_huge_bytes"]
                return f"{NOT}: no whole huge page at this address", ""
            huge, whole = text_section.huge, text_section.is_huge
            assert bool(huge) == bool(core["code_huge_bytes"]), (huge, core)
        huge = huge or core["code_huge_bytes"]
    wanted = made.options.get("backing", "image")
    outcome, allowed, says = NOT, environment.outcome, environment.says
    if core is not None and huge:
        outcome = PRIMED if core["backing"] in (wanted, "already", "in_place") else OTHERWISE
    if wanted == "image" and not has_images():
        # Whatever else is wrong with the store, it may not be the first thing that shows.
        allowed = tuple(OTHERWISE if one == PRIMED else one for one in allowed)
        if outcome == OTHERWISE and (says or OTHERWISE not in environment.outcome):
            says = f"{says}|{NOT_TRUSTED}" if says else NOT_TRUSTED
    assert outcome in allowed, (outcome, text)
    if says:
        found = re.search(says, text)
        assert found, (says, text)
        reason = found[0]
    else:
        reason = "; ".join(_reasons(report, core))
        assert reason or (whole and outcome == PRIMED), (outcome, text)
        # That some of it is kept for profilers is not why another backing was taken.
        assert outcome != OTHERWISE or (core is not None and core["notes"]), text
    if outcome != NOT and core is not None:
        return f"{outcome}: {core['backing']}", reason
    return outcome, reason


def _reasons(report: dict[str, Any], core: dict[str, Any] | None) -> list[str]:
    """Why something was not done, or otherwise: all of it, the interpreter's code, or locks."""
    found = [": ".join(filter(None, (report["reason"], report["detail"])))]
    if core is not None:
        found += [note.rpartition("/")[2] for note in core["notes"]]  # a path is of this very run
        found += [
            reason
            for segment in core["segments"]
            for reason in segment["left"]
            if reason not in LEFT_ANYWAY
        ]
    if report["lock_refusal"]:
        found.append(f"not locked: {report['lock_refusal']}")
    return list(dict.fromkeys(filter(None, found)))


def leaf(pid: int) -> int:
    """The process at the end of a chain of wrappers that fork, as we see it."""
    while True:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = file.read().split()
        if not children:
            return pid
        pid = int(children[0])
