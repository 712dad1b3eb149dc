"""What profilers, debuggers and the like see of a gunicorn worker: real tools, run from outside.

A *shape* is an interpreter, a *way* how its server is primed, if it is. A *probe* runs one tool on
a target and returns what the tool saw, in a form that has no addresses in it; the same probe of an
unprimed target of the same shape says what was to be seen. tests/test_tools.py asserts on that,
tools/matrix.py makes a table of it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import outside
from elftools.elf.elffile import ELFFile
from servers import NO_CONTROL_SOCKET, Server, children, free_port, get, wait_for

HERE = Path(__file__).parent
CONF = "python:page_primer.integrations.gunicorn_conf"


class NotHere(Exception):
    """The tool is not to be had here, or not for this target; the message says why."""


class Failed(Exception):
    """The tool ran and did not do its work; the message is what it said."""


@dataclass(frozen=True)
class Shape:
    """An interpreter to serve with. One in a chroot is entered by `wrapper`."""

    name: str
    python: str
    chroot: str = ""
    wrapper: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """How a server is primed: its environment."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict, hash=False)


UNPRIMED = Way("unprimed", {"PAGE_PRIMER": "0"})


def ways(disk: Path, memory: Path) -> list[Way]:
    """The ways of priming.

    Args:
        disk: a directory for images, on a file system that has huge pages for files.
        memory: another, on a tmpfs.
    """
    return [
        Way("image on disk", {"PAGE_PRIMER_BACKING": "image", "PAGE_PRIMER_IMAGE_DIR": str(disk)}),
        Way("image on tmpfs",
            {"PAGE_PRIMER_BACKING": "image", "PAGE_PRIMER_IMAGE_DIR": str(memory)}),
        Way("memfd", {"PAGE_PRIMER_BACKING": "memfd", "PAGE_PRIMER_IMAGE_DIR": str(disk)}),
        Way("anonymous", {"PAGE_PRIMER_BACKING": "anonymous", "PAGE_PRIMER_IMAGE_DIR": str(disk)}),
        Way("anonymous, perf map",
            {"PAGE_PRIMER_BACKING": "anonymous", "PAGE_PRIMER_IMAGE_DIR": str(disk),
             "PAGE_PRIMER_PERF_MAP": "1"}),
    ]  # fmt: skip


def build_module(directory: Path) -> None:
    """Build the extension module that the application uses, for every CPython from 3.10 on."""
    include = sysconfig.get_path("include")
    command = ["g++", "-g", "-O1", "-fPIC", "-shared", f"-I{include}", str(HERE / "frames.cpp"),
               "-o", str(directory / "frames.abi3.so")]  # fmt: skip
    subprocess.run(command, check=True)


class Target:
    """A gunicorn with one worker that serves toolsapp.py, and where the worker is at the moment."""

    def __init__(self, shape: Shape, way: Way, module: Path, *, late: bool = False) -> None:
        """
        Args:
            shape: what serves.
            way: how it is primed.
            module: the directory of build_module().
            late: do not prime before the request for it.
        """
        self.shape, self.way = shape, way
        self.directory = Path(
            tempfile.mkdtemp(prefix="page-primer-tools-", dir=shape.chroot + "/tmp")
        )
        shutil.copy(HERE / "toolsapp.py", self.directory)
        if shape.chroot:
            shutil.copy(module / "frames.abi3.so", self.directory)
        else:  # one file, so that one image serves all
            os.symlink(module / "frames.abi3.so", self.directory / "frames.abi3.so")
        os.mkfifo(self.directory / "release")
        port = free_port()
        conf = [] if late else ["-c", CONF]
        command = [
            *shape.wrapper, shape.python, "-m", "gunicorn", *conf,
            "--chdir", str(self.directory).removeprefix(shape.chroot),
            "--bind", f"127.0.0.1:{port}", "--timeout", "600", "--log-level", "debug",
            *NO_CONTROL_SOCKET, "toolsapp:app",
        ]  # fmt: skip
        env = {"PAGE_PRIMER_MLOCK": "0", **way.env}
        self.server = Server(self.directory, port, *command, env=env)

    def __enter__(self) -> Target:
        self.server.__enter__()
        (self.pid,) = children(self.server.pid)
        # Until the interpreter has specialised what it will: calls from Python to Python then take
        # other frames of C.
        for _ in range(50):
            self.get("warm")
        return self

    def __exit__(self, *_: object) -> None:
        processes = self.server.family()
        try:
            self.server.__exit__()
        finally:
            shutil.rmtree(self.directory)
            for pid in {*processes, self.pid}:  # a worker may have been killed, and another started
                Path(f"/tmp/perf-{pid}.map").unlink(missing_ok=True)

    def get(self, path: str) -> str:
        return get(self.server.port, f"/{path}", seconds=300).decode()  # while tools look

    def require_primed(self) -> None:
        """Raises Failed unless the worker's code is where this way puts it; NotHere if by its own
        report there was nothing to put there."""
        wanted = self.way.env.get("PAGE_PRIMER_BACKING", "image")
        pattern = r"page-primer: ([\d.]+) % of .* on huge pages(?: \((\w+))?"
        said = re.search(pattern, self.server.log())
        if said and not float(said[1]) and not said[2]:
            raise NotHere(f"nothing to move: {said[0]}")
        if said is None or said[2] != wanted:
            raise Failed(f"not primed: {said[0] if said else self.server.log()}")
        if not self.shape.chroot:
            text = outside.text_of(self.pid)
            # What may be left for profilers is the head of what has a random address.
            whole = text.fixed or (wanted == "image" and self.interpreter.endswith(".so.1.0"))
            if text.huge < (text.attainable if whole else 1):
                raise Failed(f"not primed: {text}")

    @property
    def alive(self) -> bool:
        return self.get("") == "ok" and children(self.server.pid) == [self.pid]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The worker stays in a request, under Python's and C's frames, in open(2) of a FIFO."""

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the worker was killed
                self.get("hold")

        request = threading.Thread(target=ask)
        request.start()
        held = ("fifo", "partner")
        wchan = Path(f"/proc/{self.pid}/wchan")
        wait_for(lambda: any(word in wchan.read_text() for word in held), "the request to hold")
        try:
            yield
        finally:
            while request.is_alive():
                with contextlib.suppress(OSError):  # nobody there yet, or no longer
                    os.close(os.open(self.directory / "release", os.O_WRONLY | os.O_NONBLOCK))
                request.join(0.05)

    @contextlib.contextmanager
    def spinning(self) -> Iterator[None]:
        """The worker works, request after request."""
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                self.get("spin")

        load = threading.Thread(target=ask)
        load.start()
        time.sleep(0.2)
        try:
            yield
        finally:
            stop.set()
            load.join()

    @property
    def interpreter(self) -> str:
        return outside.interpreter_file(self.pid)

    @property
    def interpreter_image(self) -> str:
        """The path of the file that the interpreter's code is mapped from."""
        address = json.loads(self.get("addresses"))["PyEval_EvalCode"]
        return next(v.path for v in outside.smaps(self.pid) if v.start <= address < v.end)


# --------------------------------------------------------------------------- what tools print ---

NATIVE, PYTHON = "native", "Python"


@dataclass(frozen=True)
class Frame:
    """A frame as a tool names it, innermost last or first as the tool has it. `where` is the source
    file and line, or the object's name where the tool knows no more."""

    kind: str
    name: str
    where: str


def run(
    *command: str, seconds: int = 120, stdin: str = "", env: Mapping[str, str] | None = None
) -> str:
    """What a tool says, on both its outputs."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, errors="replace", timeout=seconds,
        env={**os.environ, "NO_COLOR": "1", **(env or {})}, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def tool(name: str) -> str:
    """A tool's path: beside the interpreter that runs this, or where the shell finds it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise NotHere(f"no {name} here")
    return found


def base(path: str) -> str:
    return os.path.basename(path)


def py_spy_frames(text: str) -> list[Frame]:
    frames = []
    for name, where in re.findall(r"^    (\S.*?) \(([^()]*)\)$", text, re.MULTILINE):
        kind = PYTHON if re.search(r"\.py:\d+$|^<frozen", where) else NATIVE
        frames.append(Frame(kind, "?" if name.startswith("0x") else name, base(where)))
    if not frames:
        raise Failed(last_line(text))
    return frames


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")[:200]


def pystack_frames(text: str) -> list[Frame]:
    pattern = r'^    \((C|Python)\) File "(.*?)", line (\d+), in (\S+)(.*)$'
    found = re.findall(pattern, text, re.MULTILINE)
    if not found:
        raise Failed(last_line(text))
    frames = []
    for kind, file, line, name, rest in found:
        where = f"{base(file)}:{line}"
        if file == "???":
            where = base(rest.rpartition("(")[2].rstrip(")"))
        inlined = " (inlined)" if "(inlined)" in rest else ""
        frames.append(Frame(PYTHON if kind == "Python" else NATIVE, name + inlined, where))
    return frames


def gdb_frames(text: str) -> list[Frame]:
    found = re.findall(r"^#\d+\s+(?:0x[0-9a-f]+ in )?(\S+) \((.*)$", text, re.MULTILINE)
    if not found:
        raise Failed(last_line(text))
    frames = []
    for name, rest in found:
        where = re.search(r"\) (?:at|from) (\S+)$", rest)
        frames.append(Frame(NATIVE, "?" if name == "??" else name, base(where[1]) if where else ""))
    return frames


def gdb(*commands: str, target: Sequence[str], **options: Any) -> str:
    arguments = [part for command in commands for part in ("-ex", command)]
    quiet = ["-iex", "set debuginfod enabled off", "-iex", "set auto-load safe-path /"]
    return run(tool("gdb"), "-nx", *quiet, *target, "-batch", *arguments, **options)


# ------------------------------------------------------------------------------- comparisons ---


@dataclass(frozen=True)
class Verdict:
    """What became of a tool: it works, works with a note, or cannot do its work."""

    mark: str
    note: str = ""


WORKS, NOTE, CANNOT, ABSENT = "works", "note", "cannot", "not here"


def same_frames(expected: list[Frame], seen: list[Frame]) -> Verdict:
    if seen == expected:
        return Verdict(WORKS)
    python = [[frame for frame in frames if frame.kind == PYTHON] for frames in (expected, seen)]
    if python[0] != python[1]:
        return Verdict(CANNOT, f"{len(python[1])} of {len(python[0])} Python frames")
    names = [Counter(f.name for f in frames if f.kind == NATIVE) for frames in (expected, seen)]
    missing = names[0] - names[1]
    total = names[0].total()
    if missing:
        mark = NOTE if python[0] else CANNOT
        return Verdict(mark, f"{total - missing.total()} of {total} native frames are named")
    more = names[1] - names[0]
    return Verdict(NOTE, f"{more.total()} frames more" if more else "other source lines")


def same(expected: Any, seen: Any) -> Verdict:
    if seen == expected:
        return Verdict(WORKS)
    return Verdict(CANNOT, f"{difference(expected, seen)}")


def difference(expected: Any, seen: Any) -> str:
    if isinstance(expected, dict) and isinstance(seen, dict):
        keys = [key for key in expected if seen.get(key) != expected[key]]
        return (
            f"{len(keys)} of {len(expected)} differ: {keys[0]} {seen.get(keys[0])!r}"
            if keys
            else ""
        )
    return f"{seen!r}"[:160]


def hottest(names: Counter[str], total: int) -> set[str]:
    """What no run of the same work misses by chance: 5 % of the samples, and 20 of them."""
    return {name for name, count in names.items() if count >= max(20, 0.05 * total)}


def same_shares(expected: Counter[str], seen: Counter[str]) -> Verdict:
    """Names that have a share worth mentioning when unprimed are seen when primed."""
    hot = hottest(expected, expected.total())
    missing = hot - set(seen)
    if missing:
        return Verdict(
            CANNOT, f"{len(hot) - len(missing)} of {len(hot)} functions; not {min(missing)}"
        )
    return Verdict(WORKS)


# ------------------------------------------------------------------------------------ probes ---


@dataclass(frozen=True)
class Probe:
    """A tool at work on a target.

    `look` returns what it saw, or raises NotHere or Failed; `judge` compares that with what it saw
    unprimed. With `late`, the target is one that primes at a request; with `last`, the target is
    of no use to others afterwards.
    """

    name: str
    look: Callable[[Target], Any]
    judge: Callable[[Any, Any], Verdict] = same
    late: bool = False
    last: bool = False


PROBES: dict[str, Probe] = {}


def probe(
    name: str, judge: Callable[[Any, Any], Verdict] = same, **options: bool
) -> Callable[..., Any]:
    def enter(look: Callable[[Target], Any]) -> Callable[[Target], Any]:
        PROBES[name] = Probe(name, look, judge, **options)
        return look

    return enter


@probe("py-spy dump", same_frames)
def _(target: Target) -> list[Frame]:
    with target.held():
        return py_spy_frames(run(tool("py-spy"), "dump", "--pid", str(target.pid)))


@probe("py-spy dump --native", same_frames)
def _(target: Target) -> list[Frame]:
    with target.held():
        return py_spy_frames(run(tool("py-spy"), "dump", "--native", "--pid", str(target.pid)))


def py_spy_record(target: Target, *options: str) -> Counter[str]:
    output = target.directory / "recorded"
    with target.spinning():
        said = run(tool("py-spy"), "record", *options, "--pid", str(target.pid), "--rate", "200",
                   "--duration", "1", "--format", "raw", "--output", str(output))  # fmt: skip
    if not output.exists():
        raise Failed(last_line(said))
    names: Counter[str] = Counter()
    for line in output.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        for name in {frame.partition(" (")[0] for frame in stack.split(";")}:
            names[name] += int(count)
    output.unlink()
    return names


@probe("py-spy record", same_shares)
def _(target: Target) -> Counter[str]:
    return py_spy_record(target)


@probe("py-spy record --native", same_shares)
def _(target: Target) -> Counter[str]:
    return py_spy_record(target, "--native")


@probe("pystack remote", same_frames)
def _(target: Target) -> list[Frame]:
    with target.held():
        said = run(tool("pystack"), "remote", "--no-color", str(target.pid))
    found = re.findall(r'^    File "(.*)", line (\d+), in (\S+)', "\n" + said, re.MULTILINE)
    found = found or re.findall(r'\(Python\) File "(.*)", line (\d+), in (\S+)', said)
    if not found:
        raise Failed(last_line(said))
    return [Frame(PYTHON, name, f"{base(file)}:{line}") for file, line, name in found]


@probe("pystack remote --native", same_frames)
def _(target: Target) -> list[Frame]:
    with target.held():
        return pystack_frames(
            run(tool("pystack"), "remote", "--native", "--no-color", str(target.pid))
        )


def austin_stack(target: Target) -> list[str]:
    """The most frequent stack, outermost first."""
    output = target.directory / "austin"
    with target.held():
        said = run(
            tool("austin"), "-p", str(target.pid), "-x", "1", "-i", "20ms", "-o", str(output)
        )
    stacks: Counter[str] = Counter()
    for line in output.read_text().splitlines() if output.exists() else ():
        if line.startswith("P"):
            stack, _, _ = line.rpartition(" ")
            stacks[stack] += 1
    if not stacks:
        words = " ".join(re.sub(r"\x1b\[[\d;]*m", "", said).split())
        what = re.search(r"[A-Z][\w' ]{20,}\.", words)
        raise Failed(what[0] if what else last_line(said))
    return [":".join(part.split(":")[-2:]) for part in stacks.most_common(1)[0][0].split(";")[2:]]


@probe("austin")
def _(target: Target) -> list[str]:
    return austin_stack(target)


@probe("gdb bt", same_frames)
def _(target: Target) -> list[Frame]:
    with target.held():
        return gdb_frames(gdb("bt", target=["-p", str(target.pid)]))


@probe("gdb symbols")
def _(target: Target) -> dict[str, list[str]]:
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
def _(target: Target) -> tuple[list[str], bool]:
    """A breakpoint in moved code is hit, and the worker works on after it."""
    with target.spinning():
        said = gdb("break PySequence_Tuple", "continue", "bt 1", "delete", "detach",
                   target=["-p", str(target.pid)])  # fmt: skip
    return [frame.name for frame in gdb_frames(said)], target.alive


def core_of(target: Target) -> Path:
    """A core file by gcore(1), of a held worker; made once."""
    path = target.directory / f"core.{target.pid}"
    if not path.exists():
        with target.held():
            said = run(tool("gcore"), "-o", str(target.directory / "core"), str(target.pid))
        if not path.exists():
            raise Failed(last_line(said))
    return path


@probe("gcore, then gdb bt", same_frames)
def _(target: Target) -> list[Frame]:
    core = str(core_of(target))
    return gdb_frames(gdb("bt", target=[f"/proc/{target.pid}/exe", core]))


@probe("gcore, then pystack core --native", same_frames)
def _(target: Target) -> list[Frame]:
    core = str(core_of(target))
    exe = os.readlink(f"/proc/{target.pid}/exe")
    return pystack_frames(run(tool("pystack"), "core", "--native", "--no-color", core, exe))


@dataclass
class Samples:
    """perf's samples of one process's user code."""

    total: int = 0
    resolvable: int = 0  # by the symbol tables of the objects' own files
    resolved: int = 0  # of these
    wrong: int = 0  # of these, named otherwise than in the tables
    names: Counter[str] = field(default_factory=Counter)


def same_samples(expected: Samples, seen: Samples) -> Verdict:
    """99 % as many of the resolvable samples are resolved, and to the same symbols: by address in
    the files' own tables, and the hot ones by name. perf itself names a few in a thousand otherwise
    than the tables do, where functions overlap."""
    shares = [found.resolved / max(found.resolvable, 1) for found in (expected, seen)]
    numbers = (
        f"{seen.resolved} of {seen.resolvable} samples named ({expected.resolved} of "
        f"{expected.resolvable} unprimed)"
    )
    if shares[1] < 0.99 * shares[0]:
        return Verdict(CANNOT, numbers)
    if seen.wrong > max(expected.wrong, 0.01 * seen.resolvable):
        return Verdict(CANNOT, f"{numbers}, {seen.wrong} wrongly")
    hot = hottest(expected.names, expected.total)
    missing = hot - set(seen.names)
    if missing:
        return Verdict(CANNOT, f"{numbers}; no {min(missing)}")
    return Verdict(WORKS, numbers)


class Symbols:
    """The functions of a process by address, read from its objects' own files."""

    def __init__(self, pid: int, root: str = "") -> None:
        found: dict[tuple[int, int], set[str]] = {}
        vmas = outside.smaps(pid)
        for path in {v.path for v in vmas if v.path.startswith("/") and "w" in v.perms}:
            with contextlib.suppress(Exception), open(root + path, "rb") as file:
                elf = ELFFile(file)
                bias = outside.load_bias(path, vmas, root + path)
                for name in (".symtab", ".dynsym"):
                    section = elf.get_section_by_name(name)
                    for symbol in section.iter_symbols() if section else ():
                        if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_size"]:
                            start = bias + symbol["st_value"]
                            key = start, start + symbol["st_size"]
                            found.setdefault(key, set()).add(symbol.name.partition("@")[0])
        self._ranges = sorted(found.items())
        self._starts = [key[0] for key, _ in self._ranges]

    def at(self, address: int) -> set[str]:
        names: set[str] = set()
        index = bisect_right(self._starts, address)
        for (start, end), found in reversed(self._ranges[max(0, index - 8) : index]):
            if start <= address < end:
                names |= found
        return names


# A cache as a user has it, that keeps by build-id what it has seen of unprimed processes.
BUILD_IDS = Path(tempfile.gettempdir()) / f"page-primer-build-ids-{os.getpid()}"


def perf_samples(target: Target, *scope: str, first: str = "") -> Samples:
    """perf at a scope, while the worker works; after it has answered a first request."""
    data = target.directory / "perf.data"
    record = [tool("perf"), "--buildid-dir", str(BUILD_IDS), "record", "-q", "-e", "cpu-clock",
              "-F", "997", *scope, "-o", str(data), "--", "sleep", "1.5"]  # fmt: skip
    process = subprocess.Popen(record, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        time.sleep(0.3)
        target.get(first)
        with target.spinning():
            process.wait(60)
    finally:
        said, _ = process.communicate(timeout=60)
    script = run(tool("perf"), "--buildid-dir", str(BUILD_IDS), "script", "-i", str(data),
                 "--pid", str(target.pid), "-F", "ip,sym")  # fmt: skip
    data.unlink(missing_ok=True)
    symbols, samples = Symbols(target.pid, target.shape.chroot), Samples()
    for line in script.splitlines():
        found = re.match(r"\s*([0-9a-f]+) (.+?)\s*$", line)
        if not found or int(found[1], 16) >= 1 << 63:
            continue
        address, name = int(found[1], 16), found[2]
        known = symbols.at(address)
        samples.total += 1
        samples.resolvable += bool(known)
        samples.names[name] += 1
        if known and name != "[unknown]":
            samples.resolved += 1
            samples.wrong += name.partition("@")[0] not in known
    if samples.total < 100:
        raise Failed(last_line(said) if not samples.total else f"only {samples.total} samples")
    return samples


@probe("perf record", same_samples)
def _(target: Target) -> Samples:
    return perf_samples(target, "-p", str(target.pid))


@probe("perf record -a", same_samples)
def _(target: Target) -> Samples:
    return perf_samples(target, "-a")


@probe("perf record, started before priming", same_samples, late=True)
def _(target: Target) -> Samples:
    return perf_samples(target, "-p", str(target.pid), first="prime")


@probe("faulthandler")
def _(target: Target) -> list[str]:
    traceback = target.directory / "traceback"
    with target.held():
        os.kill(target.pid, signal.SIGUSR2)
        wait_for(lambda: "_run_module_as_main" in traceback.read_text(), "the traceback")
    return re.findall(r'File ".*?([^/]*)", line (\d+) in (\S+)', traceback.read_text())


@probe("a C++ exception through moved frames")
def _(target: Target) -> str:
    return target.get("throw")


@probe("backtrace(3)")
def _(target: Target) -> list[str]:
    return [line.partition(" [")[0] for line in target.get("backtrace").splitlines()]


def build_id(head: bytes) -> str:
    """The build-id as the kernel reads it for perf and eBPF (lib/buildid.c): program headers and
    note within the file's first page."""
    if head[:4] != b"\x7fELF":
        return ""
    (offset,) = struct.unpack_from("=Q", head, 32)
    size, count = struct.unpack_from("=HH", head, 54)
    for index in range(count):
        at = offset + index * size
        if at + size > len(head):
            break
        kind, _, start, _, _, length = struct.unpack_from("=IIQQQQ", head, at)
        while kind == 4 and length >= 12 and start + 12 <= len(head):
            namesz, descsz, note = struct.unpack_from("=III", head, start)
            name, end = start + 12, start + 12 + -(-namesz // 4) * 4 + -(-descsz // 4) * 4
            if note == 3 and head[name : name + 4] == b"GNU\0" and end <= len(head):
                return head[name + 4 : name + 4 + descsz].hex()
            length, start = length - (end - start), end
    return ""


@probe("build-id and symbols of a mapping's file")
def _(target: Target) -> dict[str, Any]:
    """What eBPF tools do with an address: the mapping's file, its build-id, and the symbol at the
    address's offset in that file."""
    found: dict[str, Any] = {}
    vmas = outside.smaps(target.pid)
    for name, address in json.loads(target.get("addresses")).items():
        vma = next(v for v in vmas if v.start <= address < v.end)
        path = f"/proc/{target.pid}/map_files/{vma.start:x}-{vma.end:x}"
        if not os.path.lexists(path):
            found[name] = "no file"
            continue
        with open(path, "rb") as file:
            identity = build_id(file.read(4096))
            found[name] = (
                symbol_at(file, vma.offset + address - vma.start) if identity else "no build-id"
            )
    return found


def symbol_at(file: Any, offset: int) -> str:
    elf = ELFFile(file)
    load = next(
        (
            h
            for h in elf.iter_segments("PT_LOAD")
            if h["p_offset"] <= offset < h["p_offset"] + h["p_filesz"]
        ),
        None,
    )
    if load is None:
        return "not in the file"
    address = load["p_vaddr"] + offset - load["p_offset"]
    table = elf.get_section_by_name(".dynsym")
    names = sorted(s.name for s in table.iter_symbols() if s["st_value"] == address)
    return " ".join(names)


MEMRAY_SEEN = """
import sys, memray
names = set()
for record in memray.FileReader(sys.argv[1]).get_allocation_records():
    if record.allocator not in (memray.AllocatorType.FREE, memray.AllocatorType.MUNMAP):
        stack = record.%s_stack_trace()
        names.update(frame[0] for frame in stack)
print(" ".join(sorted(names)))
"""


def memray_names(target: Target, *options: str, stack: str = "") -> set[str]:
    output = target.directory / "memray"
    with target.spinning():
        said = run(
            tool("memray"),
            "attach",
            *options,
            "--duration",
            "1",
            "-o",
            str(output),
            str(target.pid),
        )
        time.sleep(1.5)
    if not output.exists():
        raise Failed(last_line(said))
    seen = run(
        str(Path(tool("memray")).with_name("python")), "-c", MEMRAY_SEEN % stack, str(output)
    )
    output.unlink()
    return set(seen.split())


@probe("memray attach", last=True)
def _(target: Target) -> set[str]:
    return memray_names(target) & {"app", "spin", "count_words", "dumps", "loads", "sub"}


def inside(target: Target, *command: str, **options: Any) -> str:
    """Run a command where the target runs: in its mount namespace and root directory."""
    if target.shape.chroot:
        command = ("nsenter", "--target", str(target.pid), "--mount", "--root", *command)
    return run(*command, **options)


EXECUTED = """
import sys, traceback
names = [frame.name for frame in traceback.extract_stack()]
with open(%r, "w") as file:
    print(*names[: names.index("app") + 2], file=file)
"""


@probe("sys.remote_exec")
def _(target: Target) -> list[str]:
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
def _(target: Target) -> set[str]:
    with target.spinning():
        said = inside(target, target.shape.python, "-m", "pdb", "-p", str(target.pid),
                      stdin="where\nquit\n")  # fmt: skip
    if "option -p not recognized" in said:
        raise NotHere("Python before 3.14")
    found = set(re.findall(r"\.py\(\d+\)(\w+)\(\)", said))
    if "app" not in found:
        raise Failed(last_line(said))
    return found & {"handle_request", "app", "spin", "run_for_one"}


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
def _(target: Target) -> dict[str, Any]:
    """A program that primes itself under memcheck. What is told of uninitialised values is
    CPython's own, and prime() runs more of it; accesses to wrong addresses are not."""
    env = {**target.way.env, "PYTHONMALLOC": "malloc", "PAGE_PRIMER_MLOCK": "0",
           "PAGE_PRIMER_PERF_MAP": "0"}  # fmt: skip
    command = [tool("valgrind"), target.shape.python, "-c", VALGRINDED]
    said = run(*command, env=env)
    result = re.search(r"^(\d+) (\w+)(.*)$", said, re.MULTILINE)
    if not result or "ERROR SUMMARY" not in said:
        raise Failed(last_line(said))
    if result[2] == "None" and "no whole huge page" in result[3]:
        raise NotHere("nothing to move: no whole huge page where valgrind loads it")
    if (result[2] == "None") != (target.way == UNPRIMED):
        raise Failed("not primed under valgrind")
    return {
        "result": int(result[1]),
        "wrong addresses": len(re.findall("Invalid (?:read|write)|Jump to the invalid", said)),
        # The innermost alone: where nothing is moved, too, valgrind takes a word of the heap for a
        # caller's address now and then.
        "frames without a name": len(re.findall(r"at 0x[0-9A-F]+: \?\?\?", said)),
        "backing": result[2],
    }


@probe("a core file of the kernel's, gdb bt and pystack core", same_frames, last=True)
def _(target: Target) -> list[Frame]:
    if Path("/proc/sys/kernel/core_pattern").read_text().strip() != "core":
        raise NotHere("core files go elsewhere")
    exe = os.readlink(f"/proc/{target.pid}/exe")
    run("prlimit", "--pid", str(target.pid), "--core=unlimited")
    with target.held():
        os.kill(target.pid, signal.SIGABRT)
        wait_for(lambda: not os.path.exists(f"/proc/{target.pid}"), "the core file")
    core = str(max(target.directory.glob("core*"), key=os.path.getmtime))
    frames = gdb_frames(gdb("bt", target=[exe, core]))
    return frames + pystack_frames(
        run(tool("pystack"), "core", "--native", "--no-color", core, exe)
    )
