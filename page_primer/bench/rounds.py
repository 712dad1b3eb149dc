"""Interleaved rounds: every variant in each, in random order, the server started anew."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from page_primer.bench.failures import CutShort, Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from page_primer.bench.variants import Variant

    Round = dict[str, dict[str, float]]
    Told = Callable[[Variant, int], None]
    Measure = Callable[[Sequence[Variant], Told], Round]

_MOST_LEFT_OUT = 3


@dataclass
class Course:
    """What came of the rounds so far: complete ones, lines about those that were left out, and why
    it is over, unless that is because all is done."""

    rounds: list[Round] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    ended: str | None = None
    interrupted: bool = False
    began: float = field(default_factory=time.time, compare=False)  # seconds since the epoch


@dataclass(frozen=True)
class Plan:
    """When it is enough: after so many rounds or, with `seconds`, when a further round would not
    end in time."""

    rounds: int
    seconds: float | None = None


def go(
    variants: Sequence[Variant],
    measure: Measure,
    plan: Plan,
    *,
    seed: int = 1,
    told: Callable[[Course, Variant, int], None] = lambda *_: None,
) -> Course:
    """Measure until the plan is fulfilled, a failure or Ctrl-C: what is known then is returned.

    A round that is cut short does not count; after three, it is over. The order within a round is
    random, which is what makes the two values of a pair exchangeable (see intervals.py), but the
    same for the same seed.

    Args:
        variants: of the command.
        measure: measures each once, in the order given, and calls what it is given, too, before
            each: the variant, and which of its round it is.
        plan: when it is enough.
        seed: of the order within rounds.
        told: called by it, with the course.
    """
    course, generator, began = Course(), random.Random(seed), time.monotonic()
    try:
        while len(course.rounds) < plan.rounds:
            took = (time.monotonic() - began) / max(1, len(course.rounds) + len(course.left_out))
            if plan.seconds is not None and (
                time.monotonic() - began + (took if course.rounds else 0) > plan.seconds
            ):
                break
            order = list(variants)
            generator.shuffle(order)
            number = len(course.rounds) + len(course.left_out) + 1
            try:
                course.rounds.append(measure(order, partial(told, course)))
            except (CutShort, Failure) as error:
                course.left_out.append(f"round {number}, {error}")
                if len(course.left_out) >= _MOST_LEFT_OUT:
                    course.ended = f"{len(course.left_out)} rounds were cut short"
                    break
    except KeyboardInterrupt:
        course.ended, course.interrupted = "interrupted", True
    return course
