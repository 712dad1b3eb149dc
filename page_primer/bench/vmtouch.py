"""vmtouch(8), a peer: it locks in memory what a server executes, as its users have it do."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

from page_primer.bench.failures import Failure
from page_primer.bench.tree import dies_with_us
from page_primer.kernel.smaps import Mapping, read_maps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from page_primer.bench.tree import Adopted

_VMTOUCH = "vmtouch"
_LOCK_SECONDS = 30.0


def check() -> None:
    """
    Raises:
        Failure: it is not installed.
    """
    if not shutil.which(_VMTOUCH):
        raise Failure("vmtouch: command not found (Debian and Ubuntu: apt install vmtouch)")


@contextlib.contextmanager
def locking(tree: Adopted) -> Iterator[None]:
    """Have it lock the files that the processes execute.

    Raises:
        Failure: it did not.
    """
    files = {
        mapping.path
        for pid in tree.processes()
        for mapping in _maps(pid)
        if mapping.executable and os.path.isfile(mapping.path)
    }
    process = subprocess.Popen(
        [_VMTOUCH, "-l", "-q", *sorted(files)], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=dies_with_us(),
    )  # fmt: skip
    tree.helpers.add(process.pid)
    try:
        _wait_for_locks(process)
        yield
    finally:
        process.kill()
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]  # PIPE
        tree.helpers.discard(process.pid)


def _wait_for_locks(process: subprocess.Popen[str]) -> None:
    """vmtouch says nothing when it has locked everything: wait until its locks stay the same."""
    end, before = time.monotonic() + _LOCK_SECONDS, ""
    while time.monotonic() < end:
        time.sleep(0.1)
        if process.poll() is not None:
            said = process.stderr.read()  # type: ignore[union-attr]
            last = (said.strip().splitlines() or ["it ended"])[-1]
            raise Failure(last.removeprefix("vmtouch: "))
        with open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
            now = next((line for line in file if line.startswith("VmLck")), "")
        if now == before and now.split()[1:2] not in ([], ["0"]):
            return
        before = now
    raise Failure("it locked nothing")


def _maps(pid: int) -> list[Mapping]:
    try:
        return list(read_maps(pid))
    except OSError:
        return []
