"""Checks of limits: what may be locked, and what memory is available."""

from __future__ import annotations

from page_primer import mlock_plan
from page_primer.doctor.facts import Process
from page_primer.doctor.findings import INFO, OK, PROBLEM, WARNING, Check
from page_primer.elf.file import PF_X
from page_primer.kernel import memlock
from page_primer.kernel.memory import Memory
from page_primer.options import Options
from page_primer.plan import Plan
from page_primer.survey import Survey
from page_primer.words import memlock_for, memlock_lines, memlock_remedy, mib, shortage


def lock_sizes(found: Survey, planned: Plan, options: Options) -> tuple[int, int]:
    """Bytes to lock once the plan is carried out: the interpreter's code, and everything."""
    wanted = mlock_plan.locks(found.objects, found.mappings, options, found.pmd_size)
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


def margin_of(process: Process) -> int:
    """What prime() leaves of the limit to the application, bytes."""
    return 0 if process.soft is None else memlock.margin(process.soft)


def judge_locking(
    process: Process, code: int, everything: int, code_refused: str | None, refused: str | None
) -> Check:
    """Whether what is to be locked fits.

    Args:
        process: its limits.
        code: bytes of the interpreter's code.
        everything: bytes of all that is to be locked.
        code_refused: why the kernel refused to lock as much as the code and margin_of(), if it
            did.
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
    need = process.locked + everything
    if process.soft is None or need + margin_of(process) <= process.soft:
        # A sandbox, then: there is no limit to raise.
        text = f"{what}; mlock refused ({refused}) despite {limits}"
        return Check("locking", PROBLEM, text, code="locks-refused")
    limits += f", of which {mib(margin_of(process))} are left to the application"
    fix = memlock_remedy(need)
    if process.hard is None or memlock_for(need) <= process.hard:
        fix += ", which needs no privilege here"
    if code_refused is None:
        text = f"{what}: the code fits, everything does not: {limits}"
        return Check("locking", WARNING, text, fix, "locks-exceed-limit", memlock_lines(need))
    text = f"{what}: not even the code fits: {limits}"
    return Check("locking", PROBLEM, text, fix, "code-exceeds-limit", memlock_lines(need))


def judge_available(memory: Memory | None, share: float, wanted: int) -> Check:
    """Whether the machine's memory and its cgroups' allow what is to be copied and locked.

    Args:
        memory: what is available.
        share: of that, what may be taken.
        wanted: bytes to copy and to lock.
    """
    name = "available memory"
    if memory is None:
        text = "unknown: /proc/meminfo and the memory cgroup are not readable"
        return Check(name, INFO, text, code="memory-unknown")
    text = (
        f"{shortage(memory)}; page-primer takes {100 * share:g} % of that at most, "
        f"{mib(int(share * memory.available))}, and wants {mib(wanted)}"
    )
    if wanted <= share * memory.available:
        return Check(name, OK, text)
    if memory.where == "/proc/meminfo":
        fix = "give the machine more memory, or end other processes"
        return Check(name, WARNING, text, fix, "short-of-memory", (f"# {fix}",))
    need = memory.limit + int(wanted / share) - memory.available
    size = (-(-need >> 20)) + 4  # what is in use differs from one moment to the next
    fix = (
        f"MemoryMax={size}M (systemd), --memory={size}m (Docker), "
        f"resources: {{limits: {{memory: {size}Mi}}}} (Kubernetes)"
    )
    lines = (
        f"MemoryMax={size}M  # systemd",
        f"--memory={size}m  # Docker",
        f"resources: {{limits: {{memory: {size}Mi}}}}  # Kubernetes",
    )
    return Check(name, WARNING, text, fix, "short-of-memory", lines)
