"""The line that mends what a reason of a report stands for, where there is one; docs/reasons.md has
the same."""

from __future__ import annotations

from page_primer import reasons

# Those that are no line to apply.
REMEDY_LINES = {reasons.FILE_GONE: ("# restart this process",)}
REMEDIES = {
    reasons.FILE_GONE: "restart this process",
    reasons.NOT_CONGRUENT: "page-primer align",
    reasons.PROFILERS_HEAD: "PAGE_PRIMER_KEEP_PROFILERS=0",
}
