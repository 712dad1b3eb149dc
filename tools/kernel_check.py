"""Prime a process on the running kernel and check the outcome from outside.

    python tools/kernel_check.py [--python PATH] [--case NAME] [--mdwe] [--others]

An observer, this program, starts a subject: an interpreter that primes, forks, restores and primes
again, stopping after each step. At every stop the observer looks at /proc/PID of the subject; what
page_primer reports of itself is compared with that and never believed. One JSON line comes out;
its `problems` is empty, and the exit status 0, when everything that must hold on any kernel does:
no exception, the report tells what smaps shows, the code still reads as its file, a forked child
has its huge pages and takes its locks anew, and restore() leaves nothing behind. How much should
be huge here is for the caller to judge. Options come from the environment, PAGE_PRIMER_* as ever.

With --others two more processes of that interpreter are looked at while the subject is primed: one
that has nothing of page_primer in it, "plain", and one that primes itself, "second".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PT_NULL, PT_LOAD, PF_X, ET_DYN = 0, 1, 1, 3
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
PMD_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


# ------------------------------------------------------------------------------- the subject ---


def subject(mdwe: bool) -> None:
    """Go from step to step, telling each and waiting for a byte before the next."""
    import page_primer

    if mdwe:
        import ctypes

        if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
            sys.exit("this kernel has no PR_SET_MDWE")
    _tell("before")
    began = time.perf_counter()
    report = page_primer.prime()
    _tell("primed", (time.perf_counter() - began) * 1000, report)
    child = os.fork()
    began = time.perf_counter()
    if child == 0:
        report = page_primer.prime()
        _tell("child", (time.perf_counter() - began) * 1000, report)
        os._exit(0)
    os.waitpid(child, 0)
    report = page_primer.restore()
    _tell("restored", report=report)
    began = time.perf_counter()
    report = page_primer.prime()
    _tell("primed again", (time.perf_counter() - began) * 1000, report)


def _tell(step: str, milliseconds: float = 0.0, report: Any = None) -> None:
    line = {"step": step, "pid": os.getpid(), "milliseconds": milliseconds}
    if report is not None:
        line["report"] = report.as_dict()
        line["text"] = str(report)
    # Past sys.stdout, so that a forked child has no buffer to write again.
    os.write(1, (json.dumps(line) + "\n").encode())
    os.read(0, 1)


# The other processes: each tells that it is there, does its part, tells that, and waits.
_OTHERS = {"plain": "pass", "second": "import page_primer; page_primer.prime()"}
_OTHER = (
    "import sys; print(flush=True); sys.stdin.readline(); {}; print(flush=True); sys.stdin.read()"
)


# ------------------------------------------------------------------------------ the observer ---


@dataclass(frozen=True)
class Mapping:
    """A mapping as smaps shows it: its own line, and the counters and flags that matter here."""

    line: str
    start: int
    end: int
    path: str
    huge: int
    rss: int
    pss: int
    locked: bool


@dataclass
class Observer:
    """What is known of the subject, and what was found to be wrong."""

    python: str = ""  # the interpreter's command, where other processes are to be looked at
    path: str = ""  # the interpreter's file
    code: list[tuple[int, int]] = field(default_factory=list)  # its executable segments
    content: list[bytes] = field(default_factory=list)  # the same, as the file has them
    files: list[str] = field(default_factory=list)
    nameless: int = 0
    huge: int = 0  # of the code, before: a kernel may map a file huge by itself
    problems: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    def see(self, told: dict[str, Any]) -> None:
        """Look at the process that has just told a step."""
        mappings = smaps(told["pid"])
        step = told["step"]
        if step == "before":
            self._learn(mappings)
            return
        huge, locked = self._huge(mappings), locked_bytes(told["pid"])
        self._check_content(told)
        report = told["report"]
        if report["reason"] is not None:
            self.problems.append(f"{step}: {report['reason']}: {report['detail']}")
            return
        core = next(obj for obj in report["objects"] if obj["interpreter"])
        if core["code_huge_bytes"] != huge:
            self.problems.append(f"{step}: reports {core['code_huge_bytes']} huge, smaps {huge}")
        flagged = sum(m.end - m.start for m in mappings if m.locked)
        if (reported := report["locked_bytes"]) != flagged:
            self.problems.append(f"{step}: reports {reported} locked, smaps {flagged}")
        if step == "primed":
            self._remember(told, core, huge, locked)
            if self.python:
                self.result["others"] = {name: other(self.python, name) for name in _OTHERS}
        elif step == "restored":
            self._check_restored(mappings, huge, locked)
            self.problems += [f"{step}: {note}" for note in core["notes"]]
        elif huge < self.result["huge_bytes"] or locked < self.result["locked_bytes"]:
            self.problems.append(f"{step}: only {huge} huge and {locked} locked bytes")
        self.result.setdefault("milliseconds", {})[step] = round(told["milliseconds"], 1)

    def _learn(self, mappings: list[Mapping]) -> None:
        """Find the interpreter's code: libpython's where one is mapped, else the program's."""
        mine = [m for m in mappings if re.search(r"/libpython3[^/]*\.so", m.path)]
        self.path = mine[0].path if mine else mappings[0].path
        first = next(m for m in mappings if m.path == self.path)
        data = Path(self.path).read_bytes()
        kind, entries, size, count = header(data)
        bias = first.start if kind == ET_DYN else 0
        table = [
            struct.unpack_from("=IIQQQQQQ", data, entries + index * size) for index in range(count)
        ]
        # An aligned file has its machine code in an entry that is switched off (PT_NULL).
        aligned = any(entry[0] == PT_NULL and entry[1] & PF_X for entry in table)
        for p_type, p_flags, p_offset, p_vaddr, _, p_filesz, _, _ in table:
            if p_type == (PT_NULL if aligned else PT_LOAD) and p_flags & PF_X:
                self.code.append((bias + p_vaddr, bias + p_vaddr + p_filesz))
                self.content.append(data[p_offset : p_offset + p_filesz])
        self.files = [m.line for m in mappings if m.path.startswith("/")]
        self.nameless = count_nameless(mappings)
        self.huge = self._huge(mappings)

    def _huge(self, mappings: list[Mapping]) -> int:
        """Bytes of the interpreter's code that are certainly on huge pages."""
        pmd = int(PMD_SIZE.read_text())
        total = 0
        for mapping in mappings:
            low, high = -(-mapping.start // pmd) * pmd, mapping.end // pmd * pmd
            for start, end in self.code:
                both = min(end, high) - max(start, low)
                # What smaps counts is not said to lie here or there within the mapping.
                missing = high - low - mapping.huge
                total += max(0, both - missing) if mapping.huge and both > 0 else 0
        return total

    def _check_content(self, told: dict[str, Any]) -> None:
        with open(f"/proc/{told['pid']}/mem", "rb", buffering=0) as memory:
            for (start, end), content in zip(self.code, self.content, strict=True):
                memory.seek(start)
                if memory.read(end - start) != content:
                    self.problems.append(f"{told['step']}: code differs from its file")

    def _check_restored(self, mappings: list[Mapping], huge: int, locked: int) -> None:
        lines = [m.line for m in mappings]
        missing = [line for line in self.files if line not in lines]
        if missing:
            self.problems.append(f"restored: {len(missing)} mappings differ, as {missing[0]}")
        paths = {line.split(maxsplit=5)[5] for line in self.files}
        # Libraries loaded since have paths of their own; the interpreter's file may have no more
        # mappings than before, and nothing of its image may be left.
        name = os.path.basename(self.path)
        over = [
            m.line
            for m in mappings
            if m.line not in self.files
            and (m.path in paths or m.path.startswith("/memfd") or os.path.basename(m.path) == name)
        ]
        if over:
            self.problems.append(f"restored: {len(over)} mappings too many, as {over[0]}")
        if count_nameless(mappings) > self.nameless:
            self.problems.append("restored: reserved address space is left behind")
        # In place, the pages are the file's own, and stay what they have become.
        if (huge > self.huge and self.result["backing"] != "in_place") or locked:
            self.problems.append(f"restored: {huge} huge and {locked} locked bytes are left")

    def _remember(self, told: dict[str, Any], core: dict[str, Any], huge: int, locked: int) -> None:
        left: dict[str, int] = {}
        for segment in core["segments"]:
            if segment["kind"] == "code":
                for reason, size in segment["left"].items():
                    left[reason] = left.get(reason, 0) + size
        self.result.update(
            object=core["path"],
            backing=core["backing"],
            where=core["where"],
            code_bytes=sum(end - start for start, end in self.code),
            huge_bytes_before=self.huge,
            huge_bytes=huge,
            copied_bytes=core["copied_bytes"],
            locked_bytes=locked,
            lock_refused_bytes=told["report"]["lock_refused_bytes"],
            left=left,
            notes=core["notes"],
            text=told["text"],
        )


def other(python: str, name: str) -> dict[str, int]:
    """What another process has of the interpreter's code: bytes on huge pages, and what of the
    mappings that these are in is resident and is this process's share."""
    with subprocess.Popen(
        [python, "-c", _OTHER.format(_OTHERS[name])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        observer = Observer()
        process.stdout.readline()
        observer._learn(smaps(process.pid))
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        mappings = smaps(process.pid)
        huge = observer._huge(mappings)
        held = [
            m
            for m in mappings
            if m.huge and any(m.start < end and start < m.end for start, end in observer.code)
        ]
    return {
        "huge_bytes": huge,
        "resident_bytes": sum(m.rss for m in held),
        "share_bytes": sum(m.pss for m in held),
    }


def smaps(pid: int) -> list[Mapping]:
    """Read /proc/PID/smaps, by means of its own: this is what page_primer is checked against."""
    found = []
    text = Path(f"/proc/{pid}/smaps").read_text(errors="surrogateescape")
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)[1:]:
        line, *details = entry.splitlines()
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        counted = {name: rest for name, _, rest in (detail.partition(":") for detail in details)}
        huge = sum(
            int(counted[name].split()[0]) << 10
            for name in ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Private_Hugetlb",
                         "Shared_Hugetlb")
            if name in counted
        )  # fmt: skip
        path = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) > 5 else ""
        rss, pss = (int(counted[name].split()[0]) << 10 for name in ("Rss", "Pss"))
        locked = "lo" in counted["VmFlags"].split()
        found.append(Mapping(line, start, end, path, huge, rss, pss, locked))
    return found


def locked_bytes(pid: int) -> int:
    """What the kernel charges the process for locks, VmLck (proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    (found,) = re.findall(r"^VmLck:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found) << 10


def count_nameless(mappings: list[Mapping]) -> int:
    """Mappings of address space alone: reserved, and without a file or a name."""
    return sum(" ---p " in m.line and not m.path for m in mappings)


def header(data: bytes) -> tuple[int, int, int, int]:
    """Of an ELF file: e_type, e_phoff, e_phentsize, e_phnum."""
    fields = struct.unpack_from("=16sHHIQQQIHHH", data)
    return fields[1], fields[5], fields[9], fields[10]


def default_python() -> str:
    """This interpreter where it is Debian's (in a virtual environment too), else Debian's."""
    debian = os.path.realpath("/usr/bin/python3")
    return sys.executable if os.path.realpath(sys.executable) == debian else debian


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=default_python(), metavar="PATH",
                        help="the interpreter to prime (default: %(default)s)")  # fmt: skip
    parser.add_argument("--case", default="", metavar="NAME", help="repeated in the result")
    parser.add_argument("--mdwe", action="store_true", help="set PR_SET_MDWE before priming")
    parser.add_argument("--others", action="store_true", help="look at other processes as well")
    parser.add_argument("--subject", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        subject(options.mdwe)
        return 0
    command = [options.python, __file__, "--subject", *(["--mdwe"] if options.mdwe else [])]
    observer = Observer(python=options.python if options.others else "")
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    steps = []
    for line in process.stdout:
        told = json.loads(line)
        steps.append(told["step"])
        try:
            observer.see(told)
        except (OSError, KeyError, StopIteration) as error:
            observer.problems.append(f"{told['step']}: not observed: {error!r}")
        process.stdin.write("\n")
        process.stdin.flush()
    errors = process.stderr.read().strip().splitlines()
    if process.wait() or errors or steps[-1:] != ["primed again"]:
        last = errors[-1] if errors else f"exit status {process.returncode}"
        observer.problems.append(f"after {steps[-1] if steps else 'the start'}: {last}")
    start = {"kernel": os.uname().release, "case": options.case}
    print(json.dumps({**start, **observer.result, "problems": observer.problems}), flush=True)
    return 1 if observer.problems else 0


if __name__ == "__main__":
    sys.exit(main())
