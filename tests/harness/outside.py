"""What the kernel says of a process, seen from outside and worked out independently of the package:
smaps by a parser of its own, ELF files by pyelftools."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from elftools.elf.elffile import ELFFile

from harness.kernel_log import watch
from harness.privileges import has_images, locks_fit
from harness.state import file_mappings as file_mappings

# Where there are no such pages, what they would be with pages of 4 KiB.
_SIZE = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
PMD = int(open(_SIZE).read()) if os.path.exists(_SIZE) else 2 << 20
PAGE = 4096
HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) (\S+) (\d+)\s*(.*)")


COUNTERS = frozenset(re.findall(r"^(\w+): .* kB$", open("/proc/self/smaps").read(), re.MULTILINE))


class Counters(dict[str, int]):
    """KiB by the kernel's names; of these, what is not entered is 0."""

    def __missing__(self, name: str) -> int:
        if name not in COUNTERS:
            raise KeyError(name)
        return 0


@dataclass
class Vma:
    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str
    kb: dict[str, int] = field(default_factory=Counters)
    flags: list[str] = field(default_factory=list)

    @property
    def huge(self) -> int:
        names = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Private_Hugetlb",
                 "Shared_Hugetlb")  # fmt: skip
        return sum(self.kb.get(name, 0) for name in names) << 10

    @property
    def file_mapping(self) -> tuple[int, int, str, int, str]:
        return self.start, self.end, self.perms, self.offset, self.path


def smaps(pid: int) -> list[Vma]:
    watch(pid)
    vmas: list[Vma] = []
    kb: dict[str, int] = {}
    with open(f"/proc/{pid}/smaps", "rb") as file:
        text = file.read().decode(errors="replace")
    # Nine lines of ten are a counter that is 0.
    for line in [line for line in text.split("\n") if line[-5:] != " 0 kB"]:
        if line[-3:] == " kB":
            name, _, number = line[:-3].partition(":")
            kb[name] = int(number)
        elif line.startswith("VmFlags:"):
            vmas[-1].flags = line.split()[1:]
        elif head := HEAD.match(line):
            start, end, perms, offset, device, inode, path = head.groups()
            vmas.append(
                Vma(int(start, 16), int(end, 16), perms, int(offset, 16), device, int(inode), path)
            )
            kb = vmas[-1].kb
    return vmas


@dataclass
class Text:
    """The .text section of the interpreter in one process, in bytes."""

    path: str
    size: int
    attainable: int  # covered by whole huge pages of the read-only span
    head: int  # of that, what stays on the interpreter's own file for profilers if the rest cannot
    huge: int
    locked: bool
    executable: bool  # all of it is mapped r-x
    fixed: bool  # of an ET_EXEC
    phase: int  # its load bias modulo a huge page; where that is random, `attainable` is, too
    span_vmas: list[Vma]  # the mappings of the read-only span

    @property
    def pss(self) -> int:
        return sum(v.kb["Pss"] for v in self.span_vmas) << 10

    @property
    def span(self) -> int:
        return sum(v.end - v.start for v in self.span_vmas)

    @property
    def moved(self) -> list[Vma]:
        """Of the span, what is mapped from elsewhere: of a library, its hot chunks."""
        return [v for v in self.span_vmas if v.path != self.path]

    @property
    def is_huge(self) -> bool:
        """Whether all that can be is on huge pages: of a user without images, in a memory file or
        in place."""
        without_images = () if has_images() else (self.attainable - self.head,)
        return self.huge in (self.attainable, *without_images)

    def require_huge(self) -> None:
        """All that can be is on huge pages; at a huge page boundary, some can."""
        assert self.is_huge, self
        assert self.attainable or self.phase, self

    def require_hot_chunks_huge(self) -> None:
        """What was moved of a library is on huge pages, and all that is touched of it is locked
        where that is allowed."""
        for vma in self.moved:
            assert vma.huge == vma.end - vma.start, vma
        assert self.locked or not locks_fit(), self

    def require_libcrypto_moved(self) -> None:
        """What is to be huge of libcrypto once it is in use: of OpenSSL 3.0 all that can be; of
        newer ones, with four megabytes of code, hot chunks, at a random address perhaps none."""
        self.require_hot_chunks_huge()
        if self.phase or self.size > 3 << 20:
            assert self.moved or self.phase, self
        else:
            assert self.huge == self.attainable > 0, self


def interpreter_file(pid: int) -> str:
    """The file that holds the interpreter's code: libpython, or else the main program."""
    for _, _, perms, _, path in file_mappings(pid):
        if re.search(r"/libpython3\.\d+\w*\.so", path) and "w" in perms:
            return path
    return os.readlink(f"/proc/{pid}/exe")


@lru_cache
def elf_file(path: str, _mtime: int) -> tuple[Any, list[Any], bool]:
    """Its .text section header, its PT_LOADs, and whether it is an ET_EXEC."""
    with open(path, "rb") as file:
        elf = ELFFile(file)
        section = elf.get_section_by_name(".text").header
        return section, [s.header for s in elf.iter_segments("PT_LOAD")], elf["e_type"] == "ET_EXEC"


def load_bias(path: str, vmas: list[Vma], file: str | None = None) -> int:
    """Address minus p_vaddr of an object among a process's mappings; `file` is where to read it,
    for a process with another root."""
    _, loads, fixed = elf_file(file or path, os.stat(file or path).st_mtime_ns)
    if fixed:
        return 0
    # Writable data stays on the object's own file, so it tells where the object is.
    data = next(h for h in loads if h["p_flags"] & 2)
    at = next(v for v in vmas if v.path == path and v.offset == data["p_offset"] & -PAGE)
    return at.start - (data["p_vaddr"] & -PAGE)


def text_of(pid: int, path: str | None = None) -> Text:
    """Measure the .text of an object, by default of the interpreter."""
    interpreter = interpreter_file(pid)
    path = path or interpreter
    vmas = smaps(pid)
    # A process may see other files than we; one in another root is shown with a path of ours.
    there = next(p for p in (f"/proc/{pid}/root{path}", path) if os.path.exists(p))
    section, loads, fixed = elf_file(there, os.stat(there).st_mtime_ns)
    base = load_bias(path, vmas, there)
    low, high = base + section["sh_addr"], base + section["sh_addr"] + section["sh_size"]

    # The run of read-only segments that are contiguous in memory and hold the section.
    span_start = span_end = None
    for load in loads:
        start = base + (load["p_vaddr"] & -PAGE)
        end = base + ((load["p_vaddr"] + load["p_memsz"] + PAGE - 1) & -PAGE)
        if load["p_flags"] & 2 or (span_end is not None and start != span_end):
            if span_start is not None and span_start <= low < span_end:
                break
            span_start = span_end = None
        if not load["p_flags"] & 2:
            span_start, span_end = span_start if span_start is not None else start, end
    chunk_low, chunk_high = -(-span_start // PMD) * PMD, span_end // PMD * PMD
    reached = max(low, chunk_low), min(high, chunk_high)
    attainable, head = max(0, reached[1] - reached[0]), 0
    if path == interpreter:
        # The huge pages of the ELF header and of the first code.
        first = next(h["p_vaddr"] for h in loads if h["p_flags"] & 1)
        for at in {(base + start & -PAGE) // PMD * PMD for start in (loads[0]["p_vaddr"], first)}:
            head += max(0, min(reached[1], at + PMD) - max(reached[0], at))

    huge, executable, locked = _huge_between(vmas, low, high), True, True
    for vma in vmas:
        if min(high, vma.end) > max(low, vma.start):
            executable &= vma.perms[:3] == "r-x"
            locked &= "lo" in vma.flags
    span_vmas = [v for v in vmas if span_start <= v.start and v.end <= span_end]
    return Text(
        path, high - low, attainable, head, huge, locked, executable, fixed, base % PMD, span_vmas
    )


def require_one_image(texts: Iterable[Text]) -> dict[int, int]:
    """Processes map one image of the interpreter; or, where the loader has put it at random
    addresses, those in which it is at the same one modulo a huge page. Without images there are
    memory files and the interpreter's own. Returns the sizes, by the addresses."""
    moved = [text for text in texts if text.attainable]
    spans = {text.phase: text.span for text in moved}
    if has_images():
        assert len({vma.path for text in moved for vma in text.span_vmas}) == len(spans), moved
    return spans


def require_one_copy(texts: Iterable[Text]) -> None:
    """These are all processes that map it, and share its memory; without images those do that are
    forked from a primed one."""
    texts = list(texts)
    expected = sum(require_one_image(texts).values())
    if not has_images():
        return
    assert expected or all(text.phase for text in texts), texts
    pss = sum(text.pss for text in texts if text.attainable)
    assert abs(pss - expected) <= expected // 20, (pss, expected, texts)


@dataclass
class Totals:
    """Of all ELF objects of a process, in bytes."""

    code: int = 0  # sections of instructions
    huge: int = 0  # of them on huge pages
    locked: int = 0  # mapped with a memory lock
    objects: int = 0


def totals_of(pid: int) -> Totals:
    """Measure all ELF objects."""
    vmas, found = smaps(pid), Totals()
    for path in sorted({v.path for v in vmas if "w" in v.perms and v.path.startswith("/")}):
        with open(path, "rb") as file:
            if file.read(4) != b"\x7fELF":
                continue
            sections = [s.header for s in ELFFile(file).iter_sections()]
        base = load_bias(path, vmas)
        found.objects += 1
        for section in sections:
            if section["sh_flags"] & 6 == 6:  # SHF_ALLOC, SHF_EXECINSTR
                low = base + section["sh_addr"]
                found.code += section["sh_size"]
                found.huge += _huge_between(vmas, low, low + section["sh_size"])
    found.locked = sum(v.end - v.start for v in vmas if "lo" in v.flags)
    return found


def _huge_between(vmas: list[Vma], low: int, high: int) -> int:
    """smaps counts per mapping: what is missing from one is taken to be missing between these."""
    huge = 0
    for vma in vmas:
        start, end = -(-vma.start // PMD) * PMD, vma.end // PMD * PMD
        inside = min(high, end) - max(low, start)
        if inside > 0:
            huge += max(0, inside - max(0, end - start - vma.huge))
    return huge
