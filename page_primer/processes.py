"""Look at any live process from outside: which code lies on huge pages, locked, copied, shared.

Nothing here depends on page-primer having run in that process: everything is read from smaps and
from the ELF files that its mappings name.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from page_primer._lean import asdict as plain
from page_primer.elf import file as elf
from page_primer.elf.file import PROGRAM_HEADER, PT_LOAD, ProgramHeader
from page_primer.elf.objects import Segment, segments_of
from page_primer.kernel import memlock
from page_primer.kernel.anonymous import Use, named_by_us, use_of
from page_primer.kernel.smaps import Mapping, overlapping, read_smaps, total
from page_primer.kernel.thp import page_size, pmd_size
from page_primer.verify import measure
from page_primer.words import memlock_remedy, mib

# A path's end, as in python3.13t, libpython3.11.so.1.0, libpython3.so.
_PYTHON = re.compile(rb"/(lib)?(python|pypy)[0-9.]*[a-z]?(-c)?(\.so[.0-9]*)?( \(deleted\))?$")
CAP_IPC_LOCK = 14  # linux/capability.h
SUMS = (  # of all objects, in a process's as_dict()
    "code_bytes", "code_huge_bytes", "copied_bytes", "copied_shared_bytes",
    "copied_private_bytes", "shared_bytes", "pss_bytes",
)  # fmt: skip
NO_PROCESS = "no such process"
# More than any real file has of program headers, and than a process has of copies of one (dlmopen
# knows 16 namespaces).
_MOST_HEADERS, _MOST_COPIES = 512, 64


@dataclass(frozen=True)
class ObjectStatus:
    """One ELF object in one process; sizes in bytes."""

    path: str
    backing: str | None  # the path its read-only span is mapped from, if not its own
    code_bytes: int
    code_huge_bytes: int
    locked_bytes: int
    lockable_bytes: int  # mapped, and not by the loader's PROT_NONE gaps
    copied_bytes: int  # of the read-only span, not mapped from the object's own file
    copied_shared_bytes: int  # of them resident, and mapped by other processes too
    copied_private_bytes: int  # of them resident in this process alone
    shared_bytes: int  # resident, of the read-only span, and mapped by other processes too
    pss_bytes: int  # resident, of the read-only span, divided by the processes that map it
    huge_bytes: int = 0  # of all of its memory, on huge pages
    huge_private_bytes: int = 0  # of them resident in this process alone
    small_locked_bytes: int = 0  # locked, and not on huge pages


@dataclass(frozen=True)
class ProcessStatus:
    """One process; `problem` says why there is nothing to tell."""

    pid: int
    parent: int
    command: str
    objects: tuple[ObjectStatus, ...] = ()
    locked_bytes: int = 0  # VmLck: all of the process, not only ELF objects
    lock_limit: int | None = None  # RLIMIT_MEMLOCK; None: there is none, or CAP_IPC_LOCK
    problem: str | None = None
    # Private anonymous memory. Arenas are told by their name, where the kernel has names, so those
    # that are older than page-primer's count as other.
    heap: Use = field(default_factory=Use)

    def sum(self, name: str) -> int:
        """One number of all objects, by its field name."""
        return sum(getattr(obj, name) for obj in self.objects)

    @property
    def primed(self) -> bool:
        """Whether something of it was moved or locked."""
        return any(obj.backing or obj.locked_bytes for obj in self.objects)

    @property
    def unlocked(self) -> str | None:
        """What the limit keeps from being locked, with the remedy."""
        wanted, locked = self.sum("lockable_bytes"), self.sum("locked_bytes")
        if locked >= wanted or not self.primed or self.lock_limit is None:
            return None
        # Locks of something else may take their part of the limit, and the host has one.
        need = self.locked_bytes - locked + wanted
        if need + memlock.margin(self.lock_limit) <= self.lock_limit:
            return None  # what was loaded since, or is left out
        return (
            f"{mib(wanted - locked)} of {mib(wanted)} not locked: RLIMIT_MEMLOCK is "
            f"{mib(self.lock_limit)}; allow it with {memlock_remedy(need)}"
        )

    @property
    def added(self) -> str | None:
        """What priming has added to its memory."""
        shared, private = self.sum("copied_shared_bytes"), self.sum("copied_private_bytes")
        if not self.primed:
            return "unprimed: nothing of its code was moved or locked"
        if not self.sum("copied_bytes"):
            return None
        return (
            f"copied: {mib(self.sum('copied_bytes'))}, of which {mib(shared + private)} resident, "
            f"{mib(shared)} shared with other processes, {mib(private)} private"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dumps()."""
        data = asdict(self)
        data["unlocked"], data["primed"] = self.unlocked, self.primed
        data["heap"] = plain(self.heap)
        for name in SUMS:
            data[name] = self.sum(name)
        return data


@dataclass(frozen=True)
class _Loaded:
    """An ELF file's place in an address space."""

    path: str
    identity: tuple[str, int]
    base: int
    segments: tuple[Segment, ...]

    def covers(self, other: _Loaded) -> bool:
        return self.base == other.base and self.segments[0].start <= other.segments[0].start


def family(pid: int) -> list[int]:
    """A process and its descendants, in the order of their ids; empty if there is no such one."""
    parents = _parents()
    found = {pid} & parents.keys()
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found, key=lambda member: (member != pid, member))


def _parents() -> dict[int, int]:
    """Each process's parent."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parents[int(name)] = _parent(int(name))
    return parents


def is_python(pid: int) -> bool:
    """Whether a process is a Python interpreter, or has one in it: by its files' names, or, where
    we may not look at these, by its command's."""
    with contextlib.suppress(OSError):
        names = _read(f"/proc/{pid}/maps").splitlines()
        return any(_PYTHON.search(name) for name in names)
    with contextlib.suppress(OSError):
        return bool(_PYTHON.search(_read(f"/proc/{pid}/cmdline").partition(b"\0")[0]))
    return False


def topmost_python(pid: int) -> list[tuple[int, str]]:
    """The Python processes below another with no Python process between, and their commands."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    found, waiting = [], sorted(children.get(pid, ()))
    while waiting:
        one = waiting.pop(0)
        if is_python(one):
            with contextlib.suppress(OSError):
                found.append((one, _command(one)))
        else:
            waiting += sorted(children.get(one, ()))
    return sorted(found)


def _command(pid: int) -> str:
    line = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    # A kernel thread has no command line, but a name.
    return line or f"[{_read(f'/proc/{pid}/comm').decode(errors='replace').strip()}]"


def examine(pid: int) -> ProcessStatus:
    """The status of one process, which may end meanwhile or not be ours to see."""
    try:
        parent = _parent(pid)
        status = ProcessStatus(pid, parent, _command(pid))
    except (OSError, IndexError):
        return ProcessStatus(pid, 0, "", problem=NO_PROCESS)
    try:
        mappings = read_smaps(pid)
        locked, limit = _locked(pid), _lock_limit(pid)
    except OSError as error:
        return replace(status, problem=f"cannot read its mappings: {error.strerror}")
    if not mappings:
        return replace(status, problem="nothing is mapped: it has ended, or is the kernel's")
    objects = tuple(_objects(pid, mappings))
    heap = use_of(mappings, named_by_us)
    return replace(status, objects=objects, locked_bytes=locked, lock_limit=limit, heap=heap)


def _objects(pid: int, mappings: Sequence[Mapping]) -> Iterator[ObjectStatus]:
    loaded = _loaded(pid, mappings)
    # An image lies over a part of the object it is of, at the same base; the object's own file
    # still holds the writable data. What has none (a stub) is mapped from one file alone.
    with_data = {(m.device, m.inode) for m in mappings if m.writable}
    originals = [one for one in loaded if one.identity in with_data]
    images = [one for one in loaded if one.identity not in with_data]
    originals += [one for one in images if not any(o.covers(one) for o in originals)]
    for original in sorted(originals, key=lambda one: one.segments[0].start):
        first, last = original.segments[0].start, original.segments[-1].end
        here = list(overlapping(mappings, first, last))
        spans = [s for s in original.segments if not s.writable]
        span = [m for m in here if any(True for s in spans if m.start < s.end and s.start < m.end)]
        moved = [m for m in span if (m.device, m.inode) != original.identity]
        segments = measure(original.segments, here, pmd_size())
        code = [s for s in segments if s.kind == "code"]
        yield ObjectStatus(
            path=original.path,
            backing=_name_of(moved),
            code_bytes=sum(s.bytes for s in code),
            code_huge_bytes=sum(s.huge_bytes for s in code),
            locked_bytes=sum(s.locked_bytes for s in segments),
            lockable_bytes=sum(
                min(m.end, last) - max(m.start, first) for m in here if m.permissions[0] == "r"
            ),
            copied_bytes=sum(m.size for m in moved),
            copied_shared_bytes=total(moved, "Shared_Clean") + total(moved, "Shared_Dirty"),
            copied_private_bytes=total(moved, "Private_Clean") + total(moved, "Private_Dirty"),
            shared_bytes=total(span, "Shared_Clean") + total(span, "Shared_Dirty"),
            pss_bytes=total(span, "Pss"),
            **_kinds(here, first, last),
        )


def _kinds(mappings: Iterable[Mapping], first: int, last: int) -> dict[str, int]:
    """What of an object's memory is huge, private, locked."""
    huge_bytes = huge_private = small_locked = 0
    for mapping in mappings:
        size = min(mapping.end, last) - max(mapping.start, first)
        huge = min(mapping.huge, size)
        private = mapping.count("Private_Clean") + mapping.count("Private_Dirty")
        huge_bytes += huge
        # smaps counts per mapping: what of it is huge is as private as all of it.
        huge_private += huge * private // max(mapping.count("Rss"), 1)
        small_locked += (size - huge) * mapping.is_locked
    return {
        "huge_bytes": huge_bytes, "huge_private_bytes": huge_private,
        "small_locked_bytes": small_locked,
    }  # fmt: skip


def _name_of(moved: Sequence[Mapping]) -> str | None:
    if not moved:
        return None
    return moved[0].path or "anonymous memory"


def _loaded(pid: int, mappings: Iterable[Mapping]) -> list[_Loaded]:
    """The ELF objects in an address space, each file with its load bias."""
    files: dict[tuple[str, int], list[Mapping]] = {}
    for mapping in mappings:
        if mapping.inode and mapping.path.startswith("/"):
            files.setdefault((mapping.device, mapping.inode), []).append(mapping)
    found = []
    for identity, parts in files.items():
        table = _program_headers(pid, parts[0])
        if not table:
            continue
        # A process may have mapped any file, in any way: that must not keep us from an end.
        for _ in range(_MOST_COPIES):
            # Segments may share a page of the file, so one mapping can mean two load biases: the
            # one that most mappings agree on is the right one.
            votes = Counter(bias for part in parts for bias in _load_biases(table, part))
            if not votes:
                break
            base = votes.most_common(1)[0][0]
            segments = segments_of(table, base, page_size())
            if not segments:
                break
            start, end = segments[0].start, segments[-1].end
            # Only what has code somewhere is an object in the sense of this report.
            if any(segment.code for segment in segments):
                found.append(_Loaded(parts[0].path, identity, base, segments))
            others = [part for part in parts if not start <= part.start < end]
            if len(others) == len(parts):
                break
            parts = others
    return found


def _program_headers(pid: int, mapping: Mapping) -> bytes | None:
    """The program header table of a mapped file, if it is a 64-bit ELF file that can be read: seen
    from the process's own root, or by the mapping itself where the file was deleted."""
    names = (
        f"/proc/{pid}/root{mapping.path}",
        f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}",
    )
    for name in names:
        with contextlib.suppress(OSError), open(name, "rb", buffering=0) as file:
            try:
                table = elf.File(file.fileno()).program_headers()
            except elf.Malformed:
                return None
            return table if len(table) <= _MOST_HEADERS * PROGRAM_HEADER.size else None
    return None


def _load_biases(table: bytes, mapping: Mapping) -> Iterator[int]:
    """address - p_vaddr, for each PT_LOAD that the mapping may be of."""
    page = page_size()
    for header in ProgramHeader.parse_table(table):
        low = header.p_offset & -page
        high = (header.p_offset + header.p_filesz + page - 1) & -page
        if header.p_type == PT_LOAD and low <= mapping.offset < high:
            yield mapping.start - mapping.offset + low - (header.p_vaddr & -page)


def _parent(pid: int) -> int:
    # The second field, the command, may hold anything, but ends at the last parenthesis.
    return int(_read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[1])


def _locked(pid: int) -> int:
    return int(_field(pid, "status", "VmLck:", "0")) << 10


def _lock_limit(pid: int) -> int | None:
    limit = _field(pid, "limits", "Max locked memory", "unlimited")
    if limit == "unlimited" or int(_field(pid, "status", "CapEff:", "0"), 16) >> CAP_IPC_LOCK & 1:
        return None
    return int(limit)


def _field(pid: int, name: str, title: str, default: str) -> str:
    """What follows a title in /proc/PID/NAME."""
    for line in _read(f"/proc/{pid}/{name}").decode(errors="replace").splitlines():
        if line.startswith(title):
            return line.removeprefix(title).split()[0]
    return default


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()
