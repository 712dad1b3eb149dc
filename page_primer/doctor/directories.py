"""Checks of what was tried: directories for images, and memory without a file's name."""

from __future__ import annotations

import errno

from page_primer.doctor.checks import in_force, judge_thp_disabled, shmem_fix, thp_fix
from page_primer.doctor.facts import Directory, Process, Settings
from page_primer.doctor.findings import INFO, OK, PROBLEM, WARNING, Check
from page_primer.doctor.probes import Trial
from page_primer.images.trust import BUILD
from page_primer.words import mib

# From which kernel on a file system's files can be on huge pages without further settings.
GOOD_SINCE = {"ext4": (6, 16), "xfs": (6, 1), "tmpfs": (6, 1)}


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
        trial: the result of trying it.
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
        word = "not available" if needless else "unusable"
        return Check(name, bad, f"{kind}, {word}: {why}", fix, "directory-unusable")
    huge = f"{mib(trial.huge)} of {mib(trial.wanted)} on huge pages in a trial"
    if not trial.works:
        why, fix = _not_huge(kind, settings)
        return Check(name, bad, f"{kind}, {huge}: {why}", fix, "directory-not-huge")
    if not trial.there and directory.free is not None and directory.free < needed:
        text = f"{kind}, {mib(directory.free)} free: the interpreter's image takes {mib(needed)}"
        fix = _room_fix(directory, needed, container)
        return Check(name, bad, text, fix, "directory-full")
    there = "the interpreter's image is there, " if trial.there else ""
    return Check(name, OK, f"{kind}, {there}{huge}")


def judge_system(path: str) -> Check:
    """Of root's store, for others, when it has no image of the interpreter."""
    text = "root's store, without an image of this interpreter; others are used"
    return Check(f"image directory {path}", INFO, text, f"{BUILD}, as root",
                 "no-image-in-roots-store", (f"{BUILD}  # as root",))  # fmt: skip


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
    if trial.remedy:
        return trial.refused or "", trial.remedy
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
        fix = shmem_fix(settings)
        if fix:
            return "shmem_enabled forbids it", fix
    since = GOOD_SINCE.get(filesystem)
    if since and kernel < since:
        why = f"{filesystem} gives huge pages from Linux {since[0]}.{since[1]} on"
    elif since:
        return _fragmented()
    else:
        why = f"{filesystem} gives none on Linux {kernel[0]}.{kernel[1]}"
    return why, image_fix(kernel)


def image_fix(kernel: tuple[int, int]) -> str:
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
        word = "not available" if needless else "unusable"
        return Check(trial.backing, bad, f"{word}: {why}", fix, "memory-unusable")
    text = f"{mib(trial.huge)} of {mib(trial.wanted)} on huge pages in a trial"
    if trial.works:
        return Check(trial.backing, OK, text)
    never = in_force(settings.thp, settings.thp_of_size) == "never"
    if process.thp_disabled:
        why, fix = "PR_SET_THP_DISABLE is in force", judge_thp_disabled(True).fix
    elif trial.backing == "memfd" and shmem_fix(settings):
        why, fix = "shmem_enabled forbids it", shmem_fix(settings)
    elif trial.backing == "anonymous" and never and settings.kernel < (6, 1):
        why, fix = "THP is never", thp_fix()
    else:
        why, fix = _fragmented()
    return Check(trial.backing, bad, f"{text}: {why}", fix, "memory-not-huge")
