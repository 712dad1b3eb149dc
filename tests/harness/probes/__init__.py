"""What profilers, debuggers and the like see of a gunicorn worker: real tools, run from outside.

A *shape* is an interpreter, a *way* how its server is primed, if it is. A *probe* runs one tool on
a target and returns what the tool saw, in a form that has no addresses in it; the same probe of an
unprimed target of the same shape says what was to be seen. tests/test_tools.py asserts on that,
tools/matrix.py makes a table of it.

A module holds one tool's probes.
"""

from harness.probes import (
    austin,
    build_ids,
    cores,
    gdb,
    kernels_cores,
    memray,
    perf,
    py_spy,
    pystack,
    remote,
    services,
    uprobes,
    valgrind,
    within,
)
from harness.probes.registry import REGISTERED, Probe
from harness.probes.target import (
    UNPRIMED,
    Failed,
    NotHere,
    Shape,
    Target,
    Way,
    build_module,
    ways,
)
from harness.probes.verdicts import ABSENT, CANNOT, NOTE, WORKS, Verdict

__all__ = [
    "ABSENT",
    "CANNOT",
    "NOTE",
    "PROBES",
    "UNPRIMED",
    "WORKS",
    "Failed",
    "NotHere",
    "Probe",
    "Shape",
    "Target",
    "Verdict",
    "Way",
    "build_module",
    "ways",
]

# By name, in the order of the matrix.
PROBES: dict[str, Probe] = {
    probe.name: probe
    for module in (
        py_spy, pystack, austin, gdb, cores, perf, within, build_ids, memray, remote,
        uprobes, services, valgrind, kernels_cores,
    )
    for probe in REGISTERED
    if probe.look.__module__ == module.__name__
}  # fmt: skip
