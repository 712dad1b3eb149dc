"""Explain an environment: what of page-primer works here, what does not and why, and for each
shortfall the line that fixes it.

Readers gather facts from /proc, /sys and by trial at scratch addresses; functions named `judge_...`
are pure and turn facts into checks. Nothing is believed to work, or not to, where it can be tried.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from page_primer import _unsupported
from page_primer.kernel import mounts
from page_primer.kernel.mounts import Mount, mount_of
from page_primer.kernel.release import release
from page_primer.options import Options
from page_primer.report import memlock_for, memlock_remedy, mib, percent, shortage

try:
    from page_primer import _core, plan, survey
    from page_primer.backing import image as image_backing
    from page_primer.backing.pieces import reason_of
    from page_primer.doctor.probes import Trial, try_directory, try_lock, try_memory
    from page_primer.elf.file import PF_R, PF_X
    from page_primer.elf.objects import Object, Region
    from page_primer.heap.advice import advice
    from page_primer.images import store
    from page_primer.kernel.memory import Memory
    from page_primer.kernel.thp import pmd_size
    from page_primer.plan import Move, Plan
    from page_primer.status import CAP_IPC_LOCK
    from page_primer.survey import Survey
except ImportError as error:  # not Linux, or built without the C core: examine() says so
    _missing: str | None = str(error)
else:
    _missing = None

OK, INFO, WARNING, PROBLEM = "ok", "info", "warning", "problem"

_THP = "/sys/kernel/mm/transparent_hugepage"
_HUGETLB = "/sys/kernel/mm/hugepages"
_PLENTY = 0.9  # share of the interpreter's code that is worth no remark


@dataclass(frozen=True)
class Check:
    """One thing examined. `fix` is the line that mends it: a command, a flag, a unit's setting."""

    name: str
    status: str  # "ok", "info", "warning" or "problem"
    found: str
    fix: str | None = None


@dataclass(frozen=True)
class Settings:
    """The kernel's version and settings; an empty string or None where there is no such setting."""

    kernel: tuple[int, int]
    pmd: int  # bytes; 0 without THP
    thp: str = ""
    thp_of_size: str = ""  # hugepages-*/enabled
    shmem: str = ""
    shmem_of_size: str = ""
    memfd_noexec: int | None = None
    pool: int | None = None  # hugetlb pages
    pool_free: int = 0


@dataclass(frozen=True)
class Process:
    """What this process has been forbidden, and what it may lock."""

    thp_disabled: bool
    mdwe: int
    soft: int | None  # RLIMIT_MEMLOCK, bytes; None: unlimited
    hard: int | None
    capable: bool  # CAP_IPC_LOCK in the effective set
    locked: int  # bytes, VmLck


@dataclass(frozen=True)
class Directory:
    """A candidate for images, as found before the trial."""

    path: str
    mount: Mount
    user: int  # our effective uid
    free: int | None = None  # bytes
    owner: int | None = None  # None where it does not exist
    mode: int = 0


@dataclass(frozen=True)
class SegmentLayout:
    """A PT_LOAD in memory, in whole pages."""

    address: int
    size: int  # bytes
    kind: str  # "code", "rodata" or "data"


@dataclass(frozen=True)
class Coverage:
    """How much of the interpreter's code a backing can put on huge pages."""

    huge_bytes: int
    share: float
    left: dict[str, int]  # reason -> bytes of code left on small pages


@dataclass(frozen=True)
class Interpreter:
    """How the object that holds the interpreter is laid out, and what can be made of that."""

    path: str
    kind: str
    filesystem: str
    segments: tuple[SegmentLayout, ...]
    span: tuple[int, int]  # addresses: the read-only PT_LOADs around the code
    pmd_size: int  # bytes
    phase: int  # load address modulo pmd_size
    huge_pages: int  # whole ones inside the span
    code_bytes: int
    copied_bytes: int  # what its image takes
    image: Coverage
    memory: Coverage  # with memfd, anonymous memory and hugetlb
    problem: str | None  # why it cannot be moved at all

    def as_dict(self) -> dict[str, Any]:
        """The layout as plain data, ready for json.dumps()."""
        return asdict(self)


# ------------------------------------------------------------------------------- the public face


def examine(options: Options) -> tuple[Check, ...]:
    """Examine the environment of this process for what `options` ask of it.

    Nothing outside scratch mappings and short-lived files is changed. What the environment refuses
    is a check that says so, never an exception.
    """
    reason = _unsupported() or (_missing and f"not available here: {_missing}")
    if reason:
        return (Check("platform", PROBLEM, reason),)
    # What one check cannot find out is no reason to go without the others.
    found = _Examination(options)
    checks: list[Check] = []
    for name, check in found.checks():
        try:
            checks += check()
        except Exception as error:
            checks.append(Check(name, PROBLEM, f"not examined: {_words(error)}"))
    return tuple(checks)


def interpreter(options: Options) -> Interpreter | None:
    """Describe the interpreter's layout and the coverage to expect; None where that is unknown."""
    if _unsupported() or _missing:
        return None
    try:
        found = survey.take()
    except OSError:
        return None
    return _describe(found, plan.make(found, options), _has_directory(options))


def as_dict(checks: Iterable[Check], layout: Interpreter | None = None) -> dict[str, Any]:
    """Checks and layout as plain data, ready for json.dumps(); sizes are in bytes."""
    return {
        "checks": [asdict(check) for check in checks],
        "interpreter": layout.as_dict() if layout else None,
    }


def render(checks: Sequence[Check], layout: Interpreter | None = None, width: int = 100) -> str:
    """Checks and layout as text for a terminal of `width` columns. Fixes are never wrapped, so that
    they can be copied."""
    lines = []
    indent = " " * 9
    for check in checks:
        # No line ends between a number and its unit.
        text = re.sub(r"(\d) (%|MiB)", "\\1\0\\2", f"{check.name}: {check.found}")
        wrapped = textwrap.wrap(
            text, max(width - 9, 30), break_long_words=False, break_on_hyphens=False
        )
        wrapped = [line.replace("\0", " ") for line in wrapped]
        lines += [f"{check.status:<9}{wrapped[0]}", *(indent + line for line in wrapped[1:])]
        if check.fix:
            lines.append(f"{indent}fix: {check.fix}")
    if layout:
        lines += ["", *_draw(layout)]
    counts = [
        f"{sum(check.status == status for check in checks)} {word}"
        for status, word in ((OK, "ok"), (WARNING, "warnings"), (PROBLEM, "problems"))
    ]
    return "\n".join([*lines, "", ", ".join(counts)])


def _draw(layout: Interpreter) -> Iterator[str]:
    yield f"{layout.path} ({layout.kind}, on {layout.filesystem or 'an unknown file system'})"
    start, end = layout.span
    for segment in layout.segments:
        stop = segment.address + segment.size
        inside = "  span" if start <= segment.address < end else ""
        yield f"  {segment.address:#x}-{stop:#x}  {mib(segment.size):>9}  {segment.kind:<6}{inside}"
    if not layout.pmd_size:
        return
    yield (
        f"  span {mib(end - start)} with {layout.huge_pages} whole huge pages of "
        f"{mib(layout.pmd_size)}; load address is {layout.phase:#x} modulo that"
    )
    for name, coverage in (("image", layout.image), ("memfd, anonymous", layout.memory)):
        left = "".join(f"; {size} bytes: {why}" for why, size in coverage.left.items())
        yield (
            f"  {name}: {coverage.huge_bytes} of {layout.code_bytes} bytes of code "
            f"({percent(coverage.huge_bytes, layout.code_bytes)}) on huge pages{left}"
        )


class _Examination:
    """The facts that several checks want, gathered once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.settings = read_settings(pmd_size())
        self.process = read_process()
        self.container = judge_container(*read_container())
        self.trials: list[Trial] = []
        self._seen: tuple[Survey, Plan] | None = None

    def checks(self) -> list[tuple[str, Callable[[], Iterable[Check]]]]:
        """The checks in the order of a diagnosis: names for when they fail, and functions."""
        settings, process, options = self.settings, self.process, self.options
        return [
            ("switch", lambda: judge_switch(options)),
            ("kernel", lambda: [judge_kernel(settings.kernel)]),
            ("transparent huge pages", lambda: [judge_thp(settings)]),
            ("shmem huge pages", lambda: [judge_shmem(settings)]),
            ("memfd_noexec", lambda: judge_memfd_noexec(settings)),
            ("THP of this process", lambda: [judge_thp_disabled(process.thp_disabled)]),
            ("write-execute", lambda: [judge_mdwe(process.mdwe, options)]),
            ("container", lambda: [self.container]),
            ("interpreter", lambda: [judge_interpreter(self.layout(), options)]),
            ("image directories", self.directories),
            ("memory", self.memory),
            ("hugetlb pool", lambda: [judge_pool(settings, options, self.pool_pages())]),
            (
                "backing",
                lambda: [judge_backing(self.trials, self.layout(), options, settings.kernel)],
            ),
            ("locking", self.locking),
            ("available memory", self.available),
            ("heap", lambda: [Check("heap", *advice(options, settings.pmd))]),
        ]

    @property
    def in_container(self) -> bool:
        return self.container.status == INFO

    def seen(self) -> tuple[Survey, Plan]:
        """The survey of this process and the plan for it."""
        if self._seen is None:
            found = survey.take()
            self._seen = found, plan.make(found, self.options)
        return self._seen

    def layout(self) -> Interpreter:
        return _describe(*self.seen(), _has_directory(self.options))

    def directories(self) -> Iterator[Check]:
        if not self.can_try or self.options.backing not in ("auto", "image"):
            return
        named = self.options.image_dir is not None or self.options.backing == "image"
        needed = self.layout().copied_bytes
        for path, reason in image_backing.directories(self.options):
            name = f"image directory {path}"
            if reason:
                yield Check(name, INFO, f"passed over: {reason}")
                continue
            directory = read_directory(path)
            trial = try_directory(path, self.settings.pmd)
            others = any(other.works for other in self.trials)
            yield judge_directory(
                trial, directory, self.settings,
                needed=needed, named=named, needless=others, container=self.in_container,
            )  # fmt: skip
            self.trials.append(trial)

    def memory(self) -> Iterator[Check]:
        if not self.can_try:
            return
        wanted = self.options.backing
        for name in ("memfd", "anonymous") if wanted == "auto" else (wanted,):
            # Pages of the pool are the administrator's: not touched unless asked for.
            if name == "image":
                return
            trial = try_memory(name, self.settings.pmd)
            others = any(other.works for other in self.trials)
            yield judge_memory(
                trial, self.settings, self.process, named=wanted == name, needless=others
            )
            self.trials.append(trial)

    @property
    def can_try(self) -> bool:
        # arm64 with 64 KiB pages has huge pages of 512 MiB: no trial is worth a gigabyte.
        return self.options.remap and 0 < self.settings.pmd <= 32 << 20

    def pool_pages(self) -> int:
        """What the interpreter would take of the hugetlb pool, pages."""
        _, planned = self.seen()
        move = next((move for move in planned.moves if move.object.interpreter), None)
        if move is None or not self.settings.pmd:
            return 0
        regions = _in_memory(move, _has_directory(self.options))
        return sum(region.end - region.start for region in regions) // self.settings.pmd

    def locking(self) -> Iterator[Check]:
        if not self.options.mlock:
            yield Check("locking", INFO, "mlock is off")
            return
        code, everything = lock_sizes(*self.seen(), self.options)
        yield judge_locking(self.process, code, everything, try_lock(code), try_lock(everything))

    def available(self) -> Iterator[Check]:
        found, planned = self.seen()
        _, wanted = lock_sizes(found, planned, self.options)
        wanted = max(wanted, sum(plan.size_of(move.object) for move in planned.moves))
        yield judge_available(found.memory, self.options.memory_share, wanted)


def _words(error: Exception) -> str:
    return reason_of(error) if isinstance(error, OSError) else f"{error!r}"


# ---------------------------------------------------------------------- settings of the kernel ---


def read_settings(pmd: int) -> Settings:
    """Read what the kernel says of itself."""
    of_size = f"{_THP}/hugepages-{pmd >> 10}kB"
    pool = f"{_HUGETLB}/hugepages-{pmd >> 10}kB"
    pages = _number(f"{pool}/nr_hugepages")
    free = (_number(f"{pool}/free_hugepages") or 0) - (_number(f"{pool}/resv_hugepages") or 0)
    return Settings(
        kernel=release(),
        pmd=pmd,
        thp=_chosen(f"{_THP}/enabled"),
        thp_of_size=_chosen(f"{of_size}/enabled"),
        shmem=_chosen(f"{_THP}/shmem_enabled"),
        shmem_of_size=_chosen(f"{of_size}/shmem_enabled"),
        memfd_noexec=_number("/proc/sys/vm/memfd_noexec"),
        pool=pages,
        pool_free=max(free, 0),
    )


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _chosen(path: str) -> str:
    """The choice in brackets, as in "always [madvise] never"."""
    found = re.search(r"\[(\w+)\]", _read(path))
    return found[1] if found else ""


def judge_switch(options: Options) -> Iterator[Check]:
    """What is switched off."""
    if not options.enabled:
        yield Check("switch", PROBLEM, "switched off by PAGE_PRIMER=0", "unset PAGE_PRIMER")
    elif not options.remap:
        yield Check("switch", INFO, "remap is off: no code is moved", "unset PAGE_PRIMER_REMAP")


def judge_kernel(version: tuple[int, int]) -> Check:
    """What a kernel of this version allows."""
    name = "{}.{}".format(*version)
    if version >= (7, 2):
        text = "images on ext4, xfs and tmpfs, MADV_COLLAPSE of any of them; memfd and anonymous"
    elif version >= (6, 16):
        text = "images on ext4, xfs and tmpfs; memfd and anonymous"
    elif version >= (6, 12):
        text = "images on xfs and tmpfs, on ext4 from Linux 6.16 on; memfd and anonymous"
    elif version >= (6, 1):
        text = (
            "images on tmpfs, and on xfs when read back from disk, on ext4 from Linux 6.16 on; "
            "memfd and anonymous"
        )
    else:
        text = "anonymous memory, and memfd with shmem_enabled=advise; images from Linux 6.1 on"
        fix = "boot Linux 6.1 or newer; 6.16 or newer for images on ext4"
        return Check("kernel", WARNING, f"Linux {name}: {text}", fix)
    return Check("kernel", OK, f"Linux {name}: {text}")


def judge_thp(settings: Settings) -> Check:
    """THP `enabled`, of all sizes and of the one that matters."""
    name = "transparent huge pages"
    if not settings.pmd:
        return Check(
            name, PROBLEM, f"none: there is no {_THP}/hpage_pmd_size",
            "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y",
        )  # fmt: skip
    text = f"{mib(settings.pmd)} each, enabled={settings.thp or 'unknown'}"
    if settings.thp_of_size not in ("", "inherit"):
        text += f", enabled={settings.thp_of_size} for this size"
    if settings.pmd > 32 << 20:
        return Check(name, PROBLEM, f"{text}: larger than the code of any interpreter",
                     "boot a kernel with pages of 4 KiB")  # fmt: skip
    if _in_force(settings.thp, settings.thp_of_size) != "never":
        return Check(name, OK, text)
    if settings.kernel >= (6, 1):
        return Check(name, OK, f"{text}: does not matter to MADV_COLLAPSE and to images")
    return Check(name, WARNING, f"{text}: no anonymous huge pages before Linux 6.1", _thp_fix())


def _in_force(general: str, of_size: str) -> str:
    return general if of_size in ("", "inherit") else of_size


def _thp_fix() -> str:
    return f"echo madvise > {_THP}/enabled"


def judge_shmem(settings: Settings) -> Check:
    """Whether memfd and tmpfs can have huge pages."""
    name = "shmem huge pages"
    text = f"shmem_enabled={settings.shmem or 'unknown'}"
    if settings.shmem_of_size not in ("", "inherit"):
        text += f", {settings.shmem_of_size} for this size"
    fix = _shmem_fix(settings)
    if fix:
        return Check(name, WARNING, f"{text}: no huge pages for memfd and tmpfs", fix)
    if settings.shmem == "never":
        text += ": does not matter to MADV_COLLAPSE"
    return Check(name, OK, text)


def _shmem_fix(settings: Settings) -> str | None:
    """The line that allows memfd and tmpfs huge pages; None where nothing forbids them."""
    if settings.shmem == "deny" or (settings.kernel < (6, 1) and settings.shmem == "never"):
        return f"echo advise > {_THP}/shmem_enabled"
    # The setting of one size came with 6.12; from 7.2 on MADV_COLLAPSE does not ask it.
    if settings.shmem_of_size == "never" and settings.kernel < (7, 2):
        return f"echo inherit > {_THP}/hugepages-{settings.pmd >> 10}kB/shmem_enabled"
    return None


def judge_memfd_noexec(settings: Settings) -> Iterator[Check]:
    """vm.memfd_noexec (Linux 6.3): page-primer's memfds obey it, so this only explains."""
    value = settings.memfd_noexec
    if value:
        what = "are sealed against execve(2)" if value == 1 else "must be sealed against execve(2)"
        text = f"vm.memfd_noexec={value}: memfds {what}, as page-primer's are; mapping is allowed"
        yield Check("memfd_noexec", OK, text)


def judge_pool(settings: Settings, options: Options, needed: int) -> Check:
    """The hugetlb pool, which is used only when asked for by name."""
    name = "hugetlb pool"
    if settings.pool is None:
        text, free = f"no pool of pages of {mib(settings.pmd)}", 0
    else:
        text = f"{settings.pool_free} of {settings.pool} pages of {mib(settings.pmd)} free"
        free = settings.pool_free
    if options.backing != "hugetlb":
        return Check(name, INFO, f"{text}; used only with backing=hugetlb")
    text += f", the interpreter takes {needed}"
    if settings.pool is not None and free >= needed:
        return Check(name, OK, text)
    return Check(
        name, PROBLEM, text, f"sysctl vm.nr_hugepages={(settings.pool or 0) + needed - free}"
    )


# ---------------------------------------------------------------------- settings of the process --


def read_process() -> Process:
    """Read what this process may do."""
    import resource

    def limit(value: int) -> int | None:
        return None if value == resource.RLIM_INFINITY else value

    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    status = dict(re.findall(r"^(\w+):\s+(\w+)", _read("/proc/self/status"), re.MULTILINE))
    disabled, mdwe = False, 0
    # Older kernels say EINVAL to the question: then the answer is no.
    with contextlib.suppress(OSError):
        disabled = _core.thp_disabled()
    with contextlib.suppress(OSError):
        mdwe = _core.mdwe()
    return Process(
        thp_disabled=disabled,
        mdwe=mdwe,
        soft=limit(soft),
        hard=limit(hard),
        capable=bool(int(status.get("CapEff", "0"), 16) >> CAP_IPC_LOCK & 1),
        locked=int(status.get("VmLck", "0")) << 10,
    )


def judge_thp_disabled(disabled: bool) -> Check:
    """PR_SET_THP_DISABLE, which is inherited over fork and exec."""
    name = "THP of this process"
    if not disabled:
        return Check(name, OK, "allowed")
    return Check(
        name, PROBLEM,
        "disabled by PR_SET_THP_DISABLE, which a parent process or systemd's MemoryTHP=disable set",
        "MemoryTHP=inherit (systemd), or before prime(): "
        "ctypes.CDLL(None).prctl(41, 0, 0, 0, 0)",
    )  # fmt: skip


def judge_mdwe(flags: int, options: Options) -> Check:
    """PR_SET_MDWE, systemd's MemoryDenyWriteExecute=."""
    name = "write-execute"
    if not flags:
        return Check(name, OK, "not denied")
    text = "memory that was writable cannot become executable (MemoryDenyWriteExecute): "
    if options.backing == "anonymous":
        return Check(name, PROBLEM, f"{text}backing=anonymous is impossible",
                     "PAGE_PRIMER_BACKING=auto")  # fmt: skip
    return Check(name, OK, f"{text}images and memfd are not affected, anonymous memory is not used")


# -------------------------------------------------------------------------------- where we are ---


def read_container() -> tuple[str | None, str]:
    """The sign of a container, if there is one, and the root file system's type."""
    root = mount_of("/", _read("/proc/self/mountinfo")).filesystem
    sign = container_sign(
        [path for path in ("/.dockerenv", "/run/.containerenv") if os.path.exists(path)],
        _read("/proc/1/environ"),
        _read("/proc/self/cgroup"),
    )
    return sign, root


def container_sign(files: Sequence[str], environment: str, cgroup: str) -> str | None:
    """What shows that this is a container.

    Args:
        files: the marker files that exist.
        environment: of process 1, separated by null bytes; empty when it is not readable.
        cgroup: the content of /proc/self/cgroup.
    """
    if files:
        return files[0]
    for variable in environment.split("\0"):
        name, _, value = variable.partition("=")
        if name == "container" and value:
            return f"container={value}"
    found = re.search(r"docker|kubepods|containerd|libpod|lxc|crio", cgroup)
    return f"cgroup of {found[0]}" if found else None


def judge_container(sign: str | None, root: str) -> Check:
    """What a container changes: limits come from its runtime, and overlayfs costs alignment."""
    name = "container"
    text = f"yes ({sign})" if sign else "no sign of one"
    if root == "overlay":
        text += "; the root file system is overlay, which maps libraries at unaligned addresses"
    elif root:
        text += f"; the root file system is {root}"
    return Check(name, INFO if sign or root == "overlay" else OK, text)


# ------------------------------------------------------------------------------ the interpreter --


def _has_directory(options: Options) -> bool:
    """Whether files can be written for anchors, as far as permissions tell."""
    for path, _ in image_backing.directories(options):
        there = path
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        with contextlib.suppress(OSError):  # a symbolic link to nothing
            ours = there != path or store.is_trusted(os.stat(there))
            if ours and os.path.isdir(there) and os.access(there, os.W_OK):
                return True
    return False


def _in_memory(move: Move, anchors: bool) -> Sequence[Region]:
    return (move.signed if anchors else ()) or move.memory


def _describe(found: Survey, planned: Plan, anchors: bool = False) -> Interpreter:
    obj = next(obj for obj in found.objects if obj.interpreter)
    move = next((move for move in planned.moves if move.object is obj), None)
    left = {
        part.reason: 0 for part in planned.remainders if part.object is obj and part.kind == "code"
    }
    nothing = Coverage(0, 0.0, dict.fromkeys(left, obj.code_bytes))
    code = next(segment for segment in obj.segments if segment.code)
    span = next((span for span in obj.spans() if code in span), (code,))
    start, end = span[0].start, span[-1].end
    pmd = found.pmd_size
    low, high = Region(start, end, PF_R).huge(pmd) if pmd else (0, 0)
    return Interpreter(
        path=obj.path,
        kind=_kind(obj),
        filesystem=mount_of(os.path.realpath(obj.path), mounts.read()).filesystem,
        segments=tuple(SegmentLayout(s.start, s.end - s.start, s.kind) for s in obj.segments),
        span=(start, end),
        pmd_size=pmd,
        phase=obj.start % pmd if pmd else 0,
        huge_pages=(high - low) // pmd if pmd else 0,
        code_bytes=obj.code_bytes,
        copied_bytes=move.bytes if move else 0,
        image=coverage(obj, move.image, pmd) if move else nothing,
        memory=coverage(obj, _in_memory(move, anchors), pmd) if move else nothing,
        problem=obj.problem,
    )


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _kind(obj: Object) -> str:
    if not obj.main:
        return "shared libpython" if _name(obj.path).startswith("libpython") else "shared library"
    return "static, ET_EXEC" if obj.fixed else "static, PIE"


def coverage(obj: Object, regions: Sequence[Region], pmd: int) -> Coverage:
    """How much of an object's code is on huge pages once `regions` have moved, and what keeps the
    rest; the two add up to its code."""
    left: dict[str, int] = {}
    if not regions:
        left = {plan.PROFILERS_HEAD: obj.code_bytes}  # a move has no memory only for that reason
    else:
        code = [(s.address, s.address + s.size) for s in obj.segments if s.code]
        for part in plan.explain(obj, regions, pmd):
            for low, high in code if part.kind == "code" else ():
                size = min(part.end, high) - max(part.start, low)
                if size > 0:
                    left[part.reason] = left.get(part.reason, 0) + size
    huge = obj.code_bytes - sum(left.values())
    return Coverage(huge, huge / obj.code_bytes if obj.code_bytes else 0.0, left)


def judge_interpreter(found: Interpreter, options: Options) -> Check:
    """What share of the interpreter's code can be on huge pages, and what keeps the rest."""
    text = (
        f"{_name(found.path)}: {found.kind} on {found.filesystem or 'an unknown file system'}, "
        f"{mib(found.code_bytes)} of code"
    )
    in_memory = options.backing in ("memfd", "anonymous", "hugetlb")
    best = found.memory if in_memory else found.image
    if found.problem == survey.REMAPPED:
        return Check("interpreter", INFO, f"{text}, which has been moved already")
    if found.problem:
        fix = "restart this process" if found.problem == survey.FILE_GONE else None
        return Check("interpreter", PROBLEM, f"{text}, which cannot be moved: {found.problem}", fix)
    if not options.remap or set(best.left) == {plan.EXCLUDED}:
        return Check("interpreter", INFO, f"{text}, left alone: {', '.join(best.left)}")
    if not in_memory:
        text += (
            f"; an image can put {percent(best.huge_bytes, found.code_bytes)} of it on huge pages"
        )
    if in_memory or found.memory != found.image:
        share = percent(found.memory.huge_bytes, found.code_bytes)
        text += f"; memory without a file's name {share}"
    left = [f"{mib(size)}: {why}" for why, size in best.left.items()]
    if left:
        text += f" ({', '.join(left)})"
    if best.share >= _PLENTY:
        return Check("interpreter", OK, text)
    if found.phase and plan.NO_CHUNK in best.left:
        text += f"; its load address is not {mib(found.pmd_size)} aligned, which costs coverage"
    fix = _coverage_fix(found, best, options)
    # Short of full is the nature of a small interpreter, unless something can be done about it.
    status = PROBLEM if not best.huge_bytes else WARNING if fix or found.phase else INFO
    return Check("interpreter", status, text, fix)


def _coverage_fix(found: Interpreter, best: Coverage, options: Options) -> str | None:
    if plan.NO_CHUNK in best.left and not options.merge:
        return "PAGE_PRIMER_MERGE=1"
    if plan.PROFILERS_HEAD in best.left:
        return "PAGE_PRIMER_KEEP_PROFILERS=0"
    return None


# ----------------------------------------------------------------------------------- the trials --


def read_directory(path: str) -> Directory:
    """Look at a candidate for images without touching it."""
    real = os.path.realpath(path)
    owner, mode = None, 0
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        owner, mode = status.st_uid, status.st_mode & 0o7777
    there = real
    while not os.path.isdir(there) and there != "/":
        there = os.path.dirname(there)
    free = None
    with contextlib.suppress(OSError):
        room = os.statvfs(there)
        if room.f_blocks:
            free = (room.f_bavail if os.geteuid() else room.f_bfree) * room.f_frsize
    mount = mount_of(there, mounts.read())
    return Directory(path, mount, os.geteuid(), free, owner, mode)


def judge_directory(
    trial: Trial,
    directory: Directory,
    settings: Settings,
    *,
    needed: int,
    named: bool = False,
    needless: bool = False,
    container: bool = False,
) -> Check:
    """What a candidate for images is good for.

    Args:
        trial: what came of trying it.
        directory: how it was found.
        settings: the kernel's.
        needed: bytes of the interpreter's image.
        named: somebody asked for it, so a failure is a problem.
        needless: an earlier candidate works, so a failure does not matter.
        container: this is one, and its runtime makes the mounts.
    """
    name = f"image directory {directory.path}"
    kind = directory.mount.filesystem or "unknown file system"
    bad = PROBLEM if named else INFO if needless else WARNING
    if trial.refused is not None:
        why, fix = _refusal(trial, directory, needed, container)
        return Check(name, bad, f"{kind}, unusable: {why}", fix)
    huge = f"{mib(trial.huge)} of {mib(trial.wanted)} on huge pages in a trial"
    if not trial.works:
        why, fix = _not_huge(kind, settings)
        return Check(name, bad, f"{kind}, {huge}: {why}", fix)
    if directory.free is not None and directory.free < needed:
        text = f"{kind}, {mib(directory.free)} free: the interpreter's image takes {mib(needed)}"
        return Check(name, bad, text, _room_fix(directory, needed, container))
    return Check(name, OK, f"{kind}, {huge}")


def _refusal(
    trial: Trial, directory: Directory, needed: int, container: bool
) -> tuple[str, str | None]:
    """Why a directory was refused, in words, and the line that mends it."""
    path, mount, user = directory.path, directory.mount, directory.user
    flag = f"--tmpfs {path}:exec,mode=0755,uid={user}"
    if trial.number in (errno.ENOSPC, errno.EDQUOT):
        free = "full" if not directory.free else f"only {mib(directory.free)} free"
        return f"{free}: {trial.refused}", _room_fix(directory, needed, container)
    if trial.number == errno.EROFS or (trial.number and "ro" in mount.options):
        point = f"mount -o remount,rw {mount.point}"
        return f"read-only: {mount.point} is mounted ro", flag if container else point
    if trial.number in (errno.EPERM, errno.EACCES) and "noexec" in mount.options:
        point = f"mount -o remount,exec {mount.point}"
        return f"{mount.point} is mounted noexec", flag if container else point
    if trial.number is None and directory.owner not in (None, user):
        why = f"it belongs to user {directory.owner}, this process runs as {user}"
        return why, f"chown {user} {path}"
    if trial.number is None and directory.mode & 0o022:
        return f"others can write to it (mode {directory.mode:04o})", f"chmod go-w {path}"
    if trial.number in (errno.EPERM, errno.EACCES):
        return f"{trial.refused}, as user {user}", f"install -d -m 0755 -o {user} {path}"
    return trial.refused or "unknown reason", None


def _room_fix(directory: Directory, needed: int, container: bool) -> str | None:
    mount = directory.mount
    size = 64
    while size << 20 < 4 * needed:
        size *= 2
    if mount.filesystem != "tmpfs":
        return None
    if container and mount.point == "/dev/shm":
        return f"--shm-size={size}m"
    return f"mount -o remount,size={size}m {mount.point}"


def _not_huge(filesystem: str, settings: Settings) -> tuple[str, str | None]:
    """Why files of a file system are not on huge pages although nothing refused them."""
    kernel = settings.kernel
    if filesystem == "tmpfs":
        fix = _shmem_fix(settings)
        if fix:
            return "shmem_enabled forbids it", fix
    since = image_backing.GOOD_SINCE.get(filesystem)
    if since and kernel < since:
        why = f"{filesystem} gives huge pages from Linux {since[0]}.{since[1]} on"
    elif since:
        return _fragmented()
    else:
        why = f"{filesystem} gives none on Linux {kernel[0]}.{kernel[1]}"
    return why, _image_fix(kernel)


def _image_fix(kernel: tuple[int, int]) -> str:
    """The line that gets images on huge pages where no candidate does."""
    if kernel < (6, 1):
        return "boot Linux 6.1 or newer"
    return "PAGE_PRIMER_IMAGE_DIR=/a/directory/on/xfs/or/tmpfs"


def _fragmented() -> tuple[str, str]:
    return (
        "settings allow it, so memory may be short or fragmented, or a sandbox forbids it",
        "echo 1 > /proc/sys/vm/compact_memory",
    )


def judge_memory(
    trial: Trial,
    settings: Settings,
    process: Process,
    *,
    named: bool = False,
    needless: bool = False,
) -> Check:
    """What a backing without a file's name is good for; the arguments are judge_directory()'s."""
    bad = PROBLEM if named else INFO if needless else WARNING
    fix: str | None
    if trial.refused is not None:
        why, fix = trial.refused, None
        if trial.backing == "anonymous" and process.mdwe:
            why += ", because write-execute is denied"
            fix = "MemoryDenyWriteExecute=no"
        elif trial.backing == "hugetlb":
            fix = f"sysctl vm.nr_hugepages={(settings.pool or 0) + 2}"
        return Check(trial.backing, bad, f"unusable: {why}", fix)
    text = f"{mib(trial.huge)} of {mib(trial.wanted)} on huge pages in a trial"
    if trial.works:
        return Check(trial.backing, OK, text)
    never = _in_force(settings.thp, settings.thp_of_size) == "never"
    if process.thp_disabled:
        why, fix = "PR_SET_THP_DISABLE is in force", judge_thp_disabled(True).fix
    elif trial.backing == "memfd" and _shmem_fix(settings):
        why, fix = "shmem_enabled forbids it", _shmem_fix(settings)
    elif trial.backing == "anonymous" and never and settings.kernel < (6, 1):
        why, fix = "THP is never", _thp_fix()
    else:
        why, fix = _fragmented()
    return Check(trial.backing, bad, f"{text}: {why}", fix)


def judge_backing(
    trials: Sequence[Trial], found: Interpreter, options: Options, kernel: tuple[int, int]
) -> Check:
    """What prime() would take of what was tried."""
    if not options.remap:
        return Check("backing", INFO, "none: remap is off")
    if found.problem or set(found.image.left) == {plan.EXCLUDED}:
        return Check("backing", INFO, "none: the interpreter is left alone")
    works = [trial for trial in trials if trial.works]
    if not works:
        return Check("backing", PROBLEM, "none works here: code stays where it is")
    for trial in works:
        expected = found.image if trial.backing == "image" else found.memory
        if not expected.huge_bytes:
            continue
        share = percent(expected.huge_bytes, found.code_bytes)
        where = f" in {trial.where}" if trial.backing == "image" else ""
        text = f"{trial.backing}{where}, with {share} of the interpreter's code on huge pages"
        if options.backing != "auto" or trial.backing == "image":
            return Check("backing", OK, text)
        text += "; profilers lose the symbols of what is moved, which an image keeps"
        return Check("backing", WARNING, text, _image_fix(kernel))
    fix = "PAGE_PRIMER_KEEP_PROFILERS=0" if plan.PROFILERS_HEAD in found.memory.left else None
    names = ", ".join(trial.backing for trial in works)
    why = ", ".join(found.memory.left)
    return Check("backing", PROBLEM, f"{names} works, but there is nothing to move: {why}", fix)


# -------------------------------------------------------------------------------------- locking --


def lock_sizes(found: Survey, planned: Plan, options: Options) -> tuple[int, int]:
    """Bytes to lock once the plan is carried out: the interpreter's code, and everything."""
    wanted = plan.locks(found.objects, found.mappings, options)
    everything = sum(lock.end - lock.start for lock in wanted)
    code = sum(
        lock.end - lock.start for lock in wanted if lock.object.interpreter and lock.kind == "code"
    )
    for move in planned.moves:
        if move.object.interpreter and code:
            # Read-only data that shares a huge page with code is executable after the move.
            regions = [region for region in move.image if region.flags & PF_X]
            outside = [s for s in move.object.segments if s.code and s.end <= move.image[0].start]
            code = sum(r.end - r.start for r in regions) + sum(s.end - s.start for s in outside)
    return code, max(everything, code)


def judge_locking(
    process: Process, code: int, everything: int, code_refused: str | None, refused: str | None
) -> Check:
    """Whether what is to be locked fits.

    Args:
        process: its limits.
        code: bytes of the interpreter's code.
        everything: bytes of all that is to be locked.
        code_refused: why the kernel refused to lock as much as the code, if it did.
        refused: the same of everything.
    """
    soft = "unlimited" if process.soft is None else mib(process.soft)
    hard = "unlimited" if process.hard is None else mib(process.hard)
    limits = f"RLIMIT_MEMLOCK is {soft} (hard limit {hard})"
    if process.locked:
        limits += f", {mib(process.locked)} locked already"
    if process.capable:
        limits = f"CAP_IPC_LOCK, {limits}"
    what = f"the interpreter's code is {mib(code)}, everything {mib(everything)}"
    if refused is None:
        return Check("locking", OK, f"{what} and fits: {limits}")
    if process.soft is None or process.locked + everything <= process.soft:
        # A sandbox, then: there is no limit to raise.
        return Check("locking", PROBLEM, f"{what}; mlock refused ({refused}) despite {limits}")
    need = process.locked + everything
    fix = memlock_remedy(need)
    if process.hard is None or memlock_for(need) <= process.hard:
        fix += ", which needs no privilege here"
    if code_refused is None:
        text = f"{what}: the code fits, everything does not: {limits}"
        return Check("locking", WARNING, text, fix)
    return Check("locking", PROBLEM, f"{what}: not even the code fits: {limits}", fix)


def judge_available(memory: Memory | None, share: float, wanted: int) -> Check:
    """Whether the machine's memory and its cgroups' allow what is to be copied and locked.

    Args:
        memory: what is to be had.
        share: of that, what may be taken.
        wanted: bytes to copy and to lock.
    """
    name = "available memory"
    if memory is None:
        return Check(name, INFO, "unknown: /proc/meminfo and the memory cgroup are not readable")
    text = (
        f"{shortage(memory)}; page-primer takes {100 * share:g} % of that at most, "
        f"{mib(int(share * memory.available))}, and wants {mib(wanted)}"
    )
    if wanted <= share * memory.available:
        return Check(name, OK, text)
    if memory.where == "/proc/meminfo":
        return Check(name, WARNING, text, "give the machine more memory, or end other processes")
    need = memory.limit + int(wanted / share) - memory.available
    size = (-(-need >> 20)) + 4  # what is in use differs from one moment to the next
    fix = (
        f"MemoryMax={size}M (systemd), --memory={size}m (Docker), "
        f"resources: {{limits: {{memory: {size}Mi}}}} (Kubernetes)"
    )
    return Check(name, WARNING, text, fix)
