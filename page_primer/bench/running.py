"""A server, or worker, that runs: its work in turns, and what that takes, as numbers."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from page_primer import processes
from page_primer.bench import load
from page_primer.bench.failures import CutShort
from page_primer.bench.tree import END_SECONDS, Adopted, Held, Used, average, workers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from page_primer.bench import celery, places, server
    from page_primer.bench.counters import Attached, Counters
    from page_primer.bench.variants import Variant

_MIB = 1 << 20


@dataclass
class Running:
    """A variant of the command that runs, and what its work took so far."""

    variant: Variant
    place: places.Place
    process: server.Process
    client: celery.Client | None
    connections: int
    generator: str
    obtained: dict[str, dict[str, float]]  # by variant; of all of a run
    start_s: float = 0.0
    requests: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    used: Used = field(default_factory=lambda: Used({}, 0, 0))
    held: Held | None = None
    _counts: Counter[str] = field(default_factory=Counter)
    _counting: Attached | None = None

    @property
    def tree(self) -> Adopted:
        return self.process.tree

    def warm_up(self, requests: int) -> float:
        """Requests that do not count; returns how many a second were answered."""
        found = self._send(max(self.connections, requests))
        self.tree.settle()
        return found.rate

    @contextlib.contextmanager
    def counted(self, counters: Counters) -> Iterator[None]:
        """With the hardware's counters in turns."""
        with counters.attach(self.tree.processes()) as self._counting:
            yield

    def turn(self, requests: int) -> None:
        """Requests that count, with what the server used between the first and the last.

        Raises:
            CutShort: not all were answered, or the server ended.
        """
        assert self._counting is not None
        counted, used = self._counting.read(), self.tree.used()
        answered = self._send(requests)
        self.used += self.tree.used() - used
        self._counts.update(self._counting.read())
        self._counts.subtract(counted)
        self.requests += requests
        self.seconds += answered.seconds
        self.latencies += answered.latencies

    def look(self) -> None:
        """See what it obtained, once in a run.

        Raises:
            CutShort: it has ended.
        """
        if why := self.process.ended():
            raise CutShort(f"the server {why}")
        working = workers(self.used)
        if working and self.variant.name not in self.obtained:
            self.obtained[self.variant.name] = _obtained(working[-1])

    def weigh(self) -> None:
        """See what its workers hold."""
        self.held = average(workers(self.used))

    def numbers(self) -> dict[str, float]:
        """What came of it; memory, if it was weighed."""
        answered = load.Load(self.seconds, tuple(sorted(self.latencies)))
        found = {
            "start_s": self.start_s,
            "cpu_ms": self.used.seconds * 1000 / self.requests,
            "rate": answered.rate,
            "p50_ms": answered.quantile(0.5) * 1000,
            "p99_ms": answered.quantile(0.99) * 1000,
            "max_ms": answered.latencies[-1] * 1000,
            "minor_faults": self.used.minor_faults / self.requests,
            "major_faults": self.used.major_faults / self.requests,
            "workers": len(workers(self.used)),
        }
        if self.held:
            found.update(pss_mib=self.held.pss / _MIB, private_mib=self.held.private / _MIB)
        found.update({name: value / self.requests for name, value in self._counts.items()})
        return found

    def _send(self, requests: int) -> load.Load:
        try:
            if self.client:
                return self.client.send(requests, self.connections)
            urls = [address.url for address in self.place.addresses]
            return load.send(self.generator, urls, requests, self.connections, self.tree.helpers)
        except CutShort as error:
            why = self.process.ended(within=END_SECONDS)
            raise CutShort(f"the server {why}; {error}" if why else str(error)) from None


def _obtained(pid: int) -> dict[str, float]:
    """What a worker really has: shares of its code and heap on huge pages, and what is locked."""
    seen = processes.examine(pid)
    code, heap = seen.sum("code_bytes"), seen.heap.bytes
    return {
        "code_huge": seen.sum("code_huge_bytes") / code if code else 0.0,
        "heap_huge": seen.heap.huge / heap if heap else 0.0,
        "locked_mib": seen.locked_bytes / _MIB,
    }
