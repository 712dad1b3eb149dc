"""Checks of the settings of the kernel and of the process: pure functions from facts."""

from __future__ import annotations

from collections.abc import Iterator

from page_primer.doctor.facts import Settings
from page_primer.doctor.findings import INFO, OK, PROBLEM, WARNING, Check
from page_primer.kernel.thp import SETTINGS
from page_primer.options import Options
from page_primer.words import mib

_ALLOW_THP = "ctypes.CDLL(None).prctl(41, 0, 0, 0, 0)"


def judge_switch(options: Options) -> Iterator[Check]:
    """What is switched off."""
    if not options.enabled:
        yield Check("switch", PROBLEM, "switched off by PAGE_PRIMER=0", "unset PAGE_PRIMER",
                    code="switched-off")  # fmt: skip
    elif not options.remap:
        yield Check("switch", INFO, "remap is off: no code is moved", "unset PAGE_PRIMER_REMAP",
                    code="remap-off")  # fmt: skip


def judge_kernel(version: tuple[int, int]) -> Check:
    """What a kernel of this version allows."""
    name = "{}.{}".format(*version)
    if version >= (7, 2):
        text = (
            "aligned files in place, on every file system with large folios; "
            "images on ext4, xfs and tmpfs; memfd and anonymous"
        )
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
        return Check("kernel", WARNING, f"Linux {name}: {text}", fix, "old-kernel", (f"# {fix}",))
    return Check("kernel", OK, f"Linux {name}: {text}")


def judge_thp(settings: Settings) -> Check:
    """THP `enabled`, of all sizes and of the one that matters."""
    name = "transparent huge pages"
    if not settings.pmd:
        return Check(
            name, PROBLEM, f"none: there is no {SETTINGS}/hpage_pmd_size",
            "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y", "no-thp",
            ("# boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y",),
        )  # fmt: skip
    text = f"{mib(settings.pmd)} each, enabled={settings.thp or 'unknown'}"
    if settings.thp_of_size not in ("", "inherit"):
        text += f", enabled={settings.thp_of_size} for this size"
    if settings.pmd > 32 << 20:
        return Check(name, PROBLEM, f"{text}: larger than the code of any interpreter",
                     "boot a kernel with pages of 4 KiB", "huge-pages-too-large",
                     ("# boot a kernel with pages of 4 KiB",))  # fmt: skip
    if in_force(settings.thp, settings.thp_of_size) != "never":
        return Check(name, OK, text)
    if settings.kernel >= (6, 1):
        return Check(name, OK, f"{text}: does not matter to MADV_COLLAPSE and to images")
    return Check(name, WARNING, f"{text}: no anonymous huge pages before Linux 6.1", thp_fix(),
                 "thp-never")  # fmt: skip


def in_force(general: str, of_size: str) -> str:
    return general if of_size in ("", "inherit") else of_size


def thp_fix() -> str:
    return f"echo madvise > {SETTINGS}/enabled"


def judge_shmem(settings: Settings) -> Check:
    """Whether memfd and tmpfs can have huge pages."""
    name = "shmem huge pages"
    text = f"shmem_enabled={settings.shmem or 'unknown'}"
    if settings.shmem_of_size not in ("", "inherit"):
        text += f", {settings.shmem_of_size} for this size"
    fix = shmem_fix(settings)
    if fix:
        return Check(name, WARNING, f"{text}: no huge pages for memfd and tmpfs", fix,
                     "shmem-forbidden")  # fmt: skip
    if settings.shmem == "never":
        text += ": does not matter to MADV_COLLAPSE"
    return Check(name, OK, text)


def shmem_fix(settings: Settings) -> str | None:
    """The line that allows memfd and tmpfs huge pages; None where nothing forbids them."""
    if settings.shmem == "deny" or (settings.kernel < (6, 1) and settings.shmem == "never"):
        return f"echo advise > {SETTINGS}/shmem_enabled"
    # The setting of one size came with 6.12; from 7.2 on MADV_COLLAPSE does not ask it.
    if settings.shmem_of_size == "never" and settings.kernel < (7, 2):
        return f"echo inherit > {SETTINGS}/hugepages-{settings.pmd >> 10}kB/shmem_enabled"
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
        return Check(name, INFO, f"{text}; used only with backing=hugetlb", code="pool-unused")
    text += f", the interpreter takes {needed}"
    if settings.pool is not None and free >= needed:
        return Check(name, OK, text)
    return Check(
        name,
        PROBLEM,
        text,
        f"sysctl vm.nr_hugepages={(settings.pool or 0) + needed - free}",
        "pool-too-small",
    )


def judge_thp_disabled(disabled: bool) -> Check:
    """PR_SET_THP_DISABLE, which is inherited over fork and exec."""
    name = "THP of this process"
    if not disabled:
        return Check(name, OK, "allowed")
    return Check(
        name, PROBLEM,
        "disabled by PR_SET_THP_DISABLE, which a parent process or systemd's MemoryTHP=disable set",
        f"MemoryTHP=inherit (systemd), or before prime(): {_ALLOW_THP}", "thp-disabled",
        ("MemoryTHP=inherit  # systemd", f"{_ALLOW_THP}  # before prime()"),
    )  # fmt: skip


def judge_mdwe(flags: int, options: Options) -> Check:
    """PR_SET_MDWE, systemd's MemoryDenyWriteExecute=."""
    name = "write-execute"
    if not flags:
        return Check(name, OK, "not denied")
    text = "memory that was writable cannot become executable (MemoryDenyWriteExecute): "
    if options.backing == "anonymous":
        return Check(name, PROBLEM, f"{text}backing=anonymous is impossible",
                     "PAGE_PRIMER_BACKING=auto", "anonymous-denied")  # fmt: skip
    return Check(name, OK, f"{text}images and memfd are not affected, anonymous memory is not used")


def judge_container(sign: str | None, root: str) -> Check:
    """What a container changes: limits come from its runtime, and overlayfs costs alignment."""
    name = "container"
    text = f"yes ({sign})" if sign else "no sign of one"
    if root == "overlay":
        text += "; the root file system is overlay, which maps libraries at unaligned addresses"
    elif root:
        text += f"; the root file system is {root}"
    if not sign and root != "overlay":
        return Check(name, OK, text)
    return Check(name, INFO, text, code="container")
