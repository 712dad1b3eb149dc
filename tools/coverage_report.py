"""Run the tests with coverage of Python and of C, and write what they never execute, and why.

The repository is copied to build/coverage/tree and built there with gcov's counters, beside a
virtual environment that shares the packages of the one that runs this. Every Python that the tests
start measures itself. Tests that fail are named and do not end the run: counters make processes
slower and open files of their own, which some tests notice.

Each line that is never executed needs a reason in tools/coverage_reasons.txt, and each reason there
a line: where they differ, that is named and the exit status is 1.

    tools/coverage_report.py [--report FILE] [--more | --report-only] [PYTEST OPTION...]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "coverage"
TREE, HOME, DATA = WORK / "tree", WORK / "venv", WORK / "data"
GOAL = {"Python": 92, "C": 85}
REASONS = ROOT / "tools/coverage_reasons.txt"
# What begins another part of a statement.
CLAUSE = re.compile(r"(except|elif|else|finally|case)\b|} else")

CONFIG = f"""
[run]
branch = true
parallel = true
data_file = {DATA}/python
source = page_primer
patch = _exit
[report]
exclude_also =
    if TYPE_CHECKING:
    ^\\s*\\.\\.\\.$
"""

# Imported by every Python's start. What a process has executed is written before it becomes another
# program, as `patch = execv` does; but that changes the environment, which tests look at.
MEASURED = """
import os
import coverage

coverage.process_startup()


def saving(execute):
    def save_and_execute(*arguments, **options):
        if (measured := coverage.Coverage.current()) is not None:
            measured.save()
        return execute(*arguments, **options)

    return save_and_execute


os.execv, os.execve = saving(os.execv), saving(os.execve)
"""


@dataclass
class File:
    """What of one file was executed."""

    name: str
    lines: int = 0
    run: int = 0
    branches: int = 0
    taken: int = 0
    # By function, which of its lines were executed; and those of them that went one way only.
    executed: dict[str, dict[int, bool]] = field(default_factory=dict)
    partial: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Missed:
    """Lines of a function, one after the other, that were never executed."""

    function: str  # and its file
    text: str  # of the first one
    lines: int
    whole: bool  # nothing of the function was executed

    @property
    def key(self) -> str:
        return self.function if self.whole else f"{self.function}: {self.text}"


@dataclass
class Reason:
    why: str
    always: bool  # or only on some machines, or at some moments
    used: bool = False


# ------------------------------------------------------------------------------------- set-up ---


def copy_tree(measured: bool = True) -> None:
    """Copy what the repository has, uncommitted changes included; but for what is measured."""
    names = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(names, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        here, there = ROOT / name, TREE / name
        if not here.exists():
            continue
        if name.startswith("page_primer/") and not measured:
            if not there.exists() or here.read_bytes() != there.read_bytes():
                sys.exit(f"{name} has changed since the counters began: run without --more")
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(here, there)


def build() -> None:
    """Build the core and page-primer-warm in the copy, with counters."""
    environment = {**os.environ, "CC": "gcc --coverage -fprofile-update=atomic", "CFLAGS": "-O0"}
    setup = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "build_scripts"]
    subprocess.run(setup, cwd=TREE, env=environment, check=True)
    # Other users' processes, too, add to the counters, and the first creates the files.
    for notes in TREE.rglob("*.gcno"):
        notes.with_suffix(".gcda").touch()
        notes.with_suffix(".gcda").chmod(0o666)


def make_environment() -> None:
    """A virtual environment with this one's packages, the copy instead of the repository."""
    shutil.rmtree(HOME, ignore_errors=True)
    venv.create(HOME, symlinks=True)
    packages = Path(sysconfig.get_path("purelib"))
    (there,) = HOME.glob("lib/python3.*/site-packages")
    for path in packages.iterdir():
        if not path.name.startswith("__editable__") and path.name != "__pycache__":
            (there / path.name).symlink_to(path)
    (there / "tree.pth").write_text(f"{TREE}\n")
    (there / "measured.py").write_text(MEASURED)
    (there / "coverage.pth").write_text("import measured\n")
    scripts = Path(sysconfig.get_path("scripts"))
    shebang = re.compile(rb"^#!" + re.escape(os.fsencode(scripts)) + rb"/(python\S*)\n")
    for path in scripts.iterdir():
        target = HOME / "bin" / path.name
        if target.exists() or not path.is_file():
            continue
        content = path.read_bytes()
        if not shebang.match(content):
            target.symlink_to(path)
            continue
        target.write_bytes(shebang.sub(b"#!%s/bin/\\1\n" % os.fsencode(HOME), content))
        target.chmod(0o755)
    (program,) = TREE.glob("build/scripts-*/page-primer-warm")
    (HOME / "bin" / program.name).unlink(missing_ok=True)
    shutil.copy(program, HOME / "bin")


def prepare() -> None:
    """Set everything up, with counters of zero."""
    shutil.rmtree(TREE, ignore_errors=True)
    copy_tree()
    build()
    make_environment()
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir(parents=True)
    DATA.chmod(0o1777)  # processes of other users write their own
    (WORK / "coveragerc").write_text(CONFIG)


def run_tests(options: list[str]) -> int:
    environment = {
        **os.environ,
        "COVERAGE_PROCESS_START": str(WORK / "coveragerc"),
        "GCOV_ERROR_FILE": "/dev/null",
        "PATH": f"{HOME / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(HOME / "bin/python"), "-m", "pytest", "-q", "--numprocesses", "auto",
               "--maxprocesses", "8", "--dist", "loadfile", *options]  # fmt: skip
    return subprocess.run(command, cwd=TREE, env=environment, check=False).returncode


# ---------------------------------------------------------------------------------- what ran ---


def python_files() -> Iterator[File]:
    coverage = [sys.executable, "-m", "coverage"]
    config = f"--rcfile={WORK / 'coveragerc'}"
    report = WORK / "python.json"
    if any(DATA.glob("python.*")):
        combine = [*coverage, "combine", config, "-q", "--append"]
        # Files of processes that were killed as they wrote may be all there is.
        subprocess.run(combine, cwd=TREE, check=False)
    subprocess.run([*coverage, "json", config, "-q", "-i", "-o", report], cwd=TREE, check=True)
    for name, found in json.loads(report.read_text())["files"].items():
        summary = found["summary"]
        file = File(
            name.removeprefix(f"{TREE}/").removeprefix("page_primer/"),
            summary["num_statements"], summary["covered_lines"],
            summary["num_branches"], summary["covered_branches"],
        )  # fmt: skip
        for function, part in found["functions"].items():
            lines = dict.fromkeys(part["executed_lines"], True)
            lines |= dict.fromkeys(part["missing_lines"], False)
            file.executed[function or "module"] = lines
            ways = {line for line, _ in part["missing_branches"] if lines[line]}
            file.partial[function or "module"] = sorted(ways)
        yield file


def c_files() -> Iterator[File]:
    """By gcov's own reading of its counters; what several objects have of a file is one."""
    for path in TREE.rglob("*.gcda"):
        if not path.stat().st_size:  # nothing of it ran
            path.unlink()
    out = WORK / "gcov"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in TREE.rglob("*.gcno"):
        command = ["gcov", "--json-format", "--branch-probabilities", str(path)]
        subprocess.run(command, cwd=out, check=True, stdout=subprocess.DEVNULL)
    for path in sorted(out.glob("*.gz")):
        for found in json.loads(gzip.decompress(path.read_bytes()))["files"]:
            if found["file"].startswith("/") or not found["lines"]:
                continue
            file = File(found["file"].removeprefix("page_primer/"))
            for line in found["lines"]:
                ways = [way for way in line["branches"] if not way["throw"]]
                file.lines += 1
                file.run += line["count"] > 0
                file.branches += len(ways)
                file.taken += sum(way["count"] > 0 for way in ways)
                name = line.get("function_name", "file")
                file.executed.setdefault(name, {})[line["line_number"]] = line["count"] > 0
                if line["count"] and any(not way["count"] for way in ways):
                    file.partial.setdefault(name, []).append(line["line_number"])
            yield file


# ------------------------------------------------------------------------------------ report ---


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def read_reasons() -> dict[str, Reason]:
    """What REASONS says, by its keys: its first lines describe it."""
    reasons: dict[str, Reason] = {}
    always, why = True, ""
    for line in REASONS.read_text().splitlines():
        if line.startswith("["):
            always = line == "[never]"
        elif line.startswith("    "):
            if reasons.setdefault(line.strip(), Reason(why, always)).why is not why:
                sys.exit(f"{REASONS.name}: twice: {line.strip()}")
        elif line and not line.startswith("#"):
            why = line
    return reasons


def missed(file: File) -> list[Missed]:
    """What was never executed, in blocks: a clause, or what is left of one."""
    source = (TREE / "page_primer" / file.name).read_text().splitlines()
    found: list[Missed] = []
    for function, executed in file.executed.items():
        whole = function != "module" and not any(executed.values())
        depth: int | None = None  # of the block that the line before belongs to
        for number, ran in sorted(executed.items()):
            text = source[number - 1].lstrip()
            indented = len(source[number - 1]) - len(text)
            if ran:
                depth = None
            elif depth is not None and (
                indented > depth or (indented == depth and not CLAUSE.match(text))
            ):
                found[-1].lines += 1
            else:
                found.append(Missed(f"{file.name} {function}", text.rstrip(), 1, whole))
                depth = -1 if whole else indented
    return found


def complain(files: list[File], reasons: dict[str, Reason]) -> Iterator[str]:
    """Name lines without a reason, and reasons without a line."""
    for file in files:
        for block in missed(file):
            if reason := reasons.get(block.key):
                reason.used = True
            else:
                yield f"never executed, for no reason that is known: {block.key}"
    for key, reason in reasons.items():
        if not reason.used and (reason.always or not is_there(key)):
            yield f"executed, or no longer there: {key}"


def is_there(key: str) -> bool:
    name, _, rest = key.partition(" ")
    function, _, text = rest.partition(": ")
    source = (TREE / "page_primer" / name).read_text()
    return (text or function.rpartition(".")[2]) in source


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def render(language: str, files: list[File], reasons: dict[str, Reason]) -> Iterator[str]:
    """A chapter: the figures of each file, and the lines never executed, by function."""
    lines, run = sum(f.lines for f in files), sum(f.run for f in files)
    branches, taken = sum(f.branches for f in files), sum(f.taken for f in files)
    yield (
        f"{percent(run, lines)} of {lines:,} lines (the goal is {GOAL[language]} %), "
        f"{percent(taken, branches)} of {branches:,} branches.\n"
    )
    files = sorted(files, key=lambda file: file.name)
    yield "| file | lines | branches |\n|---|---|---|"
    for file in files:
        yield (
            f"| {file.name} | {percent(file.run, file.lines)} "
            f"| {percent(file.taken, file.branches)} |"
        )
    yield "\nLines never executed:\n\n| function | lines | the first | why |\n|---|---|---|---|"
    for file in files:
        for block in missed(file):
            why = reasons[block.key].why if block.key in reasons else "**not known**"
            yield f"| {block.function} | {block.lines} | `{cell(block.text)}` | {why} |"
    yield "\nLines that always went the same way:\n\n| function | lines |\n|---|---|"
    for file in files:
        source = (TREE / "page_primer" / file.name).read_text().splitlines()
        for function, numbers in file.partial.items():
            if texts := [f"`{cell(source[number - 1].strip())}`" for number in numbers]:
                yield f"| {file.name} {function} | {'; '.join(texts)} |"
    yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", type=Path, metavar="FILE", default=WORK / "report.md")
    parser.add_argument("--more", action="store_true", help="add to the last run's counters")
    parser.add_argument("--report-only", action="store_true", help="of the last run's counters")
    options, more = parser.parse_known_args()
    status = 0
    if not options.report_only:
        if options.more:
            copy_tree(measured=False)
        else:
            prepare()
        status = run_tests(more)
    measured = {"Python": list(python_files()), "C": list(c_files())}
    reasons = read_reasons()
    text = "\n".join(
        f"### {language}\n\n" + "\n".join(render(language, files, reasons))
        for language, files in measured.items()
    )
    options.report.write_text(text)
    print(re.sub(r"(?s)\nLines never executed.*?(?=### |\Z)", "", text))
    print(f"What was not executed, and why: {options.report}")
    wrong = list(complain([*measured["Python"], *measured["C"]], reasons))
    wrong += [
        f"below the goal: {language}"
        for language, files in measured.items()
        if 100 * sum(f.run for f in files) < GOAL[language] * sum(f.lines for f in files)
    ]
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else status


if __name__ == "__main__":
    sys.exit(main())
