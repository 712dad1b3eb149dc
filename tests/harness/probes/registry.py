"""What a probe is, and the ones that the modules beside this one define."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.probes.target import Target
from harness.probes.verdicts import Verdict, same

__all__ = ["REGISTERED", "Probe", "probe"]


@dataclass(frozen=True)
class Probe:
    """A tool at work on a target.

    `look` returns what it saw, or raises NotHere or Failed; `judge` compares that with what it saw
    unprimed. With `late`, the target is one that primes at a request; with `last`, the target is
    of no use to others afterwards.
    """

    name: str
    look: Callable[[Target], Any]
    judge: Callable[[Any, Any], Verdict] = same
    late: bool = False
    last: bool = False


REGISTERED: list[Probe] = []


def probe(
    name: str, judge: Callable[[Any, Any], Verdict] = same, **options: bool
) -> Callable[..., Any]:
    def enter(look: Callable[[Target], Any]) -> Callable[[Target], Any]:
        REGISTERED.append(Probe(name, look, judge, **options))
        return look

    return enter
