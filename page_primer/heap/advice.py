"""What the doctor says of the heap."""

from __future__ import annotations

from page_primer._lean import replace
from page_primer.heap import arenas, malloc
from page_primer.heap.refusal import defrag, refusal
from page_primer.kernel import memory
from page_primer.options import Options

LEFT_ALONE = "left alone"


def advice(options: Options, huge: int) -> tuple[str, str, str | None]:
    """What `heap` can do in a process such as this one: a status as the doctor has it ("ok", "info"
    or "warning"), what was found, and the line that mends it.

    Args:
        huge: the size of a huge page, bytes; 0 without THP.
    """
    asked = replace(options, heap=options.heap or "auto")
    refused = refusal(asked, huge, list(memory.bounds()))
    if refused is not None:
        return ("warning" if options.heap else "info", f"{LEFT_ALONE}: {refused}", None)
    parts = [arenas.unavailable(huge) or "pymalloc's arenas can be on huge pages"]
    other = malloc.other_allocator()
    if other is not None:
        parts.append(f"malloc is {other}, left alone")
    elif malloc.tunable_in_force():
        parts.append("glibc advises malloc's memory itself")
    else:
        parts.append("malloc's heap, too")
    parts.append(f"defrag={defrag() or 'unknown'}")
    text = "; ".join(parts)
    if options.heap:
        return "ok", f"{options.heap}: {text}", None
    return "info", f"off; {text}", "PAGE_PRIMER_HEAP=auto (see docs/heap.md)"
