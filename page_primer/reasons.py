"""Every reason that a report gives for what was not done, for programs to key on.

docs/reasons.md tells of each what to do about it. What belongs to one case alone (an error of the
kernel's, a path, a number) is not part of a reason: it is the `detail` beside it, or in the notes.

Not enum.Enum, whose import takes longer than that of the whole package.
"""

from __future__ import annotations

from page_primer._lean import Record


class Reason(str):
    """One of the constants of this module; in JSON, a string."""

    __slots__ = ()


class Refusal(Record):
    """A reason, and what it was in this case."""

    reason: Reason
    detail: str | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Declined(Exception):
    """Nothing was done, for a `refusal`."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


# Nothing was done for the process.
SWITCHED_OFF = Reason("switched off")
INVALID_OPTION = Reason("invalid option")
NOT_SUPPORTED = Reason("not supported here")
NOT_AVAILABLE = Reason("not available here")
TOO_LITTLE_MEMORY = Reason("too little memory")
TOO_MANY_MAPPINGS = Reason("too many mappings")
IN_SIGNAL_HANDLER = Reason("called by a signal handler while it was under way")
ANOTHER_CALL = Reason("another call has not ended")
CUT_OFF = Reason("forked while another thread loaded page-primer")
UNEXPECTED = Reason("unexpected error")

# Nothing was done for the process's code, or for its heap.
NO_HUGE_PAGES = Reason("no huge pages on this kernel")
SIZE_UNKNOWN = Reason("the size of huge pages cannot be read")
THP_DISABLED = Reason("huge pages are disabled for this process (PR_SET_THP_DISABLE)")
THP_OFF = Reason("transparent huge pages are off")
SMALL_LIMIT = Reason("the memory limit is below PAGE_PRIMER_HEAP_MIN_MEMORY")

# The plan leaves bytes of an object where they are.
REMAP_OFF = Reason("remap is off")
EXCLUDED = Reason("excluded")
NO_CODE = Reason("no code")
NO_CHUNK = Reason("no whole huge page")
PROFILERS_HEAD = Reason("kept for profilers")
WRITABLE = Reason("writable")
NOT_CONGRUENT = Reason("address and file offset differ modulo a huge page")
OVER_LIMIT = Reason("over the limit")
OVER_PRIVATE_LIMIT = Reason("over the limit for private copies")
COLD = Reason("hardly touched")
OVER_MEMORY = Reason("short of memory")

# An object cannot be moved at all.
FILE_GONE = Reason("file deleted or replaced on disk")
FILE_UNREADABLE = Reason("its file cannot be looked at")
TEXT_RELOCATIONS = Reason("text relocations")
EXECUTE_ONLY = Reason("execute-only code")
SEALED = Reason("sealed")
REMAPPED = Reason("already remapped")
OUT_OF_PROPORTION = Reason("more addresses than its file has bytes")
MAPPED_OTHERWISE = Reason("not mapped as its program headers say")

# A move was tried; the object's notes have the attempts.
NO_BACKING = Reason("no backing gave huge pages")
MODIFIED = Reason("modified in memory")
SWAP_FAILED = Reason("swap failed")
SMALL_AFTER_SWAP = Reason("no huge pages after the swap")


def every() -> tuple[Reason, ...]:
    """All of them."""
    return tuple(value for value in globals().values() if isinstance(value, Reason))
