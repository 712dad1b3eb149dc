"""Mutate inputs of fuzz_targets.py and run targets on them: the loop that needs nothing but Python.

It is not guided by coverage: it changes sound inputs at random, headers and numbers first.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from harness.fuzz_targets import Target

_WORDS = [0, 1, 2, 3, 5, 7, 8, 0x10, 0x38, 0x40, 0x7F, 0xFF, 0x1000, 0x4000, 0xFFFF, 1 << 31,
          (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 0x1000,
          (1 << 64) - 1]  # fmt: skip
_TEXT = [b"\n", b" ", b":", b"-", b"/", b"..", b"\\040", b"\\999", b"\xff", "\u2028".encode(),
         b"\x0b", b"\x1c", b"0", b"99999999999999999999", b" (deleted)", b"\nSize:", b"=", b",",
         "\u00b2".encode(), b"\0", b"max", b"VmFlags:", b" kB"]  # fmt: skip


LONGEST = 30.0  # seconds of processor time that one input may take


@dataclass
class Finding:
    """An exception that a target does not expect."""

    data: bytes
    text: str


@dataclass
class Tally:
    """What came of a run."""

    executions: int = 0
    accepted: int = 0
    finds: dict[str, Finding] = field(default_factory=dict)  # by where they were raised

    def run(self, target: Target, data: bytes) -> None:
        """Run a target once; finds that are alike are kept once."""
        self.executions += 1
        try:
            with within(LONGEST):
                self.accepted += target.run(data)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = (
                f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
            )
            kept = self.finds.get(where)
            if kept is None or len(data) < len(kept.data):
                self.finds[where] = Finding(data, traceback.format_exc())


@contextlib.contextmanager
def within(seconds: float) -> Generator[None, None, None]:
    """An AssertionError where something takes more processor time, on whatever machine."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def mutated(data: bytes, rng: random.Random, largest: int) -> bytes:
    """One to six changes: numbers in headers, bits, text, pieces taken out, doubled or moved."""
    found = bytearray(data or b"\0")
    is_elf = data.startswith(b"\x7fELF")
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        kind = rng.random()
        at = _place(found, rng) if is_elf else rng.randrange(len(found))
        if kind < (0.7 if is_elf else 0.15):
            size = rng.choice((1, 2, 4, 8, 8))
            word = rng.choice(_WORDS) if rng.random() < 0.7 else rng.getrandbits(64)
            if rng.random() < 0.3:
                word += int.from_bytes(found[at : at + size], "little")
            found[at : at + size] = (word & (256**size - 1)).to_bytes(size, "little")
        elif kind < 0.8:
            if is_elf or rng.random() < 0.3:
                found[at] ^= 1 << rng.randrange(8)
            else:
                text = rng.choice(_TEXT)
                found[at : at + rng.choice((0, len(text)))] = text
        else:
            length = rng.choice((1, 8, 56, 64, 500))
            piece = found[at : at + length]
            to = rng.randrange(len(found) + 1)
            if kind < 0.87 and not is_elf:
                del found[at : at + length]
            elif kind < 0.95:
                found[to : to + length] = piece
            elif is_elf:
                del found[rng.randrange(64, len(found) + 64) :]
            else:
                found[to:to] = piece
        found = found[:largest] or bytearray(b"\0")
    return bytes(found)


def _place(data: bytearray, rng: random.Random) -> int:
    """An offset into an ELF file: mostly its headers, whose words begin at multiples of two."""
    kind = rng.random()
    sections = int.from_bytes(data[40:48], "little")
    low, high = 0, len(data)
    if kind < 0.25:
        low, high = 16, 64
    elif kind < 0.65:
        programs = int.from_bytes(data[56:58], "little")
        low, high = 64, 64 + 56 * min(max(programs, 1), 12)
    elif kind < 0.85 and 0 < sections < len(data):
        low = sections
    low, high = min(low, len(data) - 1), min(high, len(data))
    at = rng.randrange(low, max(high, low + 1))
    return at & -4 if rng.random() < 0.8 else at


def inputs(target: Target, seed: int) -> Generator[bytes, None, None]:
    """A target's corpus, then mutations of it without end, the same for a seed and a corpus."""
    corpus = target.corpus()
    yield from corpus
    rng = random.Random(f"{seed} {target.name}")
    while corpus:
        yield mutated(rng.choice(corpus), rng, target.largest)


def run(
    target: Target,
    seed: int,
    tally: Tally | None = None,
    *,
    seconds: float = 1e9,
    executions: int = 1 << 60,
) -> Tally:
    """Run a target for some processor time, or a number of times, whichever comes first."""
    tally, end = Tally() if tally is None else tally, time.process_time() + seconds
    with contextlib.closing(inputs(target, seed)) as endless:
        for data in endless:
            tally.run(target, data)
            if tally.executions >= executions or time.process_time() > end:
                break
    return tally
