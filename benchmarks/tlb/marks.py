"""How a workload runs: warm, and then so often between marks, which are calls of
time.process_time()."""

import json
import sys
import time
from collections.abc import Callable


def measure(visit: Callable[[int], None], warm: int) -> None:
    """Run `visit` with numbers from 0: `warm` times, and as sys.argv says, LOOPS times between each
    of so many pairs of MARKS.

    Under `page-primer run` the process is primed when it has loaded everything, as integrations
    prime a server's worker.
    """
    loops, marks = map(int, sys.argv[1:3])
    if "page_primer" in sys.modules:
        sys.modules["page_primer"].prime()
    for number in range(warm):
        visit(number)
    taken = []
    for _ in range(marks):
        began = time.process_time()
        for number in range(loops):
            visit(number)
        taken.append(time.process_time() - began)
    print(json.dumps(taken))
