"""What `page-primer run` costs a start, beside the start itself.

    python benchmarks/start_cost.py [PYTHON ...] [--rounds N] [--directory DIR] [--list FILE]
                                    [--json FILE]

Whole-process times, from fork to exit, of `PYTHON -c pass`: plain, under `page-primer run`, and as
a process under it starts another one (it inherits the environment, and is primed too). The image is
there; with --list, PYTHON is an aligned one of which nothing need be copied, and `page-primer run`
goes through page-primer-warm. Every round runs all of them in turns, so that what slows the machine
for a while slows all sides. Printed are medians over the rounds; differences and ratios are taken
within each round. On a machine that does other work, look at the processor time (user and system,
of the process and its children): it does not count the time for which a start waited for a
processor.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import kept

COMPARED = ("run", "child")  # with a plain start
TITLES = {
    "plain": "python -c pass",
    "run": "page-primer run -- python -c pass",
    "child": "python -c pass, by a process under it",
}
LAUNCHER = str(Path(sys.executable).with_name("page-primer"))
RUN = [LAUNCHER, "run", "--"]


def environment(work: str, aligned: str) -> dict[str, str]:
    """As an installation is run: bytecode is there after the first round, which is not counted."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PAGE_PRIMER")}
    plain.pop("PYTHONDONTWRITEBYTECODE", None)
    prefix = f"{work}/bytecode"
    return {
        **plain,
        "PYTHONPYCACHEPREFIX": prefix,
        "PAGE_PRIMER_IMAGE_DIR": f"{work}/store",
        "PAGE_PRIMER_ALIGNED": aligned,
    }


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Milliseconds from fork to exit, and of processor time."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=env, check=True)
    ended, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (ended - began) * 1000, used * 1000


def measure(
    python: str, rounds: int, work: str, aligned: str
) -> dict[str, list[tuple[float, float]]]:
    """The times of each way to start an interpreter, wall and processor, one a round."""
    env = environment(work, aligned)
    program = [python, "-c", "pass"]
    ask = "import json, os; print(json.dumps([dict(os.environ), open('/proc/self/maps').read()]))"
    shown = subprocess.run(
        [*RUN, python, "-c", ask], env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    inherited, maps = json.loads(shown)
    if f"{work}/store/" not in maps and aligned == os.devnull:
        sys.exit(f"start_cost: {python} has no image here: see `page-primer doctor`")
    ways = {
        "plain": (program, env),
        "run": ([*RUN, *program], env),
        "child": (program, inherited),
        "true": (["/bin/true"], env),
    }
    for command, its_own in ways.values():
        timed(command, its_own)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (command, its_own) in ways.items():
            found[name].append(timed(command, its_own))
    return found


def summarize(found: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians, and what each way costs above the plain start within the rounds."""
    summary: dict[str, Any] = {"rounds": len(found["plain"])}
    for name, times in found.items():
        for kind, values in zip(("", "cpu_"), zip(*times, strict=True), strict=True):
            summary[f"{name}_{kind}ms"] = median(values)
            summary[f"{name}_{kind}min_ms"] = min(values)
    for name in COMPARED:
        pairs = list(zip(found[name], found["plain"], strict=True))
        for what, values in (
            ("more_ms", [a[0] - b[0] for a, b in pairs]),
            ("cpu_more_ms", [a[1] - b[1] for a, b in pairs]),
            ("ratio", [a[0] / b[0] for a, b in pairs]),
        ):
            summary[f"{name}_{what}"] = {
                "median": median(values), "min": min(values), "max": max(values)
            }  # fmt: skip
    return summary


def table(python: str, s: dict[str, Any]) -> str:
    """The summary as text."""

    def span(values: dict[str, float], form: str) -> str:
        return "{} ({} to {})".format(*(format(values[k], form) for k in ("median", "min", "max")))

    def times(name: str) -> str:
        return "{:9.2f} {:9.2f} {:9.2f} {:9.2f}".format(
            *(s[f"{name}_{kind}ms"] for kind in ("", "min_", "cpu_", "cpu_min_"))
        )

    lines = [
        f"{python}; {s['rounds']} rounds",
        f"{'ms':42}{'median':>9} {'least':>9} {'cpu':>9} {'least':>9}",
        f"{TITLES['plain']:42}{times('plain')}",
    ]
    for name in COMPARED:
        lines.append(f"{TITLES[name]:42}{times(name)}")
        difference = span(s[f"{name}_more_ms"], ".1f")
        lines.append(f"  {'difference, ms':38}{difference:>26}")
        lines.append(f"  {'of processor time':38}{span(s[f'{name}_cpu_more_ms'], '.1f'):>26}")
        lines.append(f"  {'ratio':38}{span(s[f'{name}_ratio'], '.2f'):>26}")
    lines.append(f"{'/bin/true, for comparison':42}{times('true')}")
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("python", nargs="*", default=[sys.executable], metavar="PYTHON",
                        help="the interpreters to measure (default: this one)")  # fmt: skip
    parser.add_argument("--rounds", default=40, type=int, help="default: %(default)s")
    parser.add_argument("--directory", default="/var/tmp", metavar="DIR",
                        help="where images go, in a temporary directory of its own: choose a "
                        "file system that has huge pages (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--list",
        default=os.devnull,
        metavar="FILE",
        help="aligned files, for PAGE_PRIMER_ALIGNED: absolute paths, one a line",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    measured = kept.commit()
    summaries = {}
    work = tempfile.mkdtemp(prefix="start-cost-", dir=options.directory)
    try:
        for python in options.python:
            summaries[python] = summarize(measure(python, options.rounds, work, options.list))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"start_cost: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n\n".join(table(python, s) for python, s in summaries.items()))
    if options.json:
        kept.write(options.json, measured, summaries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
