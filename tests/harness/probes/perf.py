"""perf record, and whether its samples have their names."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from elftools.elf.elffile import ELFFile

from harness import outside
from harness.probes.commands import last_line, run, tool
from harness.probes.registry import probe
from harness.probes.symbols import FUNCTION, debug_file, symbols
from harness.probes.target import Failed, Target
from harness.probes.verdicts import CANNOT, WORKS, Verdict, hottest
from harness.recording import recording


@dataclass
class Samples:
    """perf's samples of one process's user code."""

    total: int = 0
    resolvable: int = 0  # by the symbol tables of the objects' own files
    resolved: int = 0  # of these
    wrong: Counter[str] = field(default_factory=Counter)  # of these, named otherwise than there
    # or in debug information that is installed: libc6-dbg has pthread_self as __GI___pthread_self
    names: Counter[str] = field(default_factory=Counter)  # of the resolvable ones


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
    if seen.wrong.total() > max(expected.wrong.total(), 0.01 * seen.resolvable):
        return Verdict(CANNOT, f"{numbers}, wrongly {dict(seen.wrong)}")
    hot = hottest(expected.names, expected.resolvable)
    missing = hot - set(seen.names)
    if missing:
        return Verdict(CANNOT, f"{numbers}; no {min(missing)}")
    return Verdict(WORKS, numbers)


@lru_cache
def functions(path: str, _mtime: int) -> list[tuple[int, int, str]]:
    """The functions in a file's symbol tables: first and last address of each, and its name."""
    with open(path, "rb") as file:
        elf = ELFFile(file)
        return [
            (start, start + size, name.partition("@")[0])
            for table in (".symtab", ".dynsym")
            for name, kind, start, size in symbols(elf, table)
            if kind == FUNCTION and size
        ]


class Symbols:
    """The functions of a process by address, read from its objects' own files; or, with `debug`,
    from the debug information of these that is installed, which has more of them and more names."""

    def __init__(self, pid: int, *, debug: bool = False) -> None:
        found: dict[tuple[int, int], set[str]] = {}
        vmas = outside.smaps(pid)
        for path in {v.path for v in vmas if v.path.startswith("/") and "w" in v.perms}:
            with contextlib.suppress(Exception):
                bias = outside.load_bias(path, vmas)
                file = debug_file(path) if debug else path
                if file is None:
                    continue
                for start, end, name in functions(str(file), os.stat(file).st_mtime_ns):
                    found.setdefault((bias + start, bias + end), set()).add(name)
        self._ranges = sorted(found.items())
        self._starts = [key[0] for key, _ in self._ranges]

    def at(self, address: int) -> set[str]:
        names: set[str] = set()
        index = bisect_right(self._starts, address)
        for (start, end), found in reversed(self._ranges[max(0, index - 8) : index]):
            if start <= address < end:
                names |= found
        return names


# A cache as a user has it, that keeps by build-id what it has seen of unprimed processes. On a
# file system of its own, for else perf makes hard links to what it has seen, which changes a time
# by which other tests' images name their interpreters.
BUILD_IDS = Path(f"/dev/shm/page-primer-build-ids-{os.getpid()}")
atexit.register(shutil.rmtree, BUILD_IDS, ignore_errors=True)
SECONDS = 1.2  # of the worker's, in its own code
PATIENCE = 120.0  # of the clock's


def used(pid: int) -> float:
    """Seconds of processor time that a process has spent in its own code."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def samples_of(target: Target, *scope: str, first: str = "") -> Samples:
    """perf at a scope, while the worker works; after it has answered a first request. For as long
    as the worker takes for its seconds of processor time, however busy the machine is."""
    data = target.directory / "perf.data"
    perf = f"{tool('perf')} --buildid-dir {BUILD_IDS}"
    options = ["-e", "cpu-clock", "-F", "997", *scope, "-o", str(data)]
    with recording(perf, *options) as record:
        target.get(first)
        with target.spinning():
            end, latest = used(target.pid) + SECONDS, time.monotonic() + PATIENCE
            while used(target.pid) < end and record.running and time.monotonic() < latest:
                time.sleep(0.05)
    script = run(tool("perf"), "--buildid-dir", str(BUILD_IDS), "script", "-i", str(data),
                 "--pid", str(target.pid), "-F", "ip,sym,dso", "--show-mmap-events")  # fmt: skip
    data.unlink(missing_ok=True)
    symbols, debug = Symbols(target.pid), Symbols(target.pid, debug=True)
    samples = Samples()
    confused = of_several_files(script)
    for line in script.splitlines():
        found = re.match(r"\s*([0-9a-f]+) (.+?) \((.*)\)\s*$", line)
        if not found or int(found[1], 16) >= 1 << 63:
            continue
        address, name = int(found[1], 16), found[2]
        known = set() if found[3] in confused else symbols.at(address)
        samples.total += 1
        samples.resolvable += bool(known)
        if known:  # a debug package has more, and is found by the build-id of the file alone
            samples.names[name] += 1
        if known and name != "[unknown]":
            samples.resolved += 1
            if name.partition("@")[0] not in known | debug.at(address):
                samples.wrong[f"{name} for {', '.join(sorted(known))}"] += 1
    if samples.total < 100:
        raise Failed(
            last_line(record.said) if not samples.total else f"only {samples.total} samples"
        )
    return samples


def of_several_files(script: str) -> set[str]:
    """The paths that processes of several root directories have mapped as different files: a
    container's libc and the machine's. perf names the symbols of all of them by one. A memfd's name
    is no path: several may have it, and perf finds no file for any."""
    files: dict[str, set[str]] = {}
    mapped = r"MMAP2 .* ([0-9a-f]+:[0-9a-f]+ \d+) \d+\]: \S+ (/(?!memfd:).*)"
    for found in re.finditer(mapped, script):
        files.setdefault(found[2], set()).add(found[1])
    return {path for path, several in files.items() if len(several) > 1}


@probe("perf record", same_samples)
def record(target: Target) -> Samples:
    return samples_of(target, "-p", str(target.pid))


@probe("perf record -a", same_samples)
def record_all(target: Target) -> Samples:
    return samples_of(target, "-a")


@probe("perf record, started before priming", same_samples, late=True)
def record_while_primed(target: Target) -> Samples:
    return samples_of(target, "-p", str(target.pid), first="prime")
