"""What paired rounds say of a ratio: an estimate, a 95 % interval, and a verdict in words.

Every round measures each variant once, in random order, beside the baseline. If a variant makes no
difference, swapping the two within a round changes nothing, so the logarithm of their ratio is
distributed symmetrically about zero, whatever the noise of the machine looks like. That is all
that Wilcoxon's signed-rank test assumes; the interval is the set of ratios that this test does not
reject, and the estimate is the median of all pairwise means (Hodges and Lehmann, "Estimates of
location based on rank tests", 1963; Hollander, Wolfe, Chicken, "Nonparametric statistical methods",
section 3.3). Neither has a normal distribution in it, and one disturbed round moves neither far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVEL = 0.95
FEWEST_ROUNDS = 6  # with 5, even five ratios on one side have a probability of 6 % by chance
SHOWN = 0.01  # the difference that the number of rounds still needed refers to
_QUANTILE = 1.959964  # of the normal distribution, 97.5 %
_POWER = 0.841621  # 80 %: the chance that a difference of SHOWN will be seen
_EXACT_UP_TO = 100  # rounds; above, the normal approximation is the same to a rank


@dataclass(frozen=True)
class Ratio:
    """A variant's value divided by the baseline's. `low` and `high` are None with too few
    rounds."""

    middle: float
    low: float | None
    high: float | None
    rounds: int

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    @property
    def more_rounds(self) -> int:
        """How many more rounds would show a difference of 1 % in four of five cases, judged by how
        wide the interval is now; 0 where these do."""
        if self.low is None or self.high is None or self.low <= 0:
            return 0
        half = math.log(self.high / self.low) / 2
        needed = half * (_QUANTILE + _POWER) / _QUANTILE / math.log(1 + SHOWN)
        return max(0, math.ceil(self.rounds * needed**2) - self.rounds)


def ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio | None:
    """Compare the values of paired rounds; None where there are none, or one is not positive.

    Raises:
        ValueError: the lengths differ.
    """
    pairs = list(zip(values, baseline, strict=True))
    if not pairs or any(value <= 0 or base <= 0 for value, base in pairs):
        return None
    logs = sorted(math.log(value / base) for value, base in pairs)
    count = len(logs)
    means = sorted((logs[i] + logs[j]) / 2 for i in range(count) for j in range(i, count))
    middle = (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2
    if count < FEWEST_ROUNDS:
        return Ratio(math.exp(middle), None, None, count)
    aside = _left_aside(count)
    return Ratio(math.exp(middle), math.exp(means[aside]), math.exp(means[-1 - aside]), count)


@lru_cache(maxsize=64)
def _left_aside(count: int) -> int:
    """How many of the sorted pairwise means lie outside of the interval at each end: the greatest
    number k for which the signed-rank statistic is below k + 1 with a probability of 2.5 % at
    most."""
    tail = (1 - LEVEL) / 2
    sums = count * (count + 1) // 2
    if count > _EXACT_UP_TO:
        spread = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
        return max(0, math.floor(sums / 2 - 0.5 - _QUANTILE * spread))
    ways = [1] + [0] * sums  # in how many of the 2^count patterns of signs the statistic is i
    for rank in range(1, count + 1):
        for total in range(sums, rank - 1, -1):
            ways[total] += ways[total - rank]
    allowed, seen = tail * 2**count, 0
    for statistic, number in enumerate(ways):
        seen += number
        if seen > allowed:
            return max(0, statistic - 1)
    raise AssertionError("the probabilities do not add up to 1")


def verdict(found: Ratio | None, of: str = "processor time a request") -> str:
    """A sentence of what a ratio says, less being better."""
    if found is None:
        return "no measurement"
    if found.low is None or found.high is None:
        return f"no verdict: {found.rounds} of the {FEWEST_ROUNDS} rounds that one needs"
    low, high = sorted((abs(1 - found.low), abs(1 - found.high)))
    size = f"{100 * abs(1 - found.middle):.1f} %"
    bounds = f"(95 %: {100 * low:.1f} to {100 * high:.1f})"
    if found.high < 1:
        return f"{size} less {of} {bounds}"
    if found.low > 1:
        return f"slower: {size} more {of} {bounds}"
    if more := found.more_rounds:
        rounds = "1 more round" if more == 1 else f"{more} more rounds"
        return f"no measurable difference; {rounds} would show {100 * SHOWN:.0f} %"
    return (
        f"no measurable difference (95 %: {100 * (1 - found.low):.1f} % less to "
        f"{100 * (found.high - 1):.1f} % more)"
    )
