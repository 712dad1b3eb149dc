"""One measurement: a variant of the command, started anew, under one piece of work, as numbers.

Three kinds of work: requests to a server's URLs, tasks for a Celery worker, and a command that runs
to its end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from page_primer import processes
from page_primer.bench import celery, load, server, tree
from page_primer.bench.failures import CutShort, Failure
from page_primer.kernel.smaps import Mapping, read_maps

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from page_primer.bench.counters import Counters
    from page_primer.bench.interpreter import Aligned
    from page_primer.bench.variants import Variant

_VMTOUCH = "vmtouch"
_LOCK_SECONDS = 30.0
_MIB = 1 << 20
_WARM_UP = 0.25  # of the requests that are measured, sent before


@dataclass
class Bench:
    """What every measurement of a run has in common."""

    command: Sequence[str]
    requests: int
    connections: int
    tree: tree.Adopted
    counters: Counters
    environ: dict[str, str]
    start_seconds: float = 60.0
    aligned: Aligned | None = None
    addresses: Sequence[server.Address] = ()
    generator: str = ""
    task: celery.Task | None = None
    is_script: bool = False
    obtained: dict[str, dict[str, float]] = field(default_factory=dict)

    def measure(self, variant: Variant, requests: int | None = None) -> dict[str, float]:
        """Start the command as the variant says, give it its work, end it.

        Args:
            variant: how.
            requests: another number of requests than the run's.

        Returns:
            Numbers by name; those of render.METRICS, and the hardware counters.

        Raises:
            Failure: it does not start, or not answer.
            CutShort: it was not all done.
        """
        if self.is_script:
            return self._script(variant)
        if self.task is None:
            server.check_free(self.addresses)
        with self._started(variant) as process:
            requests = requests or self.requests
            if self.task:
                began = self.task.wait_until_ready(process, self.start_seconds, self.tree.helpers)
            else:
                began = process.wait_for(self.addresses, self.start_seconds)
            found = {"start_s": began}
            with self._vmtouch() if variant.vmtouch else contextlib.nullcontext():
                try:
                    self._send(max(self.connections, int(requests * _WARM_UP)))
                    self.tree.settle()
                    found.update(self._window(variant, requests))
                except CutShort as error:
                    why = process.ended()
                    raise CutShort(f"the server {why}; {error}" if why else str(error)) from None
            if why := process.ended():
                raise CutShort(f"the server {why}")
        return found

    @contextlib.contextmanager
    def _started(self, variant: Variant) -> Iterator[server.Process]:
        command, environ = self._command(variant)
        with server.Process(command, environ, self.tree) as process:
            yield process

    def _command(self, variant: Variant) -> tuple[list[str], dict[str, str]]:
        environ, command = variant.environment(self.environ), list(self.command)
        if variant.aligned:
            assert self.aligned is not None
            command = self.aligned.command
            environ = {**environ, **self.aligned.environment}
        return variant.command(command), environ

    def _send(self, requests: int) -> load.Load:
        if self.task:
            return self.task.send(requests, self.connections, self.tree.helpers)
        urls = [address.url for address in self.addresses]
        return load.send(self.generator, urls, requests, self.connections, self.tree.helpers)

    def _window(self, variant: Variant, requests: int) -> dict[str, float]:
        """The work that is measured, with the server's use of everything before and after."""
        with self.counters.attach(self.tree.processes()) as counting:
            counted = counting.read()
            before = self.tree.used()
            answered = self._send(requests)
            after = self.tree.used()
            counts = {name: value - counted.get(name, 0.0) for name, value in
                      counting.read().items()}  # fmt: skip
        working = tree.workers(before, after)
        found = {
            "cpu_ms": (after.seconds - before.seconds) * 1000 / requests,
            "rate": answered.rate,
            "p50_ms": answered.quantile(0.5) * 1000,
            "p99_ms": answered.quantile(0.99) * 1000,
            "max_ms": answered.latencies[-1] * 1000,
            "minor_faults": (after.minor_faults - before.minor_faults) / requests,
            "major_faults": (after.major_faults - before.major_faults) / requests,
            "workers": len(working),
        }
        if held := tree.average(working):
            found.update(pss_mib=held.pss / _MIB, private_mib=held.private / _MIB)
        found.update({name: value / requests for name, value in counts.items()})
        if working and variant.name not in self.obtained:
            self.obtained[variant.name] = _obtained(working[-1])
        return found

    @contextlib.contextmanager
    def _vmtouch(self) -> Iterator[None]:
        """Have vmtouch lock in memory what the server executes, as its users do."""
        files = {
            mapping.path
            for pid in self.tree.processes()
            for mapping in _maps(pid)
            if mapping.executable and os.path.isfile(mapping.path)
        }
        process = subprocess.Popen(
            [_VMTOUCH, "-l", "-q", *sorted(files)], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=tree.dies_with_us(),
        )  # fmt: skip
        self.tree.helpers.add(process.pid)
        try:
            _wait_for_locks(process)
            yield
        finally:
            process.kill()
            process.wait()
            process.stderr.close()  # type: ignore[union-attr]  # PIPE
            self.tree.helpers.discard(process.pid)

    def _script(self, variant: Variant) -> dict[str, float]:
        command, environ = self._command(variant)
        with server.Process(command, environ, self.tree) as process:
            usage, took = process.run_to_end()
            if why := process.failed():
                raise CutShort(f"{self.command[0]} {why}")
        return {
            "cpu_ms": (usage.ru_utime + usage.ru_stime) * 1000,
            "wall_ms": took * 1000,
            "resident_mib": usage.ru_maxrss / 1024,
            "minor_faults": usage.ru_minflt,
            "major_faults": usage.ru_majflt,
        }


def check_vmtouch() -> None:
    """
    Raises:
        Failure: it is not installed.
    """
    if not shutil.which(_VMTOUCH):
        raise Failure("vmtouch: command not found (Debian and Ubuntu: apt install vmtouch)")


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


def _obtained(pid: int) -> dict[str, float]:
    """What a worker really has: shares of its code and heap on huge pages, and what is locked."""
    seen = processes.examine(pid)
    code, heap = seen.sum("code_bytes"), seen.heap.bytes
    return {
        "code_huge": seen.sum("code_huge_bytes") / code if code else 0.0,
        "heap_huge": seen.heap.huge / heap if heap else 0.0,
        "locked_mib": seen.locked_bytes / _MIB,
    }
