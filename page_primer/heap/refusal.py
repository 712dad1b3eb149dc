"""Why the heap is to be left alone here. Imports little: the launcher asks before all else."""

from __future__ import annotations

from page_primer import _core, reasons
from page_primer.kernel.thp import SETTINGS, chosen
from page_primer.reasons import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from page_primer.kernel.memory import Memory
    from page_primer.options import Options


def refusal(options: Options, huge: int, bounds: Sequence[Memory]) -> Refusal | None:
    """Why the heap is to be left alone here, or None."""
    if not huge:
        return Refusal(reasons.NO_HUGE_PAGES)
    if enabled(huge) == "never":
        return Refusal(reasons.THP_OFF, f"{SETTINGS}/enabled is never")
    if _core.thp_disabled():
        return Refusal(reasons.THP_DISABLED)
    for bound in bounds:
        if bound.limit < options.heap_min_memory:
            limit, least = bound.limit >> 20, options.heap_min_memory >> 20
            return Refusal(reasons.SMALL_LIMIT, f"{limit} MiB ({bound.where}) of {least} MiB")
        if bound.available * options.memory_share < 4 * huge:
            return Refusal(
                reasons.TOO_LITTLE_MEMORY,
                f"{bound.available >> 20} MiB available of {bound.limit >> 20} MiB ({bound.where})",
            )
    return None


def enabled(huge: int) -> str:
    """The setting that decides on anonymous huge pages: "always", "madvise" or "never"; empty where
    it cannot be read."""
    of_size = chosen(f"hugepages-{huge >> 10}kB/enabled")
    return chosen("enabled") if of_size in ("", "inherit") else of_size


def defrag() -> str:
    """How far the kernel goes at a page fault for a huge page."""
    return chosen("defrag")
