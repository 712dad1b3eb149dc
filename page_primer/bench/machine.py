"""The machine that a result is of, and whether huge pages are huge to its processor."""

from __future__ import annotations

import os
import platform
import re
from typing import TYPE_CHECKING, Any

from page_primer.kernel.thp import chosen

if TYPE_CHECKING:
    from collections.abc import Iterable

_PAGES = (2048, 8192, 32768)  # the last are 128 MiB
_ACCESSES = 200_000
# Of the pointer chase over most pages. Where huge pages have entries of their own in the TLB it is
# 1.5 to 4; where a hypervisor backs them with small pages only the guest's own walk is shorter.
_HUGE_PAYS = 1.3


def describe() -> dict[str, Any]:
    """The machine, as plain data."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "virtual": "hypervisor" in _cpuinfo("flags").split(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "transparent_hugepage": chosen("enabled"),
        "multi_gen_lru": _read("/sys/kernel/mm/lru_gen/enabled"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    }


def probe() -> list[dict[str, float]]:
    """A pointer chase over small and over huge pages; empty where the probe was not built."""
    try:
        from page_primer.bench._probe import pointer_chase  # where it was built
    except ImportError:
        return []
    found = []
    for pages in _PAGES:
        small, huge = (
            min(pointer_chase(pages, advised, _ACCESSES) for _ in range(2))
            for advised in (False, True)
        )
        found.append({"pages": pages, "small_ns": small, "huge_ns": huge, "ratio": small / huge})
    return found


def judge(probed: Iterable[dict[str, float]]) -> str:
    """What the probe says, in a sentence."""
    last = max(probed, key=lambda row: row["pages"], default=None)
    if last is None:
        return "pointer chase: not built here"
    text = (
        f"pointer chase over {last['pages'] * 4 / 1024:.0f} MiB: {last['small_ns']:.1f} ns an "
        f"access on 4 KiB pages, {last['huge_ns']:.1f} on huge ones, ratio {last['ratio']:.2f}"
    )
    if last["ratio"] < _HUGE_PAYS:
        return (
            f"{text}: huge pages are not huge to this processor (a hypervisor that backs this "
            "machine with small pages?), so a gain cannot show here"
        )
    return text


def _processor() -> str:
    name = _cpuinfo("model name") or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{name} (family {family}, model {model})" if family else name


def _cpuinfo(name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
