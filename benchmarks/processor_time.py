"""Processor time of a web application's work with code and heap on small and on huge pages.

    python benchmarks/processor_time.py [--processes N] [--loops N] [options of page-primer bench]

`page-primer bench --command --side-by-side` on request_work.py: several processes that take turns
on one core, their start included. `off-again` is `off` once more: that ratio shows the noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from page_primer.cli.main import main

VARIANTS = (
    "off,off-again,code:mlock=off,aligned,heap:remap=0:mlock=off:heap=all,code+heap:mlock=off"
)
WORK = Path(__file__).resolve().parent / "request_work.py"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--processes", type=int, default=4, help="on one core, taking turns")
    parser.add_argument("--loops", type=int, default=400, help="requests of each process")
    given, others = parser.parse_known_args()
    if not any(word.startswith("--variants") for word in others):
        others += ["--variants", VARIANTS]
    work = [given.python, str(WORK), str(given.loops), str(given.processes)]
    sys.exit(main(["bench", "--command", "--side-by-side", *others, "--", *work]))
