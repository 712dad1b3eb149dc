"""What benchmarks/pressure.py found, as tables and as a picture."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Found", "plot", "summarise"]


@dataclass
class Found:
    """Of a variant: what was measured."""

    name: str
    samples: list[dict[str, float]] = field(default_factory=list)
    quiet: list[tuple[float, float]] = field(default_factory=list)  # ms by the clock, and of work
    elf: tuple[int, int] | None = None


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and between which two of the values that of all such values lies, with a
    probability of 95 %: how many fall below it is a matter of tossing coins."""
    ordered = sorted(values)
    count = len(ordered)
    below, chance = 0, 0.5**count
    while below < count // 2 and chance <= 0.025:
        below += 1
        chance += math.comb(count, below) * 0.5**count
    low = max(0, below - 1)
    return statistics.median(ordered), ordered[low], ordered[count - 1 - low]


def summarise(variants: Sequence[Found], what: str, timed: bool) -> dict[str, Any]:
    """Print a table, and return what is kept; ratios are to the first variant."""
    base = variants[0]
    print(f"\nthe first {what} after a quiet spell, {len(base.samples)} rounds"
          + (", milliseconds" if timed else ""))  # fmt: skip
    times = f" {'p50':>7} {'p99':>7} {'max':>7}  ratio" if timed else ""
    print(f"{'':12}{times}  faults  (least to most)  outside   in ELF   code resident, KiB"
          + ("   without pressure: p50, ratio, ratio of work" if timed else ""))  # fmt: skip
    result = {}
    for one in variants:
        kept, before, after = timings(one, base) if timed else ({}, "", "")
        major, outside, resident, size = (
            [sample[name] for sample in one.samples]
            for name in ("major", "outside", "resident", "code")
        )
        spread = f"({min(major):g} to {max(major):g})"
        elf = "-" if one.elf is None else "{1} of {0}".format(*one.elf)
        share = f"{statistics.median(resident) / 1024:.0f} of {statistics.median(size) / 1024:.0f}"
        print(f"{one.name:12}{before} {statistics.median(major):7g} {spread:>16}"
              f" {statistics.median(outside):8g} {elf:>8} {share:>20}{after}")  # fmt: skip
        result[one.name] = {
            **kept, "major": major, "elf": one.elf, "outside": outside, "code_resident": resident,
            "code": size,
        }  # fmt: skip
    return result


def timings(one: Found, base: Found) -> tuple[dict[str, Any], str, str]:
    """Of a variant: what is kept of its times, and the columns before and behind the faults."""
    ms = [sample["ms"] for sample in one.samples]
    pairs = zip(one.samples, base.samples, strict=True)
    ratio = statistics.median(mine["ms"] / theirs["ms"] for mine, theirs in pairs)
    both = list(zip(one.quiet, base.quiet, strict=True))
    quiet, work = (interval([mine[i] / theirs[i] for mine, theirs in both]) for i in (0, 1))
    kept = {
        "ms": ms, "quiet_ms": one.quiet, "ratio": ratio, "quiet_ratio": quiet,
        "quiet_work_ratio": work,
    }  # fmt: skip
    before = f" {statistics.median(ms):7.2f} {quantile(ms, 0.99):7.2f} {max(ms):7.2f}  {ratio:5.2f}"
    after = f"   {statistics.median(ms for ms, _ in one.quiet):5.2f}  " + "  ".join(
        "{:.3f} ({:.3f} to {:.3f})".format(*of) for of in (quiet, work)
    )
    return kept, before, after


def plot(results: dict[str, Any], prefix: str) -> None:
    """Every round a dot, the median a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 3.4), squeeze=False)
    for pane, (what, variants) in zip(panes[0], results.items(), strict=True):
        for at, (_name, found) in enumerate(variants.items()):
            spread = random.Random(1)
            x = [at + spread.uniform(-0.18, 0.18) for _ in found["ms"]]
            pane.plot(x, found["ms"], ".", alpha=0.35, markersize=4, color="#3572A5")
            middle = statistics.median(found["ms"])
            pane.hlines(middle, at - 0.32, at + 0.32, color="#222222")
            pane.text(at + 0.36, middle, f"{middle:.1f}", ha="left", va="center", fontsize=9)
        pane.set_xticks(range(len(variants)), variants.keys(), fontsize=8)
        pane.set_xlim(-0.5, len(variants) - 0.2)
        pane.set_yscale("log")
        pane.set_ylim(bottom=1)
        pane.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        pane.yaxis.set_major_formatter("{x:g}")
        pane.yaxis.set_minor_locator(ticker.NullLocator())
        pane.set_ylabel("milliseconds")
        pane.set_title(f"first {what} after a quiet spell", fontsize=10)
        pane.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(
            f"{prefix}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else {}
        )
