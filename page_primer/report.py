"""The report of a call of prime(): data first, then the lines for people, in a server's log."""

from __future__ import annotations

from page_primer._lean import Record, asdict
from page_primer._loading import Loading
from page_primer.logs import Shortfall, say
from page_primer.options import nearest_variable
from page_primer.outcome import ObjectReport, code_reasons
from page_primer.reasons import OVER_LIMIT, OVER_MEMORY, Reason, Refusal
from page_primer.words import counted, memlock_remedy, mib, percent, shortage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from page_primer.kernel.memory import Memory
    from page_primer.logs import AnyLogger
    from page_primer.outcome import HeapReport


TOTALS = (  # of all objects
    "code_bytes", "code_huge_bytes", "locked_bytes", "copied_bytes", "shared_bytes",
    "private_bytes",
)  # fmt: skip
_OF_CORE = ("path", "backing", "where", "code_bytes", "code_huge_bytes")


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
    frozen: int | None = None  # objects that were frozen, here or in a parent; None: none
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
        lines = filter(None, (self.summary(), *(s.text for s in self.shortfalls()), self.heap))
        return "\n".join([*map(str, lines), *(f"  {line}" for line in self._details())])

    def log(self, logger: AnyLogger, *, since: Report | None = None) -> None:
        """Write one INFO line, DEBUG lines with the detail, and a WARNING for each thing that was
        asked for and not got. Records have fields as well as text (docs/logging.md).

        Args:
            logger: a logging.Logger, or a framework's own with the same methods.
            since: an earlier report, of this process or of the one it was forked from. Then only
                what differs is worth a line above DEBUG.
        """
        said = {shortfall.text for shortfall in since.shortfalls()} if since else set()
        fresh = [shortfall for shortfall in self.shortfalls() if shortfall.text not in said]
        core = self.interpreter
        needed = "mlock" in self.warn or (core is not None and not core.locked_bytes)
        minor = [s for s in fresh if s.event in ("lock_shortfall", "memory_shortfall")]
        minor = [] if needed else minor  # what was tried, and was nobody's wish: no line of its own
        if self._is_news(since):
            self.log_state(logger, minor)
        elif minor:
            for shortfall in minor:
                say(logger.info, shortfall.event, shortfall.text, **shortfall.fields)
        elif since is not None and self.pid != since.pid:
            line = f"as before, {self.milliseconds:.1f} ms"
            say(logger.debug, "unchanged", line, milliseconds=self.milliseconds)
        if self.heap is not None:
            self.heap.log(logger, since.heap if since else None, named="heap" in self.warn)
        for shortfall in fresh:
            if shortfall not in minor:
                say(logger.warning, shortfall.event, shortfall.text, **shortfall.fields)

    def log_state(self, logger: AnyLogger, minor: Iterable[Shortfall] = ()) -> None:
        """Write the INFO line, with what could not be locked or moved, and the DEBUG lines
        of log() alone."""
        event, fields = "nothing_done" if self.reason else "primed", self._said()
        for shortfall in minor:
            fields |= shortfall.fields
        line = "; ".join([self.summary(), *(shortfall.text for shortfall in minor)])
        say(logger.info, event, line, **fields)
        for line in self._details():
            say(logger.debug, "detail", line)

    def shortfalls(self) -> tuple[Shortfall, ...]:
        """What was asked for, or possible, and not obtained."""
        parts = (
            self._lock_shortfall(), self._memory_shortfall(), self._huge_shortfall(),
            self._replaced(), self._misspelt(),
        )  # fmt: skip
        return tuple(part for part in parts if part is not None)

    def _said(self) -> dict[str, Any]:
        """What the INFO line says, for programs."""
        if self.reason is not None:
            return {"reason": str(self.reason), "detail": self.detail}
        core = self.interpreter
        of_core = {name: getattr(core, name) if core else None for name in _OF_CORE}
        return {
            **{f"interpreter_{name}": value for name, value in of_core.items()},
            **{name: getattr(self, name) for name in (*TOTALS, "resident_bytes")},
            "objects": len(self.objects),
            "milliseconds": self.milliseconds,
        }

    def _is_news(self, since: Report | None) -> bool:
        """Whether the summary is worth a line, after that of an earlier report."""
        return (
            since is None
            or bool(self.moved)
            or self.reason != since.reason
            or self._left_out(OVER_LIMIT) != since._left_out(OVER_LIMIT)
        )

    def summary(self) -> str:
        """The line that log() writes at INFO."""
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
            stores = dict.fromkeys(o.store for o in self.objects if o.store)
            if len(stores) > 1:  # root's, and this user's
                parts[-1] += f", images in {' and '.join(stores)}"
        written = sum(obj.written_bytes for obj in self.objects if obj.path in self.moved)
        if self.frozen is not None:
            parts.append(f"{counted(self.frozen, 'object')} frozen")
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
            if obj.backing is None and reason in code_reasons(obj)
        ]

    def _lock_shortfall(self) -> Shortfall | None:
        if not self.lock_refused_bytes:
            return None
        text = (
            f"{mib(self.lock_refused_bytes)} of {mib(self.lock_wanted_bytes)} not locked "
            f"({self.lock_refusal})"
        )
        if self.lock_limit is not None:
            text += (
                f": RLIMIT_MEMLOCK is {mib(self.lock_limit)}; "
                f"allow it with {memlock_remedy(self.lock_wanted_bytes)}"
            )
        names = ("lock_wanted_bytes", "lock_refused_bytes", "lock_refusal", "lock_limit")
        return Shortfall("lock_shortfall", text, {name: getattr(self, name) for name in names})

    def _memory_shortfall(self) -> Shortfall | None:
        """What was not done, to leave memory to others."""
        unmoved = self._left_out(OVER_MEMORY)
        if self.memory is None or not (unmoved or self.lock_withheld_bytes):
            return None
        parts = [f"not moved: {', '.join(unmoved)}"] if unmoved else []
        if self.lock_withheld_bytes:
            parts.append(
                f"{mib(self.lock_withheld_bytes)} of {mib(self.lock_wanted_bytes)} not locked"
            )
        text = (
            f"to leave memory to others, {' and '.join(parts)}: {shortage(self.memory)}, of which "
            f"page-primer takes {100 * (self.memory_share or 0):g} % at most; "
            "raise that limit, or PAGE_PRIMER_MEMORY_SHARE"
        )
        return Shortfall("memory_shortfall", text, {
            "lock_withheld_bytes": self.lock_withheld_bytes, "memory_share": self.memory_share,
            "available_bytes": self.memory.available, "limit_bytes": self.memory.limit,
        })  # fmt: skip

    def _huge_shortfall(self) -> Shortfall | None:
        """What was asked for by name and not used, or the interpreter's layout would allow."""
        core = self.interpreter
        if self.reason or core is None or OVER_MEMORY in code_reasons(core):
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
        why = "; ".join((*core.notes, *code_reasons(core))) or "no reason known"
        remedy = "run `page-primer align` once"
        with Loading():  # not with the package: few processes have this line
            from page_primer.images.trust import BUILD
            from page_primer.kernel import credentials
        who = credentials.read()
        if core.attainable_bytes and who.user in who.trusted:
            remedy += (
                ", or name a directory of this user on ext4 (Linux 6.16) or xfs with "
                "PAGE_PRIMER_IMAGE_DIR"
            )
        elif core.attainable_bytes:
            remedy += f", or `{BUILD}` as root"
        text = f"{problem} ({why}): {remedy}; `page-primer doctor` explains"
        return Shortfall("huge_shortfall", text, {
            "code_bytes": core.code_bytes, "code_huge_bytes": core.code_huge_bytes,
            "attainable_bytes": core.attainable_bytes, "why": why,
        })  # fmt: skip

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

    def _replaced(self) -> Shortfall | None:
        """The files that were aligned once."""
        names = [obj.name for obj in self.objects if obj.no_longer_aligned]
        if not names:
            return None
        text = (
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} no longer aligned (replaced "
            "by an upgrade?); run `page-primer align --again`"
        )
        return Shortfall("no_longer_aligned", text, {"files": names})

    def _misspelt(self) -> Shortfall | None:
        """The variables that nothing reads, with those that may have been meant."""
        if not self.unknown_variables:
            return None
        nearest = [(name, nearest_variable(name)) for name in self.unknown_variables]
        words = [f"{name} (did you mean {near}?)" if near else name for name, near in nearest]
        text = f"unknown environment variable{'s' * (len(words) > 1)} {', '.join(words)}"
        return Shortfall("unknown_variables", text, {"variables": list(self.unknown_variables)})

    def _details(self) -> list[str]:
        lines = []
        for obj in self.objects:
            if obj.backing is None and not obj.notes and not obj.code_huge_bytes:
                continue
            lines.append(
                f"{obj.path}: {percent(obj.code_huge_bytes, obj.code_bytes)} of "
                f"{mib(obj.code_bytes)} of code on huge pages, {mib(obj.locked_bytes)} locked"
                + (f", {obj.whereabouts}" if obj.backing else "")
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
                others.setdefault(", ".join(code_reasons(obj)), []).append(obj.name)
        for why, names in others.items():  # without a reason: nobody asked, as after restore()
            lines.append(f"left alone{f', {why}' if why else ''}: {', '.join(names)}")
        return lines
