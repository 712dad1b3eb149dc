"""What a run found, as data and as text."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from page_primer import __version__
from page_primer.bench import intervals, machine
from page_primer.bench.variants import OFF

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from page_primer.bench.intervals import Ratio
    from page_primer.bench.rounds import Course

    Table = Callable[[Sequence[str], Sequence[Sequence[str]]], None]
    Say = Callable[[str], None]


class Metric(NamedTuple):
    """A number of each measurement: its name in the data, its title, how it is written."""

    name: str
    title: str
    form: str
    compared: bool = True


METRICS = (
    Metric("cpu_ms", "processor ms a {unit}", ".3f"),
    Metric("rate", "{unit}s/s", ".0f"),
    Metric("p50_ms", "p50 ms", ".2f"),
    Metric("p99_ms", "p99 ms", ".2f"),
    Metric("max_ms", "max ms", ".1f", compared=False),
    Metric("wall_ms", "wall ms", ".1f"),
    Metric("pss_mib", "PSS MiB a worker", ".1f"),
    Metric("private_mib", "private MiB a worker", ".1f"),
    Metric("resident_mib", "resident MiB", ".1f"),
    Metric("minor_faults", "minor faults a {unit}", ".2f", compared=False),
    Metric("major_faults", "major faults a {unit}", ".3f", compared=False),
    Metric("start_s", "start-up s", ".2f"),
    Metric("cycles", "cycles a {unit}", ".3g"),
    Metric("instructions", "instructions a {unit}", ".3g"),
    Metric("itlb_misses", "iTLB misses a {unit}", ".3g"),
    Metric("dtlb_misses", "dTLB misses a {unit}", ".3g"),
    Metric("itlb_walk_cycles", "cycles of iTLB walks a {unit}", ".3g"),
    Metric("dtlb_walk_cycles", "cycles of dTLB walks a {unit}", ".3g"),
    Metric("itlb_walks", "iTLB walks a {unit}", ".3g"),
    Metric("dtlb_walks", "dTLB walks a {unit}", ".3g"),
)
VERDICT_ON = "cpu_ms"


@dataclass
class Report:
    """A run: what was asked for, on which machine, and what came of it."""

    command: list[str]
    settings: dict[str, Any]
    variants: list[str]
    course: Course
    unit: str  # request, task, run
    counters: str | None = None  # why there are none
    generator: str = ""
    obtained: dict[str, dict[str, float]] = field(default_factory=dict)
    probe: list[dict[str, float]] = field(default_factory=list)
    side_by_side: bool = False
    notes: Sequence[str] = ()

    def values(self, variant: str, name: str) -> list[float]:
        """A number of every round that has it: memory is not looked at in each, where variants run
        side by side."""
        return [measured[variant][name] for measured in self.course.rounds
                if name in measured[variant]]  # fmt: skip

    def ratio(self, variant: str, name: str) -> Ratio | None:
        """The number of a variant beside that of `off`, of the rounds that have both."""
        both = [(measured[variant][name], measured[OFF][name]) for measured in self.course.rounds
                if name in measured[variant] and name in measured[OFF]]  # fmt: skip
        return intervals.ratio(*zip(*both, strict=True)) if both else None

    def verdict(self, variant: str) -> str:
        """What a run is for, in a sentence."""
        return intervals.verdict(self.ratio(variant, VERDICT_ON), f"processor time a {self.unit}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dumps()."""
        names = list({name: None for measured in self.course.rounds
                      for found in measured.values() for name in found})  # fmt: skip
        return {
            "page_primer": __version__,
            "command": [sys.executable, "-m", "page_primer", *sys.argv[1:]],
            "server": self.command,
            "settings": self.settings,
            "side_by_side": self.side_by_side,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.course.began)),
            "python": sys.version.split()[0],
            "machine": machine.describe(),
            "tlb_probe": self.probe,
            "no_counters": self.counters,
            "generator": self.generator,
            "ended": self.course.ended,
            "left_out": self.course.left_out,
            "variants": {
                name: {
                    "medians": {of: statistics.median(self.values(name, of)) for of in names
                                if self.values(name, of)},
                    "obtained": self.obtained.get(name, {}),
                    **(self._compared(name, names) if name != OFF else {}),
                }
                for name in self.variants
            },
            "rounds": self.course.rounds,
        }  # fmt: skip

    def _compared(self, variant: str, names: Sequence[str]) -> dict[str, Any]:
        ratios = {name: self.ratio(variant, name) for name in names}
        return {
            "verdict": self.verdict(variant),
            "ratios": {name: asdict(found) for name, found in ratios.items() if found},
        }

    def show(self, show_table: Table, say: Say) -> None:
        """Print it."""
        for line in self.course.left_out:
            say(f"left out: {line}")
        if self.course.ended:
            say(f"ended early: {self.course.ended}")
        count = len(self.course.rounds)
        how = "side by side, in turns" if self.side_by_side else "once in each"
        say(f"{count} round{'' if count == 1 else 's'}, every variant {how}; "
            f"medians, and ratios to `{OFF}` (95 % interval)")  # fmt: skip
        if not count:
            return
        print()
        show_table(("", *self.variants), list(self._rows()))
        print()
        for name in self.variants[1:]:
            say(f"{name}: {self.verdict(name)}")
        print()
        for note in self.notes:
            say(note)
        say(machine.judge(self.probe))
        if self.counters:
            say(self.counters)

    def _rows(self) -> list[list[str]]:
        rows = []
        for metric in METRICS:
            medians = [self.values(name, metric.name) for name in self.variants]
            if not any(medians):
                continue
            rows.append([metric.title.format(unit=self.unit),
                         *(format(statistics.median(values), metric.form) if values else ""
                           for values in medians)])  # fmt: skip
            ratios = [self.ratio(name, metric.name) for name in self.variants[1:]]
            if metric.compared and any(ratios):
                rows.append(["  ratio", "", *map(_written, ratios)])
        for key, title in (
            ("code_huge", "code on huge pages"),
            ("heap_huge", "heap on huge pages"),
        ):
            if self.obtained:
                rows.append([title, *(self._share(name, key) for name in self.variants)])
        if self.obtained:
            rows.append(["locked MiB", *(self._mib(name, "locked_mib") for name in self.variants)])
        return rows

    def _share(self, variant: str, key: str) -> str:
        found = self.obtained.get(variant, {}).get(key)
        return "" if found is None else f"{100 * found:.0f} %"

    def _mib(self, variant: str, key: str) -> str:
        found = self.obtained.get(variant, {}).get(key)
        return "" if found is None else f"{found:.1f}"


def _written(found: Ratio | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.middle:.3f}"
    return f"{found.middle:.3f} ({found.low:.3f}-{found.high:.3f})"
