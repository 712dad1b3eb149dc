"""Attach every tool to a primed gunicorn worker, for every interpreter and every backing here, and
write the table into docs/tools.md: `make tools-matrix`.

    python tools/matrix.py [--shape PATTERN] [--probe PATTERN] [--jobs N] [--output FILE]

What a tool sees is compared with what it sees of an unprimed worker of the same interpreter, in the
same run; so is an aligned copy, primed and not (--shape "*, aligned" for these alone). The chapters
of interpreters that were not chosen stay. The probes are in tests/harness/probes/;
tests/test_tools.py asserts on the most important ones.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import chapters  # noqa: E402
from harness import aligned, debian_python, probes  # noqa: E402
from harness.interpreters import INTERPRETERS, python_of  # noqa: E402
from harness.probes import (  # noqa: E402
    ABSENT,
    CANNOT,
    NOTE,
    PROBES,
    UNPRIMED,
    WORKS,
    Shape,
    Verdict,
    Way,
    perf,
)
from harness.probes.commands import run, tool  # noqa: E402

KEPT = ROOT / ".venv-tools"  # copies of interpreters, and memray for each: made once
WAITING = 3600  # seconds, for Debian unstable
ALIGNED = ", aligned"
# Of Debian unstable, in which this program runs with that one's own tools. There its interpreter
# is one of the machine's.
UNSTABLE = "CPython 3.14 (Debian unstable), static, not PIE"
THERE = "CPython 3.14.[0-9]*, static, not PIE"
SYMBOL = {WORKS: "works", NOTE: "note", CANNOT: "cannot", ABSENT: "-"}

# Why, where it is known; the first that matches tool, way and interpreter.
WHY = (
    ("pystack remote --native", "[ma]*", "*", "elfutils unwinds by what is at the mapping's path"),
    ("pystack remote --native", "image*", "*",
     "elfutils finds a debug package by build-id, and an image has one of its own"),
    ("py-spy *--native", "[ma]*", "*", "py-spy unwinds by what is at the mapping's path"),
    ("perf record*", "memfd", "*", "perf looks for symbols at the path, and a memfd has none"),
    ("perf record*", "anonymous", "*", "perf knows anonymous memory by a perf map: see the column"),
    ("build-id*", "[ma]*", "*", "there is no file to look into"),
    ("uprobe on the interp*", "*", "*", "uprobes belong to a file, and the code is in another"),
    ("uprobe on the path*", "[ma]*", "*", "a probe needs a file"),
    ("a core file, eu-stack", "*", "*", "elfutils has no file for the program: name it with -e"),
)  # fmt: skip


class NotBuilt(Exception):
    """An interpreter is not to be had here; the message says why."""


def shapes(pattern: str) -> Iterator[Shape | str]:
    """The interpreters with such a name that are here, as they are and aligned; in words why one
    is not here."""
    for number, base in INTERPRETERS.items():
        maps = run(base, "-c", "print(open('/proc/self/maps').read())")
        form = "shared libpython" if "/libpython3" in maps else "static, not PIE"
        name = f"CPython {number.partition('-')[0]}, {form}"
        yield from both(name, pattern, partial(copied, number, base))
    version = os.path.basename(debian_python.DEBIAN).removeprefix("python")
    if debian_python.ARCHIVE.exists():
        yield from both(f"CPython {version}, static PIE", pattern, pie)
    else:
        yield f"a static PIE: needs {debian_python.PACKAGE} to build it from"


def both(name: str, pattern: str, build: Callable[[], Shape]) -> Iterator[Shape | str]:
    """A shape as it is, and its aligned copy, where their names match."""
    wanted = [title for title in (name, name + ALIGNED) if fnmatch.fnmatch(title, pattern)]
    try:
        shape = replace(build(), name=name) if wanted else None
    except NotBuilt as reason:
        yield f"{name}: {reason}"
        return
    if shape and name in wanted:
        yield shape
    if shape and name + ALIGNED in wanted:
        try:
            yield replace(shape, name=name + ALIGNED, aligned=twin_of(shape))
        except aligned.NotAligned as reason:
            yield f"{name + ALIGNED}: {reason}"


def home_of(number: str) -> Path:
    home = KEPT / number
    home.mkdir(parents=True, exist_ok=True)
    return home


def copied(number: str, base: str) -> Shape:
    """A copy: a uprobe is in all processes that execute the file, and splits their huge pages."""
    found = aligned.unaligned_copy_of(base, home_of(number))
    install_memray(found.python)
    return Shape("", found.python, env=found.env)


def pie() -> Shape:
    python = python_of(home_of("pie"), debian_python.DEBIAN)
    install_memray(python)
    if os.path.islink(python):
        debian_python.build_pie(Path(python))
    return Shape("", python)


def install_memray(python: str) -> None:
    """memray is loaded into the process that it looks at, so it must be that interpreter's."""
    check = subprocess.run([python, "-c", "import memray"], capture_output=True, check=False)
    if check.returncode:
        pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
        # What it depends on is pure Python, and here.
        options = ["--quiet", "--no-deps", "--ignore-installed"]
        subprocess.run([*pip, "install", *options, "memray"], check=False)


def of_unstable(pattern: str, probe: str, page: Page) -> Iterator[str]:
    """Enter Debian unstable's chapters, made there by this program; in words why there is none."""
    wanted = [end for end in ("", ALIGNED) if fnmatch.fnmatch(UNSTABLE + end, pattern)]
    if not wanted:
        return
    there = THERE + (wanted[0] if len(wanted) == 1 else "*")
    options = shlex.join(["--shape", there, "--probe", probe, "--output", "-"])
    command = f"make tools-matrix MATRIX={shlex.quote(options)}"
    ended, said = within([str(ROOT / "tools/debian"), "sid", command], WAITING)
    for part in said.split(chapters.CHAPTER)[1:]:
        title, _, text = part.partition("\n")
        end = ALIGNED if title.endswith(ALIGNED) else ""
        page.enter(UNSTABLE + end, f"{text.strip()}\n")
        wanted.remove(end)
    for end in wanted:
        yield f"{UNSTABLE + end}: tools/debian {ended}"


def within(command: list[str], seconds: int) -> tuple[str, str]:
    """Run a command and all that it starts, for so long at most; how it ended, and what it said."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
            ended = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"had not ended after {seconds} s"
            os.killpg(process.pid, signal.SIGTERM)
            said, _ = process.communicate()
        except KeyboardInterrupt:  # which only we have
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return ended, said


def twin_of(shape: Shape) -> Shape:
    """An aligned copy of a shape."""
    home = Path(shape.python).parents[2] / "aligned"
    home.mkdir(exist_ok=True)
    found = aligned.copy_of(shape.python, home)
    install_memray(found.python)
    return replace(shape, python=found.python, env=found.env)


def look(shape: Shape, way: Way, module: Path, wanted: list[str]) -> dict[str, object]:
    """What each tool sees, or the exception that it ended with."""
    seen: dict[str, object] = {}
    for late in (False, True):
        mine = [PROBES[name] for name in wanted if PROBES[name].late == late]
        if not mine:
            continue
        with probes.Target(shape, way, module, late=late) as target:
            if not late and way != UNPRIMED:
                try:
                    target.require_primed()
                except probes.NotHere as reason:
                    return dict.fromkeys(wanted, reason)
            for probe in sorted(mine, key=lambda probe: probe.last):
                print(f"{shape.name} | {way.name} | {probe.name}", file=sys.stderr, flush=True)
                try:
                    seen[probe.name] = probe.look(target)
                except Exception as error:
                    if not isinstance(error, probes.NotHere | probes.Failed):
                        traceback.print_exc()
                    seen[probe.name] = error
    return seen


def judge(name: str, expected: object, seen: object) -> Verdict:
    if isinstance(expected, probes.NotHere):
        return Verdict(ABSENT, str(expected))
    if isinstance(expected, Exception):
        return Verdict(ABSENT, f"nor unprimed: {in_words(expected)}")
    if isinstance(seen, probes.NotHere):
        return Verdict(ABSENT, str(seen))
    if isinstance(seen, Exception):
        return Verdict(CANNOT, in_words(seen))
    return PROBES[name].judge(expected, seen)


def in_words(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):  # which would quote the whole command
        return f"no answer within {error.timeout:g} s"
    return str(error)


Table = dict[str, dict[str, Verdict]]


def examine(shape: Shape, ways: list[Way], module: Path, wanted: list[str]) -> Table:
    """The verdicts for an interpreter: by tool, by way."""
    ways = ways_of(shape, ways)
    unprimed = look(shape, UNPRIMED, module, wanted)
    table: Table = {name: {} for name in wanted}
    for way in ways:
        primed = look(shape, way, module, wanted)
        for name in wanted:
            table[name][way.name] = judge(name, unprimed[name], primed[name])
            said = f"{shape.name} | {way.name} | {name}: {table[name][way.name]}"
            print(said, file=sys.stderr, flush=True)
    return table


def ways_of(shape: Shape, ways: list[Way]) -> list[Way]:
    return [way for way in ways if way.aligned == (shape.aligned is not None)]


def why(tool: str, way: str, shape: str) -> str:
    for tools, ways, shapes, reason in WHY:
        pairs = (tool, tools), (way, ways), (shape, shapes)
        if all(fnmatch.fnmatch(*pair) for pair in pairs):
            return f": {reason}"
    return ""


def render(shape: str, table: Table, ways: list[Way]) -> Iterator[str]:
    """The table of an interpreter in Markdown, with its notes."""
    notes: dict[str, int] = {}
    release = ".".join(os.uname().release.split(".")[:2])
    machine = f"Linux {release} ({os.uname().machine})"
    yield f"Run on {time.strftime('%Y-%m-%d, %H:%M UTC', time.gmtime())}, on {machine}, with\n"
    yield f"{versions()}.\n\n"
    yield f"| tool | {' | '.join(way.name for way in ways)} |\n"
    yield "|---|" + "---|" * len(ways) + "\n"
    for name, verdicts in table.items():
        cells = []
        for way, verdict in verdicts.items():
            cell = SYMBOL[verdict.mark]
            if verdict.mark != WORKS:
                note = verdict.note.rstrip(".")
                if verdict.mark != ABSENT:
                    note += why(name, way, shape)
                cell += f" ({notes.setdefault(note, len(notes) + 1)})"
            cells.append(cell)
        yield f"| {name} | {' | '.join(cells)} |\n"
    yield "\n" + "".join(f"{number}. {note}\n" for note, number in notes.items())


def versions() -> str:
    """The versions of the tools, as they say themselves."""
    found = []
    for name in ("py-spy", "pystack", "memray", "austin", "gdb", "perf", "valgrind"):
        try:
            said = run(tool(name), "--version")
        except probes.NotHere:
            continue
        number = re.search(r"\d+\.\d+[\d.]*", said)
        found.append(f"{name} {number[0] if number else '?'}")
    return ", ".join(found)


class Page:
    """Where chapters go: a document that has them, or standard output."""

    def __init__(self, path: str) -> None:
        self.document = None if path == "-" else Path(path)

    def enter(self, title: str, text: str, *, last: bool = False) -> None:
        if self.document:
            chapters.enter(self.document, title, text, last=last)
        elif not last:
            print(f"{chapters.CHAPTER}{title}\n\n{text}", flush=True)


def matrix(found: list[Shape], wanted: list[str], jobs: int, page: Page) -> None:
    """Enter a chapter for each interpreter, as soon as it is done: it stays when the rest is cut
    off."""
    with (
        tempfile.TemporaryDirectory(prefix="page-primer-", dir="/var/tmp") as disk,
        tempfile.TemporaryDirectory(prefix="page-primer-", dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(prefix="page-primer-") as scratch,
    ):
        ways = probes.ways(Path(disk), Path(memory))
        probes.build_module(Path(scratch))
        with ThreadPoolExecutor(jobs) as pool:
            examined = {
                pool.submit(examine, shape, ways, Path(scratch), wanted): shape for shape in found
            }
            for done in as_completed(examined):
                shape = examined[done]
                text = "".join(render(shape.name, done.result(), ways_of(shape, ways)))
                page.enter(shape.name, text)
    shutil.rmtree(perf.BUILD_IDS, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="*", metavar="PATTERN")
    parser.add_argument("--probe", default="*", metavar="PATTERN[;PATTERN...]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    parser.add_argument("--output", default=str(ROOT / "docs" / "tools.md"), metavar="FILE",
                        help="- is standard output")  # fmt: skip
    options = parser.parse_args()
    patterns = options.probe.split(";")
    wanted = [n for n in PROBES if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
    page = Page(options.output)
    found = list(shapes(options.shape))
    if chosen := [shape for shape in found if isinstance(shape, Shape)]:
        matrix(chosen, wanted, options.jobs, page)
    absent = [reason for reason in found if isinstance(reason, str)]
    absent += of_unstable(options.shape, options.probe, page)
    text = "".join(f"- {reason}.\n" for reason in absent)
    page.enter("Not tried", text or "Nothing of what is here.\n", last=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
