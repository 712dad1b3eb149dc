"""The TLBs of some cores, with the sources, and the simulator's interface."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Core:
    """Entries as (sets, ways); `l1_2m` counts entries for 2 MiB alone, 0 where there are none."""

    name: str
    title: str
    l1: tuple[int, int]
    l1_2m: int
    l2: tuple[int, int]
    l1d: int
    l2d: tuple[int, int] = (0, 0)  # a second level for data of its own; else it is shared


CORES = (
    # AMD Zen 4, Software Optimization Guide 57647, "Translation lookaside buffers": L1 ITLB 64
    # entries fully associative, all sizes; L2 ITLB 512 entries 8-way. L1 DTLB 72 entries, L2 DTLB
    # 3072 entries 24-way, its own. CPUID Fn8000_0005 and Fn8000_0006 of an EPYC confirm it.
    Core("zen4", "AMD Zen 4", (1, 64), 0, (64, 8), 72, (128, 24)),
    # Intel Skylake-SP, Optimization Reference Manual 248966, "TLB parameters of the Skylake client
    # microarchitecture" (the server core has the same): ITLB 128 x 4K 8-way, 8 x 2M per thread;
    # STLB 1536 12-way, 4K and 2M, shared with data.
    Core("skx", "Intel Skylake", (16, 8), 8, (128, 12), 64),
    # Intel Golden Cove, same manual: ITLB 256 x 4K 8-way, 32 x 2M (simulated fully associative);
    # STLB 2048 16-way, shared with data.
    Core("glc", "Intel Golden Cove", (32, 8), 32, (128, 16), 96),
    # Arm Neoverse N1 TRM 100616, "TLB organization": L1 I and L1 D 48 entries each, fully
    # associative, all sizes; L2 1280 entries 5-way, shared. (Code layout of x86-64 binaries.)
    Core("n1", "Arm Neoverse N1", (1, 48), 0, (256, 5), 48),
)


class Geometry(ctypes.Structure):
    """struct geometry of tlbsim.c."""

    _fields_ = [(name, ctypes.c_uint32) for name in
                ("l1_sets", "l1_ways", "l1_2m_ways", "l2_sets", "l2_ways", "l1d_ways", "l2d_sets",
                 "l2d_ways")]  # fmt: skip


class Result(ctypes.Structure):
    """struct result of tlbsim.c."""

    _fields_ = [(name, ctypes.c_uint64) for name in
                ("insns", "fetches", "l1_misses", "walks", "data_walks")]  # fmt: skip


def simulate(
    simulator, records, tags, core: Core, workers: int, quantum: int, by_page=None
) -> Result:
    """Replay a trace, code and data, for processes that take turns on a core; an array `by_page` of
    64-bit integers gets the walks of each page."""
    geometry = Geometry(*core.l1, core.l1_2m, *core.l2, core.l1d, *core.l2d)
    result = Result()
    simulator.simulate(
        records, ctypes.c_size_t(len(records)), tags, ctypes.byref(geometry), workers,
        ctypes.c_uint64(quantum), 0, ctypes.byref(result), by_page,
    )  # fmt: skip
    return result
