"""The report of a call of prime(): data first, then the lines for people, in a server's log."""

from __future__ import annotations

from page_primer._lean import Record, asdict
from page_primer.options import nearest_variable
from page_primer.reasons import OVER_LIMIT, OVER_MEMORY, Reason, Refusal
from page_primer.words import counted, image_place, memlock_remedy, mib, percent, shortage

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from typing import Any, Protocol

    from page_primer.kernel.memory import Memory
    from page_primer.outcome import HeapReport, SegmentReport

    class Logger(Protocol):
        """What `Report.log()` needs: logging.Logger has it, and so has gunicorn's logger."""

        def debug(self, msg: str, *args: Any) -> Any: ...
        def info(self, msg: str, *args: Any) -> Any: ...
        def warning(self, msg: str, *args: Any) -> Any: ...


TOTALS = (  # of all objects
    "code_bytes", "code_huge_bytes", "locked_bytes", "copied_bytes", "shared_bytes",
    "private_bytes",
)  # fmt: skip


class ObjectReport(Record):
    """One ELF object. Byte counts are measured in smaps, not what was asked for."""

    path: str
    interpreter: bool
    # Where its code lies now: "already" and "in_place" are huge pages of its own file, None is its
    # own file without them.
    backing: str | None
    where: str | None  # the image's path, for one
    code_bytes: int
    code_huge_bytes: int
    huge_bytes: int
    locked_bytes: int
    copied_bytes: int  # on another backing than its own file
    written_bytes: int  # what this process wrote for that; 0 where an image was there
    segments: tuple[SegmentReport, ...]
    notes: tuple[str, ...]  # attempts that failed, in order
    # Whether other processes map the same pages of a copy: "shared" where a fork inherited it or an
    # image is at a load address that recurs, else "private"; None where there is no copy.
    sharing: str | None = None
    attainable_bytes: int = 0  # of the interpreter's code, what its layout lets be huge
    aligned: bool = False  # its own mappings can have huge pages, without a copy
    no_longer_aligned: bool = False  # recorded as aligned, but another file has taken its place

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def place(self) -> str:
        """The backing, for people: an image's store rather than its long path."""
        if self.backing == "image" and self.where:
            return image_place(self.where)
        return {"already": "huge already", "in_place": "in place"}.get(
            self.backing or "", self.backing or "its own file"
        )

    @property
    def remedy(self) -> str:
        """What spares a copy, where there is one."""
        if self.backing in (None, "already", "in_place"):
            return ""
        if self.aligned:
            return ", aligned but in memory on small pages: `page-primer warm` before it starts"
        return ", no copy with `page-primer align`"


class Report(Record):
    """The primed state of a process, and what one call of `prime()` did for it.

    Sizes are in bytes. `as_dict()` is what a program should read, `str()` and `log()` are for
    people.
    """

    pid: int
    reason: Reason | None  # why nothing was done, where nothing was
    objects: tuple[ObjectReport, ...] = ()
    moved: tuple[str, ...] = ()  # paths of the objects that this call moved
    lock_wanted_bytes: int = 0
    lock_refused_bytes: int = 0
    lock_refusal: str | None = None  # in the kernel's words
    lock_limit: int | None = None  # RLIMIT_MEMLOCK; None: no limit
    perf_map: str | None = None  # the perf map's path, or why it was not written
    lock_withheld_bytes: int = 0  # not tried, to leave memory to others
    memory: Memory | None = None  # what was available then
    memory_share: float | None = None  # of it, what copies and locks may take
    resident_bytes: int = 0  # by which priming this process has made it grow, all calls together
    warn: tuple[str, ...] = ()  # what was asked for by name: "remap", "mlock"
    backing: str = "auto"  # what was asked for
    image_dir: str | None = None
    milliseconds: float = 0.0
    threads: int = 0
    unknown_variables: tuple[str, ...] = ()  # named PAGE_PRIMER_*, and nothing reads them
    heap: HeapReport | None = None  # None: the heap was not to be touched
    frozen: int | None = None  # objects that the collector does not look at, if asked for
    detail: str | None = None  # what the reason was in this case

    @property
    def code_bytes(self) -> int:
        """Machine code of all objects."""
        return sum(obj.code_bytes for obj in self.objects)

    @property
    def code_huge_bytes(self) -> int:
        """Machine code that lies on huge pages."""
        return sum(obj.code_huge_bytes for obj in self.objects)

    @property
    def locked_bytes(self) -> int:
        return sum(obj.locked_bytes for obj in self.objects)

    @property
    def copied_bytes(self) -> int:
        return sum(obj.copied_bytes for obj in self.objects)

    @property
    def shared_bytes(self) -> int:
        """What is copied, and mapped by other processes as well."""
        return sum(obj.copied_bytes for obj in self.objects if obj.sharing == "shared")

    @property
    def private_bytes(self) -> int:
        """What is copied for this process."""
        return sum(obj.copied_bytes for obj in self.objects if obj.sharing == "private")

    @property
    def interpreter(self) -> ObjectReport | None:
        """The interpreter's own object: the main program, or libpython."""
        return next((obj for obj in self.objects if obj.interpreter), None)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for json.dumps(); schema.py has its JSON schema."""
        data: dict[str, Any] = asdict(self)
        for name in TOTALS:
            data[name] = getattr(self, name)
        return data

    def __str__(self) -> str:
        shortfalls = self._lock_shortfall(), self._memory_shortfall(), self._replaced()
        heap = str(self.heap or "")
        lines = filter(None, (self.summary(), *shortfalls, self._misspelt(), heap))
        return "\n".join([*lines, *(f"  {line}" for line in self._details())])

    def log(self, logger: Logger | logging.Logger, *, since: Report | None = None) -> None:
        """Write one INFO line, DEBUG lines with the detail, and a WARNING for each thing that was
        asked for and not got.

        Args:
            logger: a logging.Logger, or a framework's own with the same methods.
            since: an earlier report, of this process or of the one it was forked from. Then only
                what differs is worth a line above DEBUG.
        """
        left_out = self._left_out(OVER_LIMIT)
        if (
            since is None
            or self.moved
            or self.reason != since.reason
            or left_out != since._left_out(OVER_LIMIT)
        ):
            logger.info("page-primer: %s", self.summary())
            for line in self._details():
                logger.debug("page-primer: %s", line)
        elif self.pid != since.pid:
            logger.debug("page-primer: as before, %.1f ms", self.milliseconds)
        if self.heap is not None:
            self.heap.log(logger, since.heap if since else None, named="heap" in self.warn)
        core = self.interpreter
        needed = "mlock" in self.warn or (core is not None and not core.locked_bytes)
        for part in (Report._lock_shortfall, Report._memory_shortfall):
            shortfall = part(self)
            if shortfall and (since is None or shortfall != part(since)):
                (logger.warning if needed else logger.info)("page-primer: %s", shortfall)
        for part in (Report._remap_shortfall, Report._replaced, Report._misspelt):
            shortfall = part(self)
            if shortfall and (since is None or shortfall != part(since)):
                logger.warning("page-primer: %s", shortfall)

    def summary(self) -> str:
        """The one line that log() writes at INFO."""
        if self.reason is not None:
            return f"nothing done: {Refusal(self.reason, self.detail)}"
        parts = []
        core = self.interpreter
        if core is not None:
            parts.append(
                f"{percent(core.code_huge_bytes, core.code_bytes)} of {core.name}'s "
                f"{mib(core.code_bytes)} of code on huge pages"
                + (f" ({core.place}{core.remedy})" if core.backing else "")
            )
        parts.append(
            f"{mib(self.code_huge_bytes)} of {mib(self.code_bytes)} in "
            f"{counted(len(self.objects), 'object')}"
        )
        left_out = self._left_out(OVER_LIMIT)
        if left_out:
            parts.append(f"over the limit: {', '.join(left_out)}")
        parts.append(f"{mib(self.locked_bytes)} locked")
        if self.copied_bytes:
            kinds = (("shared", self.shared_bytes), ("private", self.private_bytes))
            parts.append(f"copied: {', '.join(f'{mib(n)} {kind}' for kind, n in kinds if n)}")
        written = sum(obj.written_bytes for obj in self.objects if obj.path in self.moved)
        if self.frozen is not None:
            parts.append(f"{self.frozen} objects frozen")
        done = f"{self.milliseconds:.1f} ms"
        if written:
            done += f", {mib(written)} written"
        if self.threads > 1:
            done += f", {self.threads} threads"
        return f"{'; '.join(parts)}; {done}"

    def _left_out(self, reason: Reason) -> list[str]:
        """The objects that were left out for a reason, with the size of their code."""
        return [
            f"{obj.name} ({mib(obj.code_bytes)})"
            for obj in self.objects
            if obj.backing is None and reason in _reasons(obj)
        ]

    def _lock_shortfall(self) -> str | None:
        if not self.lock_refused_bytes:
            return None
        text = (
            f"{mib(self.lock_refused_bytes)} of {mib(self.lock_wanted_bytes)} not locked "
            f"({self.lock_refusal})"
        )
        if self.lock_limit is None:
            return text
        return (
            f"{text}: RLIMIT_MEMLOCK is {mib(self.lock_limit)}; "
            f"allow it with {memlock_remedy(self.lock_wanted_bytes)}"
        )

    def _memory_shortfall(self) -> str | None:
        """What was not done, to leave memory to others."""
        unmoved = self._left_out(OVER_MEMORY)
        if self.memory is None or not (unmoved or self.lock_withheld_bytes):
            return None
        parts = [f"not moved: {', '.join(unmoved)}"] if unmoved else []
        if self.lock_withheld_bytes:
            parts.append(
                f"{mib(self.lock_withheld_bytes)} of {mib(self.lock_wanted_bytes)} not locked"
            )
        return (
            f"to leave memory to others, {' and '.join(parts)}: {shortage(self.memory)}, of which "
            f"page-primer takes {100 * (self.memory_share or 0):g} % at most; "
            "raise that limit, or PAGE_PRIMER_MEMORY_SHARE"
        )

    def _remap_shortfall(self) -> str | None:
        """What was asked for by name and not used, or the interpreter's layout would allow."""
        core = self.interpreter
        if self.reason or core is None or OVER_MEMORY in _reasons(core):
            return None
        best = max(core.attainable_bytes, 1 if "remap" in self.warn else 0)
        problem = self._unused(core)
        if problem is None and core.code_huge_bytes < best:
            share = percent(core.code_huge_bytes, core.code_bytes)
            problem = f"{share} of {core.name}'s code on huge pages"
            if core.attainable_bytes:
                problem += f", {percent(core.attainable_bytes, core.code_bytes)} are possible"
        if problem is None:
            return None
        why = "; ".join((*core.notes, *_reasons(core))) or "no reason known"
        remedy = "run `page-primer align` once"
        if core.attainable_bytes:
            remedy += (
                ", or name a directory of this user on ext4 (Linux 6.16) or xfs with "
                "PAGE_PRIMER_IMAGE_DIR"
            )
        return f"{problem} ({why}): {remedy}; `page-primer doctor` explains"

    def _unused(self, core: ObjectReport) -> str | None:
        """The backing or the directory that was named, if the interpreter is not on it."""
        if core.backing in ("already", "in_place"):  # nothing had to be copied
            return None
        if "backing" in self.warn and self.backing not in ("auto", core.backing):
            return f"backing {self.backing} not used"
        directory = f"{(self.image_dir or '').rstrip('/')}/"
        if "image_dir" in self.warn and not (core.where or "").startswith(directory):
            return f"image directory {self.image_dir} not used"
        return None

    def _replaced(self) -> str | None:
        """The files that were aligned once."""
        names = [obj.name for obj in self.objects if obj.no_longer_aligned]
        if not names:
            return None
        return (
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} no longer aligned (replaced "
            "by an upgrade?); run `page-primer align --again`"
        )

    def _misspelt(self) -> str | None:
        """The variables that nothing reads, with those that may have been meant."""
        if not self.unknown_variables:
            return None
        nearest = [(name, nearest_variable(name)) for name in self.unknown_variables]
        words = [f"{name} (did you mean {near}?)" if near else name for name, near in nearest]
        return f"unknown environment variable{'s' * (len(words) > 1)} {', '.join(words)}"

    def _details(self) -> list[str]:
        lines = []
        for obj in self.objects:
            if obj.backing is None and not obj.notes and not obj.code_huge_bytes:
                continue
            lines.append(
                f"{obj.path}: {percent(obj.code_huge_bytes, obj.code_bytes)} of "
                f"{mib(obj.code_bytes)} of code on huge pages, {mib(obj.locked_bytes)} locked"
                + (f", {obj.backing} {obj.where}" if obj.backing else "")
            )
            for segment in obj.segments:
                left = ", ".join(f"{size} bytes: {why}" for why, size in segment.left.items())
                lines.append(
                    f"{obj.name} {segment.start:#x}-{segment.end:#x} {segment.kind}: "
                    f"{segment.huge_bytes} of {segment.bytes} bytes huge, "
                    f"{segment.locked_bytes} locked" + (f" ({left})" if left else "")
                )
            lines += [f"{obj.name}: {note}" for note in obj.notes]
        if self.perf_map:
            lines.append(f"perf map: {self.perf_map}")
        others: dict[str, list[str]] = {}
        for obj in self.objects:
            if obj.backing is None and not obj.notes and not obj.code_huge_bytes:
                others.setdefault(", ".join(_reasons(obj)), []).append(obj.name)
        lines += [f"left alone, {why}: {', '.join(names)}" for why, names in others.items()]
        return lines


def _reasons(obj: ObjectReport) -> list[Reason]:
    """The reasons that concern code, each once."""
    return list(dict.fromkeys(why for s in obj.segments if s.kind == "code" for why in s.left))
