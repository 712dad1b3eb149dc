"""Measurements: variants of the command, started anew, under one piece of work, as numbers.

Three kinds of work: requests to a server's URLs, tasks for a Celery worker, and a command that
runs to its end. Where variants can run at the same time (see places.py) they take turns at it: what
slows a shared machine for some seconds then slows all of them.
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from page_primer.bench import celery, places, server, vmtouch
from page_primer.bench.failures import CutShort, Failure
from page_primer.bench.running import Running
from page_primer.bench.variants import OFF

if TYPE_CHECKING:
    import resource
    from collections.abc import Iterator, Sequence

    from page_primer.bench.counters import Counters
    from page_primer.bench.interpreter import Aligned
    from page_primer.bench.rounds import Round, Told
    from page_primer.bench.tree import Adopted
    from page_primer.bench.variants import Variant

_WARM_UP = 0.25  # of the requests that are measured, sent before
_TURN_SECONDS = 0.2
_FEWEST_TURNS = 4


@dataclass
class Bench:
    """What every measurement of a run has in common."""

    command: Sequence[str]
    requests: int
    connections: int
    tree: Adopted
    counters: Counters
    environ: dict[str, str]
    start_seconds: float = 60.0
    aligned: Aligned | None = None
    urls: Sequence[str] = ()
    generator: str = ""
    task: celery.Task | None = None
    is_script: bool = False
    together: bool = False  # scripts
    obtained: dict[str, dict[str, float]] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(1))
    _weighed: Counter[str] = field(default_factory=Counter)
    _queues: set[str] = field(default_factory=set)

    @property
    def side_by_side(self) -> bool:
        """Whether variants run at the same time."""
        return self.together if self.is_script else places.can_be_many(self.command)

    def round(self, order: Sequence[Variant], told: Told) -> Round:
        """Every variant once.

        Args:
            order: in which they start.
            told: called before each starts: it, and which it is.

        Returns:
            Numbers by name, by variant; those of report.METRICS, and the hardware counters.

        Raises:
            Failure: one does not start, or not answer; the message has its name.
            CutShort: it was not all done; so has this.
        """
        if self.side_by_side:
            in_turns = self._scripts_in_turns if self.is_script else self._in_turns
            return in_turns(order, told)
        found = {}
        for at, variant in enumerate(order):
            told(variant, at)
            with _named(variant):
                found[variant.name] = self.measure(variant)
        return found

    def measure(self, variant: Variant, requests: int | None = None) -> dict[str, float]:
        """One variant, alone.

        Args:
            variant: how the command is run.
            requests: another number of requests than the run's.

        Returns:
            Numbers by name.

        Raises:
            Failure: it does not start, or not answer.
            CutShort: it was not all done.
        """
        if self.is_script:
            return self._script(variant)
        requests = requests or self.requests
        with self._running(variant, alone=True) as running:
            running.warm_up(int(requests * _WARM_UP))
            with running.counted(self.counters):
                running.turn(requests)
            running.look()
            running.weigh()
            return running.numbers()

    def forget(self) -> None:
        """Leave no queue with the broker."""
        while self.task and self._queues:
            with celery.Client(self.task, self._queues.pop(), self.tree.helpers) as client:
                if not client.forget():
                    return  # nor would others be

    def _in_turns(self, order: Sequence[Variant], told: Told) -> Round:
        # Memory that variants share would be divided among all of them: it is that of one of a
        # round, when the others have ended.
        names = sorted(variant.name for variant in order)
        weighed = min(names, key=lambda name: (self._weighed[name], name != OFF))
        with contextlib.ExitStack() as stack:
            stack.callback(self.tree.stop)  # what left its session, too
            running, rate = [], 0.0
            for at, variant in enumerate(order):
                told(variant, at)
                with _named(variant):
                    one = stack.enter_context(self._running(variant, alone=False))
                    rate = max(rate, one.warm_up(int(self.requests * _WARM_UP)))
                    running.append(one)
            self._check_for_strays(running)
            for one in running:
                stack.enter_context(one.counted(self.counters))
            at_once = self.connections * max(1, len(self.urls))
            for requests in _turns(self.requests, at_once, rate):
                self.random.shuffle(running)
                for one in running:
                    with _named(one.variant):
                        one.turn(requests)
            for one in running:
                with _named(one.variant):
                    one.look()
            running.sort(key=lambda one: one.variant.name == weighed)
            for one in running[:-1]:
                one.tree.stop()
            running[-1].weigh()
            self._weighed[weighed] += 1
            return {one.variant.name: one.numbers() for one in running}

    def _check_for_strays(self, running: Sequence[Running]) -> None:
        found = self.tree.live()
        known = {pid for one in running for pid in one.tree.processes()}
        for pid in set(found) - known:
            raise Failure(
                f"process {pid} of a server made itself a daemon, so nobody knows of which: "
                "variants cannot run side by side, which {port} and {queue} ask for"
            )

    @contextlib.contextmanager
    def _running(self, variant: Variant, *, alone: bool) -> Iterator[Running]:
        """A variant from its start to its end."""
        place = places.Place.of(variant.name, self.command, self.urls)
        if self.task is None:
            server.check_free(place.addresses)
        command, environ = self._command(variant)
        with contextlib.ExitStack() as stack:
            client = None
            if self.task:
                client = celery.Client(self.task, place.queue, self.tree.helpers)
                stack.enter_context(client)
                self._queues |= {place.queue} - {""}
            process = stack.enter_context(
                server.Process(place.fill(command), environ, self.tree, alone=alone)
            )
            if client:
                began = client.wait_until_ready(process, self.start_seconds)
            else:
                began = process.wait_for(place.addresses, self.start_seconds)
            if variant.vmtouch:
                stack.enter_context(vmtouch.locking(process.tree))
            yield Running(
                variant, place, process, client, self.connections, self.generator, self.obtained,
                began,
            )  # fmt: skip

    def _command(self, variant: Variant) -> tuple[list[str], dict[str, str]]:
        environ, command = variant.environment(self.environ), list(self.command)
        if variant.aligned:
            assert self.aligned is not None
            command = self.aligned.command
            environ = {**environ, **self.aligned.environment}
        return variant.command(command), environ

    def _script(self, variant: Variant) -> dict[str, float]:
        with self._started(variant, alone=True) as process:
            usage, took = process.run_to_end()
            return {**self._of_script(process, usage), "wall_ms": took * 1000}

    def _scripts_in_turns(self, order: Sequence[Variant], told: Told) -> Round:
        found: Round = {}
        with contextlib.ExitStack() as stack:
            stack.callback(self.tree.stop)
            running = []
            for at, variant in enumerate(order):
                told(variant, at)
                with _named(variant):
                    process = stack.enter_context(self._started(variant, alone=False))
                process.pause()
                running.append((variant, process))
            while running:
                self.random.shuffle(running)
                for variant, process in list(running):
                    if usage := process.run_on(_TURN_SECONDS):
                        running.remove((variant, process))
                        with _named(variant):
                            found[variant.name] = self._of_script(process, usage)
        return {variant.name: found[variant.name] for variant in order}

    def _started(self, variant: Variant, *, alone: bool) -> server.Process:
        command, environ = self._command(variant)
        by = signal.SIGTERM if alone else signal.SIGKILL  # which a stopped one notices
        return server.Process(command, environ, self.tree, alone=alone, dies_by=by)

    def _of_script(
        self, process: server.Process, usage: resource.struct_rusage
    ) -> dict[str, float]:
        """All but time on the wall, which means nothing where it is stopped now and then."""
        if why := process.failed():
            raise CutShort(f"{self.command[0]} {why}")
        return {
            "cpu_ms": (usage.ru_utime + usage.ru_stime) * 1000,
            "resident_mib": usage.ru_maxrss / 1024,
            "minor_faults": usage.ru_minflt,
            "major_faults": usage.ru_majflt,
        }


@contextlib.contextmanager
def _named(variant: Variant) -> Iterator[None]:
    """Put the variant's name before what failed."""
    try:
        yield
    except (CutShort, Failure) as error:
        raise type(error)(f"{variant.name}: {error}") from None


def _turns(requests: int, at_once: int, rate: float) -> list[int]:
    """Divide the requests of a round: some tenths of a second each, several turns, each a multiple
    of what goes out at once (every URL on every connection), but for what is left at the end."""
    count = max(_FEWEST_TURNS, round(requests / (rate * _TURN_SECONDS)))
    times = requests // at_once
    count = max(1, min(count, times))
    turns = [(times * (at + 1) // count - times * at // count) * at_once for at in range(count)]
    turns[-1] += requests - sum(turns)
    return turns
