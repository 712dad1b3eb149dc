"""Whether `page-primer bench` tells a slower server from one that is not.

    python benchmarks/verdicts.py [--rounds N] [--slow PERCENT ...] [--json FILE]

One run of `page-primer bench` compares a gunicorn with itself (`off-again`) and with itself slowed
on purpose by 1 % and by 3 % of its application's work (`slow-1`, `slow-3`: these load page-primer,
told to do nothing), or by what --slow says. Its rounds are then judged as if they were many runs,
of 12 rounds each, and all together. Exit status 1 if all together have a wrong verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import kept

from page_primer.bench import intervals

# A request is some milliseconds of this loop, beside which gunicorn's own work is a few per cent.
# The limit says which variant it is; where nothing is moved it says nothing else.
APP = """
import os
TURNS = 2000 + int(os.environ.get("PAGE_PRIMER_LIMIT", "0M")[:-1]) * 20

def app(environ, start_response):
    words = []
    for turn in range(TURNS):
        words.append(str(turn * turn).split("1"))
    body = str(sum(map(len, words))).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
ROUNDS_OF_A_RUN = 12


def judged(rounds: list[dict[str, Any]], variant: str) -> intervals.Ratio | None:
    """Of some rounds, a variant's processor time a request as a ratio to `off`."""
    both = [one for one in rounds if variant in one and "off" in one]
    return intervals.ratio(
        [one[variant]["cpu_ms"] for one in both], [one["off"]["cpu_ms"] for one in both]
    )


def called(rounds: list[dict[str, Any]], variant: str) -> dict[str, int]:
    """How many runs of ROUNDS_OF_A_RUN have which verdict."""
    counts = {"no measurable difference": 0, "slower": 0, "faster": 0}
    for first in range(0, len(rounds) - ROUNDS_OF_A_RUN + 1, ROUNDS_OF_A_RUN):
        found = judged(rounds[first : first + ROUNDS_OF_A_RUN], variant)
        if found is not None:
            word = "slower" if found.middle > 1 else "faster"
            counts[word if found.differs else "no measurable difference"] += 1
    return counts


def measure(rounds: int, slow: list[int]) -> dict[str, Any]:
    """What `page-primer bench` finds."""
    slowed = [f"slow-{percent}:remap=0:mlock=0:limit={percent}M" for percent in slow]
    with tempfile.TemporaryDirectory(prefix="verdicts-", dir="/var/tmp") as name:
        directory = Path(name)
        (directory / "app.py").write_text(APP)
        found = directory / "found.json"
        subprocess.run(
            [sys.executable, "-m", "page_primer", "bench", "--url", "http://127.0.0.1:{port}/",
             "--requests", "1000", "--connections", "4", "--rounds", str(rounds),
             "--variants", ",".join(["off", "off-again", *slowed]), "--json", str(found), "--",
             sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:{port}", "app:app"],
            cwd=directory, check=False,
            env={key: value for key, value in os.environ.items() if "PAGE_PRIMER" not in key},
        )  # fmt: skip
        if not found.exists():
            sys.exit(1)  # it has said why
        return dict(json.loads(found.read_text()))  # of fewer rounds, after Ctrl-C


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20 * ROUNDS_OF_A_RUN)
    parser.add_argument("--slow", type=int, nargs="+", default=[1, 3], metavar="PERCENT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    measured = kept.commit()
    result = measure(given.rounds, given.slow)
    rounds = result["rounds"]
    result["runs_of_12"] = {
        name: called(rounds, name)
        for name in ("off-again", *(f"slow-{percent}" for percent in given.slow))
    }
    right = True
    for name, counts in result["runs_of_12"].items():
        found = judged(rounds, name)
        print(f"{name}, all {len(rounds)} rounds: {intervals.verdict(found)}")
        print(f"{name}, runs of {ROUNDS_OF_A_RUN} rounds: {counts}")
        differs = found is not None and found.differs and found.middle > 1
        right &= differs == (name != "off-again")
    if given.json:
        kept.write(given.json, measured, result)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
