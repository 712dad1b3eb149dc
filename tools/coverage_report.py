"""Run the tests with coverage of Python and of C, and write what they never execute.

The repository is copied to build/coverage/tree and built there with gcov's counters, beside a
virtual environment that shares the packages of the one that runs this. Every Python that the tests
start measures itself. Tests that fail are named and do not end the run: counters make processes
slower and open files of their own, which some tests notice.

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "coverage"
TREE, HOME, DATA = WORK / "tree", WORK / "venv", WORK / "data"
GOAL = {"Python": 92, "C": 85}

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

# Why something is never executed: the first pattern that matches "file function: source line".
WHY = (
    (r"\.c .*PyErr_NoMemory|\.c .*(list|item|value|text|error) == NULL",
     "memory of Python's own is not made to fail"),
    (r"\.c .*Py_(BEGIN|END)_ALLOW_THREADS", "a macro: gcov sees its brace alone"),
    (r"\.c .*PyErr_Occurred|\.c .*PyModule_Add|\.c .*PyErr_NewException|_core\.c core_exec",
     "fails for want of memory only"),
    (r"_support\.c fail: goto|_objects\.c core_objects: goto|_objects\.c take_survey: return -1|"
     r"_heap\.c arenas_regions: Py_CLEAR|_swap\.c parse_pieces: return -1",
     "memory of Python's own is not made to fail"),
    (r"_heap\.c (insert: return NULL|heap_align: (break|return PyErr_SetFromErrno))|"
     r"_heap\.c arenas_install: return PyUnicode_FromString\(.fork.\)",
     "no memory is left at all"),
    (r"_core\.c PyInit__core|_heap\.c arenas_install: return PyUnicode_FromString\(.none.\)",
     "of other versions and builds of CPython than the one that is measured"),
    (r"_memory\.c core_map: munmap", "Linux before 4.17, which takes the address for a hint"),
    (r"_alone\.c in_any_child",
     "in children that end by _exit(2) or a signal, whose counters are not written"),
    (r"_swap\.c put_back: (if \(\+\+tries|usleep)|_swap\.c core_swap: fail\(module, s\.broken",
     "two failures in one swap: one is injected at a time"),
    (r"_alone\.c (take: pthread_cond_broadcast|core_alone: return PyObject_Call)",
     "one who has waited his time in vain: the machine's load decides"),
    (r"_heap\.c first_touch: heap\.(skip|stalls)",
     "the kernel takes long for a huge page: the machine's load decides"),
    (r"\.py .*(ImportError|not on Windows|sys\.platform)|bench/machine\.py judge: .*not built",
     "of an installation without its C core or an extra, or not on Linux"),
    (r"doctor/(checks\.py (judge_kernel|judge_shmem|shmem_fix|judge_thp|thp_fix)|"
     r"directories\.py (_not_huge|image_fix))|backing/image\.py directories: reason = .files",
     "of other kernels and settings: `make kernels` boots them"),
    (r"bench/interpreter\.py (_lay_out|Copy\._make: copy)",
     "a static interpreter: the one that is measured has a libpython"),
    (r"bench/counters\.py (available|_of_processor)",
     "hardware counters of other processors: virtual machines may have none"),
    (r"bench/load\.py (generator|send|_by_aiohttp)", "h2load is taken where it is installed"),
    (r"bench/\w+\.py .*raise (CutShort|Failure)|bench/.* except subprocess\.TimeoutExpired",
     "a server, a broker or a load generator that fails at this very moment"),
    (r"align/(original|rewrite|layout|verify|files|replace)\.py .*(raise Refused|return None)|"
     r"\.py .*(raise|except) (CannotLayOut|elf\.Malformed|Malformed)",
     "a file that contradicts itself, or changes meanwhile: `make fuzz` makes some of them"),
    (r"\.py .*(except BaseException|: raise$)",
     "a host's signal handler raises at this very moment: test_interrupted.py tries many"),
    (r"\.py .*except (ours\()?\(?(OSError|FileNotFoundError|PermissionError)",
     "a file or a process that ends or is withdrawn between two looks"),
    (r"doctor/alignment\.py (_libc|_hints)|heap/malloc\.py other_allocator",
     "of other C libraries than this machine's"),
)  # fmt: skip


@dataclass
class File:
    """What of one file was executed."""

    name: str
    lines: int = 0
    run: int = 0
    branches: int = 0
    taken: int = 0
    # By function: lines that were never executed; and lines that went one way only.
    missed: dict[str, list[int]] = field(default_factory=dict)
    partial: dict[str, list[int]] = field(default_factory=dict)


# ------------------------------------------------------------------------------------- set-up ---


def copy_tree() -> None:
    """Copy what the repository has, uncommitted changes included."""
    shutil.rmtree(TREE, ignore_errors=True)
    names = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(names, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).exists():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)


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
            lines = part["missing_lines"]
            if lines:
                file.missed[function or "module"] = lines
            ways = sorted({line for line, _ in part["missing_branches"]} - set(lines))
            if ways:
                file.partial[function or "module"] = ways
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
                if not line["count"]:
                    file.missed.setdefault(name, []).append(line["line_number"])
                elif any(not way["count"] for way in ways):
                    file.partial.setdefault(name, []).append(line["line_number"])
            yield file


# ------------------------------------------------------------------------------------ report ---


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def ranges(lines: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = last = 0
    for line in sorted(lines):
        if first and line != last + 1:
            yield first, last
            first = line
        first, last = first or line, line
    if first:
        yield first, last


def why(name: str) -> str:
    return next((reason for pattern, reason in WHY if re.search(pattern, name)), "")


def rows(label: str, kind: str, numbers: list[int], source: list[str]) -> Iterator[str]:
    """A row for each reason that something of a function has."""
    reasons: dict[str, list[str]] = {}
    for first, last in ranges(numbers):
        text = source[first - 1].strip()[:60].replace("|", "\\|")
        more = f" and {last - first} more" if last > first else ""
        reasons.setdefault(why(f"{label}: {text}"), []).append(f"`{text}`{more}")
    for reason, texts in reasons.items():
        yield f"| {label} | {kind} | {'; '.join(texts)} | {reason} |"


def render(language: str, files: list[File]) -> Iterator[str]:
    """A chapter: the figures of each file, and the lines never executed, by function."""
    lines, run = sum(f.lines for f in files), sum(f.run for f in files)
    branches, taken = sum(f.branches for f in files), sum(f.taken for f in files)
    yield (
        f"{percent(run, lines)} of {lines:,} lines (the goal is {GOAL[language]} %), "
        f"{percent(taken, branches)} of {branches:,} branches.\n"
    )
    yield "| file | lines | branches |\n|---|---|---|"
    for file in sorted(files, key=lambda file: file.name):
        yield (
            f"| {file.name} | {percent(file.run, file.lines)} "
            f"| {percent(file.taken, file.branches)} |"
        )
    yield "\nLines never executed, and branches of which one way was never taken:\n"
    yield "| function | | source | why |\n|---|---|---|---|"
    for file in sorted(files, key=lambda file: file.name):
        source = (TREE / "page_primer" / file.name).read_text().splitlines()
        for kind, found in (("line", file.missed), ("branch", file.partial)):
            for function, numbers in found.items():
                yield from rows(f"{file.name} {function}", kind, numbers, source)
    yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", type=Path, metavar="FILE", default=WORK / "report.md")
    parser.add_argument("--more", action="store_true", help="add to the last run's counters")
    parser.add_argument("--report-only", action="store_true", help="of the last run's counters")
    options, more = parser.parse_known_args()
    status = 0
    if not options.report_only:
        if not options.more:
            prepare()
        status = run_tests(more)
    measured = {"Python": list(python_files()), "C": list(c_files())}
    text = "\n".join(
        f"### {language}\n\n" + "\n".join(render(language, files))
        for language, files in measured.items()
    )
    options.report.write_text(text)
    print(re.sub(r"(?s)\nLines never executed.*?(?=### |\Z)", "", text))
    print(f"What was not executed, and why: {options.report}")
    short = [
        f"{language}: {percent(sum(f.run for f in files), sum(f.lines for f in files))}"
        for language, files in measured.items()
        if 100 * sum(f.run for f in files) < GOAL[language] * sum(f.lines for f in files)
    ]
    if short:
        print("below the goal:", *short, file=sys.stderr)
    return 1 if short else status


if __name__ == "__main__":
    sys.exit(main())
