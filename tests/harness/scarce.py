"""Call the core's functions with every allocation failing in its turn.

    LD_PRELOAD=fault.so python -m harness.scarce

One JSON object comes out. Of each function: how many of the interpreter's allocations and of the
core's own failed in one round, and of three rounds the least number of blocks that stayed.
Nothing but a MemoryError may come of it: anything else ends this process.
"""

import ctypes
import gc
import importlib.util
import json
import sys
from collections.abc import Callable

from harness import leaks
from page_primer import _core

_fault = ctypes.PyDLL(None)
_blocks: list[bytes] = []


def load_core() -> None:
    """The module itself, made anew."""
    spec = _core.__spec__
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def failures(function: Callable[[], object], kind: bytes) -> int:
    """Call it until no allocation of this kind is left to fail; how often one did."""
    for nth in range(1, 10_000):
        try:
            _fault.fault_arm(kind, nth, 12)
            function()
        except MemoryError:
            pass
        try:
            fired = _fault.fault_fired()
        except MemoryError:  # was not due until now
            fired = False
        if not fired:
            return nth - 1
    raise AssertionError(f"{function.__name__} takes memory without end")


def more_blocks(function: Callable[[], object]) -> int:
    gc.collect()
    before = sys.getallocatedblocks()
    failures(function, b"memory")
    gc.collect()
    return sys.getallocatedblocks() - before - 1  # which is that number itself


def main() -> None:
    _fault.fault_memory()
    _core.arenas_install(1 << 21)
    _blocks.extend(b"%400d" % number for number in range(20_000))  # in some regions
    cases = {name: call for name, call in leaks.CASES.items() if hasattr(_core, name)}
    # It calls Python, and CPython itself may crash where it has no memory for a frame.
    del cases["alone"]
    cases["load_core"] = load_core
    found = {}
    gc.disable()  # for what it calls
    for name, call in cases.items():
        found[name] = {
            kind: failures(call, kind.encode()) for kind in ("memory", "malloc", "calloc")
        }
        found[name]["blocks"] = min(more_blocks(call) for _ in range(3))
        call()  # and it works when nothing fails
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    with leaks.prepared():
        main()
