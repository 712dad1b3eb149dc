"""How far a run is: a bar on a terminal where rich is installed, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress as Bar

    from page_primer.bench.rounds import Course, Plan
    from page_primer.bench.variants import Variant


class Progress:
    """A context; told() is for rounds.go()."""

    def __init__(self, plan: Plan, variants: int) -> None:
        self._plan, self._variants, self._began = plan, variants, time.monotonic()
        self._bar: Bar | None = None
        self._shown = 0

    def __enter__(self) -> Progress:
        if sys.stderr is not None and sys.stderr.isatty():
            try:
                # An extra.
                from rich.console import Console
                from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            # No thread of its own: the server is forked from this process.
            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
                console=Console(stderr=True), auto_refresh=False, transient=True,
            )  # fmt: skip
            self._bar.add_task("", total=1.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, line: str) -> None:
        """Say what goes on, outside of rounds."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=line, refresh=True)
        elif sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)

    def told(self, course: Course, variant: Variant, at: int) -> None:
        number = len(course.rounds) + len(course.left_out) + 1
        if self._bar:
            self._bar.update(
                self._bar.task_ids[0], completed=self._share(len(course.rounds), at), refresh=True,
                description=f"round {number}: {variant.name}",
            )  # fmt: skip
            return
        for line in course.left_out[self._shown :]:
            self.note(f"left out: {line}")
        self._shown = len(course.left_out)
        if at == 0 and course.rounds:
            last = course.rounds[-1]
            times = ", ".join(f"{name} {found['cpu_ms']:.3f}" for name, found in last.items())
            of = f" of {self._plan.rounds}" if self._plan.seconds is None else ""
            self.note(f"round {number - 1}{of}: processor ms: {times}")

    def _share(self, rounds: int, at: int) -> float:
        by_rounds = (rounds + at / self._variants) / self._plan.rounds
        if self._plan.seconds is None:
            return by_rounds
        return max(by_rounds, (time.monotonic() - self._began) / self._plan.seconds)
